"""Conditions that decide an exit code: `recovery>=0.98,kl<=0.02`.

A condition is a name, an operator and a number. Names are `recovery`, `kl` (short for `kl_mean`), and every key of
results.Perplexity and results.Divergence that measures something; how much was read (tokens, windows, positions, ...)
is no quality to be held to. A gate has to fail closed: a value that was not measured, or is NaN, meets
no condition, and a condition that could only ever fail for want of data is refused before any model is loaded.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Literal

from llmshrink_eval.errors import EvalError
from llmshrink_eval.results import Divergence, ModelResult, Perplexity, Requirement, Results

_OPERATORS: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    "==": operator.eq,
    ">": operator.gt,
    "<": operator.lt,
}
_CONDITION = re.compile(r"(?P<name>[A-Za-z_][A-Za-z0-9_]*)\s*(?P<operator>[<>=!~≤≥]+)\s*(?P<bound>\S.*)")
_MISTAKEN = {"=>": ">=", "=<": "<=", "=": "==", "≥": ">=", "≤": "<="}

Part = Literal["perplexity", "divergence", "tasks"]


def _numeric(model: type[Perplexity] | type[Divergence]) -> tuple[str, ...]:
    numbers = (float, float | None)  # whole numbers count what was read
    return tuple(name for name, field in model.model_fields.items() if field.annotation in numbers)


_PERPLEXITY = _numeric(Perplexity)
_DIVERGENCE = _numeric(Divergence)
_COUNTS = (Perplexity.model_fields.keys() | Divergence.model_fields.keys()) & {
    "units", "tokens", "words", "bytes", "windows", "positions", "kl_units",
}  # fmt: skip
NAMES: tuple[str, ...] = ("recovery", "kl", *_PERPLEXITY, *_DIVERGENCE)


@dataclass(frozen=True)
class Condition:
    """One part of --require. text: as the user wrote it, less blanks."""

    name: str
    operator: str
    bound: float

    @property
    def text(self) -> str:
        """`kl<=0.02`, which parses to the same condition."""
        return f"{self.name}{self.operator}{self.bound:.12g}"

    @property
    def part(self) -> Part:
        """What has to be measured for it."""
        if self.name == "recovery":
            return "tasks"
        return "perplexity" if self.name in _PERPLEXITY else "divergence"

    def value(self, model: ModelResult) -> float | None:
        """The number that the condition is about; None where it was not measured."""
        if self.name == "recovery":
            return model.recovery
        holder = model.perplexity if self.part == "perplexity" else model.divergence
        found = getattr(holder, "kl_mean" if self.name == "kl" else self.name, None)
        return None if found is None else float(found)

    def met(self, value: float | None) -> bool:
        """Whether the value meets it; None and NaN never do."""
        return value is not None and not math.isnan(value) and _OPERATORS[self.operator](value, self.bound)


def parse(text: str) -> list[Condition]:
    """The conditions of `NAME OP NUMBER, ...`. Raises EvalError with every fault of the text at once."""
    conditions: list[Condition] = []
    faults: list[str] = []
    for part in text.split(","):
        read = _read(part.strip())
        if isinstance(read, str):
            faults.append(read)
        else:
            conditions.append(read)
    if faults:
        raise EvalError("--require: " + "; ".join(faults))
    return conditions


def _read(part: str) -> Condition | str:
    """A condition, or what is wrong with it."""
    if not part:
        return "an empty condition; write conditions as 'recovery>=0.98,kl<=0.02'"
    match = _CONDITION.fullmatch(part)
    if part[:1] not in "<>=≤≥" and part.endswith(tuple("<>=≤≥")):
        return f"{part!r} has no number after its operator: write one, as 'kl<=0.02'"
    if match is None:
        return f"{part!r} is no condition: write NAME, one of {' '.join(_OPERATORS)}, and a number, as 'kl<=0.02'"
    name, sign, written = match["name"], match["operator"], match["bound"]
    faults = []
    if name in _COUNTS:
        faults.append(f"{name!r} in {part!r} says how much was read, not how good: names are {', '.join(NAMES)}")
    elif name not in NAMES:
        near = get_close_matches(name, NAMES, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"names are {', '.join(NAMES)}"
        faults.append(f"unknown name {name!r} in {part!r}: {hint}")
    if sign not in _OPERATORS:
        hint = f"did you mean {_MISTAKEN[sign]!r}?" if sign in _MISTAKEN else f"operators are {' '.join(_OPERATORS)}"
        faults.append(f"unknown operator {sign!r} in {part!r}: {hint}")
    bound = _number(written)
    if bound is None:
        faults.append(f"{written!r} in {part!r} is no finite number")
    if faults or bound is None:
        return "; ".join(faults)
    return Condition(name, sign, bound)


def _number(written: str) -> float | None:
    try:
        value = float(written)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def refuse_unmeasurable(conditions: Iterable[Condition], *, text: bool, tasks: bool, baseline: bool) -> None:
    """Stop before work when a condition is about something that this evaluation won't measure.

    text: whether a text will be scored; tasks: whether tasks will be run; baseline: whether there is an original to
    compare with. Raises EvalError that names every such condition and what is missing.
    """
    faults = []
    for condition in conditions:
        compares = condition.part != "perplexity" or condition.name.startswith("excess_")
        data = ("tasks (--tasks)", tasks) if condition.part == "tasks" else ("a text (--text)", text)
        needed = (data, ("an original (--baseline)", baseline or not compares))
        missing = [what for what, there in needed if not there]
        if missing:
            faults.append(f"{condition.text!r} needs {' and '.join(missing)}")
    if faults:
        raise EvalError("--require: " + "; ".join(faults))


def check(conditions: Sequence[Condition], results: Results) -> tuple[Requirement, ...]:
    """Every condition held to every compressed model, model by model.

    Where only an original was measured it is held to them itself: a gate that checks nothing would pass everything.
    """
    held = [model for model in results.models if model.role == "compressed"] or list(results.models)
    return tuple(
        Requirement(condition=condition.text, model=model.name, value=value, passed=condition.met(value))
        for model in held
        for condition in conditions
        for value in [condition.value(model)]
    )
