"""The scale (and zero-point) of a group, in closed form: min-max, or the best of a grid by squared error.

    minimise over s, z:  sum_j h_j (s (q_j - z) - w_j)^2,   q_j = clamp(round(w_j / s) + z)

with h_j = 1 (`mse`) or h_j = H_jj (`hessian`). The grid runs over fractions of the min-max scale: clipping an outlier
buys finer steps for everyone else. A symmetric range holds one code more below zero than above it; a negative scale
(`signed`) turns that round where the heavier tail is positive. With zero-points, every scale of the grid is tried with
the range's own zero and with the zero that centres the error left by it.

Everything here is transposed, [inputs, rows]: a column of the weight is contiguous and rows are what vector units run
over. Scales are rounded to the dtype that will store them before any code is chosen.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llmshrink.methods.contract import QuantizeSpec
from llmshrink.weights import SMALLEST_SCALE, code_range


@dataclass(frozen=True, eq=False)
class Grid:
    """scale: float32 [..., rows]; zero: float32, the same shape, integers, or None when symmetric."""

    scale: Tensor
    zero: Tensor | None


def stored(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """`scale` as it will be read back from a checkpoint that stores `dtype`, never under 1e-5 in magnitude; float32."""
    smallest = torch.tensor(SMALLEST_SCALE).to(dtype)
    if float(smallest) < SMALLEST_SCALE:
        smallest = torch.nextafter(smallest, torch.ones_like(smallest))
    magnitude = scale.abs().to(dtype).to(torch.float32).clamp_min_(float(smallest))
    return torch.where(scale < 0, -magnitude, magnitude)


def fractions(bits: int) -> tuple[float, ...]:
    """The grid: fractions of the min-max scale `absmax / (2**bits - 1) * 2`.

    It holds the two fractions that map the largest weight exactly on the last code of the longer and of the shorter
    side, so that weights which are already on a grid are found again.
    """
    half = (2**bits - 1) / 2
    lowest = {2: 0.4, 3: 0.5, 4: 0.65}.get(bits, 0.8)
    steps = 12
    even = [lowest + (1.0 - lowest) * i / (steps - 1) for i in range(steps)]
    return (*even, half / (half + 0.5), half / (half - 0.5))


def minmax(weight: Tensor, spec: QuantizeSpec, dtype: torch.dtype) -> Grid:
    """The scale whose range just holds the group. weight: float32 [..., inputs, rows]; grids are [..., rows]."""
    low, high = code_range(spec.bits)
    if spec.symmetric:
        least, most = weight.amin(-2), weight.amax(-2)
        extreme = torch.maximum(-least, most)
        if spec.signed:
            return Grid(stored(torch.where(most > -least, -extreme, extreme) / -low, dtype), None)
        return Grid(stored(extreme / ((high - low) / 2), dtype), None)
    least, most = weight.amin(-2).clamp_max_(0.0), weight.amax(-2).clamp_min_(0.0)
    scale = stored((most - least) / (high - low), dtype)
    return Grid(scale, torch.round(low - least / scale).clamp_(low, high))


def fit(weight: Tensor, importance: Tensor | None, spec: QuantizeSpec, dtype: torch.dtype) -> Grid:
    """The best of the grid by (weighted) squared error.

    weight: float32 [..., inputs, rows]. importance: float32 [..., inputs] or None for equal weights. dtype: how scales
    are stored.
    """
    if not spec.symmetric:
        return _fit_affine(weight, importance, spec, dtype)
    low, high = code_range(spec.bits)
    extreme = weight.abs().amax(-2) / ((high - low) / 2)
    best = torch.full_like(extreme, torch.inf)
    scale = extreme
    for fraction in fractions(spec.bits):
        candidate = stored(fraction * extreme, dtype)
        codes = weight / candidate.unsqueeze(-2)
        nearest = torch.round(codes)
        for sign in (1, -1) if spec.signed else (1,):
            bounds = (low, high) if sign > 0 else (-high, -low)
            left = nearest.clamp(*bounds).sub_(codes)
            loss = _weighted(left, importance).mul_(candidate.square())
            better = loss < best
            best = torch.where(better, loss, best)
            scale = torch.where(better, sign * candidate, scale)
    return Grid(stored(scale, dtype), None)


def _fit_affine(weight: Tensor, importance: Tensor | None, spec: QuantizeSpec, dtype: torch.dtype) -> Grid:
    low, high = code_range(spec.bits)
    least, most = weight.amin(-2).clamp_max_(0.0), weight.amax(-2).clamp_min_(0.0)
    first = minmax(weight, spec, dtype)
    assert first.zero is not None
    scale, zero = first.scale, first.zero
    best = torch.full_like(scale, torch.inf)
    total = float(weight.shape[-2]) if importance is None else importance.sum(-1, keepdim=True).clamp_min(1e-30)
    for fraction in fractions(spec.bits):
        candidate = stored(fraction * (most - least) / (high - low), dtype)
        codes = weight / candidate.unsqueeze(-2)
        nearest = torch.round(codes)
        # The clipped range keeps the middle of the full one.
        middle = (most + least) / (2 * candidate)
        shift = torch.round((low + high) / 2 - middle).clamp_(low, high)
        for _ in range(2):
            left = nearest.clamp((low - shift).unsqueeze(-2), (high - shift).unsqueeze(-2)).sub_(codes)
            loss = _weighted(left, importance).mul_(candidate.square())
            better = loss < best
            best = torch.where(better, loss, best)
            scale = torch.where(better, candidate, scale)
            zero = torch.where(better, shift, zero)
            drift = (left.sum(-2) if importance is None else torch.einsum("...ir,...i->...r", left, importance)) / total
            shift = torch.round(shift + drift).clamp_(low, high)
    return Grid(scale, zero)


def _weighted(left: Tensor, importance: Tensor | None) -> Tensor:
    """sum_i importance_i left_ir^2: [..., rows]; overwrites `left`."""
    left.square_()
    return left.sum(-2) if importance is None else torch.einsum("...ir,...i->...r", left, importance)
