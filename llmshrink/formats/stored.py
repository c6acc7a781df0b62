"""How the linears of one checkpoint lie on disk: the one place that knows of more than one format.

Who reads or writes a checkpoint asks here, and gets the module that its scheme belongs to. A scheme of None is a linear
that is stored as plain `name.weight`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Literal

import torch
from torch import Tensor

from llmshrink.formats import compressed_tensors, sparse24
from llmshrink.formats.compressed_tensors import GroupedIntScheme
from llmshrink.formats.sparse24 import Sparse24Scheme
from llmshrink.weights import Dense, GroupedInt, Sparse24

Format = Literal["compressed-tensors", "llmshrink"]
FORMATS: tuple[Format, ...] = ("compressed-tensors", "llmshrink")
Scheme = GroupedIntScheme | Sparse24Scheme
Weight = Dense | GroupedInt | Sparse24
Layout = dict[str, tuple[torch.dtype, tuple[int, ...]]]
"""Key -> dtype and shape of a checkpoint's tensors."""


def as_stored(weight: Dense | GroupedInt, scheme: Scheme | None) -> Weight:
    """The form in which `scheme` stores a weight. Raises ValueError, naming the place, where it has to be 2:4."""
    return Sparse24.of(weight) if isinstance(scheme, Sparse24Scheme) else weight


def whole(weight: Weight) -> Dense | GroupedInt:
    """The inverse: the weight with its zeros."""
    return weight.whole() if isinstance(weight, Sparse24) else weight


def tensors(name: str, weight: Weight) -> dict[str, Tensor]:
    """The checkpoint's tensors of the linear `name` (a module path, without `.weight`)."""
    if isinstance(weight, Sparse24):
        return sparse24.tensors(name, weight)
    if isinstance(weight, GroupedInt):
        return compressed_tensors.tensors(name, weight)
    return {f"{name}.weight": weight.weight}


def names(name: str, scheme: Scheme | None) -> list[str]:
    """The keys that `tensors` writes for the linear `name`."""
    if isinstance(scheme, Sparse24Scheme):
        return sparse24.names(name, scheme)
    return [f"{name}.weight"] if scheme is None else compressed_tensors.names(name, symmetric=scheme.symmetric)


def layout(name: str, scheme: Scheme | None, shape: tuple[int, int], dtype: torch.dtype) -> Layout:
    """Key -> (dtype, shape) of what `tensors` gives. shape: (out_features, in_features).

    dtype: of a dense weight, of 2:4's values of 16 bits, or of a scale.
    """
    if isinstance(scheme, Sparse24Scheme):
        return sparse24.layout(name, scheme, shape, dtype)
    return (
        {f"{name}.weight": (dtype, shape)} if scheme is None else compressed_tensors.layout(name, scheme, shape, dtype)
    )


def nbytes(layout: Layout) -> int:
    """Bytes of all tensors of a layout."""
    return sum(math.prod(shape) * dtype.itemsize for dtype, shape in layout.values())


def read(name: str, get: Callable[[str], Tensor], scheme: Scheme | None) -> Weight:
    """The linear `name`, from its checkpoint tensors. get: key -> tensor. Raises CheckpointError for a damaged one."""
    if isinstance(scheme, Sparse24Scheme):
        return sparse24.read(name, get, scheme)
    return Dense(get(f"{name}.weight")) if scheme is None else compressed_tensors.read(name, get, scheme)


def quantization_config(
    sites: Mapping[str, Scheme | None], ignore: Iterable[str], format: Format
) -> dict[str, object] | None:
    """The `quantization_config` of config.json; None for a model that is stored as a plain one.

    sites: module path of every linear inside the blocks -> its scheme. ignore: further linears that stay as they are.
    """
    if not any(sites.values()):
        return None
    if format == "llmshrink":
        sparse = {name: scheme for name, scheme in sites.items() if not isinstance(scheme, GroupedIntScheme)}
        assert len(sparse) == len(sites), "one checkpoint has one format"
        return sparse24.quantization_config(sparse, ignore)
    grouped = {name: scheme for name, scheme in sites.items() if not isinstance(scheme, Sparse24Scheme)}
    assert len(grouped) == len(sites), "one checkpoint has one format"
    return compressed_tensors.quantization_config(grouped, ignore)


def schemes(config: Mapping[str, object] | None) -> Mapping[str, Scheme]:
    """Module path -> scheme, from the `quantization_config` of a checkpoint that llmshrink wrote; none, none.

    Raises CheckpointError for a format that can't be read here.
    """
    if not config:
        return {}
    if config.get("quant_method") == sparse24.METHOD:
        return sparse24.schemes(config)
    return compressed_tensors.schemes(config)
