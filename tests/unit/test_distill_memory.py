"""What a step's loss adds to a process's peak memory: as many logits as predicted, whole ones or a chunk's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from llmshrink.distillation.chunked import chunk_rows

ROWS, VOCABULARY, WIDTH = 1024, 32768, 64


def added(way: str) -> int:
    """Bytes that one loss with its gradients added to the peak of a process of its own."""
    shape = (f"--rows={ROWS}", f"--vocabulary={VOCABULARY}", f"--width={WIDTH}")
    # What is freed goes back at once, so that the peak is of what was held and not of what malloc kept.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "benchmarks.distill_loss", "--way", way, *shape]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return int(json.loads(done.stdout)["bytes"])


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="the peak is read from /proc, which isn't here")
def test_the_peak_of_a_step_falls_by_what_was_predicted() -> None:
    from benchmarks.distill_loss import HELD

    whole, chunked = added("autograd"), added("chunked")
    logits = [4 * rows * VOCABULARY for rows in (ROWS, chunk_rows(VOCABULARY, torch.device("cpu")))]
    predicted = HELD["autograd"] * logits[0] - HELD["chunked"] * logits[1]
    assert logits[1] * 8 == logits[0]
    assert 0.8 * predicted < whole - chunked < 1.2 * predicted
    assert chunked < 0.4 * whole
