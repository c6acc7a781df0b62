"""A linear whose weight stays packed.

words, scales and zero_points are the kernels' `PackedWeight` (llmshrink_kernels.wna16.prepack draws its layout) as
buffers, so that `state_dict`, `.to(device)` and `copy.deepcopy` find them. `.to(dtype)` changes what the layer computes
in, never the scales: rounding those would be another model.

There is one copy of the weight, in one of two layouts. On the CPU, in bfloat16 and where torch's int4 product takes the
shape, `words` are in that operator's layout, which the processor decides (see llmshrink_kernels.wna16.cpu); everywhere
else they are in the kernels'. The layer changes over when it moves or changes its dtype, and `state_dict` always holds
the kernels' layout, so that what is saved here loads anywhere.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from llmshrink_kernels.device import runs_triton
from llmshrink_kernels.wna16 import PackedWeight, cpu
from torch import Tensor, nn

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class QuantLinear(nn.Module):
    """y = x W^T + b with W in 2, 3, 4 or 8-bit grouped integers. x: [..., in_features] in the layer's `dtype`.

    x W^T is within `naive.allowed_error` of exact for x's dtype, and 2**-21 |x| |W|^T more for sums in float32; the
    bias is added to what was rounded. float32 is for the CPU. Differentiable with respect to x and the bias.
    """

    words: Tensor
    scales: Tensor
    zero_points: Tensor | None
    scale_and_zero: Tensor | None
    """bf16 [K/g, padded N, 2]; made of scales and zero_points while the words are in the CPU's layout, else None."""
    left: Tensor | None
    bias: nn.Parameter | None

    def __init__(self, weight: PackedWeight, bias: nn.Parameter | None = None, *, dtype: torch.dtype) -> None:
        super().__init__()
        self.bits, self.group_size = weight.bits, weight.group_size
        self.out_features, self.in_features = weight.out_features, weight.in_features
        self.dtype = dtype
        self.register_buffer("words", weight.words)
        self.register_buffer("scales", weight.scales)
        self.register_buffer("zero_points", weight.zero_points)
        self.register_buffer("scale_and_zero", None, persistent=False)
        self.register_buffer("left", None, persistent=False)
        self.register_parameter("bias", bias)
        self._settle()

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., in_features]; returns [..., out_features] in its dtype. ValueError where x doesn't fit."""
        if x.shape[-1] != self.in_features or x.dtype != self.dtype:
            raise ValueError(
                f"x is {x.dtype} {list(x.shape)}; this layer takes {self.dtype} [..., {self.in_features}]"
                " (model.to(dtype) changes its dtype)"
            )
        if x.device != self.words.device:
            raise ValueError(f"x is on {x.device}, the weight on {self.words.device}")
        flat = x.reshape(-1, self.in_features)
        if self.scale_and_zero is not None:
            y: Tensor = torch.ops.llmshrink.int4_cpu_matmul(
                flat, self.words, self.scale_and_zero, self.left, self.out_features
            )
        else:
            y = torch.ops.llmshrink.wna16_matmul(
                flat,
                self.words,
                self.scales,
                self.zero_points,
                self.bits,
                self.group_size,
                self.out_features,
                self.in_features,
            )
        y = y.view(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias

    @property
    def nbytes(self) -> int:
        """What the weight takes in memory."""
        return sum(buffer.nbytes for buffer in self._buffers.values() if buffer is not None)

    def packed(self) -> PackedWeight:
        """The weight in the kernels' layout; a copy of the words where the layer holds them in the CPU's."""
        return self._as_packed(self._kernel_words())

    def extra_repr(self) -> str:
        """As `nn.Linear`'s, with bits and group."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None},"
            f" bits={self.bits}, group_size={self.group_size}, symmetric={self.zero_points is None}"
        )

    def _as_packed(self, words: Tensor) -> PackedWeight:
        small = (self.scales, self.zero_points)
        return PackedWeight(words, *small, self.bits, self.group_size, self.out_features, self.in_features)

    def _kernel_words(self) -> Tensor:
        """The words in the kernels' layout, whichever they are in."""
        if self.scale_and_zero is None:
            return self.words
        words = cpu.unpack(self.words.cpu(), self.out_features, self.in_features, self.group_size)
        return words.to(self.words.device)

    def _settle(self) -> None:
        """Bring the words into the layout for this device and dtype."""
        group = cpu.group_for(self.bits, self.group_size, self.in_features)
        fits = group is not None and self.words.device.type == "cpu" and self.dtype == torch.bfloat16
        if fits and self.scale_and_zero is None:
            assert group is not None
            # torch's int4 product is a plain torch path too, and says so as the others do when they run.
            runs_triton(self.words.device)
            weight = self._as_packed(self.words)
            self.words = cpu.pack(weight)
            self.scale_and_zero, self.left = cpu.pairs(self.scales, self.zero_points, group, weight)
        elif not fits:
            self._unsettle()

    def _unsettle(self) -> None:
        """Bring the words into the kernels' layout."""
        if self.scale_and_zero is not None:
            self.words = self._kernel_words()
            self.scale_and_zero = self.left = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantLinear:
        scales = self.scales
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=scales.device)).dtype
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.scales.dtype != scales.dtype:
            self.scales = scales.to(self.scales.device)
        self._settle()
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}words"] = self._kernel_words()

    def _load_from_state_dict(self, *arguments: Any, **options: Any) -> None:
        self._unsettle()
        super()._load_from_state_dict(*arguments, **options)
        self._settle()
