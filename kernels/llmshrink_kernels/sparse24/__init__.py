"""2:4 sparse weights of 4, 8 or 16 bits: stored canonically, prepacked for the kernel, multiplied."""

from llmshrink_kernels.sparse24.canonical import (
    compress,
    expand,
    pack_nibbles,
    pack_positions,
    unpack_nibbles,
    unpack_positions,
)
from llmshrink_kernels.sparse24.ops import sparse24_matmul
from llmshrink_kernels.sparse24.prepack import PackedSparse, prepack, unpack

__all__ = [
    "PackedSparse",
    "compress",
    "expand",
    "pack_nibbles",
    "pack_positions",
    "prepack",
    "sparse24_matmul",
    "unpack",
    "unpack_nibbles",
    "unpack_positions",
]
