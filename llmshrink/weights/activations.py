"""What engines make of a linear's input where its product is one of 8 bits: rounded token by token, as it comes.

    q = round(x / s), s = max_i |x_i| / 127  for int8        q = fp8(x / s), s = max_i |x_i| / 448  for FP8 E4M3

with one s for each token, nothing calibrated ("dynamic"). This is vLLM's arithmetic; the compressed-tensors library
divides by 127.5 for int8, and so rounds to codes that are up to one apart. Whoever computes with such a checkpoint's
dequantized weights must round the inputs too, or computes another model than the one that is served.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from llmshrink.weights.eight_bit import FP8, FP8_MOST

Activations = Literal["int8", "fp8"]
SMALLEST = 1e-12
"""Of a token's scale, so that a token of zeros stays one."""


def coded(x: Tensor, kind: Activations) -> tuple[Tensor, Tensor]:
    """(codes, scale) of an input. x: [..., in_features]. codes: int8 or float8_e4m3fn; scale: float32 [..., 1]."""
    values = x.to(torch.float32)
    most = 127.0 if kind == "int8" else FP8_MOST
    scale = (values.abs().amax(-1, keepdim=True) / most).clamp_(min=SMALLEST)
    codes = (values / scale).clamp_(-most, most)
    return (codes.round_().to(torch.int8) if kind == "int8" else codes.to(FP8)), scale


def by_token(x: Tensor, kind: Activations) -> Tensor:
    """The input that the product is taken of: x rounded, in its own dtype. x: [..., in_features]."""
    codes, scale = coded(x, kind)
    return (codes.to(torch.float32) * scale).to(x.dtype)


def round_inputs(linear: nn.Module, kind: Activations) -> RemovableHandle:
    """From now on a linear's input is rounded before anything else sees it. Registered first, it comes first."""

    def rounded(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (by_token(args[0], kind), *args[1:])

    return linear.register_forward_pre_hook(rounded)
