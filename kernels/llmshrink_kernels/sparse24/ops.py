"""`sparse24_matmul`: what callers use, checked; and the custom operators under it, which torch.compile sees whole.

The operators take plain tensors and integers, the shapes of their results are known without running them, and each is
the other's gradient: y = x W^T, dx = dy W; the weight itself is frozen. Where the kernels can't run the same operators
compute by plain torch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llmshrink_kernels.device import runs_triton
from llmshrink_kernels.sparse24 import backward, dequantize, dispatch
from llmshrink_kernels.sparse24.prepack import PackedSparse

DTYPES = (torch.float16, torch.bfloat16)


def sparse24_matmul(x: Tensor, packed: PackedSparse) -> Tensor:
    """y = x W^T with fp32 accumulation, W 2:4 sparse.

    x: fp16 or bf16 [..., K] on the weight's device, any strides, any number of rows (none gives an empty result); with
    16-bit values it has their dtype. Returns [..., N] in x's dtype. Differentiable with respect to x. Raises ValueError
    naming what is wrong with x.
    """
    allowed = DTYPES if packed.bits < 16 else (torch.bfloat16 if packed.bfloat else torch.float16,)
    if x.dtype not in allowed:
        raise ValueError(f"x is {x.dtype}; {' or '.join(map(str, allowed))} is expected")
    if x.dim() < 1 or x.shape[-1] != packed.in_features:
        raise ValueError(
            f"x is {list(x.shape)}; the weight has {packed.in_features} inputs: [..., {packed.in_features}]"
        )
    if x.device != packed.words.device:
        raise ValueError(f"x is on {x.device}, the weight on {packed.words.device}")
    flat = x.reshape(-1, packed.in_features)
    y: Tensor = torch.ops.llmshrink.sparse24_matmul(flat, *plain(packed))
    return y.view(*x.shape[:-1], packed.out_features)


def plain(packed: PackedSparse) -> tuple[Tensor, Tensor | None, int, int, bool, int, int]:
    """The weight as the operator takes it."""
    return (
        packed.words,
        packed.scales,
        packed.bits,
        packed.group_size,
        packed.bfloat,
        packed.out_features,
        packed.in_features,
    )


def _matmul(x: Tensor, *weight: Any) -> Tensor:
    packed = PackedSparse(*weight)
    if x.shape[0] == 0:
        return x.new_empty(0, packed.out_features)
    x = x.contiguous()
    if runs_triton(x.device):
        from triton.errors import TritonError

        from llmshrink_kernels.sparse24 import launch

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
    return backward.matmul_transposed(y.contiguous(), PackedSparse(*weight))


def _fake(x: Tensor, *weight: Any) -> Tensor:
    return x.new_empty(x.shape[0], PackedSparse(*weight).out_features)


def _fake_transposed(y: Tensor, *weight: Any) -> Tensor:
    return y.new_empty(y.shape[0], PackedSparse(*weight).in_features)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """For the backward of either: the weight."""
    _, words, scales, *ctx.numbers = inputs
    ctx.save_for_backward(words, *([] if scales is None else [scales]))


def _kept(ctx: Any) -> tuple[Any, ...]:
    tensors = ctx.saved_tensors
    return (*tensors, *([None] if len(tensors) == 1 else []), *ctx.numbers)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return torch.ops.llmshrink.sparse24_matmul_transposed(grad, *_kept(ctx)), *[None] * 7


def _backward_transposed(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return torch.ops.llmshrink.sparse24_matmul(grad, *_kept(ctx)), *[None] * 7


# As in wna16: `torch.library.custom_op` would import torch.compile's machinery, and Triton with it, at the first call.
_LIBRARY = torch.library.Library("llmshrink", "FRAGMENT")
_WEIGHT = "Tensor words, Tensor? scales, int bits, int group_size, bool bfloat, int out_features, int in_features"

for _name, _schema, _run, _shape, _gradient in (
    ("sparse24_matmul", f"(Tensor x, {_WEIGHT}) -> Tensor", _matmul, _fake, _backward),
    (
        "sparse24_matmul_transposed",
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
