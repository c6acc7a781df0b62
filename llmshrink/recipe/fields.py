"""What the fields of a recipe's steps may be: their types, and checks that more than one step has."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints
from pydantic_core import PydanticCustomError

from llmshrink.limits import MOST_GROUP

BITS = (2, 3, 4, 8)
BITSANDBYTES = ("bnb-int8", "bnb-nf4", "bnb-nf4-double")
"""Methods that are bitsandbytes' own; what they make is stored as that library stores it."""
BUILT_IN = (*BITSANDBYTES, "gptq", "rtn")
"""Methods accepted without a look into the registry, whose import brings torch; a test checks they are there."""
PRUNERS = ("alps", "magnitude", "sparsegpt", "wanda")
"""The same of the ways to prune."""

Activations = Literal["none", "int8", "fp8"]
KvCache = Literal["none", "fp8"]
ScaleSearch = Literal["minmax", "mse", "hessian", "trial"]
Importance = Literal["activations", "magnitude"]
DropBy = Literal["angular", "loss"]
Ratios = Literal["uniform", "by-error"]
Divergence = Literal["forward_kl", "reverse_kl", "jsd"]
Train = Literal["weights", "scales"]
Text = Annotated[str, StringConstraints(min_length=1)]


def _strength(value: object) -> object:
    number = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1
    if value is None or value == "none":
        return value
    if number:
        return float(value)  # type: ignore[arg-type]
    raise PydanticCustomError("smooth", "isn't none or a number from 0 to 1")


Strength = Annotated[Annotated[float, Field(ge=0.0, le=1.0)] | Literal["none"], BeforeValidator(_strength)]


class Frozen(BaseModel):
    """Values of the types that are written, and no other key."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


def known_bits(bits: int | None) -> int | None:
    """The same, or a fault: bits that a kernel of some engine has."""
    if bits is not None and bits not in BITS:
        raise PydanticCustomError("bits", "isn't one of 2, 3, 4, 8")
    return bits


def known_group(group_size: int | None) -> int | None:
    """The same, or a fault."""
    if group_size is not None and group_size != -1 and group_size < 1:
        raise PydanticCustomError("group_size", "isn't -1 (one group a row) or a positive number of inputs")
    if group_size is not None and group_size > MOST_GROUP:
        raise PydanticCustomError("group_size", f"is more than {MOST_GROUP:,} inputs; -1 is one group a row")
    return group_size


def known_method(method: str | None) -> str | None:
    """The same, or a fault: a way to quantize that is registered."""
    if method is not None and method not in BUILT_IN and method not in methods():
        raise PydanticCustomError("method", "unknown method")
    return method


def methods() -> tuple[str, ...]:
    """Every method that is registered."""
    from llmshrink.methods import names

    return names()


def pruners() -> tuple[str, ...]:
    """Every way to prune that is registered."""
    from llmshrink.methods.pruning import names

    return names()


def known_pruner(method: str | None) -> str | None:
    """The same, or a fault: a way to prune that is registered."""
    if method is not None and method not in PRUNERS and method not in pruners():
        raise PydanticCustomError("pruner", "unknown way to prune")
    return method


def known_pattern(pattern: str | None) -> str | None:
    """The same, or a fault: n:m, as `2:4`."""
    if pattern is None:
        return None
    keep, of, block = pattern.partition(":")
    if not (of and keep.isdecimal() and block.isdecimal() and 0 < int(keep) < int(block)):
        raise PydanticCustomError("pattern", 'isn\'t n:m with 0 < n < m, as "2:4"')
    return pattern


def _amount(value: object) -> object:
    """A number of things (a whole number), or a share of them (a number with a point)."""
    number = isinstance(value, int) and not isinstance(value, bool) and value >= 1
    if value is None or number or (isinstance(value, float) and 0 < value < 1):
        return value
    raise PydanticCustomError(
        "amount", "isn't a whole number of at least 1, or a share between 0 and 1 (with a point, as 0.25)"
    )


Amount = Annotated[int | float, BeforeValidator(_amount)]
