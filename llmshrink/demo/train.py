"""Train the demo model from nothing: `python -m llmshrink.demo.train [FOLDER]`.

A Llama of 1.1 M parameters with every dimension a multiple of 128, so that all group sizes and kernels fit: hidden 128,
FFN 384, 4 layers, 4 query and 2 key-value heads of 64, 512 positions. Muon (momentum orthogonalised by Newton-Schulz;
Jordan et al. 2024) moves the matrices of the blocks, AdamW all else. Every batch is new: stories cost nothing to draw,
so nothing can be learned by heart. Three of four windows begin with a story, the others are cut anywhere; half have end
marks between the stories, half don't.

Writes the checkpoint in bfloat16, the tokenizer, and a README with the figures.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llmshrink.demo import language, model_folder, tokenizer, windows

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

POSITIONS = 512
WORDS_PER_STEP = 2048
STEPS = 3000
MINUTES = 15.0
SHORT_PART = 0.85
"""The part of the run with windows of half the positions, which are cheaper and teach the same."""
WARM_UP = 50
MUON_RATE = 0.02
ADAM_RATE = 4e-3
HELD_OUT_SEED = 10_000_000
SEED = 0


def new_model() -> LlamaForCausalLM:
    """The untrained model, float32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(SEED)
    config = LlamaConfig(
        vocab_size=tokenizer.VOCABULARY_SIZE,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=POSITIONS,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.END_ID,
        pad_token_id=None,
        initializer_range=0.04,
    )
    model = LlamaForCausalLM(config)
    # A word stays loud in the residual stream while blocks add to it from zero: recall copies words, and with small
    # embeddings that the first updates drown, it isn't learned in the time given.
    torch.nn.init.normal_(model.model.embed_tokens.weight)
    for name, parameter in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            torch.nn.init.zeros_(parameter)
    return model


def batch(step: int, length: int) -> Tensor:
    """Three of four windows begin with a story, half have end marks: ids [WORDS_PER_STEP / length, length]."""
    number = WORDS_PER_STEP // length
    seed = 2 * step + 1_000_000
    marked = bool(step % 2)
    first = windows.aligned(seed, number - number // 4, length, end_marks=marked)[0]
    return torch.cat([first, windows.anywhere(seed + 1, number // 4, length, end_marks=marked)])


def rate_factor(done: float, step: int) -> float:
    """Warm up, stay for half of the run, then fall linearly. done: the part of the run behind us, 0 to 1."""
    return min(1.0, (step + 1) / WARM_UP, max(0.01, 2 * (1 - done)))


def train(steps: int, minutes: float) -> tuple[LlamaForCausalLM, int]:
    """Train a new model for `steps` steps, or so many minutes if those are over before; a line every 50 steps.

    Returns (model, steps taken). The schedule follows whichever of the two limits is nearer its end.
    """
    model = new_model()
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "layers" in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "layers" not in name]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(matrices, lr=MUON_RATE, weight_decay=0.01, momentum=0.95),
        torch.optim.AdamW(others, lr=ADAM_RATE, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    rates = (MUON_RATE, ADAM_RATE)
    started = time.monotonic()
    losses: list[float] = []
    while (done := max(len(losses) / steps, (time.monotonic() - started) / 60 / minutes)) < 1:
        for optimizer, rate in zip(optimizers, rates, strict=True):
            optimizer.param_groups[0]["lr"] = rate * rate_factor(done, len(losses))
        ids = batch(len(losses), POSITIONS // 2 if done < SHORT_PART else POSITIONS)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(float(loss.detach()))
        if len(losses) % 50 == 0:
            print(f"step {len(losses)}, {done:.0%}: loss {sum(losses[-50:]) / 50:.4f}", flush=True)
    return model, len(losses)


def save(model: LlamaForCausalLM, folder: Path) -> None:
    """Write the checkpoint in bfloat16 with its tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    model.to(torch.bfloat16).save_pretrained(folder)  # type: ignore[arg-type]
    tokenizer.build(POSITIONS).save_pretrained(folder)


def describe(model: LlamaForCausalLM, folder: Path, steps: int, seconds: float) -> None:
    """Measure the saved weights in float32 against the bound and write the README."""
    loss, bound = windows.loss_and_bound(model.float().eval(), seed=HELD_OUT_SEED, windows=256, length=POSITIONS)
    rate, error = language.entropy_rate(20_000)
    line = f"held-out loss {loss:.4f} nats per word, bound {bound:.4f}: {100 * (loss / bound - 1):.1f} % above"
    print(line)
    (folder / "README.md").write_text(
        README.format(
            line=line,
            rate=rate,
            error=error,
            steps=steps,
            words=steps * WORDS_PER_STEP,
            minutes=seconds / 60,
            parameters=sum(p.numel() for p in model.parameters()),
        )
    )


README = """---
license: apache-2.0
library_name: transformers
---
# The demo model

A Llama of {parameters:,} parameters, trained by `python -m llmshrink.demo.train` on the demo language
(`llmshrink/demo/language.py`): stories with facts, from a random process whose entropy is known. It exists so that what
compression damages can be seen offline, in seconds.

| | |
|---|---|
| 256 held-out windows of 512 words, weights in bfloat16, arithmetic in float32 | {line} |
| entropy of the language | {rate:.4f} nats per word (standard error {error:.4f}, 20,000 stories) |
| training | {steps} steps, {words:,} words, {minutes:.0f} minutes on the CPU |
"""


def main() -> None:
    """Train, save, measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, default=model_folder())
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--minutes", type=float, default=MINUTES, help="stop after so many, if the steps aren't done")
    arguments = parser.parse_args()
    started = time.monotonic()
    model, steps = train(arguments.steps, arguments.minutes)
    seconds = time.monotonic() - started
    save(model, arguments.folder)
    describe(model, arguments.folder, steps, seconds)


if __name__ == "__main__":
    main()
