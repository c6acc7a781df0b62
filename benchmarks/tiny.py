"""The smallest model that every verb takes and vLLM would serve, for benchmarks that run a verb a thousand times."""

from __future__ import annotations

import contextlib
import gc
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch


def model(folder: Path) -> Path:
    """Write a random Llama of two blocks, 0.2 million weights in bfloat16, with the demo's tokenizer; the folder."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from llmshrink.demo import tokenizer

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=tokenizer.VOCABULARY_SIZE,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=128,
        bos_token_id=None,
        eos_token_id=tokenizer.END_ID,
        pad_token_id=tokenizer.END_ID,
    )
    made: Any = LlamaForCausalLM(config)
    made.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.build(128).save_pretrained(folder)
    return folder


def carried_out_here(command: Sequence[str]) -> None:
    """Carry out a command line in this process, in silence, so that those forked from it import nothing again.

    Raises RuntimeError, with what it said, where it doesn't end with 0.
    """
    from llmshrink.cli import run

    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        code = run(command)
    gc.collect()
    gc.freeze()  # what a fork never touches isn't copied for it
    if code:
        raise RuntimeError(f"{' '.join(command)}: ended with {code}: {said.getvalue()[-2000:]}")
