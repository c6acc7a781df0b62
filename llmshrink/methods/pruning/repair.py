"""The best weights that a mask allows: exact least squares, row by row.

With S what row w keeps, the v that is zero outside S and comes nearest to w's output solves

    H_SS v_S = (H w)_S,

a positive definite system of |S| unknowns for every row; rows are solved together, by batches of Cholesky factors.
Cheap beside what it brings: a magnitude mask with it beats every plain method.
"""

from __future__ import annotations

import torch
from torch import Tensor

BATCH_BYTES = 1 << 27


def least_squares(target: Tensor, mask: Tensor, hessian: Tensor) -> Tensor:
    """The minimiser of (v - w) H (v - w)^T over each row's mask.

    target: float32 [out, in], w. mask: bool [out, in]. hessian: float32 [in, in], positive definite. Returns float32
    [out, in], exactly zero outside the mask. A row that keeps nothing is zero.
    """
    counts = mask.sum(1)
    result = torch.zeros_like(target)
    wanted = target @ hessian
    # Rows that keep about as much are solved together, so that little is padded.
    order = counts.argsort(stable=True)
    largest = int(counts.max()) if len(counts) else 0
    if largest == 0:
        return result
    chunk = max(1, BATCH_BYTES // (4 * largest * largest))
    for start in range(0, len(order), chunk):
        rows = order[start : start + chunk]
        size = int(counts[rows].max())
        if size == 0:
            continue
        kept = mask[rows].to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :size]
        real = torch.arange(size, device=mask.device) < counts[rows].unsqueeze(1)
        system = hessian[kept.unsqueeze(2), kept.unsqueeze(1)]
        # Where a row keeps fewer, the rest of its system is the identity against zeros.
        both = real.unsqueeze(2) & real.unsqueeze(1)
        system = torch.where(both, system, torch.diag_embed((~real).to(system.dtype)))
        right = wanted[rows].gather(1, kept) * real
        solution = torch.cholesky_solve(right.unsqueeze(2), torch.linalg.cholesky(system)).squeeze(2)
        result[rows] = torch.zeros_like(result[rows]).scatter_(1, kept, solution * real)
    return result
