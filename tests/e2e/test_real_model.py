"""A real language model, end to end: all thirty blocks of SmolLM2-135M-Instruct, which the package index has."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.real import source

pytestmark = pytest.mark.slow

BLOCKS, SITES = 30, 210


@pytest.fixture(scope="module")
def model() -> Path:
    try:
        return source.model()
    except source.Unavailable as error:
        pytest.skip(str(error))


def llmshrink(*words: str | Path) -> str:
    command = [sys.executable, "-m", "llmshrink", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_the_conversion_is_the_model(model: Path) -> None:
    """A language model's perplexity on plain English tells a wrong norm, rope or tokenizer; the config, the rest."""
    import torch
    from safetensors import safe_open
    from transformers import AutoModelForCausalLM, AutoTokenizer

    config = json.loads((model / "config.json").read_text())
    assert (config["num_hidden_layers"], config["rms_norm_eps"], config["tie_word_embeddings"]) == (BLOCKS, 1e-5, True)
    assert config["dtype"] == "bfloat16" and "quantization_config" not in config
    with safe_open(model / "model.safetensors", "pt") as file:
        assert "lm_head.weight" not in file.keys() and len(file.keys()) == 9 * BLOCKS + 2  # noqa: SIM118
    tokenizer = AutoTokenizer.from_pretrained(model)
    assert tokenizer.chat_template and len(tokenizer) == config["vocab_size"] == 49152
    network: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    text = "The capital of France is Paris, and the capital of Italy is Rome. The sun rises in the east and sets in"
    ids = tokenizer(text, return_tensors="pt").input_ids
    with torch.no_grad():
        out = network(ids, labels=ids)
    assert tokenizer.decode(out.logits[0, -1].argmax()).strip() == "the" and out.loss.exp() < 12


def test_all_blocks_in_four_bits(model: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    pages = sorted((source.ROOT / "docs").glob("*.md"))
    text.write_text("\n".join(page.read_text() for page in pages))
    out = tmp_path / "out"
    shape = ("--samples", "8", "--seq-len", "128", "--group-size", "64", "--dtype", "float32")
    llmshrink("quantize", model, "-o", out, "--recipe", "gptq-w4a16", "--calibration", text, *shape)
    record = json.loads((out / "llmshrink.json").read_text())
    assert len(record["sites"]) == SITES and {site["bits"] for site in record["sites"]} == {4}
    quality = record["quality"]
    assert 0.02 < quality["kl_mean"] < 0.4, quality
    assert quality["ppl_before"] < quality["ppl_after"] < 1.4 * quality["ppl_before"], quality
    said = llmshrink(
        "generate", out, "The capital of France is", "--no-chat", "--max-new-tokens", "2", "--dtype", "float32"
    )
    assert "Paris" in said
