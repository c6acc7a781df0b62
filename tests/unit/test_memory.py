"""What a run holds of its heap, and what it gives back."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import torch
from llmshrink.run import memory
from llmshrink.run.memory import give_back, holding, resident

def come_and_go(survivors):
    held = [torch.ones(1 << 20) for _ in range(40)]  # 160 MB
    survivors.append(held[-1])  # above all that is freed, so that the heap can't shrink by itself

survivors = []
give_back()
start = resident()
with holding({more}):
    come_and_go(survivors)
    give_back()
    inside = resident() - start
print(inside, resident() - start)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc_trim")
@pytest.mark.parametrize("more", [400_000_000, 100_000_000])
def test_free_pages_are_kept_up_to_what_was_planned_and_given_back_beyond(more: int) -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM.format(more=more)], capture_output=True, text=True, check=True)
    inside, after = (int(word) for word in done.stdout.split())
    if more > 160_000_000:
        assert inside > 150_000_000
    else:
        assert inside < 40_000_000
    assert after < 40_000_000
