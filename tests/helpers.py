"""Tiny models and comparisons that several tests share."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def given(documents: Iterable[Any], *, single: bool = False) -> Any:
    """A source of these documents, each in a record of its own, or of a record as it is."""
    from llmshrink.calibration.text import Documents, Record

    kept = list(documents)
    records = [each if isinstance(each, Record) else Record(each, f"record {n}") for n, each in enumerate(kept, 1)]
    return Documents("given", lambda _seed: iter(records), single=single)


def with_bos(size: int = 512, *, puts: bool = True) -> Any:
    """The demo's tokenizer with a BOS, <|begin|>, of its own. puts: whether before every text, as Llama's does."""
    from tokenizers.processors import TemplateProcessing

    from llmshrink.demo.tokenizer import build

    tokenizer: Any = build(size)
    tokenizer.add_special_tokens({"bos_token": "<|begin|>"})
    if puts:
        token, number = tokenizer.bos_token, tokenizer.bos_token_id
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=f"{token} $A", pair=None, special_tokens=[(token, number)]
        )
    return tokenizer


TINY: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": 0,
}


def make_model(folder: Path, family: str = "llama", *, seed: int = 0, dtype: str = "bfloat16", **changes: Any) -> Path:
    """Write a tiny random model of a family with the demo's tokenizer; returns the folder.

    Weights are large enough for the blocks to matter, so that a wrong one shows in the logits.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from llmshrink.demo.tokenizer import VOCABULARY_SIZE, build

    torch.manual_seed(seed)
    config = AutoConfig.for_model(family, **{**TINY, "vocab_size": VOCABULARY_SIZE, **changes})
    model: Any = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.copy_(torch.randn(parameter.shape) * 2 / parameter.shape[1] ** 0.5)
            else:
                parameter.add_(torch.randn(parameter.shape) * 0.1)
    model.save_pretrained(folder)
    build(128).save_pretrained(folder)
    return folder


def contents(folder: Path) -> dict[str, str]:
    """Relative path -> sha256 of every file that two runs of one command must agree on."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "timing.json"
    }
