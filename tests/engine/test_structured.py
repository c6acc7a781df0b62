"""A width-pruned model is a plain one to the real vLLM."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from served import Served, llmshrink

from llmshrink.serving.vllm.check import TOLERANCE, compare, transformers_logits


@pytest.mark.slow
def test_a_narrower_demo_says_what_transformers_says(tmp_path: Path, serve_once: Callable[[Path], Served]) -> None:
    """Fewer channels and fewer heads than hidden_size / head_dim: what only the config's own fields can tell."""
    out = tmp_path / "out"
    words = [word for field in ("channels=250", "kv_groups=0.5") for word in ("--set", f"steps.0.width.{field}")]
    llmshrink("prune", "demo", "-o", out, "--recipe", "width-prune", *words)
    config = json.loads((out / "config.json").read_text())
    assert config["intermediate_size"] == 250
    assert config["num_attention_heads"] * config["head_dim"] < config["hidden_size"]
    served = serve_once(out)
    report = compare(served.result, served.prompts, transformers_logits(out))
    assert report.ok and report.worst_kl < TOLERANCE
    assert report.greedy_agreement > 0.9
