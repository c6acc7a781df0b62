"""SparseGPT: weights are removed column after column, and what goes is made good by the columns that follow.

The sweep is GPTQ's with "zero" in the place of "nearest code" (Frantar and Alistarh 2023, arXiv 2301.00774): with U the
factor of the inverse Hessian, removing w_j costs w_j^2 / U_jj^2 once all later columns have adapted, by

    w_k -= w_j * U_jk / U_jj   for all k > j.

With n of m the mask of m columns is chosen when the sweep reaches them, on the weights as the columns before have left
them; an unstructured share is chosen for `BLOCK` columns at a time, over all rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmshrink.methods.pruning.contract import Problem, PruneSpec
from llmshrink.methods.pruning.pattern import choose
from llmshrink.methods.pruning.registry import mask_chooser
from llmshrink.methods.sweep import RUN, collect_

BLOCK = 128


@mask_chooser("sparsegpt")
def sparsegpt(target: Tensor, problem: Problem, spec: PruneSpec) -> tuple[Tensor, Tensor]:
    """Choose and remove in one sweep. Returns the weight, what is kept having adapted, and the mask."""
    unit, importance = problem.factor.unit, problem.factor.importance
    # Transposed, [in, rows]: a finished column holds its error, what it was before it was removed.
    left = target.T.contiguous()
    mask = torch.empty(left.shape, dtype=torch.bool, device=left.device)
    kept = torch.empty_like(left)
    width = left.shape[0]
    step = spec.pattern.block or RUN
    for start in range(0, width, BLOCK // step * step):
        stop = min(start + BLOCK // step * step, width)
        collect_(left, unit, 0, start, stop)
        if not spec.pattern.block:
            scores = left[start:stop].square() * importance[start:stop].unsqueeze(1)
            mask[start:stop] = choose(scores.T, spec.pattern, by_row=False).T
        for run in range(start, stop, step):
            end = min(run + step, stop)
            collect_(left, unit, start, run, end)
            if spec.pattern.block:
                scores = left[run:end].square() * importance[run:end].unsqueeze(1)
                mask[run:end] = choose(scores.T.contiguous(), spec.pattern, by_row=True).T
            for i in range(run, end):
                if i > run:
                    left[i].addmv_(left[run:i].T, unit[run:i, i], alpha=-1.0)
                torch.mul(left[i], mask[i], out=kept[i])
                left[i].mul_(~mask[i])
    return kept.T.contiguous(), mask.T.contiguous()
