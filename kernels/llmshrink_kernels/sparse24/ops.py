"""`sparse24_matmul`: what callers use, checked; and the custom operator under it, which torch.compile sees whole.

The operator takes plain tensors and integers, and the shape of its result is known without running it. Where the kernel
can't run it computes by plain torch. There is no backward: training goes through dense weights.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llmshrink_kernels.device import runs_triton
from llmshrink_kernels.sparse24 import dequantize, dispatch
from llmshrink_kernels.sparse24.prepack import PackedSparse

DTYPES = (torch.float16, torch.bfloat16)


def sparse24_matmul(x: Tensor, packed: PackedSparse) -> Tensor:
    """y = x W^T with fp32 accumulation, W 2:4 sparse.

    x: fp16 or bf16 [..., K] on the weight's device, any strides, any number of rows (none gives an empty result); with
    16-bit values it has their dtype. Returns [..., N] in x's dtype. Raises ValueError naming what is wrong with x.
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
        from llmshrink_kernels.sparse24 import launch

        plan = dispatch.plan(packed, x.shape[0], x.dtype, x.device)
        if not isinstance(plan, str):
            return launch.matmul(x, packed, plan)
    return dequantize.matmul(x, packed)


def _fake(x: Tensor, *weight: Any) -> Tensor:
    return x.new_empty(x.shape[0], PackedSparse(*weight).out_features)


# As in wna16: `torch.library.custom_op` would import torch.compile's machinery, and Triton with it, at the first call.
_LIBRARY = torch.library.Library("llmshrink", "FRAGMENT")
_LIBRARY.define(
    "sparse24_matmul(Tensor x, Tensor words, Tensor? scales, int bits, int group_size, bool bfloat, int out_features, "
    "int in_features) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_LIBRARY.impl("sparse24_matmul", _matmul, "CompositeExplicitAutograd")
torch.library.register_fake("llmshrink::sparse24_matmul", _fake, lib=_LIBRARY)
