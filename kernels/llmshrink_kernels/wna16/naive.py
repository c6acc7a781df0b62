"""What `wna16_matmul` means, in lines that anyone can check: dequantize, then multiply, all in float64."""

from __future__ import annotations

import torch
from torch import Tensor


def dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor | None, group_size: int) -> Tensor:
    """W[n, k] = scale[n, k // g] * (codes[n, k] - zero_point[n, k // g]), float64 [N, K]; g = -1: one group a row."""
    columns = codes.shape[1]
    size = columns if group_size == -1 else group_size
    group = torch.arange(columns, device=codes.device) // size
    values = codes.double() if zero_point is None else codes.double() - zero_point.double()[:, group]
    return values * scale.double()[:, group]


def matmul(x: Tensor, codes: Tensor, scale: Tensor, zero_point: Tensor | None, group_size: int) -> Tensor:
    """Y = X W^T, float64. x: [M, K]; returns [M, N]."""
    return x.double() @ dequantize(codes, scale, zero_point, group_size).T


def allowed_error(x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """How far any way of computing Y may be from X W^T: float64 [M, N]. The one tolerance of tests, tuner, benchmark.

    weight: W in float64. With u the rounding of `dtype`: u |y| for the result's own rounding, and u |x| |W|^T for ways
    that round W to `dtype` first; sums in fp32 are far inside that. Half the smallest subnormal is where roundings end.
    """
    limits = torch.finfo(dtype)
    rounding, least = limits.eps / 2, limits.tiny * limits.eps / 2
    size = x.double().abs()
    return rounding * ((x.double() @ weight.T).abs() + size @ weight.abs().T) + least * (1 + size.sum(-1, keepdim=True))
