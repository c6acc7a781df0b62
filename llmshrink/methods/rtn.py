"""Round to nearest: the baseline that needs no data.

Every weight goes to the nearest code of its group's scale, w ~ s * (clamp(round(w / s) + z) - z). What there is to
choose is the scale: min-max, or the least squared error (`scale_search` mse; `hessian` weighs it with the Hessian's
diagonal where statistics are at hand, `trial` means mse because there is no sweep to try it in).
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmshrink.methods.contract import (
    QuantizeSpec,
    SiteStatistics,
    Solved,
    check_finite,
    measure,
    relative,
    resolve_group_size,
)
from llmshrink.methods.registry import site_solver
from llmshrink.methods.scales import Grid, fit, minmax
from llmshrink.weights import FP8, FP8_MOST, SMALLEST_SCALE, EightBit, GroupedInt, code_range

CHUNK = 1 << 22


@site_solver("rtn", reads=frozenset())
def rtn(weight: Tensor, statistics: SiteStatistics | None, spec: QuantizeSpec, scale_dtype: torch.dtype) -> Solved:
    """Round every weight to the nearest code of its group.

    weight: [out_features, in_features], any float dtype. statistics: only for the error (and `hessian` scales); may be
    None. scale_dtype: how scales will be stored. Raises SolveError on NaN or a group size that doesn't divide.
    """
    check_finite("the weight", weight)
    size = resolve_group_size(weight.shape[1], spec.group_size)
    hessian = None if statistics is None else statistics.hessian
    if spec.activations == "fp8":
        return _solved(weight.to(torch.float32), _fp8(weight.to(torch.float32), scale_dtype), spec, hessian)
    importance = None
    if spec.scale_search == "hessian" and hessian is not None:
        importance = hessian.diagonal().float().view(-1, size)

    pieces = []
    chunk = max(1, CHUNK // weight.shape[1])
    for start in range(0, weight.shape[0], chunk):
        rows = weight[start : start + chunk].to(torch.float32)
        grouped = rows.T.reshape(-1, size, rows.shape[0])
        search = minmax(grouped, spec, scale_dtype) if spec.scale_search == "minmax" else None
        pieces.append(_round(grouped, search or fit(grouped, importance, spec, scale_dtype), spec, scale_dtype))
    quantized = GroupedInt(
        torch.cat([piece.codes for piece in pieces]),
        torch.cat([piece.scale for piece in pieces]),
        None if spec.symmetric else torch.cat([piece.zero_point for piece in pieces if piece.zero_point is not None]),
        spec.bits,
        size,
    )
    return _solved(weight.to(torch.float32), quantized, spec, hessian)


def _solved(original: Tensor, quantized: GroupedInt | EightBit, spec: QuantizeSpec, hessian: Tensor | None) -> Solved:
    error, energy = measure(original, quantized, hessian)
    residual = original - quantized.dequantize() if spec.residual else None
    return Solved(quantized, relative(error, energy), error, energy, 0.0, (), residual)


def _fp8(weight: Tensor, dtype: torch.dtype) -> EightBit:
    """weight: float32 [out, in]. The largest of a row becomes FP8's largest; a better scale would gain little, since
    rounding is relative to each number."""
    scale = (weight.abs().amax(1, keepdim=True) / FP8_MOST).clamp_(min=SMALLEST_SCALE).to(dtype)
    codes = (weight / scale.to(torch.float32)).clamp_(-FP8_MOST, FP8_MOST)
    return EightBit(codes.to(FP8), scale)


def _round(grouped: Tensor, grid: Grid, spec: QuantizeSpec, dtype: torch.dtype) -> GroupedInt:
    """grouped: float32 [groups, group_size, rows]."""
    low, high = code_range(spec.bits)
    codes = torch.round(grouped / grid.scale.unsqueeze(1))
    if grid.zero is not None:
        codes += grid.zero.unsqueeze(1)
    codes = codes.clamp_(low, high).view(-1, grouped.shape[2]).T.to(torch.int8, memory_format=torch.contiguous_format)
    zero_point = None if grid.zero is None else grid.zero.T.to(torch.int8, memory_format=torch.contiguous_format)
    scale = grid.scale.T.to(dtype, memory_format=torch.contiguous_format)
    return GroupedInt(codes, scale, zero_point, spec.bits, grouped.shape[1])
