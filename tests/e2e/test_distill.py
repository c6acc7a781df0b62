"""`llmshrink distill` as a user starts it: killed and gone on with, in one process and in two."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from helpers import contents

import llmshrink

SETTINGS = (
    "--steps", "6", "--batch-size", "4", "--seq-len", "32", "--lr", "0.01", "--warmup", "1", "--eval-steps", "2",
    "--dtype", "float32", "--hidden-weight", "0.3",
)  # fmt: skip


@pytest.fixture(scope="module")
def models(model_of: Callable[..., Path], story: Path, tmp_path_factory: pytest.TempPathFactory) -> Sequence[str]:
    """A teacher, its 2:4 student, and the options that name the text."""
    teacher, student = model_of("llama"), tmp_path_factory.mktemp("students") / "sparse"
    llmshrink.prune(teacher, output=student, recipe="magnitude-2of4", calibration=story, samples=8, seq_len=32)
    return (str(teacher), str(student), "--data", str(story), *SETTINGS)


def start(*words: str | Path, cwd: Path, launcher: Sequence[str] = ()) -> subprocess.Popen[str]:
    python = [*launcher, "-m", "llmshrink"] if launcher else [sys.executable, "-m", "llmshrink"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([*python, *map(str, words)], text=True, cwd=cwd, **pipes)


def finished(process: subprocess.Popen[str]) -> str:
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return out


def curve(folder: Path) -> list[float]:
    return [point["kl"] for point in json.loads((folder / "llmshrink.json").read_text())["distill"]["curve"]]


def test_a_killed_run_goes_on_and_two_processes_do_what_one_does(models: Sequence[str], tmp_path: Path) -> None:
    said = finished(start("distill", *models, "-o", "whole", cwd=tmp_path))
    assert "verified" in said
    before, after = map(float, re.findall(r"^KL +([\d.]+) -> ([\d.]+)", said, re.MULTILINE)[0])
    assert after < before

    killed = start("distill", *models, "-o", "killed", cwd=tmp_path)
    assert killed.stderr is not None
    for line in killed.stderr:
        if line.startswith("step 4/6"):
            killed.kill()
    killed.communicate()
    assert killed.returncode == -9
    again = start("distill", *models, "-o", "killed", cwd=tmp_path)
    _, err = again.communicate(timeout=300)
    assert again.returncode == 0, err
    assert re.search(r"^resumed +at step [24] of 6", err, re.MULTILINE)
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")

    torchrun = (str(Path(sys.executable).with_name("torchrun")), "--standalone", "--nproc-per-node", "2")
    assert finished(start("distill", *models, "-o", "two", cwd=tmp_path, launcher=torchrun)).count("verified") == 1
    assert curve(tmp_path / "two") == pytest.approx(curve(tmp_path / "whole"), rel=1e-4)


def test_bad_input_is_one_line_and_leaves_nothing(models: Sequence[str], tmp_path: Path) -> None:
    process = start("distill", *models, "--alpha", "2", "-o", "out", cwd=tmp_path)
    out, err = process.communicate(timeout=300)
    assert (process.returncode, out, err.count("\n")) == (2, "", 1)
    assert "--alpha 2.0: must be from 0" in err
    assert not list(tmp_path.iterdir())
