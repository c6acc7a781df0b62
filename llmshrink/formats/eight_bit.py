"""compressed-tensors' `int-quantized` and `float-quantized`: 8 bits a weight, unpacked, for products of 8 bits.

A linear called `name` with N outputs and K inputs has

    name.weight        int8 or float8_e4m3fn [N, K]
    name.weight_scale  [N, 1], stored dtype

and its config group says that inputs are rounded to the same kind token by token ("dynamic"), for which nothing is
stored. Weights are symmetric, with one scale a row: what the kernels of every engine take.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llmshrink.errors import CheckpointError
from llmshrink.formats.groups import checked
from llmshrink.weights import FP8, Activations, EightBit

FORMATS: dict[str, Activations] = {"int-quantized": "int8", "float-quantized": "fp8"}
SUFFIXES = ("weight", "weight_scale")
SCALE_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class EightBitScheme:
    """activations: what inputs, and with them weights, are rounded to. The rest is the same for all."""

    activations: Activations

    bits = 8
    group_size = -1
    symmetric = True

    @property
    def format(self) -> str:
        """compressed-tensors' name of it."""
        return next(name for name, kind in FORMATS.items() if kind == self.activations)

    @property
    def dtype(self) -> torch.dtype:
        """Of a code."""
        return torch.int8 if self.activations == "int8" else FP8


def tensors(name: str, weight: EightBit) -> dict[str, Tensor]:
    """The checkpoint's tensors of the linear `name`."""
    return {f"{name}.weight": weight.codes.contiguous(), f"{name}.weight_scale": weight.scale.contiguous()}


def names(name: str) -> list[str]:
    """The keys that `tensors` writes for the linear `name`."""
    return [f"{name}.{suffix}" for suffix in SUFFIXES]


def layout(
    name: str, scheme: EightBitScheme, shape: tuple[int, int], dtype: torch.dtype
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Key -> (dtype, shape) of what `tensors` gives. shape: (out_features, in_features); dtype: of a scale."""
    return {f"{name}.weight": (scheme.dtype, shape), f"{name}.weight_scale": (dtype, (shape[0], 1))}


def read(name: str, get: Callable[[str], Tensor], scheme: EightBitScheme) -> EightBit:
    """The linear `name`, from its checkpoint tensors. Raises CheckpointError naming one that isn't as it should be."""
    key = f"{name}.weight"
    codes = get(key)
    if codes.ndim != 2 or codes.dtype != scheme.dtype:
        raise CheckpointError(
            f"{key} is {codes.dtype} {list(codes.shape)}, expected {scheme.dtype} [out, in]; the checkpoint is damaged"
        )
    if scheme.dtype == FP8 and bool(codes.to(torch.float32).isnan().any()):
        raise CheckpointError(f"{key} has NaN; the checkpoint is damaged")
    return EightBit(codes, checked(get, f"{name}.weight_scale", SCALE_DTYPES, (codes.shape[0], 1), scheme))


def group(scheme: EightBitScheme) -> dict[str, object]:
    """`weights` and `input_activations` of a config group."""
    one: dict[str, object] = {
        "num_bits": 8,
        "type": "int" if scheme.activations == "int8" else "float",
        "symmetric": True,
        "group_size": None,
        "actorder": None,
        "block_structure": None,
        "observer_kwargs": {},
    }
    return {
        "weights": {**one, "strategy": "channel", "dynamic": False, "observer": "minmax"},
        "input_activations": {**one, "strategy": "token", "dynamic": True, "observer": None},
    }


def scheme_of(label: str, group: Mapping[str, Any]) -> EightBitScheme | None:
    """The scheme of a config group whose inputs are rounded; None where they aren't. CheckpointError for others."""
    inputs, weights = group.get("input_activations"), group.get("weights")
    if not inputs:
        return None
    kinds: dict[object, Activations] = {"int": "int8", "float": "fp8"}
    if isinstance(inputs, dict) and isinstance(weights, dict):
        kind = kinds.get(weights.get("type"))
        alike = all(
            one.get("num_bits") == 8 and one.get("type") == weights.get("type") and one.get("symmetric", True)
            for one in (weights, inputs)
        )
        by = (weights.get("strategy"), inputs.get("strategy"), inputs.get("dynamic"), bool(weights.get("dynamic")))
        if kind is not None and alike and by == ("channel", "token", True, False):
            return EightBitScheme(kind)
    raise CheckpointError(
        f"quantization_config {label} rounds activations in another way than 8-bit numbers by token beside weights of "
        "the same kind by channel; only those can be read here"
    )
