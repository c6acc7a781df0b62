"""What pydantic found wrong, in one line a person can act on: where, the value, the limit, the nearest right word."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from llmshrink.recipe.fields import methods, pruners
from llmshrink.recipe.schema import Override, Recipe
from llmshrink.recipe.steps import Depth, Distill, Prune, PrunePatch, Quantize, QuantizePatch, Step, Width

_KNOWN_KEYS: dict[str, tuple[str, ...]] = {
    "": tuple(Recipe.model_fields),
    "steps": tuple(Step.model_fields),
    "quantize": tuple(Quantize.model_fields),
    "prune": tuple(Prune.model_fields),
    "depth": tuple(Depth.model_fields),
    "width": tuple(Width.model_fields),
    "distill": tuple(Distill.model_fields),
    "overrides": tuple(Override.model_fields),
}
assert tuple(Quantize.model_fields) == tuple(QuantizePatch.model_fields)
assert tuple(Prune.model_fields) == tuple(PrunePatch.model_fields)

_WANTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "text",
    "tuple_type": "a list",
    "model_type": "a mapping",
    "model_attributes_type": "a mapping",
    "string_too_short": "some text",
}


def describe(fault: Mapping[str, Any], label: str, origins: Mapping[str, str]) -> str:
    """One line for one of pydantic's errors.

    label: the file or shipped name. origins: path -> the flag that set it, which is named instead of the file.
    """
    path = joined(fault["loc"])
    origin = _origin(path, origins)
    where = f"{origin}: {path}" if origin else f"{label}: {path}" if path else label
    kind, value = fault["type"], fault.get("input")
    if kind == "extra_forbidden":
        known = _KNOWN_KEYS[next((str(p) for p in reversed(fault["loc"][:-1]) if isinstance(p, str)), "")]
        hint = nearest(_cut(fault["loc"][-1]), known)
        return f"{where}: unknown key{hint or '; known: ' + ', '.join(known)}"
    if kind == "missing":
        return f"{where}: missing{'; for example steps: [{quantize: {bits: 4}}]' if path == 'steps' else ''}"
    said = _cut(value)
    if kind == "method":
        return f"{where}: {said}: unknown method{nearest(said, methods())}; methods: {', '.join(methods())}"
    if kind == "pruner":
        return f"{where}: {said}: unknown way to prune{nearest(said, pruners())}; ways: {', '.join(pruners())}"
    if kind == "string_type" and path.endswith("pattern"):
        return f'{where}: {said} isn\'t text: write the pattern with quotes, as "2:4"'
    if kind == "literal_error":
        known = tuple(re.findall(r"'([^']*)'", fault["ctx"]["expected"]))
        return f"{where}: {_shown(value)} isn't one of {', '.join(known)}{nearest(said, known)}"
    if kind in _WANTED:
        return f"{where}: {_shown(value)} isn't {_WANTED[kind]}{_number_hint(kind, value)}"
    if kind in ("bits", "group_size", "pattern", "amount", "smooth"):
        return f"{where}: {said} {fault['msg']}"
    if isinstance(value, int | float | str):
        return f"{where}: {_shown(value)}: {_lower(fault['msg']).replace('input ', '')}"
    return f"{where}: {_lower(fault['msg'])}"


def joined(parts: Sequence[str | int]) -> str:
    """("steps", 0, "quantize") -> "steps[0].quantize"."""
    text = ""
    for part in parts:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def nearest(name: str, known: Iterable[str]) -> str:
    """ "; did you mean X?" with the known name most like `name`, or nothing."""
    found = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {found[0]}?" if found else ""


def _origin(path: str, origins: Mapping[str, str]) -> str | None:
    """What set `path`, or a part of the document that it lies in; the last to do so wins."""
    for place, origin in reversed(list(origins.items())):
        if path == place or path.startswith((place + ".", place + "[")):
            return origin
    return None


def _shown(value: object) -> str:
    text = _cut(value)
    return text.lower() if isinstance(value, bool) else repr(text) if isinstance(value, str) else text


def _cut(value: object) -> str:
    """A value as it is written, of a long one the beginning."""
    text = str(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


def _number_hint(kind: str, value: object) -> str:
    if kind not in ("int_type", "float_type") or not isinstance(value, str):
        return ""
    try:
        number = float(value)
    except ValueError:
        return ""
    if not math.isfinite(number):
        return "; write a finite one" if kind == "float_type" else ""
    if kind == "float_type":
        return f"; without quotes and with a decimal point, as {number:g}"
    return f"; write {number:g}" if number.is_integer() else ""


def _lower(message: str) -> str:
    return message[:1].lower() + message[1:]
