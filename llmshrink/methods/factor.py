"""The factor of the inverse Hessian that the sweep, the trial and the corrected target all use.

With `H_d = H + damp * mean(diag H) * I` in the order in which columns will be quantized, GPTQ needs the upper Cholesky
factor U of the inverse, `H_d^-1 = U^T U` (Frantar et al. 2022, arXiv 2210.17323). The usual chain factorises H,
inverts it, and factorises the inverse: 4/3 d^3. But reversing the order of rows and columns turns an upper factor into
a lower one: with J the reversal and `L L^T = J H_d J`, `R = J L J` is upper with `R R^T = H_d`, and so `U = R^-1 =
J L^-1 J`: one factorisation and one triangular inverse, 2/3 d^3.

A factorisation that fails is tried again in float64, then with ten times the damping, then refused; each step is an
event of the report. An input that is never active (H_jj = 0) is given the mean diagonal: it then has no part in any
other column's error, and keeps its round-to-nearest weight.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llmshrink.methods.contract import SolveError, check_finite

LARGEST_DAMPING = 1.0
SMALLEST_RETRY = 0.01


@dataclass(frozen=True, eq=False)
class Factor:
    """U in two pieces, so that a sweep never divides.

    unit: float32 [in, in], U with each row divided by its diagonal (upper, ones on the diagonal).
    importance: float32 [in], 1 / U_ii^2, what a squared error of column i costs once all later columns have adapted.
    order: int64 [in], the input that is quantized i-th; both of the above are in this order.
    damping: the fraction of the mean diagonal that was added. events: what went otherwise than asked.
    """

    unit: Tensor
    importance: Tensor
    order: Tensor
    damping: float
    events: tuple[str, ...]


def factorise(hessian: Tensor, order: Tensor, damp: float) -> Factor:
    """Factorise the inverse of the damped Hessian.

    hessian: [in, in], symmetric, undamped, left as it is. order: int64 [in], a permutation. damp: a fraction of the
    mean diagonal. Raises SolveError on NaN, or when no damping up to the mean diagonal itself helps.
    """
    check_finite("the Hessian", hessian)
    dead, live, mean = _activity(hessian)
    events: list[str] = []
    if live < len(dead):
        events.append(f"{len(dead) - live} of {len(dead)} inputs are never active: rounded to nearest")
    ridge = torch.where(dead, mean, 0.0).index_select(0, order.flip(0))

    for damping, dtype in attempts(damp):
        lower = _cholesky(_reversed(hessian, order, ridge + damping * mean, dtype))
        if lower is not None:
            if dtype == torch.float64:
                events.append(f"Cholesky failed in float32: done in float64 with damping {damping:g}")
            invert_lower_(lower)
            upper = lower.to(torch.float32).flip(0, 1)
            scale = upper.diagonal().clone()
            upper /= scale.unsqueeze(1)
            return Factor(upper, scale.pow(-2), order, damping, tuple(events))
    raise SolveError(_unfactorable(len(dead), mean))


def _unfactorable(inputs: int, mean: float) -> str:
    return (
        f"the Hessian can't be factorised, even with its mean diagonal added to its diagonal ({inputs} inputs, "
        f"mean {mean:g}): calibrate with more tokens, or use method rtn"
    )


def lower_factor(hessian: Tensor, damp: float) -> tuple[Tensor, tuple[str, ...]]:
    """L, float32 [in, in], with `L L^T = H_d` in the natural order, and what went otherwise than asked.

    hessian: [in, in], undamped. Raises SolveError where no damping up to the mean diagonal itself helps.
    """
    for damping, dtype in attempts(damp):
        lower = _cholesky(damped(hessian, damping).to(dtype))
        if lower is not None:
            said = f"the corrected target's Cholesky failed in float32: done in float64 with damping {damping:g}"
            return lower.to(torch.float32), (said,) if dtype == torch.float64 else ()
    raise SolveError(_unfactorable(len(hessian), _activity(hessian)[2]))


def damped(hessian: Tensor, damping: float) -> Tensor:
    """What `factorise` factorised, in float32 and in the natural order. damping: the fraction that it came to."""
    dead, _, mean = _activity(hessian)
    result = hessian.to(torch.float32).clone()
    result.diagonal().add_(torch.where(dead, mean, 0.0) + damping * mean)
    return result


def _activity(hessian: Tensor) -> tuple[Tensor, int, float]:
    """Which inputs are never active, bool [in]; how many are; the mean of their diagonal, 1 where there is none."""
    diagonal = hessian.diagonal()
    dead = diagonal <= 0
    live = int((~dead).sum())
    return dead, live, float(diagonal.double().clamp_min(0).sum() / live) if live else 1.0


def attempts(damp: float) -> list[tuple[float, torch.dtype]]:
    """The dampings and dtypes in which a factorisation is tried, one after the other."""
    attempts = [(damp, torch.float32), (damp, torch.float64)]
    while damp < LARGEST_DAMPING:
        damp = min(max(10 * damp, SMALLEST_RETRY), LARGEST_DAMPING)
        attempts.append((damp, torch.float64))
    return attempts


def _reversed(hessian: Tensor, order: Tensor, ridge: Tensor, dtype: torch.dtype) -> Tensor:
    """The damped Hessian, its last column in the order first."""
    backwards = order.flip(0)
    work = hessian.index_select(0, backwards).index_select(1, backwards).to(dtype)
    work.diagonal().add_(ridge)
    return work


def _cholesky(matrix: Tensor) -> Tensor | None:
    """The lower factor, or None where the matrix isn't positive definite."""
    lower, info = torch.linalg.cholesky_ex(matrix)
    return lower if int(info) == 0 and bool(torch.isfinite(lower.diagonal()).all()) else None


def invert_lower_(lower: Tensor) -> None:
    """Invert a lower triangular matrix in place: [n, n], zeros above its diagonal.

    By halves, [[A, 0], [B, C]]^-1 = [[A^-1, 0], [-C^-1 B A^-1, C^-1]], so that nearly all of the work is matrix
    products; solving against the identity costs half as much again and a matrix more.
    """
    n = lower.shape[0]
    if n <= 128:
        identity = torch.eye(n, dtype=lower.dtype, device=lower.device)
        lower.copy_(torch.linalg.solve_triangular(lower, identity, upper=False))
        return
    half = n // 2
    first, second, corner = lower[:half, :half], lower[half:, half:], lower[half:, :half]
    invert_lower_(first)
    invert_lower_(second)
    corner.copy_((second @ corner).neg_() @ first)
