"""How far a compressed model is from its original: `python -m benchmarks.kl ORIGINAL COMPRESSED TEXT`.

Both models see the first `--tokens` tokens of the text in windows of `--window`, those of `llmshrink eval --protocol
gptq` (BOS before each where the family or the tokenizer needs it, or as `--bos` says), in float32; printed are the mean
KL(original || compressed) over all positions in nats per token and both perplexities, exp(mean nats per predicted
token).

Both load through transformers. A checkpoint of 2, 3, 5, 6 or 7 bits, which the compressed-tensors library beside vLLM
can't read, is dequantized by our own reader into a copy of the original, and the output says so; `--own-reader` does
that for any.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from llmshrink_eval.beginning import Bos
from torch import Tensor

BATCH = 8


@dataclass(frozen=True)
class Divergence:
    """kl: nats per token. original, compressed: perplexities. tokens: positions compared."""

    kl: float
    original: float
    compressed: float
    tokens: int


def windows(
    tokenizer: Any, text: Path, tokens: int, window: int, *, bos: Bos = "auto", model_type: str | None = None
) -> Tensor:
    """The text's first tokens, int64 [tokens / window, window]. bos, model_type: as `llmshrink_eval.beginning` has."""
    from llmshrink_eval.protocol import build_windows
    from llmshrink_eval.text import load_text

    return build_windows(
        load_text(str(text)),
        tokenizer,
        protocol="gptq",
        limit=window,
        window=window,
        max_tokens=tokens,
        bos=bos,
        model_type=model_type,
    ).input_ids


@torch.inference_mode()
def divergence(original: Any, compressed: Any, ids: Tensor) -> Divergence:
    """KL over every position, losses over the predicted ones. ids: int64 [windows, length]; logits in float32."""
    kl, losses, predicted = 0.0, [0.0, 0.0], 0
    for batch in ids.split(BATCH):
        logs = [
            model(input_ids=batch, use_cache=False).logits.float().log_softmax(-1) for model in (original, compressed)
        ]
        kl += float((logs[0].exp() * (logs[0] - logs[1])).sum(-1).double().sum())
        target = batch[:, 1:, None]
        for index, log in enumerate(logs):
            losses[index] -= float(log[:, :-1].gather(-1, target).double().sum())
        predicted += target.numel()
    ppl = [float(torch.tensor(loss / predicted).exp()) for loss in losses]
    return Divergence(kl / ids.numel(), ppl[0], ppl[1], ids.numel())


def load(original: Path, compressed: Path, *, own_reader: bool) -> tuple[Any, bool]:
    """The compressed model in float32, and whether our own reader made it."""
    from transformers import AutoModelForCausalLM

    from llmshrink.checkpoint.decompressed import Decompressed

    config = json.loads((compressed / "config.json").read_text())
    quantization = config.get("quantization_config")
    groups = quantization.get("config_groups", {}) if quantization else {}
    bits = {group["weights"]["num_bits"] for group in groups.values()}
    if not quantization or (bits <= {4, 8} and not own_reader):
        return AutoModelForCausalLM.from_pretrained(compressed, dtype=torch.float32).eval(), False
    model = AutoModelForCausalLM.from_pretrained(original, dtype=torch.float32).eval()
    reader = Decompressed(compressed, config, torch.float32)
    keys = set(reader.keys())
    for key, parameter in model.named_parameters():
        if key in keys:
            parameter.data.copy_(reader.read(key))
    reader.round_too(model, {name: name for name, _ in model.named_parameters()})
    return model, True


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("original", type=Path)
    parser.add_argument("compressed", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--tokens", type=int, default=102_400)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--bos", choices=get_args(Bos), default="auto")
    parser.add_argument("--own-reader", action="store_true")
    arguments = parser.parse_args()
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    ids = windows(
        AutoTokenizer.from_pretrained(arguments.original),
        arguments.text,
        arguments.tokens,
        arguments.window,
        bos=arguments.bos,
        model_type=AutoConfig.from_pretrained(arguments.original).model_type,
    )
    original = AutoModelForCausalLM.from_pretrained(arguments.original, dtype=torch.float32).eval()
    compressed, own = load(arguments.original, arguments.compressed, own_reader=arguments.own_reader)
    found = divergence(original, compressed, ids)
    print(
        f"KL {found.kl:.5f} nats/token, perplexity {found.original:.2f} -> {found.compressed:.2f}"
        f" over {found.tokens:,} tokens, read by {'our own reader' if own else 'transformers'}"
    )


if __name__ == "__main__":
    main()
