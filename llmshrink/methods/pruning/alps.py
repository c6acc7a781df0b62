"""ALPS: the mask by ADMM, in which all weights move together until they have the pattern.

    minimise  tr((B - W) H (B - W)^T)  such that  B = D  and  D has the pattern,

is taken apart by the alternating direction method of multipliers (Meng et al. 2024, arXiv 2406.07831): with a penalty r
and multipliers V,

    B = (W H - V + r D) (H + r I)^-1        what the data want
    D = the largest of B + V / r            what the pattern allows
    V = V + r (B - D)

H is brought to a unit diagonal first, which makes one r right for loud and quiet inputs. The mask is decided while r
goes from where the pattern begins to pull to `LAST`. Where that is depends on how much the inputs depend on each
other, which the geometric mean t of the eigenvalues tells: some share of t^2 (t is .06 to .9 in two real models; from
.1 for all, the worst site's error was 17 % higher). The slower r grows, the better the mask. Narrow layers, where steps
cost little, have `SLOW`: on 24 sites of two real models, repaired, the errors are .1 % below those of 140 steps of 1.05
from .003 until the mask was still, the worst .5 % above. Wide ones have `FAST`, with half of the steps or less: up to
.6 % above where t is .55 or more, up to 2 % at .3 to .4, on such sites; SparseGPT's masks are 8 to 20 % above.

r changes every `EACH` steps only. Then (H + r I)^-1 costs one factorisation for each r, and a step one product with it.
V is zero on the mask and D off it, so that one matrix, L = D + V / r, holds both. What comes out is D on its mask;
`repair` then gives the mask its best weights.
"""

from __future__ import annotations

import math

import torch
from llmshrink_kernels.products import times_transposed
from torch import Tensor

from llmshrink.methods.pruning.contract import Problem, PruneSpec
from llmshrink.methods.pruning.pattern import choose
from llmshrink.methods.pruning.registry import mask_chooser

SLOW, FAST = (0.3, 1.03), (0.8, 1.06)
"""Where r begins, in t^2, and by how much it grows a step."""
LEAST, LAST = 1e-3, 1.1
"""r, at first at least and at last. What is below LEAST can't be told from rounding in wide layers."""
EACH = 4
NARROW, WIDE = 1536, 3072
"""Inputs up to which r grows slowly, and from which fast."""
MOST = 120
"""Steps; r grows faster where they wouldn't do."""


@mask_chooser("alps")
def alps(target: Tensor, problem: Problem, spec: PruneSpec) -> tuple[Tensor, Tensor]:
    """Choose the mask by ADMM. Returns D and its mask; an unstructured share is taken of the whole matrix."""
    loudness = problem.hessian.diagonal().sqrt()
    hessian = problem.hessian / loudness / loudness.unsqueeze(1)
    leaning = target * loudness
    pull = times_transposed(leaning, hessian)
    mask = choose(leaning.abs(), spec.pattern, by_row=False)
    leaning.mul_(mask)
    earlier = None
    for penalty in penalties(target.shape[1], problem.typical):
        if earlier is not None:
            # The multipliers stay what they are.
            leaning.mul_(torch.where(mask, 1.0, earlier / penalty))
        inverse = _inverse(hessian, penalty)
        for _ in range(EACH):
            signed = torch.where(mask, leaning, -leaning)
            free = times_transposed(signed.mul_(penalty).add_(pull), inverse)
            leaning = free.add_(leaning.mul_(~mask))
            mask = choose(leaning.abs(), spec.pattern, by_row=False)
        earlier = penalty
    return leaning.mul_(mask).div_(loudness), mask


def penalties(inputs: int, typical: float) -> list[float]:
    """Each penalty of the schedule; `EACH` steps are made with it.

    typical: the geometric mean of the Hessian's eigenvalues, its diagonal being 1.
    """
    wide = min(max((inputs - NARROW) / (WIDE - NARROW), 0.0), 1.0)
    pulls, growth = (slow ** (1 - wide) * fast**wide for slow, fast in zip(SLOW, FAST, strict=True))
    first = max(pulls * typical**2, LEAST)
    count = min(math.ceil(math.log(LAST / first) / math.log(growth) / EACH), MOST // EACH)
    return [first * (LAST / first) ** (number / (count - 1)) for number in range(count)]


def _inverse(hessian: Tensor, penalty: float) -> Tensor:
    """(H + penalty I)^-1, float32 [in, in]; H is positive definite but for rounding, which the penalty is far above."""
    work = hessian.clone()
    work.diagonal().add_(penalty)
    return torch.cholesky_inverse(torch.linalg.cholesky(work))
