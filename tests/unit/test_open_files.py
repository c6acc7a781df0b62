"""Whatever is called from Python leaves no file open."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

import llmshrink

SMALL = {"samples": 4, "seq_len": 32}
DESCRIPTORS = Path("/proc/self/fd")


def opened() -> set[str]:
    """The files that are open in this process."""
    found = set()
    for each in DESCRIPTORS.iterdir():
        try:
            found.add(os.readlink(each))
        except OSError:  # the one that lists them
            continue
    return {path for path in found if path.startswith("/") and not path.startswith("/dev/")}


@pytest.mark.skipif(not DESCRIPTORS.is_dir(), reason="asks Linux which files are open")
def test_no_call_leaves_a_file_open(model_of: Callable[..., Path], story: Path, tmp_path: Path) -> None:
    model, text = str(model_of("llama")), str(story)
    calls: dict[str, Callable[[], object]] = {
        "quantize": lambda: llmshrink.quantize(model, output=tmp_path / "w4", calibration=text, group_size=32, **SMALL),
        "prune": lambda: llmshrink.prune(
            model, output=tmp_path / "sparse", recipe="sparsegpt-2of4", calibration=text, **SMALL
        ),
        "convert": lambda: llmshrink.convert(tmp_path / "sparse", output=tmp_path / "own", format="llmshrink"),
        "verify": lambda: llmshrink.verify(tmp_path / "w4"),
        "inspect": lambda: llmshrink.inspect(tmp_path / "w4"),
        "plan": lambda: llmshrink.plan(model, calibration=text, group_size=32, **SMALL),
        "load": lambda: llmshrink.load(tmp_path / "w4"),
        "distill": lambda: llmshrink.distill(
            model, tmp_path / "w4", output=tmp_path / "taught", data=text, steps=1, batch_size=1, seq_len=16
        ),
    }
    kept = []
    for name, call in calls.items():
        before = opened()
        kept.append(call())  # what it returned may hold on to a reader
        left = {path for path in opened() - before if str(tmp_path) in path or model in path or text in path}
        assert left == set(), name
