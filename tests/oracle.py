"""GPTQ as its papers write it: one row, one column at a time, in float64. Slow, and short enough to be believed."""

from __future__ import annotations

import torch
from torch import Tensor

from llmshrink.methods.contract import QuantizeSpec, SiteStatistics
from llmshrink.methods.gptq import column_order
from llmshrink.methods.scales import Grid
from llmshrink.weights import code_range


def damped(hessian: Tensor, damp: float) -> Tensor:
    hessian = hessian.double().clone()
    diagonal = hessian.diagonal()
    dead = diagonal <= 0
    mean = diagonal[~dead].mean() if bool((~dead).any()) else torch.tensor(1.0, dtype=torch.float64)
    diagonal.add_(torch.where(dead, mean, 0.0) + damp * mean)
    return hessian


def inverse_factor(hessian: Tensor) -> Tensor:
    """U, upper, with H^-1 = U^T U: the textbook chain of inverse and Cholesky."""
    return torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)


def target(weight: Tensor, statistics: SiteStatistics, spec: QuantizeSpec) -> Tensor:
    weight = weight.double()
    if statistics.cross is None or spec.corrected == 0:
        return weight
    inverse = torch.linalg.inv(damped(statistics.hessian, spec.corrected_damp))
    return weight + spec.corrected * weight @ statistics.cross.double() @ inverse


def order(statistics: SiteStatistics, size: int, spec: QuantizeSpec) -> Tensor:
    return column_order(statistics.hessian.diagonal(), size, spec)


def quantize(value: float, scale: float, zero: float, bits: int) -> tuple[int, float]:
    low, high = code_range(bits)
    code = min(max(round(value / scale) + int(zero), low), high)
    return code, scale * (code - int(zero))


def sweep(row: Tensor, factor: Tensor, columns: Tensor, scale: Tensor, zero: Tensor, size: int, bits: int) -> Tensor:
    """GPTQ's loop over one row: its codes, in the natural order. scale, zero: [groups], in the natural order."""
    left = row[columns].clone()
    codes = torch.empty(len(row), dtype=torch.int8)
    for i, column in enumerate(columns.tolist()):
        g = column // size
        codes[column], value = quantize(float(left[i]), float(scale[g]), float(zero[g]), bits)
        left[i:] -= (left[i] - value) / factor[i, i] * factor[i, i:]
    return codes


def trial(
    row: Tensor, factor: Tensor, columns: Tensor, candidates_of: object, size: int, bits: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The trial sweep over one row: codes, scales and zeros, all in the natural order.

    candidates_of: what gives a group's candidates, [candidates], from its compensated weights, [size].
    """
    assert callable(candidates_of)
    left = row[columns].clone()
    groups = len(row) // size
    codes = torch.empty(len(row), dtype=torch.int8)
    scale, zero = torch.zeros(groups, dtype=torch.float64), torch.zeros(groups, dtype=torch.float64)
    for start in range(0, len(row), size):
        grid: Grid = candidates_of(left[start : start + size])
        zeros = torch.zeros_like(grid.scale) if grid.zero is None else grid.zero
        best = (float("inf"), 0.0, 0.0)
        for s, z in zip(grid.scale.tolist(), zeros.tolist(), strict=True):
            best = min(best, (_group(left.clone(), factor, start, size, s, z, bits)[0], s, z))
        _, s, z = best
        _, left, group_codes = _group(left, factor, start, size, s, z, bits)
        inside = columns[start : start + size]
        codes[inside] = group_codes
        scale[inside[0] // size], zero[inside[0] // size] = s, z
    return codes, scale, zero


def _group(
    left: Tensor, factor: Tensor, start: int, size: int, scale: float, zero: float, bits: int
) -> tuple[float, Tensor, Tensor]:
    damage, codes = 0.0, []
    for i in range(start, start + size):
        code, value = quantize(float(left[i]), scale, zero, bits)
        codes.append(code)
        error = (left[i] - value) / factor[i, i]
        damage += float(error**2)
        left[i:] -= error * factor[i, i:]
    return damage, left, torch.tensor(codes, dtype=torch.int8)


def least_squares(weight: Tensor, mask: Tensor, hessian: Tensor) -> Tensor:
    """The best weights on each row's mask: its system solved by itself, in float64."""
    weight, hessian = weight.double(), hessian.double()
    found = torch.zeros_like(weight)
    for row, kept, result in zip(weight, mask, found, strict=True):
        system, right = hessian[kept][:, kept], (hessian @ row)[kept]
        result[kept] = torch.cholesky_solve(right.unsqueeze(1), torch.linalg.cholesky(system))[:, 0]
    return found


def output_error(weight: Tensor, quantized: Tensor, hessian: Tensor) -> float:
    """||(W - Q) X~||^2 / ||W X~||^2 in float64."""
    weight, hessian = weight.double(), hessian.double()
    difference = weight - quantized.double()
    return float(((difference @ hessian) * difference).sum() / ((weight @ hessian) * weight).sum())
