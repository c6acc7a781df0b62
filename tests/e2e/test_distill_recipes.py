"""Every shipped recipe that distills, from the embedded model to a checkpoint that the other verbs take.

One is started as a user starts it, and so are `verify` and `eval` of what it made; the others go through the same entry
point in this process, which has imported by then what each would import again.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pytest

import llmshrink
from llmshrink.cli import run

STEPS = 1
"""Of which the first has the whole learning rate; of two it would have none."""
FIRST = "sparsegpt-2of4-distill"
RECIPES = {name: recipe for name, recipe in llmshrink.recipes().items() if recipe.distill is not None}


def start(recipe: str, *words: str | Path) -> str:
    """A command line for what this recipe makes: its standard output."""
    if recipe == FIRST:
        command = [sys.executable, "-m", "llmshrink", *map(str, words)]
        process = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
        assert process.returncode == 0, process.stderr
        return process.stdout
    with redirect_stdout(StringIO()) as said:
        assert run([str(word) for word in words]) == 0, recipe
    return said.getvalue()


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A recipe -> its output, made once, from the demo's own text."""
    folder = tmp_path_factory.mktemp("taught")

    def make(recipe: str) -> Path:
        out = folder / recipe
        if out.exists():
            return out
        if recipe == "distill-recover":  # whose student is there already
            short = ["--steps", str(STEPS), "--seq-len", "64"]
            start(recipe, "distill", "demo", make(FIRST), "-o", out, "--recipe", recipe, *short)
        else:
            trained = [(n, kind) for n, step in enumerate(RECIPES[recipe].steps) for kind in step.kinds]
            few = [f"steps.{n}.{kind}.steps={STEPS}" for n, kind in trained if kind in ("tune", "distill")]
            short = ["--samples", "8", "--seq-len", "64", *(word for each in few for word in ("--set", each))]
            start(recipe, "compress", "demo", "-o", out, "--recipe", recipe, *short)
        return out

    return make


def test_there_are_recipes_that_distill() -> None:
    assert {"distill-recover", FIRST, "w2-distill", "student-half"} <= RECIPES.keys()


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_that_distills_makes_a_checkpoint_like_any_other(
    recipe: str, taught: Callable[[str], Path], tmp_path: Path
) -> None:
    out = taught(recipe)
    record = json.loads((out / "llmshrink.json").read_text())
    assert (record["distill"]["steps"], record["distill"]["data"], record["held_out"]) == (STEPS, "demo", "demo")
    assert record["quality"]["kl_mean"] <= record["distill"]["before"]["kl_mean"]
    assert "verified" in start(recipe, "verify", out)
    report = tmp_path / "report"
    short = ("--text", "demo", "--max-tokens", "512", "--window", "64")
    start(recipe, "eval", out, "--baseline", "demo", *short, "-o", report)
    assert json.loads((report / "results.json").read_text())
