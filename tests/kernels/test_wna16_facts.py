"""What the compiler makes of the fused kernel for each target: facts that hold before any GPU has run it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from llmshrink_kernels.static import SHARED_MEMORY, Case, Facts
from llmshrink_kernels.tune import Config
from llmshrink_kernels.wna16 import facts
from llmshrink_kernels.wna16.dispatch import Limits, default
from llmshrink_kernels.wna16.prepack import PackedWeight, empty

Compiled = Callable[[Sequence[Case]], list[Facts]]
HALF, BRAIN = torch.float16, torch.bfloat16
# (capability, bits, group, dtype, zero-points, rows)
CASES = [
    (90, 4, 128, BRAIN, False, 1),
    (90, 4, 128, HALF, True, 64),
    (90, 4, 32, HALF, False, 256),
    (90, 3, 128, BRAIN, True, 16),
    (90, 2, 128, HALF, False, 16),
    (90, 8, 128, BRAIN, True, 1),
    (80, 4, 128, BRAIN, True, 1),
    (100, 4, 128, HALF, False, 64),
]
MORE = [
    (capability, bits, group, dtype, zero_points, rows)
    for capability in SHARED_MEMORY
    for bits in (2, 3, 4, 8)
    for group, dtype, zero_points in ((-1, HALF, True), (64, BRAIN, False), (256, BRAIN, True))
    for rows in (1, 32, 64, 256)
]


def default_of(
    capability: int, bits: int, group: int, dtype: torch.dtype, zero_points: bool, rows: int
) -> tuple[Case, PackedWeight, Config]:
    """The kernel that runs without a search: 4096 x 4096."""
    kind = {"scale_dtype": dtype, "zero_points": zero_points, "device": "meta"}
    packed = empty(4096, 4096, bits=bits, group_size=group, **kind)
    config = default(packed, rows, Limits("", SHARED_MEMORY[capability], 132))
    assert isinstance(config, Config)
    return facts.case(capability, packed, config, dtype), packed, config


def check(cases: list[tuple[int, int, int, torch.dtype, bool, int]], compiled: Compiled) -> None:
    built = [default_of(*case) for case in cases]
    for case, (_, packed, config), found in zip(cases, built, compiled([made for made, *_ in built]), strict=True):
        capability, bits, _, _, zero_points, rows = case
        assert found.stack == 0 and not {"STL", "LDL"} & set(found.whole), case
        assert found.shared <= SHARED_MEMORY[capability], case
        conversions = found.loop.get("I2F", 0) + found.loop.get("I2FP", 0)
        weights = found.loop_length / facts.per_weight(found, config)
        # Zero-points are converted, a few a group; weights never are.
        assert conversions <= (weights / 8 if zero_points else 0), case
        assert ("HGMMA" in found.loop) == (capability == 90), case
        assert ("HMMA" in found.loop) == (capability == 80), case
        if capability == 90:
            # Words go from their tile into registers, and from there into wgmma: nothing is written back.
            assert "STS" not in found.loop and found.loop["LDSM"] > 0, case
            if bits == 4 and rows <= 16:
                assert facts.per_weight(found, config) <= facts.budget(packed), case


def test_defaults_do_not_spill_convert_or_stage(compiled: Compiled) -> None:
    check(CASES, compiled)


@pytest.mark.slow
def test_every_default_on_every_target(compiled: Compiled) -> None:
    check(MORE, compiled)


def test_the_twin_without_assembly_compiles_too(compiled: Compiled) -> None:
    case, *_ = default_of(90, 3, 128, BRAIN, True, 16)
    twin = Case(**{**vars(case), "constants": {**case.constants, "ASM": False}})
    (found,) = compiled([twin])
    assert found.stack == 0 and "HGMMA" in found.whole
