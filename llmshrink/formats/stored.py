"""How the linears of one checkpoint lie on disk: the one place that knows of more than one format.

Who reads or writes a checkpoint asks here, and gets the module that its scheme belongs to. A scheme of None is a linear
that is stored as plain `name.weight`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Literal, TypeVar

import torch
from torch import Tensor

from llmshrink.errors import CheckpointError
from llmshrink.formats import bitsandbytes, compressed_tensors, eight_bit, sparse24
from llmshrink.formats.bitsandbytes import BitsAndBytesScheme
from llmshrink.formats.compressed_tensors import GroupedIntScheme
from llmshrink.formats.eight_bit import EightBitScheme
from llmshrink.formats.groups import spelled_out
from llmshrink.formats.sparse24 import Sparse24Scheme
from llmshrink.weights import Activations, Dense, EightBit, GroupedInt, NormalFloat4, RowInt8, Solvable, Sparse24

Format = Literal["compressed-tensors", "llmshrink", "bitsandbytes"]
FORMATS: tuple[Format, ...] = ("compressed-tensors", "llmshrink")
"""Those that a user may ask for by name; `bitsandbytes` is what its own methods make, and nothing else."""
Scheme = GroupedIntScheme | EightBitScheme | Sparse24Scheme | BitsAndBytesScheme
Weight = Solvable | Sparse24
S = TypeVar("S", bound=Scheme)
SCALE = ".weight_scale"
"""What each quantized linear of compressed-tensors has."""
Layout = dict[str, tuple[torch.dtype, tuple[int, ...]]]
"""Key -> dtype and shape of a checkpoint's tensors."""


def as_stored(weight: Solvable, scheme: Scheme | None) -> Weight:
    """The form in which `scheme` stores a weight. Raises ValueError, naming the place, where it has to be 2:4."""
    if isinstance(scheme, Sparse24Scheme):
        assert isinstance(weight, Dense | GroupedInt), weight
        return Sparse24.of(weight)
    if isinstance(scheme, EightBitScheme) and isinstance(weight, GroupedInt):
        return EightBit.of(weight)
    return weight


def whole(weight: Weight) -> Solvable:
    """The inverse: the weight as its method made it, with its zeros."""
    return weight.whole() if isinstance(weight, Sparse24 | EightBit) else weight


def activations_of(scheme: Scheme | None) -> Activations | None:
    """What a linear's inputs are rounded to where it is computed; None where they aren't."""
    return scheme.activations if isinstance(scheme, EightBitScheme) else None


def tensors(name: str, weight: Weight) -> dict[str, Tensor]:
    """The checkpoint's tensors of the linear `name` (a module path, without `.weight`)."""
    if isinstance(weight, Sparse24):
        return sparse24.tensors(name, weight)
    if isinstance(weight, GroupedInt):
        return compressed_tensors.tensors(name, weight)
    if isinstance(weight, EightBit):
        return eight_bit.tensors(name, weight)
    if isinstance(weight, NormalFloat4 | RowInt8):
        return bitsandbytes.tensors(name, weight)
    return {f"{name}.weight": weight.weight}


def names(name: str, scheme: Scheme | None) -> list[str]:
    """The keys that `tensors` writes for the linear `name`."""
    if isinstance(scheme, Sparse24Scheme):
        return sparse24.names(name, scheme)
    if isinstance(scheme, BitsAndBytesScheme):
        return bitsandbytes.names(name, scheme)
    if isinstance(scheme, EightBitScheme):
        return eight_bit.names(name)
    return [f"{name}.weight"] if scheme is None else compressed_tensors.names(name, symmetric=scheme.symmetric)


def layout(name: str, scheme: Scheme | None, shape: tuple[int, int], dtype: torch.dtype) -> Layout:
    """Key -> (dtype, shape) of what `tensors` gives. shape: (out_features, in_features).

    dtype: of a dense weight, of 2:4's values of 16 bits, or of a scale.
    """
    if isinstance(scheme, Sparse24Scheme):
        return sparse24.layout(name, scheme, shape, dtype)
    if isinstance(scheme, BitsAndBytesScheme):
        return bitsandbytes.layout(name, scheme, shape, dtype)
    if isinstance(scheme, EightBitScheme):
        return eight_bit.layout(name, scheme, shape, dtype)
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
    if isinstance(scheme, BitsAndBytesScheme):
        return bitsandbytes.read(name, get, scheme)
    if isinstance(scheme, EightBitScheme):
        return eight_bit.read(name, get, scheme)
    return Dense(get(f"{name}.weight")) if scheme is None else compressed_tensors.read(name, get, scheme)


def quantization_config(
    sites: Mapping[str, Scheme | None], ignore: Iterable[str], format: Format, *, kv_cache: bool = False
) -> dict[str, object] | None:
    """The `quantization_config` of config.json; None for a model that is stored as a plain one.

    sites: module path of every linear inside the blocks -> its scheme. ignore: further linears that stay as they are.
    kv_cache: whether keys and values are cached in FP8, which the standard format alone can say.
    """
    if not any(sites.values()):
        return None
    assert not kv_cache or format == "compressed-tensors", format
    if format == "llmshrink":
        return sparse24.quantization_config(_of(Sparse24Scheme, sites), ignore)
    if format == "bitsandbytes":
        return bitsandbytes.quantization_config(_of(BitsAndBytesScheme, sites), ignore)
    standard: dict[str, GroupedIntScheme | EightBitScheme | None] = {}
    for name, scheme in sites.items():
        assert scheme is None or isinstance(scheme, GroupedIntScheme | EightBitScheme), "one checkpoint has one format"
        standard[name] = scheme
    return compressed_tensors.quantization_config(standard, ignore, kv_cache=kv_cache)


def _of(kind: type[S], sites: Mapping[str, Scheme | None]) -> dict[str, S | None]:
    found: dict[str, S | None] = {
        name: scheme for name, scheme in sites.items() if scheme is None or isinstance(scheme, kind)
    }
    assert len(found) == len(sites), "one checkpoint has one format"
    return found


def schemes(config: Mapping[str, object] | None, keys: Iterable[str] | None = None) -> Mapping[str, Scheme]:
    """Module path -> scheme, from the `quantization_config` of a checkpoint; none, none.

    keys: of the checkpoint, by which alone bitsandbytes' linears are known, and those of other tools' checkpoints that
    name classes or patterns; left out where those can't be used.
    Raises CheckpointError for a format that can't be read here.
    """
    if not config:
        return {}
    if config.get("quant_method") == sparse24.METHOD:
        return sparse24.schemes(config)
    if config.get("quant_method") == bitsandbytes.METHOD:
        if keys is None:
            raise CheckpointError(
                "quantized by bitsandbytes, whose codes aren't grouped integers: this takes other checkpoints; "
                "quantize the original by another recipe"
            )
        return bitsandbytes.schemes(config, keys)
    if keys is not None:
        scaled = [key.removesuffix(SCALE) for key in keys if key.endswith(SCALE)]
        config = spelled_out(config, scaled)
    return compressed_tensors.schemes(config)
