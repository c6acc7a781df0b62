"""A disk that is full is named, with the bytes needed, where another library writes as where we do."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import llmshrink
from llmshrink.errors import OutputError
from llmshrink.run import disk

TRAIN: dict[str, Any] = {"steps": 2, "batch_size": 2, "seq_len": 32, "eval_steps": 1, "student_from": "depth=1"}


@pytest.fixture
def room(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """room["free"]: what the disk of a run's workspace seems to have; what is outside of it has all the room."""
    told = {"free": 10**12}
    real = shutil.disk_usage

    def usage(path: Any) -> Any:
        found = real(path)
        return found._replace(free=told["free"]) if ".partial" in os.fspath(path) else found

    monkeypatch.setattr(shutil, "disk_usage", usage)
    return told


def test_a_training_without_room_for_its_checkpoints_stops_and_goes_on(
    model_of: Callable[..., Path], story: Path, tmp_path: Path, room: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of("llama")
    room["free"] = 1000
    with pytest.raises(OutputError, match=r"training: no space left for the training's checkpoints: [\d,]+ bytes need"):
        llmshrink.distill(model, output=tmp_path / "out", data=story, **TRAIN)

    # Enough at the start, and no more when the second checkpoint is written.
    room["free"] = 10**12
    write, saved = disk.write_tensors, []

    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:

        def full(path: Path, tensors: Any) -> Any:
            saved.extend([path] if "training" in path.parts else [])
            if len(saved) > 3:
                room["free"] = 1000
                patched.setattr(disk, "write", refuse)
            return write(path, tensors)

        patched.setattr(disk, "write_tensors", full)
        with pytest.raises(OutputError, match=r"[\d,]+ bytes needed, 1,000 free"):
            llmshrink.distill(model, output=tmp_path / "out", data=story, **TRAIN)
    assert len(saved) > 3

    room["free"] = 10**12
    report = llmshrink.distill(model, output=tmp_path / "out", data=story, **TRAIN)
    assert report is not None and report.ok and report.steps == TRAIN["steps"]
