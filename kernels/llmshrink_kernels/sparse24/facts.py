"""The fused kernel as a case for the compiler alone (static.py): what it costs a weight, without a GPU."""

from __future__ import annotations

import torch

from llmshrink_kernels.sparse24.launch import constants
from llmshrink_kernels.sparse24.prepack import PackedSparse
from llmshrink_kernels.static import Case, Facts
from llmshrink_kernels.tune import Config
from llmshrink_kernels.wna16.facts import BUDGET, NAMES


def case(capability: int, packed: PackedSparse, config: Config, dtype: torch.dtype) -> Case:
    """The kernel that multiplies `packed` by rows of `dtype` as `config` says."""
    return Case(
        "llmshrink_kernels.sparse24.kernel:matmul",
        capability,
        {
            "x": NAMES[dtype],
            "words": "*i16",
            "scales": None if packed.scales is None else NAMES[packed.scales.dtype],
            "out": NAMES[dtype] if config.split_k == 1 else "*fp32",
            "rows": "i32?",
            "columns": "i32",
            "padded_out": "i32",
            "padded_in": "i32",
        },
        constants(packed, config, dtype, assembly=True),
        config.num_warps,
        config.num_stages,
    )


def per_weight(facts: Facts, config: Config) -> float:
    """Instructions of the main loop that a thread goes through for each weight (zeros too) of its share of a step."""
    return facts.loop_length / (config.block_n * config.block_k / (32 * config.num_warps))


def budget(packed: PackedSparse) -> float:
    """The instructions a weight that there is time for while it is read: in proportion to its bits."""
    return BUDGET * (packed.nbytes * 8 / (packed.padded_out * packed.padded_in)) / 4.125
