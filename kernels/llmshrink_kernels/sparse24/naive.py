"""What `sparse24_matmul` means, in lines that anyone can check: expand, scale, then multiply, all in float64.

The tolerance of every way of computing it is that of dense weights, `wna16.naive.allowed_error`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmshrink_kernels.sparse24.canonical import expand


def dequantize(
    values: Tensor,
    positions: Tensor,
    scale: Tensor | None,
    group_size: int,
    inputs: int,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """The dense weight, [N, K] in `dtype`: kept values times the scales of their groups; -1: one group a row."""
    dense = expand(values, positions, inputs).to(dtype)
    if scale is None:
        return dense
    size = inputs if group_size == -1 else group_size
    return dense * scale.to(dtype)[:, torch.arange(inputs, device=scale.device) // size]


def matmul(x: Tensor, values: Tensor, positions: Tensor, scale: Tensor | None, group_size: int) -> Tensor:
    """Y = X W^T, float64. x: [M, K]; returns [M, N]."""
    return x.double() @ dequantize(values, positions, scale, group_size, x.shape[1]).T
