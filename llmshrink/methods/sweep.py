"""The GPTQ sweep with scales that were fixed before it.

Columns are quantized one after another; what column i got wrong is made good by the columns after it, in the way that
the inverse Hessian's factor U says is best (Frantar et al. 2022, arXiv 2210.17323):

    e_i = w_i - Q(w_i),        w_j -= e_i * U_ij / U_ii   for all j > i.

Written from the receiving side, w_j' = w_j - sum_{i<j} e_i * (U_ij / U_ii), it needs no read-modify-write of all later
columns: the errors of a finished column take the place of its weights, and a block of columns collects all that it is
owed in one matrix product before it starts; inside it, short runs of columns do the same, and only within a run are
errors gathered column by column. The weight is transposed, [inputs, rows], in the factor's order.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmshrink.methods import fused
from llmshrink.methods.scales import Grid
from llmshrink.weights import code_range

RUN = 8


def collect_(weight: Tensor, unit: Tensor, done: int, start: int, stop: int) -> None:
    """Take from columns start..stop what the errors of columns done..start left them to make good, in place."""
    if start > done:
        weight[start:stop].addmm_(unit[done:start, start:stop].T, weight[done:start], alpha=-1.0)


def sweep_(
    weight: Tensor, unit: Tensor, grid: Grid, group: Tensor, bits: int, block_size: int, keep: Tensor | None = None
) -> Tensor:
    """Quantize all columns in order, and return their codes: int8 [in, rows].

    weight: float32 [in, rows]; overwritten with the errors. unit: `Factor.unit`. grid: scales [groups, rows]. group:
    int64 [in], the group of each column. block_size: columns between two lazy updates. keep: float32 [in, rows], 0 for
    what was pruned, whose value stays exactly 0, and 1 for all else; None keeps all.
    """
    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    kernels = keep is None and fused.has_kernels(weight.device)
    groups = [] if kernels else group.tolist()
    inverse = grid.scale.reciprocal()
    for start in range(0, weight.shape[0], block_size):
        stop = min(start + block_size, weight.shape[0])
        collect_(weight, unit, 0, start, stop)
        if kernels:
            from llmshrink_kernels.gptq_block import sweep_block

            block, inside = unit[start:stop, start:stop], group[start:stop]
            done = sweep_block(weight[start:stop], block, grid.scale, grid.zero, inside, bits=bits)
            codes[start:stop], weight[start:stop] = done
        else:
            _block_(weight, codes, unit, grid, inverse, groups, bits, start, stop, keep)
    return codes


def _block_(
    weight: Tensor,
    codes: Tensor,
    unit: Tensor,
    grid: Grid,
    inverse: Tensor,
    groups: list[int],
    bits: int,
    start: int,
    stop: int,
    keep: Tensor | None,
) -> None:
    """Quantize columns start..stop, which have collected what the columns before them left, in place."""
    low, high = code_range(bits)
    for run in range(start, stop, RUN):
        end = min(run + RUN, stop)
        collect_(weight, unit, start, run, end)
        for i in range(run, end):
            column = weight[i]
            if i > run:
                column.addmv_(weight[run:i].T, unit[run:i, i], alpha=-1.0)
            g = groups[i]
            code = torch.mul(column, inverse[g]).round_()
            if grid.zero is None:
                code.clamp_(low, high)
                if keep is not None:
                    code.mul_(keep[i])
                codes[i] = code
            else:
                code.add_(grid.zero[g]).clamp_(low, high)
                if keep is not None:
                    code.lerp_(grid.zero[g], 1 - keep[i])
                codes[i] = code
                code.sub_(grid.zero[g])
            column.addcmul_(code, grid.scale[g], value=-1.0)
