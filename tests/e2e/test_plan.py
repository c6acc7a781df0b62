"""`llmshrink plan` and `--dry-run` through the real command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llmshrink.cli import run


def test_plan_prints_a_table_and_json_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(["plan", "demo", "--samples", "8"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("demo  (gptq-w4a16)\n") and "measured on one block" in shown and "serves it" in shown
    assert run(["plan", "demo", "--samples", "8", "--json", "--no-probe"]) == 0
    assert json.loads(capsys.readouterr().out)["seconds"] is None
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "words",
    ["quantize demo -o out", "prune demo -o out --recipe depth-prune", "compress demo -o out --recipe wanda-2of4"],
)
def test_dry_run_plans_and_does_nothing(
    words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run([*words.split(), "--samples", "8", "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["output_bytes"] > 0
    assert not list(tmp_path.iterdir())


def test_dry_run_of_a_conversion_knows_its_bytes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pruned, other = str(tmp_path / "pruned"), tmp_path / "other"
    assert run(["prune", "demo", "-o", pruned, "--recipe", "magnitude-2of4", "--samples", "8", "--json"]) == 0
    capsys.readouterr()
    words = ["convert", pruned, "-o", str(other), "--format", "llmshrink", "--json"]
    assert run([*words, "--dry-run"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert not other.exists()
    assert run(words) == 0
    assert said["output_bytes"] == sum(path.stat().st_size for path in other.glob("*.safetensors"))


def test_dry_run_of_a_distillation_makes_a_step_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("accelerate")
    monkeypatch.chdir(tmp_path)
    words = ["distill", "demo", "demo", "-o", "out", "--steps", "4", "--batch-size", "2", "--data", "demo"]
    assert run([*words, "--dry-run", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["seconds"] > 0 and said["parts"]["teaching"] > 0
    assert said["output_bytes"] == pytest.approx(said["source_bytes"], rel=0.01)
    assert not list(tmp_path.iterdir())
