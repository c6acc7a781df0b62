"""The two methods that score each weight by itself, and take nothing else into account.

Magnitude keeps the largest |w_ij|: what is removed, if all inputs were equally loud, is smallest. Wanda (Sun et al.
2023, arXiv 2306.11695, eq. 1) knows how loud they are: |w_ij| * sqrt(E[x_j^2]), and compares within a row, as a row's
output is what the error is of. Neither changes what is kept; `repair` does.
"""

from __future__ import annotations

from torch import Tensor

from llmshrink.methods.pruning.contract import Problem, PruneSpec
from llmshrink.methods.pruning.pattern import choose
from llmshrink.methods.pruning.registry import mask_chooser


@mask_chooser("magnitude")
def magnitude(target: Tensor, problem: Problem, spec: PruneSpec) -> tuple[Tensor, Tensor]:
    """Keep the largest weights; an unstructured share is taken of the whole matrix."""
    mask = choose(target.abs(), spec.pattern, by_row=False)
    return target * mask, mask


@mask_chooser("wanda")
def wanda(target: Tensor, problem: Problem, spec: PruneSpec) -> tuple[Tensor, Tensor]:
    """Keep the weights that move the output most; an unstructured share is taken of each row."""
    mask = choose(target.abs() * problem.hessian.diagonal().sqrt(), spec.pattern, by_row=True)
    return target * mask, mask
