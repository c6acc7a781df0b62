"""Windows of demo stories with the surprisal of every word: what a model's loss is held against.

An aligned window begins where a story begins, so everything in it can be predicted up to the free choices: the mean
surprisal of its words is the bound of a model's mean loss on them. A window cut anywhere begins in the middle of a
story, where facts were told before it: it has no such bound, but it is what calibration and long texts look like.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llmshrink.demo.language import story
from llmshrink.demo.tokenizer import END_ID, vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def aligned(seed: int, count: int, length: int, *, end_marks: bool = True) -> tuple[Tensor, Tensor]:
    """Windows that begin with a story. Returns ids int64 and surprisal float32 (nats), both [count, length].

    end_marks: an end mark after each story (packed documents), or none (one text, a story a line).
    """
    stream = _stream(random.Random(seed), end_marks)
    ids = torch.empty((count, length), dtype=torch.int64)
    surprisal = torch.empty((count, length))
    for window in range(count):
        filled: list[tuple[int, float]] = []
        while len(filled) < length:
            filled += next(stream)
        ids[window] = torch.tensor([index for index, _ in filled[:length]])
        surprisal[window] = torch.tensor([nats for _, nats in filled[:length]])
    return ids, surprisal


def anywhere(seed: int, count: int, length: int, *, end_marks: bool = True) -> Tensor:
    """Consecutive windows of one stream of stories, cut wherever the length says. Returns ids int64 [count, length]."""
    rng = random.Random(seed)
    stream = _stream(rng, end_marks)
    filled: list[int] = []
    skipped = rng.randrange(length)
    while len(filled) < skipped + count * length:
        filled += [index for index, _ in next(stream)]
    return torch.tensor(filled[skipped : skipped + count * length]).view(count, length)


@torch.inference_mode()
def loss_and_bound(model: PreTrainedModel, *, seed: int, windows: int, length: int) -> tuple[float, float]:
    """Mean loss of the model and mean surprisal of the same words, nats per word, on aligned windows in float32.

    The first word of a window is predicted from nothing and left out of both.
    """
    ids, surprisal = aligned(seed, windows, length)
    total = 0.0
    for batch in ids.split(16):
        logits = model(input_ids=batch, use_cache=False).logits.float()
        predicted = logits[:, :-1].flatten(0, 1)
        total += float(torch.nn.functional.cross_entropy(predicted, batch[:, 1:].flatten(), reduction="sum"))
    return total / (windows * (length - 1)), float(surprisal[:, 1:].mean())


def _stream(rng: random.Random, end_marks: bool) -> Iterator[list[tuple[int, float]]]:
    """Stories as pairs of id and surprisal."""
    # The byte-level alphabet writes a space as Ġ and a newline as Ċ.
    ids = {token.replace("Ġ", " ").replace("Ċ", "\n"): index for token, index in vocabulary().items()}
    while True:
        told = story(rng)
        pairs = [(ids[word], nats) for word, nats in zip(told.words, told.surprisal, strict=True)]
        yield [*pairs, (END_ID, 0.0)] if end_marks else pairs
