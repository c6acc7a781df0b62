"""From a shipped name, a file, flags and `--set` to one validated, frozen recipe, or to all that is wrong with it.

The YAML is read by the safe loader, with duplicate keys refused (YAML would keep the last in silence). Flags and
`--set` change the parsed document before it is validated, so that a value is judged by the same rules wherever it
comes from, and a fault says where that was.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml
from llmshrink_eval.bounded import YAML_LIMIT, Unreadable, parse_yaml, shown
from llmshrink_eval.refused import refused

from llmshrink.errors import RecipeError
from llmshrink.paths import expanded
from llmshrink.recipe.faults import describe, joined, nearest
from llmshrink.recipe.schema import Recipe
from llmshrink.recipe.steps import switch_method

_SHOWN_FAULTS = 20
_FLAGS = {
    "method": "--method",
    "bits": "--bits",
    "group_size": "--group-size",
    "symmetric": "--symmetric/--asymmetric",
    "repair": "--repair/--no-repair",
    "kv_cache": "--kv-cache",
}
_KINDS = {"repair": ("prune", "width")}
"""The kinds of step that have a flag's field; of the others it is `quantize`."""
_OF_THE_RECIPE = ("kv_cache",)
"""Flags of fields that are no step's."""


def load_recipe(
    name_or_path: str | os.PathLike[str], *, flags: Mapping[str, object] | None = None, sets: Sequence[str] = ()
) -> Recipe:
    """Read a recipe by its shipped name or from a YAML file, changed by `flags` and then by `sets`.

    flags: any of method, bits, group_size, symmetric (of the quantize step), repair (of the prune or width step),
    kv_cache; None means not given. A change of method drops the fields that only the old method reads. sets:
    `steps.0.quantize.bits=3`, the value a YAML scalar or flow list. What they change is added to the recipe's name and
    summary, which would not be true without it.
    Raises RecipeError with one line for each fault.
    """
    label, text = _find(os.fspath(name_or_path))
    document = _parse(label, text)
    unchanged = copy.deepcopy(document)
    flags = {name: value for name, value in (flags or {}).items() if value is not None}
    origins: dict[str, str] = {}
    faults = _apply_flags(document, flags, origins, label)
    for assignment in sets:
        faults += _apply_set(document, assignment, origins)
    recipe, found = _validate(document, label, origins)
    faults += found
    if len(faults) > _SHOWN_FAULTS:
        faults = [*faults[:_SHOWN_FAULTS], f"{label}: and {len(faults) - _SHOWN_FAULTS:,} more such faults"]
    if recipe is None or faults:
        raise RecipeError(faults)
    if recipe == _validate(unchanged, label, {})[0]:
        return recipe
    return _named_with(recipe, [*(f"{name}={_scalar(value)}" for name, value in flags.items()), *sets])


def shipped() -> dict[str, Recipe]:
    """The recipes that come with llmshrink, by name, sorted; those that can't be read are in `unreadable`."""
    return _all_shipped()[0]


def unreadable() -> dict[str, str]:
    """Shipped recipes that can't be read here, by name, sorted, and why: one of them stops no other."""
    return _all_shipped()[1]


def _all_shipped() -> tuple[dict[str, Recipe], dict[str, str]]:
    found: dict[str, Recipe] = {}
    faults: dict[str, str] = {}
    for name in shipped_names():
        try:
            found[name] = load_recipe(name)
        except RecipeError as error:
            faults[name] = "; ".join(str(error).splitlines())
    return found, faults


def made_for(name_or_path: str, recipe: Recipe) -> str | None:
    """The shipped recipe whose other settings were measured at the bits that flags gave `recipe`, if it is another one.

    name_or_path: what `recipe` was made from.
    """
    recipes = shipped()
    asked = recipes.get(name_or_path)
    kinds = {name: _kind(each) for name, each in recipes.items()}
    if asked is None or [bits for _, bits, _ in kinds[name_or_path]] == [bits for _, bits, _ in _kind(recipe)]:
        return None
    return next((name for name, kind in kinds.items() if kind == _kind(recipe)), None)


def _kind(recipe: Recipe) -> list[tuple[str, int, bool]]:
    steps = [step.quantize for step in recipe.steps if step.quantize is not None]
    return [(step.method, step.bits, step.symmetric) for step in steps]


def shipped_names() -> list[str]:
    """The shipped recipes' names, sorted."""
    return sorted(file.stem for file in _folder().glob("*.yaml"))


def _folder() -> Path:
    """The data package's folder, found without importing it: that would hide the verb `llmshrink.recipes()`."""
    spec = find_spec("llmshrink.recipes")
    assert spec is not None, "the recipes are part of the installation"
    assert spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0])


def to_yaml(recipe: Recipe) -> str:
    """The recipe as YAML that `load_recipe` reads back to an equal one, every default written out."""
    document = recipe.model_dump(mode="json", exclude_none=True)
    for override in document["overrides"]:
        if not override["ignore"]:
            del override["ignore"]
    return yaml.safe_dump(document, sort_keys=False, allow_unicode=True, width=120)


