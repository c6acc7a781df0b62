"""ALPS: the mask by ADMM, in which all weights move together until they have the pattern.

    minimise  tr((B - W) H (B - W)^T)  such that  B = D  and  D has the pattern,

is taken apart by the alternating direction method of multipliers (Meng et al. 2024, arXiv 2406.07831): with a penalty r
and multipliers V,

    B = (W H - V + r D) (H + r I)^-1        what the data want
    D = the largest of B + V / r            what the pattern allows
    V = V + r (B - D)

r grows while the mask still changes, faster the more it does, until it stands. H is brought to a unit diagonal first,
which makes one r right for loud and quiet inputs; and taken apart once, H = Q L Q^T, so that every step is two matrix
products whatever r has become. What comes out is D on its mask; `repair` then gives the mask its best weights.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmshrink.methods.pruning.contract import Problem, PruneSpec
from llmshrink.methods.pruning.pattern import choose
from llmshrink.methods.pruning.registry import mask_chooser

FIRST_PENALTY = 0.1
EVERY = 3
"""Iterations between two looks at the mask."""
MOST = 300
GROWTH = ((0.1, 1.3), (0.005, 1.2), (0.0, 1.1))
"""Above this share of the mask changed: grow the penalty by that."""
SETTLED = 5
"""Looks in a row at which nothing of the mask changed."""


@mask_chooser("alps")
def alps(target: Tensor, problem: Problem, spec: PruneSpec) -> tuple[Tensor, Tensor]:
    """Choose the mask by ADMM. Returns D and its mask; an unstructured share is taken of the whole matrix."""
    loudness = problem.hessian.diagonal().sqrt()
    hessian = problem.hessian / loudness / loudness.unsqueeze(1)
    values, vectors = torch.linalg.eigh(hessian)
    values.clamp_min_(0.0)
    goal = target * loudness
    pull = goal @ hessian
    dense, multiplier = goal.clone(), torch.zeros_like(goal)
    mask = choose(dense.abs(), spec.pattern, by_row=False)
    seen, penalty, quiet = mask, FIRST_PENALTY, 0
    for iteration in range(1, MOST + 1):
        right = pull - multiplier + penalty * dense
        free = ((right @ vectors) / (values + penalty)) @ vectors.T
        leaning = free + multiplier / penalty
        mask = choose(leaning.abs(), spec.pattern, by_row=False)
        dense = leaning * mask
        multiplier.add_(free - dense, alpha=penalty)
        if iteration % EVERY:
            continue
        changed = float((mask != seen).double().mean())
        seen = mask
        quiet = 0 if changed else quiet + 1
        if quiet == SETTLED:
            break
        penalty *= next((growth for share, growth in GROWTH if changed > share), GROWTH[-1][1])
    return dense / loudness, mask
