"""What the compiler makes of the sweep's kernels, without a GPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
from llmshrink_kernels.gptq_block import facts
from llmshrink_kernels.static import SHARED_MEMORY, Case, Facts

Compiled = Callable[[Sequence[Case]], list[Facts]]


@pytest.mark.slow
@pytest.mark.parametrize("capability", sorted(SHARED_MEMORY))
def test_nothing_is_spilled_and_shared_memory_is_left_alone(capability: int, compiled: Compiled) -> None:
    cases = [facts.trial(capability, 4, zeros=True), facts.sweep(capability, 4, zeros=True)]
    for case, found in zip(cases, compiled(cases), strict=True):
        assert found.stack == 0 and not {"STL", "LDL"} & set(found.whole), case
        assert found.registers <= 168, case  # Three programs of the trial on a multiprocessor, at the least.
        assert found.shared <= 4096 < SHARED_MEMORY[capability], case


def test_a_thread_adds_four_lanes_for_each_element_of_the_factor(compiled: Compiled) -> None:
    """The trial's budget: 16 columns by 4 lanes of multiply-adds while collecting, 120 by 4 in the segment."""
    (found,) = compiled([facts.trial(90, 4, zeros=False)])
    assert found.stack == 0
    assert found.whole["FFMA"] >= 4 * (16 + 16 * 15 // 2)
    assert found.whole["LDG"] < found.whole["FFMA"] / 2
    assert not {"F2F", "I2F", "I2FP"} & set(found.whole)
