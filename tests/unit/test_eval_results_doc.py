"""docs/results-json.md says what results.json holds: every key, of every object, with its type, and no other."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from llmshrink_eval.results import SCHEMA_VERSION, Results

PAGE = (Path(__file__).parents[2] / "docs" / "results-json.md").read_text()
SCHEMA: dict[str, Any] = Results.model_json_schema(mode="serialization")
OBJECTS: dict[str, Any] = {"Results": SCHEMA, **SCHEMA["$defs"]}


def tables() -> dict[str, dict[str, str]]:
    """Heading -> key -> type, as the page has them."""
    found = {}
    for section in re.split(r"^## ", PAGE, flags=re.MULTILINE)[1:]:
        rows = re.findall(r"^\| `(\w+)` \| (.+?) \| (.+) \|$", section, flags=re.MULTILINE)
        found[section.splitlines()[0]] = {key: kind for key, kind, _ in rows}
    return found


def written(schema: dict[str, Any]) -> str:
    """A type of the schema as the page writes it."""
    if "$ref" in schema:
        return f"*{schema['$ref'].rpartition('/')[2]}*"
    if "anyOf" in schema:
        return " or ".join(written(one) for one in schema["anyOf"])
    if "prefixItems" in schema:
        return f"[{', '.join(map(written, schema['prefixItems']))}]"
    if schema.get("type") == "array":
        return f"array of {written(schema['items'])}"
    kind: str = schema["type"]
    return kind


def test_every_object_has_its_table() -> None:
    assert tables().keys() == OBJECTS.keys()
    assert f"`schema_version` is {SCHEMA_VERSION}." in PAGE


@pytest.mark.parametrize("name", OBJECTS)
def test_every_key_is_there_with_its_type(name: str) -> None:
    expected = {key: written(each) for key, each in OBJECTS[name]["properties"].items()}
    found = tables()[name]
    assert found == expected
    assert list(found) == list(expected)
