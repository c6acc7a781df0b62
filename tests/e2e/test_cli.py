"""The README's commands, through the real entry point, on real models."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers import contents

LLMSHRINK = str(Path(sys.executable).with_name("llmshrink"))


def llmshrink(*arguments: str | Path, code: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([LLMSHRINK, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    return done


def summary(*arguments: str | Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(llmshrink(*arguments, "--json").stdout)
    return found


@pytest.mark.long  # tests/e2e/test_tutorial.py runs these verbs and compares what they print
def test_the_demo_goes_through_all_verbs(tmp_path: Path) -> None:
    out = tmp_path / "demo-w4"
    done = llmshrink("quantize", "demo", "-o", out)
    assert "block 4/4" in done.stderr
    for said in ("size", "perplexity", "KL", "time", "peak memory", "verified", "serve"):
        assert said in done.stdout, said
    assert llmshrink("verify", out).stdout.startswith("verified")
    assert "bits/weight" in llmshrink("inspect", out).stdout
    spoken = subprocess.run(
        [sys.executable, "-m", "llmshrink.demo.say", str(out)], capture_output=True, text=True, check=True
    )
    assert len(spoken.stdout.split()) > 5


def test_damage_grows_as_bits_fall_on_the_demo(tmp_path: Path) -> None:
    kl = {
        recipe: summary("quantize", "demo", "-o", tmp_path / recipe, "--recipe", recipe)["quality"]["kl_mean"]
        for recipe in ("gptq-w8a16", "gptq-w4a16", "rtn-w4a16", "gptq-w2a16")
    }
    assert kl["gptq-w8a16"] < kl["gptq-w4a16"] < kl["rtn-w4a16"] < kl["gptq-w2a16"]


@pytest.mark.parametrize(("bits", "limit"), [(4, 0.035), (3, 0.12)])
def test_wiki7m_stays_close(bits: int, limit: float, wiki7m: Path, calibration_text: Path, tmp_path: Path) -> None:
    """Held-out KL: the solver's figures are the benchmark's business, a broken one would be far above these."""
    out = tmp_path / "out"
    found = summary(
        "quantize", wiki7m, "-o", out, "--calibration", calibration_text, "--samples", "64", "--seq-len", "256",
        "--bits", bits, "--group-size", "64",
    )  # fmt: skip
    assert found["ok"]
    assert found["quality"]["kl_mean"] < limit
    described = summary("inspect", out)
    assert {row["bits"] for row in described["sites"]} == {bits}
    assert summary("verify", out)["ok"]


def test_stories260k_keeps_what_no_engine_serves(stories260k: Path, calibration_text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ("quantize", stories260k, "-o", out, "--calibration", calibration_text, "--samples", "64",
                 "--seq-len", "128", "--group-size", "64")  # fmt: skip
    found = summary(*arguments)
    kept = {row["name"].rpartition(".")[2] for row in found["sites"] if row["bits"] is None}
    assert kept == {"down_proj"}
    assert any("5 sites" in note and "stays as it is" in note and "172" in note for note in found["notes"])
    assert summary("verify", out)["ok"]
    refused = llmshrink(*arguments[:3], tmp_path / "strict", *arguments[4:], "--strict", code=2)
    assert len(refused.stderr.strip().splitlines()) == 5
    assert not (tmp_path / "strict").exists()


def test_two_runs_of_one_command_are_equal_to_the_byte(wiki7m: Path, calibration_text: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        llmshrink("quantize", wiki7m, "-o", tmp_path / name, "--calibration", calibration_text, "--samples", "16",
                  "--seq-len", "128")  # fmt: skip
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
