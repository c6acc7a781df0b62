"""compressed-tensors: its config, and `pack-quantized`, grouped integers as transformers and vLLM load them.

Written without either; the formats of 8-bit products are `eight_bit`'s.

A linear called `name` with N outputs, K inputs, b bits and groups of g inputs has, in place of `name.weight`,

    name.weight_packed      int32 [N, ceil(K*b/32)]      codes, packed along the inputs
    name.weight_scale       [N, K/g], stored dtype       may be negative
    name.weight_shape       int64 [2] = (N, K)
    name.weight_zero_point  int32 [ceil(N*b/32), K/g]    only when asymmetric; packed along the outputs

and config.json's `quantization_config` says which linear has which scheme. Its `targets` and `ignore` here are the
modules' literal names, never patterns: engines rename modules before they match, and a literal name is what survives
that. One group a row is written as strategy `channel`, for which engines have kernels at any number of inputs.
Activation order is static (the columns are where they were), so that there is no `g_idx`: vLLM would ignore it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from llmshrink.errors import CheckpointError
from llmshrink.formats import eight_bit
from llmshrink.formats.bitpack import BITS, pack, unpack, words_for
from llmshrink.formats.eight_bit import EightBitScheme
from llmshrink.formats.groups import by_scheme, checked, literal
from llmshrink.formats.kv_cache import kv_cache_scheme
from llmshrink.weights import GroupedInt

FORMAT = "pack-quantized"
MIXED = "mixed-precision"
"""Where groups have different formats, each says its own."""
FORMATS = (FORMAT, *eight_bit.FORMATS, MIXED)
VERSION = "0.17.0"
SAME_GROUPS = (None, False, "static", "weight")
"""Values of actorder with which a group is consecutive inputs, as it is without."""
SUFFIXES = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point")
"""What may stand in place of a linear's `weight`."""
SCALE_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class GroupedIntScheme:
    """How a linear is quantized, apart from its numbers. group_size: inputs a group, -1 for one group a row."""

    bits: int
    group_size: int
    symmetric: bool

    @classmethod
    def of(cls, weight: GroupedInt) -> GroupedIntScheme:
        """The scheme that `weight` was quantized by."""
        whole_row = weight.group_size == weight.shape[1]
        return cls(weight.bits, -1 if whole_row else weight.group_size, weight.zero_point is None)

    @property
    def format(self) -> str:
        """compressed-tensors' name of it."""
        return FORMAT


StandardScheme = GroupedIntScheme | EightBitScheme
"""What a standard checkpoint may have."""


def tensors(name: str, weight: GroupedInt) -> dict[str, Tensor]:
    """The checkpoint's tensors of the linear `name` (a module path, without `.weight`)."""
    stored = {
        f"{name}.weight_packed": pack(weight.codes, weight.bits),
        f"{name}.weight_scale": weight.scale.contiguous(),
        f"{name}.weight_shape": torch.tensor(weight.shape, dtype=torch.int64),
    }
    if weight.zero_point is not None:
        stored[f"{name}.weight_zero_point"] = pack(weight.zero_point.t().contiguous(), weight.bits).t().contiguous()
    return stored


def names(name: str, *, symmetric: bool) -> list[str]:
    """The keys that `tensors` writes for the linear `name`."""
    return [f"{name}.{suffix}" for suffix in SUFFIXES if not (symmetric and suffix == "weight_zero_point")]


