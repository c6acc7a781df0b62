"""The fused kernel as a case for the compiler alone (static.py): what it costs a weight, without a GPU."""

from __future__ import annotations

import torch

from llmshrink_kernels.static import Case, Facts
from llmshrink_kernels.tune import Config
from llmshrink_kernels.wna16.launch import constants
from llmshrink_kernels.wna16.prepack import PackedWeight

NAMES = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
}
BUDGET = 3.6
"""Thread-instructions a weight of 4.125 bits that a Hopper has time for while it reads one at 4.3 TB/s."""


def case(capability: int, packed: PackedWeight, config: Config, dtype: torch.dtype) -> Case:
    """The kernel that multiplies `packed` by rows of `dtype` as `config` says."""
    asymmetric = packed.zero_points is not None
    return Case(
        "llmshrink_kernels.wna16.kernel:matmul",
        capability,
        {
            "x": NAMES[dtype],
            "words": "*i16",
            "scales": NAMES[packed.scales.dtype],
            "zeros": "*i8" if asymmetric else None,
            "out": NAMES[dtype] if config.split_k == 1 else "*fp32",
            "rows": "i32?",
            "columns": "i32",
            "padded_out": "i32",
            "padded_in": "i32",
        },
        constants(packed, config, assembly=True, wide=False),
        config.num_warps,
        config.num_stages,
    )


def per_weight(facts: Facts, config: Config) -> float:
    """Instructions of the main loop that a thread goes through for each weight that is its share of a step."""
    return facts.loop_length / (config.block_n * config.block_k / (32 * config.num_warps))


def budget(packed: PackedWeight) -> float:
    """The instructions a weight that there is time for while it is read: in proportion to its bits."""
    return BUDGET * (packed.nbytes * 8 / (packed.padded_out * packed.padded_in)) / 4.125
