"""Files called as modules lie in the current folder, as they may in one that was downloaded: none of them runs.

What `serve` and `--engine vllm` start is tried so in tests/engine/test_endings.py.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from poison import MODULES, plain, poison

import llmshrink

PROGRAM = Path(sys.executable).with_name("llmshrink")
COMMON = ("--samples", "2", "--seq-len", "32")
ONE_STEP = ("--steps", "1", "--batch-size", "1", "--seq-len", "16")
VERBS = {
    "quantize": ("{model}", "-o", "{out}", "--calibration", "{text}", *COMMON),
    "prune": ("{model}", "-o", "{out}", "--recipe", "magnitude-2of4", "--calibration", "{text}", *COMMON),
    "compress": ("{model}", "-o", "{out}", "--recipe", "sparsegpt-2of4-gptq-w4a16", "--calibration", "{text}", *COMMON),
    "plan": ("{model}", "--calibration", "{text}", *COMMON),
    "convert": ("{sparse}", "-o", "{out}", "--format", "llmshrink"),
    "distill": ("{model}", "{small}", "-o", "{out}", "--data", "{text}", *ONE_STEP),
    "eval": (
        "{small}",
        "-o",
        "{out}",
        "--cache",
        "{out}.cache",
        "--baseline",
        "{model}",
        "--text",
        "{text}",
        "--window",
        "32",
        "--max-tokens",
        "64",
    ),
    "compare": (
        "{model}",
        "{small}",
        "-o",
        "{out}",
        "--cache",
        "{out}.cache",
        "--text",
        "{text}",
        "--window",
        "32",
        "--max-tokens",
        "64",
    ),
    "generate": ("{small}", "Once", "--max-new-tokens", "2"),
    "inspect": ("{small}",),
    "verify": ("{small}",),
    "push": ("{small}", "user/name", "--dry-run"),
    "serve": ("{small}", "--dry-run"),
    "doctor": (),
    "recipes": (),
    "bench": ("kernels", "--help"),
}


@pytest.fixture(scope="module")
def paths(model_of: Callable[..., Path], story: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    model, small = model_of(), tmp_path_factory.mktemp("small") / "small"
    llmshrink.quantize(str(model), output=str(small), calibration=str(story), samples=2, seq_len=32, group_size=32)
    sparse = small.with_name("sparse")
    llmshrink.prune(
        str(model), output=str(sparse), recipe="magnitude-2of4", calibration=str(story), samples=2, seq_len=32
    )
    return {"model": model, "small": small, "sparse": sparse, "text": story}


def ran(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=folder, env=plain(), capture_output=True, text=True, check=False)


@pytest.mark.slow
@pytest.mark.parametrize("verb", VERBS)
def test_no_module_of_the_current_folder_runs(verb: str, paths: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "here"
    folder.mkdir()
    mark = poison(folder, (*MODULES, "llmshrink"))
    words = [word.format(**paths, out=tmp_path / "out") for word in VERBS[verb]]
    done = ran([str(PROGRAM), verb, *words], folder)
    assert not mark.exists(), (mark.read_text(), done.stderr)
    # Without vLLM there is nothing to serve; a machine may have something to mend.
    assert done.returncode in {"serve": (0, 2), "doctor": (0, 1)}.get(verb, (0,)), done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["quantize", "verify"])
def test_nor_where_python_is_asked_for_the_module(verb: str, paths: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "here"
    folder.mkdir()
    mark = poison(folder, MODULES)
    words = [word.format(**paths, out=tmp_path / "out") for word in VERBS[verb]]
    done = ran([sys.executable, "-m", "llmshrink", verb, *words], folder)
    assert not mark.exists(), (mark.read_text(), done.stderr)
    assert done.returncode == 0, done.stderr