def layout(
    name: str, scheme: GroupedIntScheme, shape: tuple[int, int], dtype: torch.dtype
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Key -> (dtype, shape) of what `tensors` gives. shape: (out_features, in_features); dtype: of a scale."""
    out_features, in_features = shape
    groups = 1 if scheme.group_size == -1 else in_features // scheme.group_size
    found: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
        f"{name}.weight_packed": (torch.int32, (out_features, words_for(in_features, scheme.bits))),
        f"{name}.weight_scale": (dtype, (out_features, groups)),
        f"{name}.weight_shape": (torch.int64, (2,)),
    }
    if not scheme.symmetric:
        found[f"{name}.weight_zero_point"] = (torch.int32, (words_for(out_features, scheme.bits), groups))
    return found


def read(name: str, get: Callable[[str], Tensor], scheme: GroupedIntScheme) -> GroupedInt:
    """The linear `name`, from its checkpoint tensors.

    get: key -> tensor; its errors (a key that isn't there) pass through. Raises CheckpointError naming a tensor whose
    shape or dtype isn't what `scheme` and `weight_shape` say.
    """

    def part(suffix: str, dtypes: tuple[torch.dtype, ...], shape: tuple[int, ...]) -> Tensor:
        return checked(get, f"{name}.{suffix}", dtypes, shape, scheme)

    out_features, in_features = part("weight_shape", (torch.int64,), (2,)).tolist()
    group_size = in_features if scheme.group_size == -1 else scheme.group_size
    if out_features < 1 or in_features < 1 or in_features % group_size:
        raise CheckpointError(
            f"{name}.weight_shape says {[out_features, in_features]}, which groups of {group_size} don't divide;"
            " the checkpoint is damaged"
        )
    groups = in_features // group_size
    packed = part("weight_packed", (torch.int32,), (out_features, words_for(in_features, scheme.bits)))
    scale = part("weight_scale", SCALE_DTYPES, (out_features, groups))
    zero_point = None
    if not scheme.symmetric:
        rows = words_for(out_features, scheme.bits)
        stored = part("weight_zero_point", (torch.int32,), (rows, groups))
        zero_point = unpack(stored.t().contiguous(), scheme.bits, out_features).t().contiguous()
    return GroupedInt(unpack(packed, scheme.bits, in_features), scale, zero_point, scheme.bits, group_size)


def quantization_config(
    sites: Mapping[str, StandardScheme | None], ignore: Iterable[str], *, kv_cache: bool = False
) -> dict[str, object]:
    """The `quantization_config` of config.json.

    sites: module path of every linear inside the blocks -> its scheme, or None when it stays as it is. ignore: further
    linears that stay as they are (`lm_head`). One config group for each distinct scheme, in the order met. kv_cache:
    whether keys and values are cached in FP8.
    """
    targets: dict[StandardScheme, list[str]]
    targets, ignored = by_scheme(sites, ignore)
    formats = list(dict.fromkeys(scheme.format for scheme in targets))
    return {
        "quant_method": "compressed-tensors",
        "format": formats[0] if len(formats) == 1 else MIXED,
        "quantization_status": "compressed",
        "config_groups": {
            f"group_{number}": {
                "targets": names,
                **_numbers(scheme),
                "output_activations": None,
                "format": scheme.format,
            }
            for number, (scheme, names) in enumerate(targets.items())
        },
        "ignore": ignored,
        "kv_cache_scheme": kv_cache_scheme() if kv_cache else None,
        "global_compression_ratio": None,
        "version": VERSION,
    }


def schemes(config: Mapping[str, object]) -> dict[str, StandardScheme]:
    """Module path -> scheme, from a `quantization_config` of literal names (what this module writes).

    Raises CheckpointError for another format, another kind of scheme, or targets that are patterns or classes.
    """
    if config.get("quant_method") != "compressed-tensors" or config.get("format") not in FORMATS:
        raise CheckpointError(
            f"quantization_config is {config.get('quant_method')!r}, format {config.get('format')!r}; only"
            f" compressed-tensors {', '.join(FORMATS)} can be read here"
        )
    return literal(config, _scheme)


def _numbers(scheme: StandardScheme) -> dict[str, object]:
    if isinstance(scheme, EightBitScheme):
        return eight_bit.group(scheme)
    return {"weights": _weights(scheme), "input_activations": None}


def _weights(scheme: GroupedIntScheme) -> dict[str, object]:
    whole_row = scheme.group_size == -1
    return {
        "num_bits": scheme.bits,
        "type": "int",
        "symmetric": scheme.symmetric,
        "strategy": "channel" if whole_row else "group",
        "group_size": None if whole_row else scheme.group_size,
        "actorder": None,
        "dynamic": False,
        "block_structure": None,
        "observer": "minmax",
        "observer_kwargs": {},
    }


def _scheme(label: str, group: object) -> StandardScheme:
    """The scheme of one config group; CheckpointError when it is neither grouped integers nor 8-bit products."""
    weights = group.get("weights") if isinstance(group, dict) else None
    if not isinstance(group, dict) or not isinstance(weights, dict):
        raise CheckpointError(f"quantization_config {label} describes no weights; the checkpoint is damaged")
    rounded = eight_bit.scheme_of(label, group)
    if rounded is not None:
        return rounded
    bits, strategy = weights.get("num_bits"), weights.get("strategy")
    group_size = {"channel": -1, "group": weights.get("group_size")}.get(str(strategy))
    readable = weights.get("type") == "int" and group.get("format", FORMAT) in (FORMAT, None)
    if not (readable and isinstance(bits, int) and bits in BITS and isinstance(group_size, int)):
        raise CheckpointError(
            f"quantization_config {label} is {weights.get('type')} of {bits} bits, strategy {strategy}; only"
            f" weight-only integers of {BITS[0]} to {BITS[-1]} bits by group or channel can be read here"
        )
    if weights.get("actorder") not in SAME_GROUPS:
        raise CheckpointError(
            f"quantization_config {label} has activation order {weights['actorder']!r}, whose columns are permuted"
            " (g_idx); only null, weight and static can be read here: quantize the original again"
        )
    if group_size < 1 and strategy == "group":
        raise CheckpointError(f"quantization_config {label} has groups of {group_size}; the checkpoint is damaged")
    return GroupedIntScheme(bits, group_size, bool(weights.get("symmetric", True)))
