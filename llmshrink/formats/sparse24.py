"""llmshrink's own `sparse24`: 2:4 weights without their zeros. docs/formats-sparse24.md is the format, bit by bit.

A linear called `name` with N outputs, K inputs (a multiple of four), b bits and groups of g inputs has, in place of
`name.weight`,

    name.weight_values      4 bits: uint8 [N, K/4], two a byte; 8: int8 [N, K/2]; 16: bf16 or fp16 [N, K/2]
    name.weight_positions   uint8 [N, ceil(K/8)]     where in its group of four each stood, 2 bits each
    name.weight_scale       [N, K/g], stored dtype   4 and 8 bits; may be negative
    name.weight_shape       int64 [2] = (N, K)

and config.json's `quantization_config` says which linear has which scheme, by the modules' literal names. A linear that
isn't 2:4 stays a dense `name.weight` and is listed in `ignore`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from llmshrink_kernels.sparse24 import pack_nibbles, pack_positions, unpack_nibbles, unpack_positions
from torch import Tensor

from llmshrink.errors import CheckpointError
from llmshrink.formats.compressed_tensors import SCALE_DTYPES
from llmshrink.formats.groups import by_scheme, checked, literal
from llmshrink.weights import Sparse24
from llmshrink.weights.sparse24 import VALUE_DTYPES

METHOD = "llmshrink"
FORMAT = "sparse24"
VERSION = 1
PATTERN = "2:4"
BITS = (4, 8, 16)
SUFFIXES = ("weight_values", "weight_positions", "weight_scale", "weight_shape")
"""What may stand in place of a linear's `weight`."""


@dataclass(frozen=True)
class Sparse24Scheme:
    """How a linear is stored, apart from its numbers.

    bits: 4, 8 or 16. group_size: inputs that share a scale, -1 for one group a row; None with 16 bits.
    """

    bits: int
    group_size: int | None

    @classmethod
    def of(cls, weight: Sparse24) -> Sparse24Scheme:
        """The scheme of `weight`."""
        return cls(weight.bits, -1 if weight.group_size == weight.shape[1] else weight.group_size)


def tensors(name: str, weight: Sparse24) -> dict[str, Tensor]:
    """The checkpoint's tensors of the linear `name` (a module path, without `.weight`)."""
    values = pack_nibbles(weight.values) if weight.bits == 4 else weight.values
    stored = {
        f"{name}.weight_values": values.contiguous(),
        f"{name}.weight_positions": pack_positions(weight.positions).contiguous(),
        f"{name}.weight_shape": torch.tensor(weight.shape, dtype=torch.int64),
    }
    if weight.scale is not None:
        stored[f"{name}.weight_scale"] = weight.scale.contiguous()
    return stored


def names(name: str, scheme: Sparse24Scheme) -> list[str]:
    """The keys that `tensors` writes for the linear `name`."""
    return [f"{name}.{suffix}" for suffix in SUFFIXES if not (scheme.bits == 16 and suffix == "weight_scale")]


