"""Perplexity and divergence the slow way: the model in float64, one window at a time, a loop over its tokens."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from llmshrink_eval.protocol import Windows
from llmshrink_eval.text import Text
from torch import Tensor


def a_text(documents: Sequence[str]) -> Text:
    return Text("a text", tuple(documents))


def logprobs64(model: Any, windows: Windows) -> list[Tensor]:
    """For each window, float64 [length, vocabulary]."""
    wide = copy.deepcopy(model).double()
    found = []
    with torch.no_grad():
        for row in range(len(windows)):
            ids = windows.input_ids[row, : int(windows.lengths[row])]
            found.append(wide(input_ids=ids[None]).logits[0].double().log_softmax(-1))
    return found


def nats64(logprobs: list[Tensor], windows: Windows) -> list[float]:
    """For each window, the sum of -log p over its scored tokens."""
    sums = []
    for row, table in enumerate(logprobs):
        total = 0.0
        for position in range(1, int(windows.lengths[row])):
            if windows.scored[row, position]:
                total -= float(table[position - 1, windows.input_ids[row, position]])
        sums.append(total)
    return sums


def kl64(original: list[Tensor], compressed: list[Tensor], windows: Windows) -> list[Tensor]:
    """For each window, KL(original || compressed) at the positions that are compared."""
    found = []
    for row, (p, q) in enumerate(zip(original, compressed, strict=True)):
        values = [
            math.fsum((p[position].exp() * (p[position] - q[position])).tolist())
            for position in windows.compared[row].nonzero().squeeze(-1).tolist()
        ]
        found.append(torch.tensor(values, dtype=torch.float64))
    return found


def disturbed(model: Any, scale: float, seed: int = 1) -> Any:
    """A copy whose weights are off by noise of `scale` times their own size."""
    made = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(1 + scale * torch.randn(parameter.shape, generator=generator))
    return made
