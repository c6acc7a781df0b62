"""y = x W^T with W in 2, 3, 4 or 8-bit grouped integers and x in fp16 or bf16.

`prepack` (or `prepack_compressed_tensors`) once, offline; `wna16_matmul` from then on. naive.py says what it means.
"""

from __future__ import annotations

from llmshrink_kernels.wna16.compressed import prepack_compressed_tensors, to_compressed_tensors
from llmshrink_kernels.wna16.ops import wna16_matmul
from llmshrink_kernels.wna16.prepack import PackedWeight, prepack, unpack

__all__ = [
    "PackedWeight",
    "prepack",
    "prepack_compressed_tensors",
    "to_compressed_tensors",
    "unpack",
    "wna16_matmul",
]
