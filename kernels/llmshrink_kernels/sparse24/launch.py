"""The kernels' launches: a configuration checked against the weight, the grid, the second pass of a split.

Tensors on the CPU can be given too when Triton interprets (TRITON_INTERPRET=1 before the import): that is how the
tests run the kernels without a GPU. There the assembly's twin computes, in float32.
"""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor
from torch.nn.functional import pad

from llmshrink_kernels.sparse24 import kernel
from llmshrink_kernels.sparse24.prepack import PackedSparse
from llmshrink_kernels.tune import Config
from llmshrink_kernels.wna16.kernel import add_splits
from llmshrink_kernels.wna16.launch import ADDED

DEQUANTIZED_ROWS = 64


def matmul(x: Tensor, packed: PackedSparse, config: Config) -> Tensor:
    """Y = X W^T by the fused kernel. x: [M, K], contiguous, M >= 1; returns [M, N] in x's dtype."""
    check(config, packed)
    rows = x.shape[0]
    if packed.padded_in != packed.in_features:
        x = pad(x, (0, packed.padded_in - packed.in_features))
    assembly = _assembly(x)
    result = torch.empty(rows, packed.out_features, dtype=x.dtype, device=x.device)
    target = result if assembly else torch.empty_like(result, dtype=torch.float32)
    split = config.split_k
    parts = target if split == 1 else torch.empty(split, *target.shape, dtype=torch.float32, device=x.device)
    grid = (-(-rows // config.block_m) * (packed.padded_out // config.block_n), split)
    with _current(x):
        kernel.matmul[grid](
            x,
            packed.words,
            packed.scales,
            parts,
            rows,
            packed.out_features,
            packed.padded_out,
            packed.padded_in,
            **constants(packed, config, x.dtype, assembly=assembly),
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
        if split > 1:
            size = target.numel()
            add_splits[(-(-size // ADDED),)](parts, target, size, SPLIT_K=split, BLOCK=ADDED)
    return result if assembly else result.copy_(target)


def constants(packed: PackedSparse, config: Config, dtype: torch.dtype, *, assembly: bool) -> dict[str, int | bool]:
    """What the fused kernel is compiled for; dtype: x's."""
    return {
        "BITS": packed.bits,
        "GROUP": packed.kernel_group,
        "SLAB": packed.slab,
        "BFLOAT": dtype == torch.bfloat16,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "SPLIT_K": config.split_k,
        "ASM": assembly,
        "WIDE": not assembly,
    }


def dequantize_rows(packed: PackedSparse, rows: range, dtype: torch.dtype) -> Tensor:
    """Some rows of W in `dtype` (fp16 or bf16): [rows, K]."""
    assembly = _assembly(packed.words)
    out = torch.empty(
        len(rows), packed.in_features, dtype=dtype if assembly else torch.float32, device=packed.words.device
    )
    with _current(packed.words):
        kernel.dequantize[(-(-len(rows) // DEQUANTIZED_ROWS), packed.words.shape[0])](
            packed.words,
            packed.scales,
            out,
            rows.start,
            len(rows),
            packed.in_features,
            packed.padded_out,
            BITS=packed.bits,
            GROUP=packed.kernel_group,
            SLAB=packed.slab,
            BFLOAT=dtype == torch.bfloat16,
            BLOCK_N=DEQUANTIZED_ROWS,
            ASM=assembly,
            WIDE=not assembly,
        )
    return out.to(dtype)


def check(config: Config, packed: PackedSparse) -> None:
    """ValueError naming what of `config` doesn't fit the weight."""
    if packed.padded_out % config.block_n:
        raise ValueError(f"block_n is {config.block_n}, which doesn't divide the weight's {packed.padded_out} rows")
    if config.block_k != packed.packet:
        raise ValueError(f"block_k is {config.block_k}; it must be the weight's packet, {packed.packet}")


def _assembly(tensor: Tensor) -> bool:
    """PTX on CUDA devices; else the twin, in float32."""
    return tensor.is_cuda and torch.version.hip is None


def _current(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """Triton launches on the current device: make it the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()
