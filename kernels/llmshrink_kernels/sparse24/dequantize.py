"""Rows of the weight in 16 or 32 bits, and the product that is taken through them.

With many rows of x the multiplication is what takes time, and zeros are multiplied as fast by the vendor's library as
anything else is: the weight is brought back to x's dtype a block of rows at a time and multiplied there. The same code
is the plain torch path where there is no Triton (then in float32): it takes the words apart as the kernel does, four
inputs at a time, by a table of where they go. Going back to the canonical form first costs several times as much.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import embedding

from llmshrink_kernels.device import runs_triton
from llmshrink_kernels.sparse24.prepack import SLABS, PackedSparse

BLOCK_BYTES = 32 << 20
"""Of dense weights at a time: memory doesn't grow with the weight, and a Hopper's L2 still holds it when it is read."""
CPU_BLOCK_BYTES = 2 << 20
"""The same where there is no Triton: what a CPU's second cache holds."""
TILE_ROWS = 64


def dequantize(packed: PackedSparse, rows: range, dtype: torch.dtype) -> Tensor:
    """scale * code, taken in float32 and rounded once: [rows, K]."""
    if runs_triton(packed.words.device):
        from llmshrink_kernels.sparse24.launch import dequantize_rows

        return dequantize_rows(packed, rows, dtype)
    dense = _fours(packed, rows).view(len(rows), packed.padded_in)
    if packed.scales is not None:
        scales = packed.scales[:, rows.start : rows.stop].T.float().unsqueeze(-1)
        # There are scales as far as there are inputs; words go on to the packet's end.
        covered = scales.shape[1] * packed.kernel_group or packed.padded_in
        dense = (dense[:, :covered].unflatten(1, (scales.shape[1], -1)) * scales).flatten(1)
    return dense[:, : packed.in_features].to(dtype)


def _fours(packed: PackedSparse, rows: range) -> Tensor:
    """The values without their scales, zeros in their places: float32 [rows, packets, slabs, groups of a slab, 4]."""
    planes, fields = packed.bits // 2, 16 // packed.bits
    words = packed.words[:, :, rows.start : rows.stop].permute(2, 0, 1, 3).contiguous()
    # Lower words and upper words, as [rows, packets, planes, fields, groups of a slab].
    low, high = (half.unsqueeze(3) for half in words.unflatten(-1, (-1, 2)).unbind(-1))
    shape = (len(rows), words.shape[1], SLABS, packed.slab // 4)
    field = torch.arange(fields, dtype=torch.int16, device=words.device).unsqueeze(-1)
    plane = torch.arange(planes, dtype=torch.int16, device=words.device).view(-1, 1, 1)
    at = packed.bits * field + 2 * plane
    mask = low[:, :, planes:] >> at & 3 | (high[:, :, planes:] >> at & 1) << 2
    low, high = low[:, :, :planes], high[:, :, :planes]
    if packed.bits == 4:
        index = low >> 4 * field & 15 | (high >> 4 * field & 15) * 16 | mask * 256
        looked_up: Tensor = embedding(index.int(), LOOKUP.to(words.device))
        return looked_up.view(*shape, 4)
    values = [_values(packed, half).reshape(*shape, 1) for half in (low, high)]
    first, second = (embedding(mask.view(shape).int(), table) for table in PLACES.to(words.device).unbind())
    return torch.addcmul(first.mul_(values[0]), second, values[1])


def _values(packed: PackedSparse, words: Tensor) -> Tensor:
    """The 8- or 16-bit numbers in words [..., 1, S / 4], the first field first: float32 [..., fields, S / 4]."""
    words = words.contiguous()
    if packed.bits == 16:
        return words.view(torch.bfloat16 if packed.bfloat else torch.float16).float()
    octets = words.view(torch.int8).view(*words.shape[:-2], -1, 2)
    return octets.transpose(-1, -2).float()


def _places() -> Tensor:
    """Where among four inputs the lower and the upper word's values go: float32 [2, 8, 4], of zeros and ones.

    By the mask, M0 + 2 C + 4 M1, and the table of prepack.py.
    """
    mask = torch.arange(8, device="cpu")
    zeroth, crossed, first = ((mask >> bit & 1).bool() for bit in range(3))
    second, third = zeroth == crossed, first == crossed
    never = torch.zeros_like(zeroth)
    low = torch.stack([zeroth, never, second & ~crossed, third & crossed], -1)
    high = torch.stack([never, first, second & crossed, third & ~crossed], -1)
    return torch.stack([low, high]).float()


def _lookup(places: Tensor) -> Tensor:
    """What four inputs are with 4 bits: float32 [2048, 4], by the mask and the upper and lower nibble below it."""
    signed = ((torch.arange(16, device="cpu") ^ 8) - 8).float()
    low, high = (places[half, :, None, None] * signed.view(shape) for half, shape in ((0, (-1, 1)), (1, (-1, 1, 1))))
    return (low + high).view(-1, 4)


PLACES = _places()
LOOKUP = _lookup(PLACES)


def matmul(x: Tensor, packed: PackedSparse) -> Tensor:
    """Y = X W^T through blocks of W's rows. x: [M, K]; returns [M, N] in x's dtype."""
    result = x.new_empty(x.shape[0], packed.out_features)
    # CPUs multiply 16 bits slowly, if at all.
    work = x if runs_triton(x.device) else x.float()
    block = BLOCK_BYTES if runs_triton(x.device) else CPU_BLOCK_BYTES
    step = max(TILE_ROWS, block // (packed.in_features * work.element_size()) // TILE_ROWS * TILE_ROWS)
    for start in range(0, packed.out_features, step):
        rows = range(start, min(start + step, packed.out_features))
        result[:, start : rows.stop] = work @ dequantize(packed, rows, work.dtype).T
    return result
