"""Which way a 2:4 product goes: the fused kernel and how it is cut up, or the weight brought back and multiplied.

A measured plan (tune.py: the user's cache, then what is shipped) goes first. Without one the defaults below hold. They
are reasoned, NOT YET MEASURED on any GPU:

    rows of x    way
    1..16        fused, tile of 16: bound by memory
    17..64       fused, tile of 32 or 64: still (nearly) bound by memory
    65..511      fused, tiles of 64, whose two accumulators (a group's, the total) stay in registers
    512..        dequantize, then the vendor's library, as for dense weights (wna16/dispatch.py): the kernel multiplies
                 the zeros too, so that nothing is gained where the product is what takes the time

A tile has 128 rows of W: with 64 a thread has half as many weights to share what a step costs anyway. Four warps of
them, and eight with more than 16 rows of x, where the accumulators of four would not stay in registers. Tiles of x
shrink until two stages fit the device's shared memory (and a step its tensor memory, where there is any); packets are
split among programs until there are programs for three quarters of the multiprocessors. Where these tiles spill
registers on Ampere others are taken (`tile`).
"""

from __future__ import annotations

import torch

from llmshrink_kernels import tune
from llmshrink_kernels.device import notice
from llmshrink_kernels.sparse24.prepack import PackedSparse
from llmshrink_kernels.tune import Config, Plan
from llmshrink_kernels.wna16.dispatch import (
    DECODE,
    DEQUANTIZE_FROM,
    LARGEST_CLASS,
    Limits,
    fits_tensor_memory,
    limits,
)

BLOCK_N = 128
WIDEST = 64
MOST_STAGES = 3
MOST_SPLITS = 16
SPILLING = {(4, 32, 32), (4, 64, 32), (4, 256, 64), (8, 64, 32), (8, 256, 64)}
"""(bits, the kernel's group, slab) whose usual tile spills on Ampere by the compiler of Triton 3.7.1: for fp16 or bf16,
with the packets split or not. Found by compiling them all; that 4 bits in groups of 128 are spared follows no rule."""


def plan(packed: PackedSparse, rows: int, dtype: torch.dtype, device: torch.device) -> Plan:
    """How `rows` rows of x are multiplied by the weight on a CUDA device."""
    here = limits(device)
    name = key(packed, rows, dtype, here.name)
    found = tune.lookup(name)
    if isinstance(found, Config) and not fits(packed, found, here):
        notice(f"llmshrink kernels: the configuration filed under {name!r} doesn't fit its weight; the default is used")
        found = None
    return default(packed, rows, here) if found is None else found


def withdraw(packed: PackedSparse, rows: int, dtype: torch.dtype, device: torch.device, error: Exception) -> bool:
    """Whether what could not be launched was a filed plan; the next `plan` is then the default."""
    return tune.withdraw(key(packed, rows, dtype, limits(device).name), error)


def key(packed: PackedSparse, rows: int, dtype: torch.dtype, device_name: str) -> str:
    """The shape class: all that a configuration's speed depends on, with rows rounded up to a power of two."""
    return tune.key(
        "sparse24",
        device_name,
        bits=packed.bits,
        group=packed.group_size,
        dtype=str(dtype).removeprefix("torch."),
        rows=min(LARGEST_CLASS, max(DECODE, 1 << (rows - 1).bit_length())),
        out=packed.out_features,
        inputs=packed.in_features,
    )


def default(packed: PackedSparse, rows: int, here: Limits) -> Plan:
    """The reasoned plan (see the module)."""
    if rows >= DEQUANTIZE_FROM:
        return "dequantize"
    block_m = min(widest(packed, here), max(DECODE, 1 << (rows - 1).bit_length()))
    while True:
        block_n, warps, most = tile(packed, block_m, here)
        stages = min(most, here.shared // stage_bytes(packed, block_m, block_n))
        if block_m == DECODE or (stages >= 2 and fits_tensor_memory(here, block_m, packed.packet, packed.slab // 2)):
            break
        block_m //= 2
    tiles = -(-rows // block_m) * (packed.padded_out // block_n)
    split = 1
    while tiles * split < here.processors * 3 // 4 and split * 2 <= min(MOST_SPLITS, packed.words.shape[0]):
        split *= 2
    return Config(block_m, block_n, packed.packet, warps, max(1, stages), split)


def tile(packed: PackedSparse, block_m: int, here: Limits) -> tuple[int, int, int]:
    """(rows of W, warps, most stages) for `block_m` rows of x."""
    if here.capability < 90 and (packed.bits, packed.kernel_group, packed.slab) in SPILLING:
        if packed.bits == 8:
            # Half as many outputs a thread; 5 to 15 % more instructions a weight.
            return BLOCK_N, 8, MOST_STAGES
        if block_m == 32:
            # As many outputs a thread, but with three stages, or with eight warps, one dtype or the other spills.
            return BLOCK_N // 2, 4, 2
    return BLOCK_N, 4 if block_m == DECODE else 8, MOST_STAGES


def widest(packed: PackedSparse, here: Limits) -> int:
    """The tallest tile of x whose accumulators, and what else a thread holds, stay in registers."""
    # A thread of Ampere holds x's operands too; with eight scales in a packet those of 64 rows are too many.
    if here.capability < 90 and packed.kernel_group:
        return DECODE if packed.bits == 8 else 32 if packed.kernel_group == 32 else WIDEST
    return WIDEST


def candidates(packed: PackedSparse, rows: int, here: Limits) -> list[Plan]:
    """What a search tries, the default first."""
    block_m = min(widest(packed, here), max(DECODE, 1 << (rows - 1).bit_length()))
    tried: dict[Plan, None] = {default(packed, rows, here): None}
    for m in {block_m, max(DECODE, block_m // 2)}:
        for n, warps in ((64, 4), (128, 4), (128, 8)):
            for stages in (2, 3, 4):
                for split in (1, 2, 4, 8) if rows <= WIDEST else (1, 2):
                    tried[Config(m, n, packed.packet, warps, stages, split)] = None
    if rows > DECODE:
        tried["dequantize"] = None
    return [found for found in tried if not isinstance(found, Config) or fits(packed, found, here)]


def fits(packed: PackedSparse, config: Config, here: Limits) -> bool:
    """Whether a configuration suits the weight's shape and the device."""
    return (
        packed.padded_out % config.block_n == 0
        and config.block_k == packed.packet
        and config.block_m >= DECODE
        and config.split_k <= packed.words.shape[0]
        and stage_bytes(packed, config.block_m, config.block_n) * config.num_stages <= here.shared
        and fits_tensor_memory(here, config.block_m, packed.packet, packed.slab // 2)
    )


def stage_bytes(packed: PackedSparse, block_m: int, block_n: int) -> int:
    """Shared memory of a step in flight: its words and its inputs (of x, 16 bits)."""
    _, planes, _, width = packed.words.shape
    return 2 * (planes * block_n * width + block_m * packed.packet)
