"""Every shipped recipe that distills, from the embedded model to a checkpoint that the other verbs take."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

STEPS = 4
RECIPES: Mapping[str, int] = {"sparsegpt-2of4-distill": 1, "w2-distill": 1, "student-half": 1}
"""Recipe -> the number of its distill step. `distill-recover` has a student that is there already."""
SMALL = ("--samples", "8", "--seq-len", "64")


def start(*words: str | Path, hide: str | None = None) -> subprocess.CompletedProcess[str]:
    """The command line. hide: a package that this Python shall not have."""
    program = ["-m", "llmshrink"]
    if hide is not None:
        program = ["-c", f"import sys; sys.modules[{hide!r}] = None; from llmshrink.cli import main; main()"]
    return subprocess.run([sys.executable, *program, *map(str, words)], capture_output=True, text=True, timeout=900)


def done(*words: str | Path) -> str:
    process = start(*words)
    assert process.returncode == 0, process.stderr
    return process.stdout


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A recipe -> its output, made once."""
    folder, made = tmp_path_factory.mktemp("taught"), {}

    def make(recipe: str) -> Path:
        if recipe not in made:
            out = folder / recipe
            if recipe in RECIPES:
                steps = ("--set", f"steps.{RECIPES[recipe]}.distill.steps={STEPS}")
                done("compress", "demo", "-o", out, "--recipe", recipe, "--calibration", "demo", *SMALL, *steps)
            else:
                student = folder / "student"
                done("prune", "demo", "-o", student, "--recipe", "magnitude-2of4", *SMALL)
                short = ("--steps", str(STEPS), "--seq-len", "64", "--data", "demo")
                done("distill", "demo", student, "-o", out, "--recipe", recipe, *short)
            made[recipe] = out
        return made[recipe]

    return make


@pytest.mark.parametrize("recipe", [*RECIPES, "distill-recover"])
def test_a_recipe_that_distills_makes_a_checkpoint_like_any_other(
    recipe: str, taught: Callable[[str], Path], tmp_path: Path
) -> None:
    out = taught(recipe)
    record = json.loads((out / "llmshrink.json").read_text())
    assert record["distill"]["steps"] == STEPS
    assert record["quality"]["kl_mean"] <= record["distill"]["before"]["kl_mean"]
    assert "verified" in done("verify", out)
    report = tmp_path / "report"
    short = ("--text", "demo", "--max-tokens", "1024", "--window", "64")
    done("eval", out, "--baseline", "demo", *short, "-o", report)
    assert json.loads((report / "results.json").read_text())


@pytest.fixture(scope="module")
def tiny(
    model_of: Callable[..., Path], story: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str | Path, ...]:
    """A teacher, its student, and three steps on a text."""
    teacher, student = model_of("llama", intermediate_size=192), tmp_path_factory.mktemp("students") / "sparse"
    done("prune", teacher, "-o", student, "--recipe", "magnitude-2of4", "--calibration", story, *SMALL)
    return (teacher, student, "--data", story, "--steps", "2", "--batch-size", "2", "--seq-len", "32")


WITH_THE_LIBRARY = (("--teacher-quant", "nf4"), ("--teacher-quant", "int8"), ("--optim", "adamw_bnb_8bit"))


@pytest.mark.parametrize("option", WITH_THE_LIBRARY, ids=lambda option: option[1])
def test_what_bitsandbytes_is_asked_for(option: tuple[str, str], tiny: tuple[str | Path, ...], tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes: pip install 'llmshrink[bnb]'")
    assert "verified" in done("distill", *tiny, *option, "-o", tmp_path / "out")
    record = json.loads((tmp_path / "out" / "llmshrink.json").read_text())
    assert record["distill"]["teacher"].endswith(f" in {option[1]}") == (option[0] == "--teacher-quant")


@pytest.mark.parametrize("option", WITH_THE_LIBRARY, ids=lambda option: option[1])
def test_without_bitsandbytes_there_is_one_line(
    option: tuple[str, str], tiny: tuple[str | Path, ...], tmp_path: Path
) -> None:
    process = start("distill", *tiny, *option, "-o", tmp_path / "out", hide="bitsandbytes")
    assert (process.returncode, process.stdout, process.stderr.count("\n")) == (2, "", 1), process.stderr
    assert f"{option[0]} {option[1]}: needs bitsandbytes" in process.stderr
    assert "pip install 'llmshrink[bnb]'" in process.stderr
    assert not list(tmp_path.iterdir())
