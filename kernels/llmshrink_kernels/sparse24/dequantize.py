"""Rows of the weight in 16 or 32 bits, and the product that is taken through them.

With many rows of x the multiplication is what takes time, and zeros are multiplied as fast by the vendor's library as
anything else is: the weight is brought back to x's dtype a block of rows at a time and multiplied there. The same code
is the plain torch path where there is no Triton (then in float32).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from llmshrink_kernels.device import runs_triton
from llmshrink_kernels.sparse24 import naive
from llmshrink_kernels.sparse24.prepack import PackedSparse, unpack

BLOCK_BYTES = 32 << 20
"""Of dense weights at a time: memory doesn't grow with the weight, and a Hopper's L2 still holds it when it is read."""
TILE_ROWS = 64


def dequantize(packed: PackedSparse, rows: range, dtype: torch.dtype) -> Tensor:
    """scale * code, taken in float32 and rounded once: [rows, K]."""
    if runs_triton(packed.words.device):
        from llmshrink_kernels.sparse24.launch import dequantize_rows

        return dequantize_rows(packed, rows, dtype)
    part = replace(
        packed,
        words=packed.words[:, :, rows.start : rows.stop],
        scales=None if packed.scales is None else packed.scales[:, rows.start : rows.stop],
        out_features=len(rows),
    )
    return naive.dequantize(*unpack(part), packed.group_size, packed.in_features, torch.float32).to(dtype)


def matmul(x: Tensor, packed: PackedSparse) -> Tensor:
    """Y = X W^T through blocks of W's rows. x: [M, K]; returns [M, N] in x's dtype."""
    result = x.new_empty(x.shape[0], packed.out_features)
    # CPUs multiply 16 bits slowly, if at all.
    work = x if runs_triton(x.device) else x.float()
    step = max(TILE_ROWS, BLOCK_BYTES // (packed.in_features * work.element_size()) // TILE_ROWS * TILE_ROWS)
    for start in range(0, packed.out_features, step):
        rows = range(start, min(start + step, packed.out_features))
        result[:, start : rows.stop] = work @ dequantize(packed, rows, work.dtype).T
    return result