def layout(
    name: str, scheme: Sparse24Scheme, shape: tuple[int, int], dtype: torch.dtype
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Key -> (dtype, shape) of what `tensors` gives. dtype: of the values of 16 bits, or of a scale."""
    out_features, in_features = shape
    group_size = scheme.group_size
    values = {4: (torch.uint8, in_features // 4), 8: (torch.int8, in_features // 2), 16: (dtype, in_features // 2)}
    kind, width = values[scheme.bits]
    found: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
        f"{name}.weight_values": (kind, (out_features, width)),
        f"{name}.weight_positions": (torch.uint8, (out_features, -(-in_features // 8))),
        f"{name}.weight_shape": (torch.int64, (2,)),
    }
    if group_size is not None:
        found[f"{name}.weight_scale"] = (dtype, (out_features, 1 if group_size == -1 else in_features // group_size))
    return found


def read(name: str, get: Callable[[str], Tensor], scheme: Sparse24Scheme) -> Sparse24:
    """The linear `name`, from its checkpoint tensors.

    get: key -> tensor; its errors (a key that isn't there) pass through. Raises CheckpointError naming a tensor whose
    shape, dtype or positions aren't what `scheme` and `weight_shape` say.
    """

    def part(suffix: str, dtypes: tuple[torch.dtype, ...], shape: tuple[int, ...]) -> Tensor:
        return checked(get, f"{name}.{suffix}", dtypes, shape, scheme)

    out_features, in_features = part("weight_shape", (torch.int64,), (2,)).tolist()
    group_size = in_features if scheme.group_size == -1 else scheme.group_size
    if out_features < 1 or in_features < 1 or in_features % 4 or (group_size and in_features % group_size):
        raise CheckpointError(
            f"{name}.weight_shape says {[out_features, in_features]}, whose rows don't fall into fours"
            + (f" and groups of {group_size}" if group_size else "")
            + "; the checkpoint is damaged"
        )
    kept = in_features // 2
    if scheme.bits == 4:
        values = unpack_nibbles(part("weight_values", (torch.uint8,), (out_features, kept // 2)))
    else:
        values = part("weight_values", VALUE_DTYPES if scheme.bits == 16 else (torch.int8,), (out_features, kept))
    packed = part("weight_positions", (torch.uint8,), (out_features, -(-kept // 4)))
    positions = unpack_positions(packed, kept).contiguous()
    low, high = positions.view(out_features, -1, 2).unbind(-1)
    if not bool((low < high).all()) or not torch.equal(pack_positions(positions), packed):
        raise CheckpointError(
            f"{name}.weight_positions holds something else than two rising positions for each four inputs; the "
            "checkpoint is damaged"
        )
    scale = None
    if group_size is not None:
        scale = part("weight_scale", SCALE_DTYPES, (out_features, in_features // group_size))
    return Sparse24(values, positions, scale, scheme.bits, group_size)


def quantization_config(sites: Mapping[str, Sparse24Scheme | None], ignore: Iterable[str]) -> dict[str, object]:
    """The `quantization_config` of config.json.

    sites: module path of every linear inside the blocks -> its scheme, or None when it stays as it is. ignore: further
    linears that stay as they are (`lm_head`). One config group for each distinct scheme, in the order met.
    """
    targets, ignored = by_scheme(sites, ignore)
    return {
        "quant_method": METHOD,
        "format": FORMAT,
        "version": VERSION,
        "config_groups": {
            f"group_{number}": {"targets": names, "weights": _weights(scheme)}
            for number, (scheme, names) in enumerate(targets.items())
        },
        "ignore": ignored,
    }


def schemes(config: Mapping[str, object]) -> dict[str, Sparse24Scheme]:
    """Module path -> scheme, from a `quantization_config`.

    Raises CheckpointError for another format or version, another kind of scheme, or a target that isn't a literal name.
    """
    described = (config.get("quant_method"), config.get("format"), config.get("version"))
    if described != (METHOD, FORMAT, VERSION):
        raise CheckpointError(
            f"quantization_config is {described[0]!r}, format {described[1]!r}, version {described[2]!r}; only "
            f"{METHOD} {FORMAT} {VERSION} can be read here: update llmshrink"
        )
    return literal(config, _scheme)


def _weights(scheme: Sparse24Scheme) -> dict[str, object]:
    group = scheme.group_size
    return {
        "num_bits": scheme.bits,
        "type": "float" if group is None else "int",
        "symmetric": True,
        "strategy": None if group is None else "channel" if group == -1 else "group",
        "group_size": None if group == -1 else group,
        "pattern": PATTERN,
    }


def _scheme(label: str, group: object) -> Sparse24Scheme:
    """The scheme of one config group; CheckpointError when it isn't one that this module writes."""
    weights = group.get("weights") if isinstance(group, dict) else None
    bits = weights.get("num_bits") if isinstance(weights, dict) else None
    if not isinstance(weights, dict) or not isinstance(bits, int) or bits not in BITS:
        raise CheckpointError(
            f"quantization_config {label} has weights of {bits!r} bits; {FORMAT} has {', '.join(map(str, BITS))}"
        )
    size = weights.get("group_size")
    scheme = Sparse24Scheme(bits, None if bits == 16 else -1 if weights.get("strategy") == "channel" else size)
    if bits != 16 and scheme.group_size != -1 and (not isinstance(size, int) or size < 1):
        raise CheckpointError(f"quantization_config {label} has groups of {size!r}; the checkpoint is damaged")
    if weights != _weights(scheme):
        raise CheckpointError(
            f"quantization_config {label} says {weights}, which for {bits} bits isn't what {FORMAT} stores: "
            f"{_weights(scheme)}"
        )
    return scheme
