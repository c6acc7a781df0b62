"""The best weights that a mask allows: least squares, all rows together by preconditioned conjugate gradients.

With S what row w keeps, the v that is zero outside S and comes nearest to w's output solves

    H_SS v_S = (H w)_S,

a positive definite system of its own for every row. Factorising each would cost rows x |S|^3 / 3, the fourth power of a
layer's width where all else is the third. Conjugate gradients need H only in the product p H of all rows at once,
masked after it (as in ALPS, Meng et al. 2024, arXiv 2406.07831): one product of the weight's size a step.

The preconditioner is one for all rows. A random half of the inputs inverts, on average, like (H + o I)^-1 does, with
H of unit diagonal and o such that tr H (H + o I)^-1 = |S| (Derezinski et al. 2020, arXiv 2006.10653); taken exactly it
halves the steps and doubles a step. Nearly as much comes from its largest directions alone, the loud and shared ones:
with u their eigenvectors and e their eigenvalues, c the mean of the others and o the geometric mean of all that is left
(close to the true one wherever it was measured),

    M^-1 = D^-1/2 (I - u (1 - (c + o) / (e + o)) u^T) D^-1/2.

Rows start from what the mask's method left and are done one by one. With r what is left of a row's gradient, on S, its
error is r H_SS^-1 r^T above the least one: about r M^-1 r^T, which each step has at hand, times `BOUND` / o for the
directions that M makes too little of. A row is done when that is below `TOLERANCE` of its error, and takes no part in
later products. No step makes a row worse, so that one that isn't done after `MOST` steps keeps what it has, and is
counted.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from llmshrink_kernels.products import times_transposed
from torch import Tensor

from llmshrink.methods.pruning.contract import Problem

TOLERANCE = 5e-3
"""Of a row's output error, as it is estimated. On sites of two real models, with masks of sparsegpt and wanda, what was
left was .2 to .9 % of all rows' error together."""
MOST = 200
ROUNDING = 1e-6
"""Of a row's error at the start: less than that can't be told from rounding."""
BOUND = 0.8
DIRECTIONS, SHARE, PASSES = 64, 64, 3
"""Eigenvectors: one for every SHARE inputs, at most so many, by so many passes of subspace iteration."""
PIECE = 1 << 22
"""Elements of the rows that are solved together: 16 MB for each of eight matrices."""


@dataclass(frozen=True, eq=False)
class Preconditioner:
    """M^-1 = diag(inverse) - directions diag(gain) directions^T.

    inverse: float32 [in]. directions: float32 [in, k]. gain: float32 [k]. bound: r M^-1 r^T times this
    is how far a row is taken to be above its least error.
    """

    inverse: Tensor
    directions: Tensor
    gain: Tensor
    bound: float

    def of(self, residual: Tensor, mask: Tensor) -> Tensor:
        """residual M^-1 on the mask, for float32 [rows, in]."""
        found = residual * self.inverse
        found.addmm_((residual @ self.directions).mul_(self.gain), self.directions.T, alpha=-1)
        return found.mul_(mask)


def least_squares(
    target: Tensor, mask: Tensor, problem: Problem, start: Tensor | None = None, tolerance: float = TOLERANCE
) -> tuple[Tensor, tuple[str, ...]]:
    """The minimiser of (v - w) H (v - w)^T over each row's mask, and what went otherwise than asked.

    target: float32 [out, in], w. mask: bool [out, in]. start: float32 [out, in], where to begin; w itself if None.
    tolerance: how far a row's error may be above the least one, as a share of it. Returns float32 [out, in], exactly
    zero outside the mask; a row that keeps nothing is zero.
    """
    result = torch.empty_like(target)
    by = preconditioner(problem.hessian, problem.typical)
    unfinished = 0
    rows = max(1, PIECE // target.shape[1])
    for first in range(0, len(target), rows):
        part = slice(first, first + rows)
        began = (target if start is None else start)[part] * mask[part]
        unfinished += _solve(target[part], mask[part], problem.hessian, began, by, tolerance, result[part])
    if not unfinished:
        return result, ()
    within = f"not within {tolerance:.1%} of their least error after {MOST} steps"
    return result, (f"repair: {unfinished} of {len(target)} rows {within}",)


def preconditioner(hessian: Tensor, typical: float) -> Preconditioner:
    """One for all rows: the diagonal, and the largest eigenvectors of the Hessian of unit diagonal.

    hessian: float32 [in, in], positive definite. typical: the geometric mean of its eigenvalues, its diagonal being 1.
    """
    width = len(hessian)
    count = min(DIRECTIONS, width // SHARE)
    inverse = hessian.diagonal().reciprocal()
    root = inverse.sqrt().unsqueeze(1)
    bound = BOUND / typical
    if not count:
        return Preconditioner(inverse, hessian[:, :0], inverse[:0], bound)
    found = torch.randn(width, count, generator=torch.Generator().manual_seed(0)).to(hessian)
    for _ in range(PASSES):
        found = torch.linalg.qr((hessian @ (found * root)).mul_(root)).Q
    values, turn = torch.linalg.eigh(found.T @ (hessian @ (found * root)).mul_(root))
    others = max(width - float(values.sum()), 0.0) / (width - count)
    return Preconditioner(inverse, (found @ turn) * root, 1 - (others + typical) / (values + typical), bound)


def _solve(
    target: Tensor, mask: Tensor, hessian: Tensor, value: Tensor, by: Preconditioner, tolerance: float, result: Tensor
) -> int:
    """Rows that are solved together, into `result`; returns how many aren't done. value: where they start."""
    missing = target - value
    residual = times_transposed(missing, hessian)
    error = torch.linalg.vecdot(missing, residual)
    floor = ROUNDING * error
    residual.mul_(mask)
    del missing
    step = by.of(residual, mask)
    slope = torch.linalg.vecdot(residual, step)
    place = torch.arange(len(value), device=value.device)
    active = slope * by.bound > torch.maximum(tolerance * error, floor)
    for number in range(MOST + 1):
        if not bool(active.all()):
            result[place[~active]] = value[~active]
            place, mask, value, residual, step = (each[active] for each in (place, mask, value, residual, step))
            error, floor, slope = error[active], floor[active], slope[active]
        if not len(place) or number == MOST:
            break
        through = times_transposed(step, hessian).mul_(mask)
        curvature = torch.linalg.vecdot(step, through)
        # What rounding has left no curvature of is as near as float32 comes.
        length = torch.where(curvature > 0, slope / curvature, 0.0)
        value.addcmul_(step, length.unsqueeze(1))
        residual.addcmul_(through, length.unsqueeze(1), value=-1)
        error = error - length * slope
        turned = by.of(residual, mask)
        after = torch.linalg.vecdot(residual, turned)
        step.mul_((after / slope).unsqueeze(1)).add_(turned)
        slope = after
        active = (slope * by.bound > torch.maximum(tolerance * error, floor)) & (curvature > 0)
    result[place] = value
    return len(place)
