"""A disk that is full is named, with the bytes needed, where another library writes as where we do."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import llmshrink
from llmshrink.errors import OutputError

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
    import torch

    model = model_of("llama")
    room["free"] = 1000
    with pytest.raises(OutputError, match=r"training: no space left for the training's checkpoints: [\d,]+ bytes need"):
        llmshrink.distill(model, output=tmp_path / "out", data=story, **TRAIN)

    # Enough at the start, and no more when the second checkpoint is written.
    room["free"] = 10**12
    save, saved = torch.save, []

    def full(state: Any, path: Any, *rest: Any, **more: Any) -> None:
        saved.append(path)
        if len(saved) > 3:
            room["free"] = 1000
            raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 1124992 vs 1124880")
        save(state, path, *rest, **more)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OutputError, match=r"[\d,]+ bytes needed, 1,000 free"):
        llmshrink.distill(model, output=tmp_path / "out", data=story, **TRAIN)
    assert len(saved) > 3

    monkeypatch.setattr(torch, "save", save)
    room["free"] = 10**12
    report = llmshrink.distill(model, output=tmp_path / "out", data=story, **TRAIN)
    assert report is not None and report.ok and report.steps == TRAIN["steps"]
