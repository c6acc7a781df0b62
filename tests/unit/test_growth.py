"""`benchmarks.growth`: what it fits and predicts, and a whole short run of it."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.growth import MODELS, Took, a_layer, exponent, fit, methods, predicted, report, synthetic, widths

ROOT = Path(__file__).parents[2]


def took(inputs: int, outputs: int, seconds: float) -> Took:
    return Took(inputs, outputs, seconds, None, None)


def test_an_exponent_is_the_slope_of_logarithms() -> None:
    assert exponent([(n, 5e-9 * n**3.0) for n in (512, 1024, 4096)]) == pytest.approx(3.0)
    assert widths(512, 4096) == [512, 1024, 2048, 4096] and widths(384, 1000) == [384, 768]


@pytest.mark.parametrize("true", [(2e-9, 3e-9, 1e-6), (0.0, 4e-9, 2e-6), (1e-9, 0.0, 0.0)])
def test_the_fit_finds_the_terms_and_adds_up_the_layers_of_a_model(true: tuple[float, float, float]) -> None:
    def seconds(outputs: int, inputs: int) -> float:
        return true[0] * inputs**3 + true[1] * inputs**2 * outputs + true[2] * inputs * outputs

    points = [took(n, m, seconds(m, n)) for n in (512, 1024, 2048) for m in (n, n // 4)]
    found = fit(points)
    assert found == pytest.approx(true, rel=1e-6, abs=1e-15)
    hidden, ffn, keys, blocks = MODELS["Llama 3 8B"]
    layers = [(hidden + 2 * keys, hidden), (hidden, hidden), (2 * ffn, hidden), (hidden, ffn)]
    fits = {"gptq": found, "width": found}
    total = blocks * sum(seconds(*layer) for layer in layers)
    assert predicted(fits, "gptq", "Llama 3 8B") == pytest.approx(total)
    # A narrower FFN is solved at down_proj alone.
    assert predicted(fits, "width", "Llama 3 8B") == pytest.approx(blocks * seconds(hidden, ffn))


def test_a_method_that_is_over_its_goal_is_marked() -> None:
    square = {
        "gptq": [took(512, 512, 1.0), took(1024, 1024, 4.0)],
        "sparsegpt": [took(512, 512, 1.0), took(1024, 1024, 9.0)],
    }
    lines = report(square, dict.fromkeys(square, (0.0, 0.0, 1e-09)), 0.0)
    assert [line.endswith("over the goal") for line in lines[1:3]] == [False, True]
    # What every recipe spends before the solution counts too: (3 + 9) / (3 + 4).
    shared = report(square, dict.fromkeys(square, (0.0, 0.0, 1e-09)), 3.0)
    assert not shared[2].endswith("over the goal") and "1.71" in shared[2]
    assert "2.25" in lines[2] and "forwards" in "\n".join(lines)


def test_the_inputs_are_as_dependent_as_a_models() -> None:
    import torch

    from llmshrink.methods.factor import damped, factorise
    from llmshrink.methods.pruning.contract import Problem

    known = synthetic(256)
    factor = factorise(known.hessian, torch.arange(256), 0.001)
    # .34 to .72 in SmolLM2-135M-Instruct's blocks.
    assert 0.4 < Problem(damped(known.hessian, factor.damping), factor).typical < 0.75


def test_a_short_run_measures_every_method(tmp_path: Path) -> None:
    out = tmp_path / "growth.json"
    command = [sys.executable, "-m", "benchmarks.growth", "--least", "128", "--most", "256", "--json", str(out)]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    # Of such narrow layers the last exponent may be anything, and exit code 1 says that one is over the limit.
    assert ran.returncode in (0, 1), ran.stderr
    figures = json.loads(out.read_text())
    assert set(figures["took"]) == set(methods()) == set(figures["predicted_cpu_seconds"])
    assert all(len(each) == 4 and all(one["seconds"] > 0 for one in each) for each in figures["took"].values())
    assert "Llama 3 70B" in ran.stdout and "alps" in ran.stdout


def test_widths_that_do_not_double_are_refused() -> None:
    command = [sys.executable, "-m", "benchmarks.growth", "--least", "512", "--most", "900"]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert ran.returncode == 2 and "give a multiple of 128, and twice as much" in ran.stderr


def test_layers_that_are_named_are_measured_each_by_each(tmp_path: Path) -> None:
    out = tmp_path / "layers.json"
    command = [sys.executable, "-m", "benchmarks.growth", "--methods", "rtn", "gptq", "--layer", "96x128", "--json"]
    ran = subprocess.run([*command, str(out)], capture_output=True, text=True, cwd=ROOT, check=False)
    assert ran.returncode == 0, ran.stderr
    figures = json.loads(out.read_text())
    assert list(figures["before_the_solution"]) == ["96x128"]
    took = {name: [(one["outputs"], one["inputs"]) for one in each] for name, each in figures["took"].items()}
    assert took == {"rtn": [(96, 128)], "gptq": [(96, 128)]}
    ratio = figures["took"]["rtn"][0]["seconds"] / figures["took"]["gptq"][0]["seconds"]
    assert f"{ratio:.2f}" in next(line for line in ran.stdout.splitlines() if " rtn " in line)


@pytest.mark.parametrize("text", ["4096", "4096x", "x4096", "0x4096", "64x64", "-4x256", "4096x256x2"])
def test_a_layer_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="OUTPUTSxINPUTS"):
        a_layer(text)
