"""A model made smaller by the command line: killed, gone on with, loaded by plain transformers without llmshrink."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import contents
from safetensors import safe_open

import llmshrink

LLMSHRINK = str(Path(sys.executable).with_name("llmshrink"))
PLAIN = """
import json, sys, torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
AutoTokenizer.from_pretrained(sys.argv[1])
kept = load_file(sys.argv[1] + "/verify/held_out.safetensors")
with torch.no_grad():
    logprobs = model(kept["input_ids"]).logits.float().log_softmax(-1)
found = logprobs[:, :-1].gather(-1, kept["input_ids"][:, 1:, None]).reshape(-1)
assert "llmshrink" not in sys.modules
print(json.dumps([model.num_parameters(), float((found - kept["token_logprobs"]).abs().mean())]))
"""


@pytest.mark.parametrize(
    ("recipe", "sets", "changed"),
    [
        ("width-prune", ["steps.0.width.channels=61", "steps.0.width.kv_groups=0.5"], {"intermediate_size": 61}),
        ("depth-prune", ["steps.0.depth.drop=1"], {"num_hidden_layers": 2}),
    ],
)
def test_a_killed_run_goes_on_to_the_same_smaller_model(
    recipe: str,
    sets: list[str],
    changed: dict[str, int],
    model_of: Callable[..., Path],
    story: Path,
    tmp_path: Path,
) -> None:
    """A real process, really killed once its first block is on disk."""
    source, out = model_of("llama", num_hidden_layers=3, tie_word_embeddings=True), tmp_path / "out"

    command = [LLMSHRINK, "prune", str(source), "-o", str(out), "--recipe", recipe, "--calibration", str(story)]
    command += ["--samples", "4", "--seq-len", "32", *(word for each in sets for word in ("--set", each))]
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
    assert "resumed: " in again.stderr and " of 3 blocks were finished" in again.stderr
    assert "structure   " in again.stdout and "verified" in again.stdout
    llmshrink.prune(
        source, output=tmp_path / "undisturbed", recipe=recipe, calibration=story, samples=4, seq_len=32, set=sets
    )
    assert contents(out) == contents(tmp_path / "undisturbed")
    assert changed.items() <= json.loads((out / "config.json").read_text()).items()
    if recipe == "depth-prune":
        return  # held to the original with blocks passed by in tests/unit
    plain = subprocess.run([sys.executable, "-c", PLAIN, str(out)], capture_output=True, text=True, check=True)
    parameters, difference = json.loads(plain.stdout.splitlines()[-1])
    # The run's tail is computed in float32, transformers' in bfloat16.
    assert difference < 0.05
    with safe_open(source / "model.safetensors", framework="pt") as file:
        assert parameters < sum(file.get_tensor(key).numel() for key in file.keys())  # noqa: SIM118
