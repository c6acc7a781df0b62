"""`wna16_matmul`: what callers use, checked; and the custom operators under it, which torch.compile sees whole.

The operators take plain tensors and integers. Their results' shapes are known without running them (the fakes), and
each is the other's gradient: y = x W^T, dx = dy W; the weight itself is frozen. On a machine that can't run the kernels
the same operators compute by plain torch, to the same numbers within the tolerance of `naive.allowed_error`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llmshrink_kernels.device import runs_triton
from llmshrink_kernels.wna16 import dequantize, dispatch
from llmshrink_kernels.wna16.prepack import PackedWeight

DTYPES = (torch.float16, torch.bfloat16)


def wna16_matmul(x: Tensor, packed: PackedWeight) -> Tensor:
    """y = x W^T with fp32 accumulation.

    x: fp16 or bf16 [..., K], on the weight's device; any strides, any number of rows (none gives an empty result).
    Returns [..., N] in x's dtype. Differentiable with respect to x. Raises ValueError naming what is wrong with x.
    """
    if x.dtype not in DTYPES:
        raise ValueError(f"x is {x.dtype}; torch.float16 or torch.bfloat16 is expected")
    if x.dim() < 1 or x.shape[-1] != packed.in_features:
        raise ValueError(
            f"x is {list(x.shape)}; the weight has {packed.in_features} inputs: [..., {packed.in_features}]"
        )
    if x.device != packed.words.device:
        raise ValueError(f"x is on {x.device}, the weight on {packed.words.device}")
    flat = x.reshape(-1, packed.in_features)
    y: Tensor = torch.ops.llmshrink.wna16_matmul(flat, *_plain(packed))
    return y.view(*x.shape[:-1], packed.out_features)


def _plain(packed: PackedWeight) -> tuple[Tensor, Tensor, Tensor | None, int, int, int, int]:
    """The weight as operators take it."""
    return (
        packed.words,
        packed.scales,
        packed.zero_points,
        packed.bits,
        packed.group_size,
        packed.out_features,
        packed.in_features,
    )


def _matmul(x: Tensor, *weight: Any) -> Tensor:
    packed = PackedWeight(*weight)
    if x.shape[0] == 0:
        return x.new_empty(0, packed.out_features)
    x = x.contiguous()
    if runs_triton(x.device):
        from triton.errors import TritonError

        from llmshrink_kernels.wna16 import launch

        asked = (packed, x.shape[0], x.dtype, x.device)
        plan = dispatch.plan(*asked)
        if not isinstance(plan, str):
            try:
                return launch.matmul(x, packed, plan)
            except TritonError as error:
                if not dispatch.withdraw(*asked, error):
                    raise
                return _matmul(x, *weight)
    return dequantize.matmul(x, packed)


def _matmul_transposed(y: Tensor, *weight: Any) -> Tensor:
    return dequantize.matmul_transposed(y.contiguous(), PackedWeight(*weight))


def _fake(x: Tensor, *weight: Any) -> Tensor:
    return x.new_empty(x.shape[0], PackedWeight(*weight).out_features)


def _fake_transposed(y: Tensor, *weight: Any) -> Tensor:
    return y.new_empty(y.shape[0], PackedWeight(*weight).in_features)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """For the backward of either: the weight."""
    _, words, scales, zero_points, *ctx.numbers = inputs
    ctx.save_for_backward(words, scales, *([] if zero_points is None else [zero_points]))


def _kept(ctx: Any) -> tuple[Any, ...]:
    tensors = ctx.saved_tensors
    return (*tensors, *([None] if len(tensors) == 2 else []), *ctx.numbers)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return torch.ops.llmshrink.wna16_matmul_transposed(grad, *_kept(ctx)), *[None] * 7


def _backward_transposed(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return torch.ops.llmshrink.wna16_matmul(grad, *_kept(ctx)), *[None] * 7


# `torch.library.custom_op` would say the same in fewer lines, but its operators import torch.compile's machinery, and
# with it Triton, at the first call: seconds that a process which doesn't compile need not wait.
_LIBRARY = torch.library.Library("llmshrink", "FRAGMENT")
_WEIGHT = (
    "Tensor words, Tensor scales, Tensor? zero_points, int bits, int group_size, int out_features, int in_features"
)

for _name, _schema, _run, _shape, _gradient in (
    ("wna16_matmul", f"(Tensor x, {_WEIGHT}) -> Tensor", _matmul, _fake, _backward),
    (
        "wna16_matmul_transposed",
        f"(Tensor y, {_WEIGHT}) -> Tensor",
        _matmul_transposed,
        _fake_transposed,
        _backward_transposed,
    ),
):
    _LIBRARY.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(_name, _run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"llmshrink::{_name}", _shape, lib=_LIBRARY)
    torch.library.register_autograd(f"llmshrink::{_name}", _gradient, setup_context=_keep, lib=_LIBRARY)
