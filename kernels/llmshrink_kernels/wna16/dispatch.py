"""Which way a product goes: the fused kernel and how it is cut up, or the weight brought back and multiplied.

A measured plan (tune.py: the user's cache, then what is shipped) goes first. Without one the defaults below hold. They
are reasoned, NOT YET MEASURED on any GPU:

    rows of x    way
    1..16        fused, tile of 16: bound by memory, so two programs or more on a multiprocessor if two stages do,
                 and the inputs split until there are programs for at least three quarters of the multiprocessors
    17..64       fused, tile of 32 or 64: still (nearly) bound by memory; each weight is turned into a number once
    65..511      fused, tiles of 64: a thread has no registers for two accumulators (a group's, the total) of more; with
                 one group a row there is one, and tiles are 128
    512..        dequantize, then the vendor's library: bringing b bits back costs b/8 + 2 bytes a weight (written; read
                 from the cache), about 0.6 ps at 4.3 TB/s, and the product 2.5 fs a weight and row at 790 TFLOP/s, so
                 that from some 500 rows on it adds less than half: less than a fused kernel is likely to lose

Tiles shrink until two stages of them fit the device's shared memory, and (Blackwell) until the accumulators of a step
fit its tensor memory, of which the compiler gives every product of a step its own: so that a default runs everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

from llmshrink_kernels import tune
from llmshrink_kernels.device import notice
from llmshrink_kernels.tune import Config, Plan
from llmshrink_kernels.wna16.prepack import PackedWeight, planes

DEQUANTIZE_FROM = 512
DECODE = 16
LARGEST_CLASS = 4096
RESERVED = 1024
"""Bytes of shared memory that CUDA keeps of each program's."""
TENSOR_MEMORY = 512
"""Columns of a Blackwell multiprocessor's tensor memory, each 128 lanes of 32 bits."""


@dataclass(frozen=True)
class Limits:
    """What a default depends on.

    shared: bytes of shared memory for a program. processors: multiprocessors. capability: 80, 90, 100, ...
    """

    name: str
    shared: int
    processors: int
    capability: int = 90

    @property
    def has_tensor_memory(self) -> bool:
        """Whether accumulators lie in tensor memory (datacentre Blackwell) and not in registers."""
        return 100 <= self.capability < 120


@cache
def limits(device: torch.device) -> Limits:
    """A CUDA device's; the shared memory as Triton itself holds its kernels to it."""
    from triton.runtime import driver

    index = torch.cuda.current_device() if device.index is None else device.index
    shared = driver.active.utils.get_device_properties(index)["max_shared_mem"]
    found = torch.cuda.get_device_properties(index)
    return Limits(found.name, shared, found.multi_processor_count, found.major * 10 + found.minor)


def plan(packed: PackedWeight, rows: int, dtype: torch.dtype, device: torch.device) -> Plan:
    """How `rows` rows of x are multiplied by the weight on a CUDA device."""
    here = limits(device)
    name = key(packed, rows, dtype, here.name)
    found = tune.lookup(name)
    if isinstance(found, Config) and not fits(packed, found, here):
        notice(f"llmshrink kernels: the configuration filed under {name!r} doesn't fit its weight; the default is used")
        found = None
    return default(packed, rows, here) if found is None else found


def withdraw(packed: PackedWeight, rows: int, dtype: torch.dtype, device: torch.device, error: Exception) -> bool:
    """Whether what could not be launched was a filed plan; the next `plan` is then the default."""
    return tune.withdraw(key(packed, rows, dtype, limits(device).name), error)


def key(packed: PackedWeight, rows: int, dtype: torch.dtype, device_name: str) -> str:
    """The shape class: all that a configuration's speed depends on, with rows rounded up to a power of two."""
    return tune.key(
        "wna16",
        device_name,
        bits=packed.bits,
        group=packed.group_size,
        zero_points=packed.zero_points is not None,
        dtype=str(dtype).removeprefix("torch."),
        rows=min(LARGEST_CLASS, max(DECODE, 1 << (rows - 1).bit_length())),
        out=packed.out_features,
        inputs=packed.in_features,
    )


