"""2:4 on the demo model through the real entry point: pruned, verified, inspected, loaded, spoken with, converted."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers import contents

import llmshrink as package

LLMSHRINK = str(Path(sys.executable).with_name("llmshrink"))
SMALL = ("--calibration", "demo", "--samples", "16", "--seq-len", "128")


def llmshrink(*arguments: str | Path, code: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([LLMSHRINK, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    return done


@pytest.mark.parametrize(
    ("verb", "recipe", "options", "bits"),
    [
        pytest.param("prune", "sparsegpt-2of4", (), 9.0, marks=pytest.mark.long),
        ("compress", "sparsegpt-2of4-gptq-w4a16", ("--group-size", "64"), 3.25),
    ],
)
def test_the_demo_goes_there_and_back(
    verb: str, recipe: str, options: tuple[str, ...], bits: float, tmp_path: Path
) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    own, standard, back = (tmp_path / name for name in ("own", "standard", "back"))
    done = llmshrink(verb, "demo", "-o", own, "--recipe", recipe, *options, "--format", "llmshrink", *SMALL)
    assert "verified" in done.stdout and "llmshrink serve" in done.stdout
    assert llmshrink("verify", own).stdout.startswith("verified")
    described = json.loads(llmshrink("inspect", own, "--json").stdout)
    assert described["linear_bits_per_weight"] == pytest.approx(bits, abs=0.01)
    found = llmshrink("convert", own, "-o", standard, "--format", "compressed-tensors")
    assert "28 stored anew" in found.stdout and "verified" in found.stdout
    assert llmshrink("verify", standard).stdout.startswith("verified")
    assert json.loads(llmshrink("convert", standard, "-o", back, "--format", "llmshrink", "--json").stdout)["ok"]
    assert contents(back) == contents(own)

    prompt = ("Once upon a time", "--max-new-tokens", "16", "--dtype", "float32")
    assert llmshrink("generate", own, *prompt).stdout == llmshrink("generate", standard, *prompt).stdout
    ids = torch.tensor([[5, 17, 80, 3, 41, 9]])
    models: list[Any] = [
        package.load(own, device="cpu", dtype="float32"),
        AutoModelForCausalLM.from_pretrained(own, dtype=torch.float32),
        AutoModelForCausalLM.from_pretrained(standard, dtype=torch.float32),
    ]
    said = [model.generate(ids, max_new_tokens=24, do_sample=False).tolist() for model in models]
    assert said[0] == said[1] == said[2]


def test_bad_input_is_one_line(tmp_path: Path) -> None:
    out = tmp_path / "out"
    for arguments, says in (
        (("compress", "demo", "-o", out, "--recipe", "gptq-w4a16", "--format", "llmshrink"), "it prunes nothing"),
        (("convert", tmp_path, "-o", out, "--format", "llmshrink"), "name a folder that llmshrink wrote"),
    ):
        refused = llmshrink(*arguments, code=2)
        assert says in refused.stderr and len(refused.stderr.strip().splitlines()) == 1
    assert "--format" in llmshrink("convert", tmp_path, "-o", out, code=2).stderr
    assert not out.exists()
