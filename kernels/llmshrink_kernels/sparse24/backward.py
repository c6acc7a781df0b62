"""dX = dY W for a 2:4 weight: what training through a frozen one needs.

Blocks of W's columns are brought back and multiplied, so that no sum over the rows is taken apart. A block is whole
packets and whole groups of scales: then it is a packed weight itself, a slice of `words` and of `scales`.
"""

from __future__ import annotations

import math
from dataclasses import replace

from torch import Tensor

from llmshrink_kernels.device import runs_triton
from llmshrink_kernels.sparse24 import dequantize
from llmshrink_kernels.sparse24.prepack import PackedSparse


def matmul_transposed(y: Tensor, packed: PackedSparse) -> Tensor:
    """X = Y W. y: [M, N]; returns [M, K] in y's dtype."""
    result = y.new_empty(y.shape[0], packed.in_features)
    # CPUs multiply 16 bits slowly, if at all.
    work = y if runs_triton(y.device) else y.float()
    span = packed.packet if packed.group_size == -1 else math.lcm(packed.packet, packed.group_size)
    step = max(span, dequantize.BLOCK_BYTES // (packed.out_features * work.element_size()) // span * span)
    every = range(packed.out_features)
    for start in range(0, packed.in_features, step):
        block = columns(packed, start, min(start + step, packed.in_features))
        result[:, start : start + step] = work @ dequantize.dequantize(block, every, work.dtype)
    return result


def columns(packed: PackedSparse, start: int, stop: int) -> PackedSparse:
    """Columns start..stop of the weight, sharing its memory. start: where a packet and a group begin."""
    scales = packed.scales
    if scales is not None and packed.kernel_group:
        scales = scales[start // packed.kernel_group : -(-stop // packed.kernel_group)]
    words = packed.words[start // packed.packet : -(-stop // packed.packet)]
    return replace(packed, words=words, scales=scales, in_features=stop - start)
