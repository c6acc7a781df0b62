"""The corrected target: a layer makes good what the layers before it broke.

With the prefix compressed, a layer sees X~ where the original saw X. The weight that comes nearest to the original
output on the inputs it will really get minimises `||W X - V X~||^2`, and is `V = W + W (X - X~) X~^T (X~ X~^T)^-1`, in
the terms of `Statistics`

    W* = W + a * W D (H + damp * mean(diag H) * I)^-1

(GPTAQ, arXiv 2504.02692, solves for the same target inside the sweep; Qronos, arXiv 2505.11695, is a = 1.) Scales are
fitted on W*, and GPTQ runs on W*. `a` below 1 moves less far where few tokens would be overfitted. So does this
damping, which is apart from the sweep's: in directions that few tokens have, a weight shouldn't follow D far, while the
sweep does better the nearer its H is to the data's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmshrink.methods.contract import SiteStatistics, check_finite
from llmshrink.methods.factor import lower_factor


def corrected(weight: Tensor, statistics: SiteStatistics, share: float, damp: float) -> tuple[Tensor, tuple[str, ...]]:
    """W + share * W D H^-1, float32 [out, in], and what went otherwise than asked; W itself where no D is known.

    weight: float32 [out, in]. share: 0 to 1. damp: what is added to H's diagonal, a fraction of its mean. Raises
    SolveError on NaN, or where no damping makes H positive definite.
    """
    cross, rows = statistics.cross, weight.shape[0]
    if share == 0 or (cross is None and statistics.drift is None):
        return weight, ()
    # The division is by far the most of it, and costs as much as it has rows.
    if cross is not None and rows > weight.shape[1]:
        check_finite("the cross term", cross)
        lower, events = lower_factor(statistics.hessian, damp)
        moved = weight @ _divide(cross.to(torch.float32), lower)
    else:
        moved = drift(weight, statistics)
        lower, events = lower_factor(statistics.hessian, damp)
        moved = _divide(moved, lower)
    return weight.add(moved, alpha=share), events


def drift(weight: Tensor, statistics: SiteStatistics) -> Tensor:
    """W D, float32 [out, in], where D or W D is known. weight: float32 [out, in]. Raises SolveError on NaN."""
    found = statistics.drift if statistics.cross is None else statistics.cross
    assert found is not None, "one stream has no D"
    check_finite("the cross term", found)
    found = found.to(torch.float32)
    if statistics.cross is not None:
        return weight @ found
    assert found.shape == weight.shape, (found.shape, weight.shape)
    return found


def _divide(rows: Tensor, lower: Tensor) -> Tensor:
    """rows @ H^-1, [n, in], with H = L L^T."""
    halfway = torch.linalg.solve_triangular(lower.T, rows, upper=True, left=False)
    quotient: Tensor = torch.linalg.solve_triangular(lower, halfway, upper=False, left=False)
    return quotient