def default(packed: PackedWeight, rows: int, here: Limits) -> Plan:
    """The reasoned plan (see the module)."""
    if rows >= DEQUANTIZE_FROM:
        return "dequantize"
    block_m = min(widest(packed, here), max(DECODE, 1 << (rows - 1).bit_length()))
    while True:
        # A taller tile of W halves how often x is read and is worth two warp groups, once a tile of x is large.
        # On Ampere four warps spill registers on 64 outputs of 2 bits in groups of 32, and don't on 128.
        spread = here.capability < 90 and packed.bits == 2 and packed.group_size == 32
        block_n = 128 if (block_m >= 64 or spread) and packed.padded_out % 128 == 0 else 64
        warps = block_n // 16 if not spread else 4 if block_n == 128 else 8
        size = stage_bytes(packed, block_m, block_n, packed.step)
        stages = min(4, here.shared // size)
        # With 3 bits in groups of 32 more stages than those of few rows spill registers on Ampere.
        if rows <= DECODE or (here.capability < 90 and packed.bits == 3 and packed.group_size == 32):
            stages = min(stages, max(2, (here.shared // 2 - RESERVED) // size))
        if block_m == DECODE or (stages >= 2 and fits_tensor_memory(here, block_m, packed.step, packed.slab)):
            break
        block_m //= 2
    tiles = -(-rows // block_m) * (packed.padded_out // block_n)
    steps = packed.padded_in // packed.step
    split = 1
    while tiles * split < here.processors * 3 // 4 and split * 2 <= min(16, steps):
        split *= 2
    return Config(block_m, block_n, packed.step, warps, max(1, stages), split)


def widest(packed: PackedWeight, here: Limits) -> int:
    """The tallest tile of x whose accumulators stay in registers (128 by 128 outputs on 256 threads are 64 each)."""
    if packed.group_size == -1:
        return 128
    # With many scales in a step the compiler holds, and fetches far ahead, more than a thread has room for. A thread of
    # Ampere holds x's operands too, one of Blackwell has half as many registers.
    groups = packed.step // packed.group_size
    if here.capability < 90:
        return 16 if groups >= 8 else 32 if groups >= 4 and packed.bits == 2 else 64
    return 32 if groups >= (4 if here.has_tensor_memory else 16) else 64


def fits_tensor_memory(here: Limits, block_m: int, block_k: int, slab: int) -> bool:
    """Whether the accumulators of a step's products, and one operand of 16 bits, fit where they have to."""
    return not here.has_tensor_memory or block_k // slab * block_m + slab // 2 <= TENSOR_MEMORY


def candidates(packed: PackedWeight, rows: int, here: Limits) -> list[Plan]:
    """What a search tries, the default first."""
    block_m = min(widest(packed, here), max(DECODE, 1 << (rows - 1).bit_length()))
    steps = [packed.step * n for n in (1, 2) if packed.padded_in % (packed.step * n) == 0]
    tried: dict[Plan, None] = {default(packed, rows, here): None}
    for m in {block_m, max(DECODE, block_m // 2)}:
        for n, warps in ((64, 4), (128, 4), (128, 8)):
            for k in steps:
                for stages in (2, 3, 4, 5):
                    for split in (1, 2, 4, 8) if rows <= 64 else (1, 2):
                        tried[Config(m, n, k, warps, stages, split)] = None
    if rows > DECODE:
        tried["dequantize"] = None
    return [found for found in tried if not isinstance(found, Config) or fits(packed, found, here)]


def fits(packed: PackedWeight, config: Config, here: Limits) -> bool:
    """Whether a configuration suits the weight's shape and the device."""
    return (
        packed.padded_out % config.block_n == 0
        and config.block_k % packed.step == 0
        and packed.padded_in % config.block_k == 0
        and config.block_m >= 16
        and config.split_k <= packed.padded_in // config.block_k
        and stage_bytes(packed, config.block_m, config.block_n, config.block_k) * config.num_stages <= here.shared
        and fits_tensor_memory(here, config.block_m, config.block_k, packed.slab)
    )


def stage_bytes(packed: PackedWeight, block_m: int, block_n: int, block_k: int) -> int:
    """Shared memory of a step in flight: its words and its inputs (of x, 16 bits)."""
    words = block_k // packed.packet * planes(packed.bits) * block_n * packed.slab
    return 2 * (words + block_m * block_k)
