"""Blocks of the weight in 16 or 32 bits, and the products that are taken through them.

With many rows of x the multiplication is what takes time, and nothing multiplies like the vendor's library: the weight
is brought back to x's dtype a block at a time and multiplied there. The same code is the plain torch path where there
is no Triton (then in float32), and the backward. A block is at most `BLOCK_BYTES`, so that memory doesn't grow with
the weight, and so that the block is still in the cache when it is read: a Hopper's L2, a CPU core's share of the last
level (one row by 4096 x 4096 in 4 bits: 14 ms in blocks of 4 MB, 47 ms of 32 MB).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from llmshrink_kernels.device import runs_triton
from llmshrink_kernels.wna16.prepack import PackedWeight, unpack_block

BLOCK_BYTES = {"cuda": 32 << 20, "cpu": 4 << 20}
TILE_ROWS = 64


def dequantize(packed: PackedWeight, rows: range, packets: range, dtype: torch.dtype) -> Tensor:
    """scale * (code - zero-point), taken in float32 and rounded once: [rows, columns of those packets].

    packets: from one that begins a group on. The padding of K is not part of the result.
    """
    columns = min(packets.stop * packed.packet, packed.in_features) - packets.start * packed.packet
    if runs_triton(packed.words.device):
        from llmshrink_kernels.wna16.launch import dequantize_block

        return dequantize_block(packed, rows, packets, columns, dtype)
    codes = unpack_block(packed, rows, packets)
    group = codes.shape[1] if packed.group_size == -1 else packed.group_size
    first = 0 if packed.group_size == -1 else packets.start * packed.packet // group
    part = slice(first, first + codes.shape[1] // group), slice(rows.start, rows.stop)
    values = codes.float().view(len(rows), -1, group)
    if packed.zero_points is not None:
        values -= packed.zero_points[part].t().unsqueeze(-1)
    values *= packed.scales[part].t().float().unsqueeze(-1)
    return values.view(codes.shape)[:, :columns].to(dtype)


def matmul(x: Tensor, packed: PackedWeight) -> Tensor:
    """Y = X W^T through blocks of W's rows. x: [M, K]; returns [M, N] in x's dtype."""
    result = x.new_empty(x.shape[0], packed.out_features)
    work = _work(x)
    packets = range(packed.padded_in // packed.packet)
    step = max(TILE_ROWS, _block_bytes(work) // (packed.in_features * work.element_size()) // TILE_ROWS * TILE_ROWS)
    for rows in _ranges(packed.out_features, step):
        _product(work, dequantize(packed, rows, packets, work.dtype).t(), result[:, rows.start : rows.stop])
    return result


def matmul_transposed(y: Tensor, packed: PackedWeight) -> Tensor:
    """X = Y W through blocks of W's columns, so that no sum is taken apart. y: [M, N]; returns [M, K] in y's dtype."""
    result = y.new_empty(y.shape[0], packed.in_features)
    work = _work(y)
    every = range(packed.out_features)
    step = max(
        packed.step, _block_bytes(work) // (packed.out_features * work.element_size()) // packed.step * packed.step
    )
    for columns in _ranges(packed.in_features, step):
        packets = range(columns.start // packed.packet, -(-columns.stop // packed.packet))
        _product(work, dequantize(packed, every, packets, work.dtype), result[:, columns.start : columns.stop])
    return result


def _product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out = a b, without a temporary where the dtypes are the same. out: may be a slice of columns."""
    if out.dtype == a.dtype:
        torch.mm(a, b, out=out)
    else:
        out.copy_(a @ b)


def _block_bytes(x: Tensor) -> int:
    return BLOCK_BYTES.get(x.device.type, BLOCK_BYTES["cuda"])


def _work(x: Tensor) -> Tensor:
    """x in the dtype of the product: its own on a GPU; else float32, as CPUs multiply 16 bits slowly, if at all."""
    return x if runs_triton(x.device) else x.float()


def _ranges(size: int, step: int) -> Iterator[range]:
    """0..size in ranges of `step`, the last as long as is left."""
    for start in range(0, size, step):
        yield range(start, min(start + step, size))
