"""The sweep's kernels as cases for the compiler alone (static.py): what they cost, without a GPU."""

from __future__ import annotations

import torch

from llmshrink_kernels.gptq_block.dispatch import SWEEP_ROWS, TRIAL_WARPS, segment, trial_tiles
from llmshrink_kernels.static import Case

FLOATS = "*fp32"
COLUMNS = 128
"""Of the block, or group, that is swept."""


def trial(capability: int, bits: int, *, zeros: bool, candidates: int = 22) -> Case:
    """`trial_kernel`: a group of 128 columns with every candidate."""
    tiles = trial_tiles(4096, COLUMNS, candidates, torch.device("cpu"))
    names = ("weight", "unit", "importance", "scale", "zero", "scratch", "codes", "choice_out", "errors")
    arguments: dict[str, str | None] = dict.fromkeys(names, FLOATS)
    arguments |= {"zero": FLOATS if zeros else None, "codes": "*i8", "choice_out": "*i64"}
    # The number of rows is what it happens to be; unit's width is whole segments of 16.
    arguments |= {"rows": "i32?", "size": "i32", "width": "i32", "candidates": "i32?"}
    constants = {"BITS": bits, "C": tiles.candidates, "R": tiles.rows, "S": tiles.segment}
    return Case("llmshrink_kernels.gptq_block.kernel:trial_kernel", capability, arguments, constants, TRIAL_WARPS, 1)


def sweep(capability: int, bits: int, *, zeros: bool) -> Case:
    """`sweep_kernel`: a block of 128 columns whose scales are known."""
    names = ("weight", "unit", "scale", "zero", "group", "codes", "errors")
    arguments: dict[str, str | None] = dict.fromkeys(names, FLOATS)
    arguments |= {"zero": FLOATS if zeros else None, "group": "*i64", "codes": "*i8"}
    arguments |= {"rows": "i32?", "size": "i32", "width": "i32"}
    constants = {"BITS": bits, "R": SWEEP_ROWS, "S": segment(COLUMNS)}
    return Case("llmshrink_kernels.gptq_block.kernel:sweep_kernel", capability, arguments, constants, 1, 1)
