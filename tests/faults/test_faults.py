"""Every write, fsync and rename of a run fails once; the next start makes the same bytes as an undisturbed run."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import contents

import llmshrink
from llmshrink.errors import LlmshrinkError
from llmshrink.run import disk

RUN: dict[str, Any] = {"samples": 2, "seq_len": 32, "group_size": 32, "batch_size": 2}
OPERATIONS = ("write", "fsync", "replace")


class Killed(BaseException):
    """The process ends here, as far as a test in the same process can say so."""


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Callable[[int | None, BaseException], list[str]]:
    """arm(k, error): the k-th disk operation raises instead of being done. Returns the operations so far."""
    done: list[str] = []
    state: dict[str, Any] = {"at": None, "error": None}

    def wrap(name: str) -> None:
        real = getattr(disk, name)

        def operation(*args: Any) -> Any:
            done.append(name)
            if state["at"] is not None and len(done) - 1 == state["at"]:
                if name == "write" and isinstance(state["error"], Killed):
                    os.write(args[0], bytes(args[1])[: len(args[1]) // 2])  # half of it reached the disk
                raise state["error"]
            return real(*args)

        monkeypatch.setattr(disk, name, operation)

    for name in OPERATIONS:
        wrap(name)

    def arm(at: int | None, error: BaseException) -> list[str]:
        done.clear()
        state.update(at=at, error=error)
        return done

    return arm


@pytest.fixture(scope="module")
def model(model_of: Callable[..., Path]) -> Path:
    return model_of("llama")


def run(model: Path, out: Path, story: Path) -> Any:
    return llmshrink.quantize(model, output=out, calibration=story, **RUN)


@pytest.mark.parametrize("kind", ["killed", "disk full"])
def test_a_fault_at_any_disk_operation_is_survived(
    kind: str, model: Path, story: Path, tmp_path: Path, failing: Callable[..., list[str]]
) -> None:
    operations = failing(None, Killed())
    run(model, tmp_path / "undisturbed", story)
    count, expected = len(operations), contents(tmp_path / "undisturbed")
    assert count > 30
    # Every operation is failed in one of the two ways; both ways at all of them would take twice as long.
    for at in range(0 if kind == "killed" else 1, count, 2):
        out = tmp_path / f"out{at}"
        failing(at, Killed() if kind == "killed" else OSError(errno.ENOSPC, "No space left on device"))
        with pytest.raises((Killed, LlmshrinkError, OSError)):
            run(model, out, story)
        assert not out.exists() or contents(out) == expected, at
        failing(None, Killed())
        report = run(model, out, story)
        assert report.ok
        assert contents(out) == expected, at
        assert not out.with_name(out.name + ".partial").exists(), at


@pytest.mark.parametrize(
    "recipe", ["alps-2of4", "sparsegpt-50", "sparsegpt-2of4-gptq-w4a16", "width-prune", "depth-prune"]
)
def test_a_pruning_run_goes_on_where_it_stood(
    recipe: str, model: Path, story: Path, tmp_path: Path, failing: Callable[..., list[str]]
) -> None:
    def prune(out: Path) -> Any:
        return llmshrink.compress(model, output=out, recipe=recipe, calibration=story, samples=2, seq_len=32, **group)

    group = {"group_size": 32} if "w4a16" in recipe else {}
    operations = failing(None, Killed())
    prune(tmp_path / "undisturbed")
    # After the first block's line in the journal, well before the end.
    failing(len(operations) * 6 // 10, Killed())
    with pytest.raises(Killed):
        prune(tmp_path / "out")
    failing(None, Killed())
    assert prune(tmp_path / "out").blocks_kept >= 1
    assert contents(tmp_path / "out") == contents(tmp_path / "undisturbed")


def test_kill_9_resumes_to_the_same_bytes(model: Path, story: Path, tmp_path: Path) -> None:
    """A real process, really killed once its first block is on disk."""
    run(model, tmp_path / "undisturbed", story)
    out = tmp_path / "out"
    command = [
        str(Path(sys.executable).with_name("llmshrink")), "quantize", str(model), "-o", str(out),
        "--calibration", str(story), "--samples", "2", "--seq-len", "32", "--group-size", "32", "--batch-size", "2",
    ]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("block 1/"):
            process.send_signal(signal.SIGKILL)
            break
    process.wait()
    process.stderr.close()
    assert not out.exists()
    again = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "resumed: 1 of 2 blocks" in again.stderr or "resumed: 2 of 2 blocks" in again.stderr
    assert contents(out) == contents(tmp_path / "undisturbed")
