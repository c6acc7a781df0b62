"""A linear whose products are of 8 bits, weights and inputs: a module around `weights.eight_bit_product`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from llmshrink.runtime.linear import DTYPES
from llmshrink.weights import Activations, EightBit
from llmshrink.weights.eight_bit_product import takes


class EightBitLinear(nn.Module):
    """y = x W^T + b with W and x in 8 bits, W by row and x by token. x: [..., in_features] in the layer's `dtype`.

    With x^ the rounded input, x W^T is within half a unit in the last place of dtype of the exact x^ W^T, and 2**-21
    |x^| |W|^T more (`tolerance`); the bias is added to what was rounded. Differentiable with respect to x and the bias.
    """

    codes: Tensor
    scale: Tensor
    bias: nn.Parameter | None

    def __init__(self, weight: EightBit, bias: nn.Parameter | None = None, *, dtype: torch.dtype) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.activations: Activations = "int8" if weight.codes.dtype == torch.int8 else "fp8"
        self.dtype = dtype
        self.register_buffer("codes", weight.codes.contiguous())
        self.register_buffer("scale", weight.scale)
        self.register_parameter("bias", bias)
        self._settle()

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., in_features]; returns [..., out_features] in its dtype. ValueError where x doesn't fit."""
        if x.shape[-1] != self.in_features or x.dtype != self.dtype or x.dtype not in DTYPES:
            raise ValueError(
                f"x is {x.dtype} {list(x.shape)}; this layer takes {self.dtype} [..., {self.in_features}]"
                " (model.to(dtype) changes its dtype, to float32, bfloat16 or float16)"
            )
        if x.device != self.codes.device:
            raise ValueError(f"x is on {x.device}, the weight on {self.codes.device}")
        flat = x.reshape(-1, self.in_features)
        y: Tensor = torch.ops.llmshrink.eight_bit_matmul(flat, self.codes, self.scale, self.whole)
        y = y.view(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias

    @property
    def nbytes(self) -> int:
        """What the weight takes in memory."""
        return self.codes.nbytes + self.scale.nbytes

    def extra_repr(self) -> str:
        """As `nn.Linear`'s, with what weights and inputs are rounded to."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None},"
            f" activations={self.activations}"
        )

    def _settle(self) -> None:
        """Choose the way for this device. whole: by torch's own product of codes."""
        self.whole = takes(self.activations, (self.out_features, self.in_features), self.codes.device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> EightBitLinear:
        codes, scale = self.codes, self.scale
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=scale.device)).dtype
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        # FP8 is a floating-point dtype to `.to(dtype)`, and neither it nor a scale may change.
        self.codes = self.codes if self.codes.dtype == codes.dtype else codes.to(self.codes.device)
        self.scale = self.scale if self.scale.dtype == scale.dtype else scale.to(self.scale.device)
        self._settle()
        return self
