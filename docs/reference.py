"""Writes docs/recipes.md from the recipes' own models: what a recipe may say, its defaults and limits, what is shipped.

    python docs/reference.py            writes the page
    python docs/reference.py --check    exits with 1 when the page isn't what would be written

What a field means is the line that its class's docstring has for it; everything else comes from the JSON schema.
"""

from __future__ import annotations

import inspect
import re
import sys
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from llmshrink.recipe import schema, steps
from llmshrink.recipe.read import shipped

PAGE = Path(__file__).with_name("recipes.md")
HEAD = """\
# Recipes

*Written by `python docs/reference.py` from the models in `llmshrink/recipe/`: change those, and run it again.*

A recipe says what happens to a model's weights. `--recipe` takes the name of a shipped one or a YAML file:

```yaml
name: mine
summary: 4-bit weights in groups of 64, 8-bit where it hurts most
steps:
  - quantize: {method: gptq, bits: 4, group_size: 64}
ignore: [lm_head]
overrides:
  - {match: "*.mlp.down_proj", quantize: {bits: 8}}
```

`llmshrink recipes show NAME` prints a recipe with every field, which can be saved, changed and given to `--recipe`.
Common fields have flags (`llmshrink quantize --help`), and any field can be set, as `--set steps.0.quantize.bits=3`. A
key that isn't known is refused with the nearest one that is; all faults of a file are said at once.
"""
TOP = {
    "name": "What the recipe is called.",
    "summary": "One line on what it does, for `llmshrink recipes`.",
    "steps": "What is done, in this order; each step is one of those below.",
    "ignore": "Modules that stay as they are, by name or pattern.",
    "overrides": "Where something else is done; a later one wins over an earlier one.",
    "kv_cache": "What keys and values are cached in where the result is served: `fp8`, by scales that the run finds, or"
    " `none`: as the engine likes.",
}
ALLOWED = (
    "A recipe has one of these lists of steps, and may have `distill` as one more at the end"
    " (or `distill` alone, for `llmshrink distill`):"
)
OVERRIDE = {
    "match": "Which modules: a full name (`model.layers.0.mlp.down_proj`), a pattern with `*`, `?`, `[...]`,"
    " or a last part (`down_proj`); several with a bar between them: recipes say `down_proj|fc2|c_proj`, as OPT and"
    " StarCoder call it.",
    "quantize": "Fields of the quantize step that differ there.",
    "prune": "Fields of the prune step that differ there.",
    "ignore": "`true`: these modules stay as they are.",
}
LIMITS = {"minimum": "from {}", "exclusiveMinimum": "above {}", "maximum": "to {}", "exclusiveMaximum": "below {}"}


def page() -> str:
    """The whole page."""
    parts = [HEAD, "\n## A recipe's keys\n\n", _table(schema.Recipe, TOP), f"\n{ALLOWED}\n\n"]
    parts += [f"- {', then '.join(f'`{kind}`' for kind in kinds)}\n" for kinds in schema.WORKS]
    for kind in steps.Step.model_fields:
        model = getattr(steps, kind.capitalize())
        parts += [f"\n## `{kind}`\n\n", f"{_summary(model)}\n\n", _table(model, _meanings(model))]
    parts += ["\n## `overrides`\n\n", f"{_summary(schema.Override)}\n\n", _table(schema.Override, OVERRIDE)]
    parts += ["\n## Shipped\n\n", "| recipe | steps | what it does |\n|---|---|---|\n"]
    for name, recipe in shipped().items():
        kinds = ", ".join(kind for step in recipe.steps for kind in step.kinds)
        parts.append(f"| `{name}` | {kinds} | {_cell(recipe.summary)} |\n")
    return "".join(parts)


def _table(model: type[BaseModel], meanings: dict[str, str]) -> str:
    """A row for each field. Raises KeyError for a field without a meaning."""
    properties = model.model_json_schema(mode="serialization")["properties"]
    rows = ["| key | is | default | means |\n", "|---|---|---|---|\n"]
    for name, field in model.model_fields.items():
        default = "required" if field.is_required() else _value(field.default)
        rows.append(f"| `{name}` | {_kind(properties[name])} | {default} | {_cell(meanings[name])} |\n")
    return "".join(rows)


def _kind(said: dict[str, Any]) -> str:
    """A type of the JSON schema, in words, with its limits."""
    if "anyOf" in said:
        return " or ".join(dict.fromkeys(_kind(each) for each in said["anyOf"] if each.get("type") != "null"))
    if "const" in said:
        return f"`{said['const']}`"
    if "enum" in said:
        return ", ".join(f"`{value}`" for value in said["enum"])
    if "$ref" in said or said.get("type") == "object":
        return "a mapping"
    if said["type"] == "array":
        return "a list"
    names = {"string": "text", "integer": "a whole number", "number": "a number", "boolean": "`true`, `false`"}
    bounds = [words.format(f"{said[key]:g}") for key, words in LIMITS.items() if key in said]
    return " ".join([names[said["type"]], *bounds])


def _value(default: object) -> str:
    if default is None:
        return ""
    if isinstance(default, bool):
        return f"`{str(default).lower()}`"
    if isinstance(default, tuple):
        return f"`[{', '.join(map(str, default))}]`"
    return f"`{default}`" if default != "" else ""


def _summary(model: type[BaseModel]) -> str:
    text = inspect.getdoc(model) or ""
    return " ".join(text.partition("\n\n")[0].split())


def _meanings(model: type[BaseModel]) -> dict[str, str]:
    """Field -> what its class's docstring says of it. Two on one line share the line: `lr: ... scale_lr: ...`."""
    text = " ".join((inspect.getdoc(model) or "").partition("\n\n")[2].split())
    name = f"(?:{'|'.join(model.model_fields)})"
    some = f"({name}(?:, {name})*): "
    # What stands before the first, then by turns names and what is said of them.
    _, *pairs = re.split(rf"(?:^|(?<=[.;] )){some}", text)
    return {
        one: said.strip().rstrip(".;")
        for names, said in zip(pairs[::2], pairs[1::2], strict=True)
        for one in names.split(", ")
    }


def _cell(text: str) -> str:
    linked = text.replace("(docs/distillation.md)", "([its page](distillation.md))")
    linked = linked.replace("|", "\\|")
    return linked[:1].upper() + linked[1:]


def main() -> int:
    """Write the page, or say whether it is current."""
    text = page()
    if "--check" not in sys.argv[1:]:
        PAGE.write_text(text, encoding="utf-8")
        return 0
    if PAGE.is_file() and PAGE.read_text(encoding="utf-8") == text:
        return 0
    print(f"{PAGE} isn't current: python docs/reference.py writes it", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
