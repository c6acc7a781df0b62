"""The kernels' launches: a configuration checked against the weight, the grid, the second pass of a split.

Tensors on the CPU can be given too when Triton interprets (TRITON_INTERPRET=1 before the import): that is how the
tests run the kernels without a GPU. There the assembly's twin computes, in float32 for bfloat16.
"""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor
from torch.nn.functional import pad

from llmshrink_kernels.tune import Config
from llmshrink_kernels.wna16 import kernel
from llmshrink_kernels.wna16.prepack import PackedWeight

ADDED = 1024
"""Sums that a program of `add_splits` takes."""


def matmul(x: Tensor, packed: PackedWeight, config: Config, out: Tensor | None = None) -> Tensor:
    """Y = X W^T by the fused kernel. x: [M, K], contiguous, M >= 1; returns [M, N] in x's dtype (`out`, if given)."""
    check(config, packed)
    rows = x.shape[0]
    if packed.padded_in != packed.in_features:
        x = pad(x, (0, packed.padded_in - packed.in_features))
    assembly, wide = _ways(x, x.dtype)
    result = x.new_empty(rows, packed.out_features) if out is None else out
    target = result.float() if wide else result
    split = config.split_k
    parts = target if split == 1 else target.new_empty(split, *target.shape, dtype=torch.float32)
    grid = (-(-rows // config.block_m) * (packed.padded_out // config.block_n), split)
    with _current(x):
        kernel.matmul[grid](
            x,
            packed.words,
            packed.scales,
            packed.zero_points,
            parts,
            rows,
            packed.out_features,
            packed.padded_out,
            packed.padded_in,
            **constants(packed, config, assembly=assembly, wide=wide),
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
        if split > 1:
            size = target.numel()
            kernel.add_splits[(-(-size // ADDED),)](parts, target, size, SPLIT_K=split, BLOCK=ADDED)
    return result.copy_(target) if wide else result


def constants(packed: PackedWeight, config: Config, *, assembly: bool, wide: bool) -> dict[str, int | bool]:
    """What the fused kernel is compiled for."""
    return {
        "BITS": packed.bits,
        "GROUP": max(packed.group_size, 0),
        "SLAB": packed.slab,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "SPLIT_K": config.split_k,
        "ASM": assembly,
        "WIDE": wide,
    }


def dequantize_block(packed: PackedWeight, rows: range, packets: range, columns: int, dtype: torch.dtype) -> Tensor:
    """A block of W in `dtype`: [rows, columns], columns counted from the first packet's first."""
    assembly, wide = _ways(packed.words, dtype)
    out = torch.empty(len(rows), columns, dtype=torch.float32 if wide else dtype, device=packed.words.device)
    with _current(packed.words):
        kernel.dequantize[(-(-len(rows) // 64), len(packets))](
            packed.words,
            packed.scales,
            packed.zero_points,
            out,
            rows.start,
            packets.start,
            len(rows),
            columns,
            packed.padded_out,
            BITS=packed.bits,
            GROUP=max(packed.group_size, 0),
            SLAB=packed.slab,
            BLOCK_N=64,
            ASM=assembly and dtype != torch.float32,
        )
    return out.to(dtype)


def check(config: Config, packed: PackedWeight) -> None:
    """ValueError naming what of `config` doesn't fit the weight."""
    if packed.padded_out % config.block_n:
        raise ValueError(f"block_n is {config.block_n}, which doesn't divide the weight's {packed.padded_out} rows")
    if config.block_k % packed.step or packed.padded_in % config.block_k:
        raise ValueError(
            f"block_k is {config.block_k}; a multiple of {packed.step} that divides {packed.padded_in} is needed"
        )


def _ways(tensor: Tensor, dtype: torch.dtype) -> tuple[bool, bool]:
    """(assembly, wide): PTX on CUDA devices; float32 arithmetic where the interpreter can't do the dtype's."""
    return tensor.is_cuda and torch.version.hip is None, not tensor.is_cuda and dtype == torch.bfloat16


def _current(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """Triton launches on the current device: make it the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()
