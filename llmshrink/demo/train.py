"""Train the demo model from nothing: `python -m llmshrink.demo.train [FOLDER]`.

A Llama of 1 M parameters with every dimension a multiple of 128, so that all group sizes and kernels fit: hidden 128,
FFN 384, 4 layers, 4 heads of 32, 256 positions. Muon (momentum orthogonalised by Newton-Schulz; Jordan et al. 2024)
moves the matrices of the blocks, AdamW all else. Every batch is new: stories cost nothing to draw, so nothing but the
world can be learned by heart. Three of four windows begin with a story, the others are cut anywhere; every second batch
has end marks between the stories.

The steps are the only limit and one thread does them, so the same libraries on the same kind of processor make the same
weights. Writes the checkpoint in bfloat16 and the tokenizer, and prints the figures that the model's README quotes.
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

POSITIONS = 256
WORDS_PER_STEP = 1024
STEPS = 1500
REPORT_EVERY = 50
WARM_UP = 20
MUON_RATE = 0.02
ADAM_RATE = 1.2e-2
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
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=POSITIONS,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.END_ID,
        pad_token_id=None,
        initializer_range=0.04,
    )
    model = LlamaForCausalLM(config)
    # Words enter the residual stream loud and blocks add to it from zero: the tables of what follows what, which are
    # most of what there is to learn, come within the first hundred steps.
    torch.nn.init.normal_(model.model.embed_tokens.weight)
    for name, parameter in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            torch.nn.init.zeros_(parameter)
    return model


def batch(step: int) -> Tensor:
    """Three of four windows begin with a story, half have end marks: ids [WORDS_PER_STEP / POSITIONS, POSITIONS]."""
    number = WORDS_PER_STEP // POSITIONS
    seed = 2 * step + 1_000_000
    marked = bool(step % 2)
    first = windows.aligned(seed, number - number // 4, POSITIONS, end_marks=marked)[0]
    return torch.cat([first, windows.anywhere(seed + 1, number // 4, POSITIONS, end_marks=marked)])


def rate_factor(step: int, steps: int) -> float:
    """Warm up, stay for half of the run, then fall linearly."""
    return min(1.0, (step + 1) / WARM_UP, max(0.01, 2 * (1 - step / steps)))


def train(steps: int) -> LlamaForCausalLM:
    """Train a new model; prints a line every `REPORT_EVERY` steps."""
    model = new_model()
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "layers" in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "layers" not in name]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(matrices, lr=MUON_RATE, weight_decay=0.01, momentum=0.95),
        torch.optim.AdamW(others, lr=ADAM_RATE, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    rates = (MUON_RATE, ADAM_RATE)
    losses: list[float] = []
    for step in range(steps):
        for optimizer, rate in zip(optimizers, rates, strict=True):
            optimizer.param_groups[0]["lr"] = rate * rate_factor(step, steps)
        ids = batch(step)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(float(loss.detach()))
        if len(losses) % REPORT_EVERY == 0:
            print(f"step {len(losses)} of {steps}: loss {sum(losses[-REPORT_EVERY:]) / REPORT_EVERY:.4f}", flush=True)
    return model


def save(model: LlamaForCausalLM, folder: Path) -> None:
    """Write the checkpoint in bfloat16 with its tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    model.to(torch.bfloat16).save_pretrained(folder)  # type: ignore[arg-type]
    tokenizer.build(POSITIONS).save_pretrained(folder)
    # safetensors makes its file readable by its owner only; a package is for everyone.
    for file in folder.iterdir():
        file.chmod(0o644)


def report(model: LlamaForCausalLM, seconds: float) -> None:
    """Print the figures of the model's README: the weights as saved, in float32 arithmetic, against the bound."""
    loss, bound = windows.loss_and_bound(model.float().eval(), seed=HELD_OUT_SEED, windows=256, length=POSITIONS)
    rate, error = language.entropy_rate(20_000)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, trained in {seconds:.0f} seconds of CPU")
    print(f"entropy of the language {rate:.4f} nats per word (standard error {error:.4f})")
    print(f"held-out loss {loss:.4f} nats per word, bound {bound:.4f}: {100 * (loss / bound - 1):.1f} % above")


def main() -> None:
    """Train, save, measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, default=model_folder())
    parser.add_argument("--steps", type=int, default=STEPS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model = train(arguments.steps)
    seconds = time.process_time()
    save(model, arguments.folder)
    report(model, seconds)


if __name__ == "__main__":
    main()
