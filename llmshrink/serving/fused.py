"""The layers that vLLM makes of several linears, and the one rule for them: all parts are stored alike, or none is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from llmshrink.errors import CheckpointError

S = TypeVar("S")


def one_scheme(schemes: Mapping[str, S], layer: str, members: Callable[[str], Sequence[str] | None]) -> S | None:
    """The scheme of a layer of vLLM's, by its full name; None where it is dense.

    schemes: of the linears that are compressed, by module path. members: the last part of a fused layer's name
    (`qkv_proj`) -> those of the linears that it is made of; None for a layer that is one linear. Raises CheckpointError
    when parts differ: vLLM would read one's tensors as the other's.
    """
    parent, _, leaf = layer.rpartition(".")
    parts = [layer] if layer in schemes else [f"{parent}.{member}" for member in members(leaf) or [leaf]]
    found = {part: schemes.get(part) for part in parts}
    if len(set(found.values())) > 1:
        listed = ", ".join(f"{part.rpartition('.')[2]}: {scheme or 'not compressed'}" for part, scheme in found.items())
        raise CheckpointError(
            f"{layer} is one layer in vLLM, but its parts are stored differently ({listed}); compress them alike"
        )
    return next(iter(found.values()))