def recipe_hash(recipe: Recipe) -> str:
    """sha256 (hex) of what the resolved recipe does; neither its name nor how it was written counts."""
    document = recipe.model_dump(mode="json", exclude={"name", "summary"})
    canonical = json.dumps(document, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def _find(name: str) -> tuple[str, str]:
    """The name that faults are reported under, and the YAML."""
    names = shipped_names()
    if name in names:
        return name, (_folder() / f"{name}.yaml").read_text("utf-8")
    path = expanded(name)
    if not path.is_file():
        if name.endswith((".yaml", ".yml")) or os.sep in name or path.exists():
            raise RecipeError([f"{name}: no such file; shipped recipes: {', '.join(names)}"])
        raise RecipeError(
            [f"{name}: unknown recipe{nearest(name, names)}; shipped: {', '.join(names)}, or a YAML file"]
        )
    try:
        if path.stat().st_size > YAML_LIMIT:
            raise RecipeError([f"{name}: over {YAML_LIMIT:,} bytes: not a recipe"])
        return name, path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        way = "name a YAML file"
        reason = refused(error, way) if isinstance(error, OSError) else f"not UTF-8 text; {way}"
        raise RecipeError([f"{name}: can't be read: {reason}"]) from error


class _UniqueKeys(yaml.SafeLoader):
    """The safe loader, with a key that is written twice in one mapping refused."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(None, None, f"{key.value} is given twice", key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def _load(text: str) -> Any:
    return parse_yaml(text, _UniqueKeys)


def _parse(label: str, text: str) -> dict[str, Any]:
    try:
        document = _load(text)
    except Unreadable as error:
        raise RecipeError([f"{label}: {error}"]) from error
    if not isinstance(document, dict):
        raise RecipeError([f"{label}: not a recipe: a mapping with name, steps, ignore, overrides is wanted"])
    return {str(key): value for key, value in document.items()}


def _apply_flags(
    document: dict[str, Any], given: Mapping[str, object], origins: dict[str, str], label: str
) -> list[str]:
    """Put each given flag into the one step that has such a field."""
    assert given.keys() <= _FLAGS.keys(), given
    steps = document.get("steps")
    found = [step for step in (steps if isinstance(steps, list) else []) if isinstance(step, dict)]
    if len(found) != len(steps if isinstance(steps, list) else [None]):
        return []  # what is wrong with the steps is said by their validation
    faults = []
    for name, value in given.items():
        if name in _OF_THE_RECIPE:
            document[name] = value
            origins[name] = _FLAGS[name]
            continue
        kinds = _KINDS.get(name, ("quantize",))
        kind = next((kind for kind in kinds if any(kind in step for step in found)), " or ".join(kinds))
        places = [number for number, step in enumerate(found) if isinstance(step.get(kind), dict)]
        if not places:
            if not any(kind in step for step in found):
                faults.append(f"{_FLAGS[name]}: changes a {kind} step, and {label} has none; name another recipe")
        elif len(places) > 1:
            could = " or ".join(f"steps[{number}].{kind}" for number in places)
            faults.append(
                f"{_FLAGS[name]}: could mean {could} of {label}; say which: "
                f"--set steps.{places[0]}.{kind}.{name}={_scalar(value)}"
            )
        else:
            step = found[places[0]]
            base = switch_method(step[kind], value) if name == "method" else step[kind]
            step[kind] = {**base, name: value}
            origins[f"steps[{places[0]}].{kind}.{name}"] = _FLAGS[name]
    return faults


def _apply_set(document: dict[str, Any], assignment: str, origins: dict[str, str]) -> list[str]:
    """Carry out one `path=value`; returns the faults."""
    said = f"--set {' '.join(assignment.split()):.200}"
    path, equals, text = assignment.partition("=")
    parts = [part for part in re.split(r"[.\[\]]+", path.strip()) if part]
    if not equals or not parts:
        return [f"{said}: not a path=value; for example steps.0.quantize.bits=3"]
    try:
        value = _load(text)
    except Unreadable as error:
        return [f"{said}: {shown(text)} isn't a YAML value ({error}); for example steps.0.quantize.bits=3"]
    here: Any = document
    for depth, part in enumerate(parts):
        last = depth == len(parts) - 1
        at = joined(_typed(parts[: depth + 1]))
        if isinstance(here, list):
            number = _typed([part])[0]
            if not isinstance(number, int) or number >= len(here):
                have = f"0 to {len(here) - 1}" if len(here) > 1 else "0 alone" if here else "none, it is empty"
                of = joined(_typed(parts[:depth]))
                return [f"{said}: {of} has no item {part:.60} (it has {have}); add it in a recipe file of your own"]
            key: Any = number
        elif isinstance(here, dict):
            key = part
        else:
            return [f"{said}: {joined(_typed(parts[:depth]))} is a value, so there is no {at}"]
        if last:
            here[key] = value
        elif isinstance(here, dict) and here.get(key) is None:
            here[key] = {}
        here = here[key]
    origins[joined(_typed(parts))] = said
    return []


def _named_with(recipe: Recipe, changes: Sequence[str]) -> Recipe:
    """`recipe` with its changes in its name and summary, unless the user gave these himself."""
    own = {change.partition("=")[0] for change in changes} & {"name", "summary"}
    said = ", ".join(change for change in changes if change.partition("=")[0] not in own)
    renamed = {"name": f"{recipe.name} with {said}", "summary": f"{recipe.summary}; with {said}".removeprefix("; ")}
    return recipe.model_copy(update={name: text for name, text in renamed.items() if said and name not in own})


def _typed(parts: Iterable[str]) -> list[str | int]:
    return [int(part) if part.isdecimal() and len(part) < 10 else part for part in parts]


def _scalar(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _validate(document: dict[str, Any], label: str, origins: Mapping[str, str]) -> tuple[Recipe | None, list[str]]:
    from pydantic import ValidationError

    try:
        return Recipe.model_validate(document), []
    except ValidationError as error:
        found = error.errors(include_url=False)
        # A key that is misspelt is one mistake, not also one that is missing.
        misspelt = {fault["loc"][:-1] for fault in found if fault["type"] == "extra_forbidden"}
        return None, [
            describe(fault, label, origins)
            for fault in found
            if fault["type"] != "missing" or fault["loc"][:-1] not in misspelt
        ]
