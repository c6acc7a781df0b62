"""lm-eval's model, answering sooner what the log-probability of a continuation is.

lm-eval reads each choice of an item as a sequence of its own, in batches that are padded to the longest, and makes the
logits of the whole vocabulary at every position. Here what sequences share at their beginning is computed once
(`forest`), and logits are made at the positions that are asked for, a few at a time (`head`). The answers are the same
up to rounding, as they are between two sizes of a batch.

A model for which that doesn't hold, since it has no mask of attention, keeps a state, or looks at a window shorter than
the sequences, reads them in batches as lm-eval does. Each stretch of requests finds out with its own longest sequence.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from llmshrink_kernels.products import multiply_fast
from lm_eval.models.huggingface import HFLM
from torch import Tensor

from llmshrink_eval.forest import Batch, Packed, batch_of, pack, row_of
from llmshrink_eval.head import Splitter, split
from llmshrink_eval.passes import BATCH_TOKENS, LOGITS, PROOF_TOKENS, ROWS, WHOLE_LOGITS, input_device

ROW_NODES = 256
"""Of a row of a forest, or twice the longest sequence: attention costs as the length, and a longer row shares more."""
LEAST_SHARED = 1.1
"""Tokens of the sequences alone to those of the forest, below which there is nothing to share."""
CLOSE = {torch.float32: 1e-4, torch.float64: 1e-9}
"""How far a log-probability in a forest may be from that of the sequence alone, relative to 1 or to itself. In other
dtypes, eight steps of theirs."""

Request = tuple[Any, list[int], list[int]]
"""(lm-eval's strings, or None; the context's tokens; the continuation's)"""


@dataclass(frozen=True)
class Asked:
    """tokens: what the model reads, the continuation's last left out. targets: the continuation's; the last
    len(targets) positions of `tokens` foretell them."""

    tokens: tuple[int, ...]
    targets: tuple[int, ...]


@dataclass(frozen=True)
class Answer:
    """nats: log-probability of the continuation. greedy: whether each of its tokens is the likeliest."""

    nats: float
    greedy: bool


class ContinuationLM(HFLM):  # type: ignore[misc]  # lm-eval isn't typed
    """HFLM with another way of answering `loglikelihood`. Its arguments are HFLM's.

    most: sequences in a forward, where the user says how many.
    """

    most: int | None = None

    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """(log-probability in nats, whether greedy decoding says the same) of each request, in their order."""
        asked = [self._asked(request) for request in requests]
        with torch.inference_mode():
            answers: list[Answer | None] = [None] * len(asked)
            for index, answer in answer_all(self.model, asked, self.most):
                answers[index] = answer
                if requests[index][0] is not None:
                    self.cache_hook.add_partial("loglikelihood", requests[index][0], (answer.nats, answer.greedy))
        return [(answer.nats, answer.greedy) for answer in answers if answer is not None]

    def _asked(self, request: Request) -> Asked:
        _, context, continuation = request
        room = self.max_length + 1
        length = len(context) + len(continuation)
        if length > room:
            logging.getLogger("lm_eval.models.huggingface").warning(
                f"Combined length of context ({len(context)}) and continuation ({len(continuation)}) exceeds model's"
                f" maximum length ({self.max_length}). Truncating {length - room} tokens from the left."
            )
        return Asked(tuple((context + continuation)[-room:][:-1]), tuple(continuation))


def answer_all(model: Any, asked: Sequence[Asked], most: int | None = None) -> Iterator[tuple[int, Answer]]:
    """Each request's answer with its place, as they come.

    model: a causal language model of transformers. most: sequences in a forward; what fits where None.
    """
    if not asked:
        return
    multiply_fast(model)
    reader = Reader(model, asked)
    longest = max(len(one.tokens) for one in asked)
    nodes = reader.fitting if most is None else most * longest
    rows = pack([one.tokens for one in asked], max(longest, min(nodes, max(ROW_NODES, 2 * longest))))
    read, shared = sum(len(one.tokens) for one in asked), sum(len(row.tokens) for row in rows)
    widest = max(len(row.tokens) for row in rows)
    if read >= LEAST_SHARED * shared and forest_holds(reader, asked, widest):
        for batch in _by_nodes(rows, nodes):
            yield from reader.forest(batch)
        return
    order = sorted(range(len(asked)), key=lambda one: (-len(asked[one].tokens), asked[one].tokens, one))
    size = max(1, nodes // longest)
    for start in range(0, len(order), size):
        yield from reader.alone(order[start : start + size])


def forest_holds(reader: Reader, asked: Sequence[Asked], nodes: int) -> bool:
    """Whether this model says of sequences in a forest what it says of them alone.

    The longest sequence is read alone, and at the end of a row of about so many nodes, after one that has nothing in
    common with it and others that leave it half way. Where rounding hides more than CLOSE, once more with other tokens
    in these: that mustn't change anything.
    """
    index = max(range(len(asked)), key=lambda one: len(asked[one].tokens))
    tokens = asked[index].tokens
    half = len(tokens) // 2
    try:
        alone = reader.log_probabilities(_ids_alone([row_of([tokens])]), plain=True)[0]
        found = []
        for shift in (1,) if reader.dtype in CLOSE else (1, 2):
            others = [
                tuple((token + shift + 2 * number) % reader.vocabulary for token in tokens)
                for number in range(max(1, nodes // (len(tokens) - half) - 2))
            ]
            row = row_of([others[0], *(tokens[:half] + other[half:] for other in others), tokens])
            path = row.paths[-1][1]
            found.append(reader.log_probabilities(batch_of([row], reader.dtype), plain=False)[0][list(path)])
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError, NotImplementedError):
        return False  # a model that doesn't take such a mask, or numbered positions
    step = torch.finfo(reader.dtype).eps
    allowed = CLOSE.get(reader.dtype, 8 * step) * alone.abs().clamp(min=1)
    apart, moved = (found[0] - alone).abs(), (found[-1] - found[0]).abs()
    return bool((apart <= allowed).all() and (moved <= allowed / 4).all())


class Reader:
    """A model and its output layer, apart where that is proven to be the same."""

    def __init__(self, model: Any, asked: Sequence[Asked]) -> None:
        self._model, self._asked = model, asked
        self._device = input_device(model)
        first = torch.tensor([asked[0].tokens[:PROOF_TOKENS]], device=self._device)
        self._splitter: Splitter | None = split(model, first)
        self.dtype: torch.dtype = model.dtype
        self.vocabulary = int(model.config.get_text_config().vocab_size)

    @property
    def fitting(self) -> int:
        """Tokens in a forward."""
        return (
            BATCH_TOKENS if self._splitter is not None else max(1, min(BATCH_TOKENS, WHOLE_LOGITS // self.vocabulary))
        )

    def forest(self, rows: Sequence[Packed]) -> Iterator[tuple[int, Answer]]:
        """The answers to the requests whose sequences lie in these rows."""
        batch = batch_of(rows, self.dtype)
        wanted = [
            (sequence, number, path[-len(self._asked[sequence].targets) :])
            for number, row in enumerate(rows)
            for sequence, path in row.paths
        ]
        yield from self._answers(self._states(batch, plain=False), wanted)

    def alone(self, indices: Sequence[int]) -> Iterator[tuple[int, Answer]]:
        """The answers to these requests, each sequence in a row of its own; padding follows it, and isn't seen."""
        rows = [row_of([self._asked[index].tokens]) for index in indices]
        wanted = []
        for number, index in enumerate(indices):
            end, count = len(self._asked[index].tokens), len(self._asked[index].targets)
            wanted.append((index, number, tuple(range(end - count, end))))
        yield from self._answers(self._states(_ids_alone(rows), plain=True), wanted)

    def log_probabilities(self, batch: Batch, *, plain: bool) -> Tensor:
        """float32 [rows, length, vocabulary]: of a small batch, all of them."""
        states = self._states(batch, plain=plain)
        return torch.stack([self._logits(row).log_softmax(-1) for row in states])

    def _states(self, batch: Batch, *, plain: bool) -> Tensor:
        """What logits are made of: [rows, length, width]. plain: each row is a sequence, by the model's own mask."""
        ids = batch.input_ids.to(self._device)
        more = {} if plain else {"position_ids": batch.position_ids.to(self._device)}
        mask = None if plain else batch.mask.to(self._device)
        if self._splitter is not None:
            return self._splitter.hidden(ids, mask, **more)
        states: Tensor = self._model(input_ids=ids, attention_mask=mask, use_cache=False, **more).logits
        return states

    def _logits(self, states: Tensor) -> Tensor:
        """[rows, width] -> float32 [rows, vocabulary]."""
        if self._splitter is None:
            return states.float()
        with self._splitter.head() as head:
            return head(states)

    def _answers(
        self, states: Tensor, wanted: Sequence[tuple[int, int, Sequence[int]]]
    ) -> Iterator[tuple[int, Answer]]:
        """wanted: (request, row of `states`, the places in it that foretell the request's targets)."""
        rows = torch.tensor([row for _, row, places in wanted for _ in places])
        columns = torch.tensor([place for _, _, places in wanted for place in places])
        targets = torch.tensor([token for request, _, _ in wanted for token in self._asked[request].targets])
        nats, greedy = self._scored(states[rows.to(states.device), columns.to(states.device)], targets)
        start = 0
        for request, _, places in wanted:
            stop = start + len(places)
            yield request, Answer(float(nats[start:stop].sum()), bool(greedy[start:stop].all()))
            start = stop

    def _scored(self, states: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Of each row of states: the target's log-probability, and whether it is the likeliest token."""
        step = max(ROWS[0], min(ROWS[1], LOGITS // self.vocabulary))
        nats, greedy = [], []
        for start in range(0, len(states), step):
            logits = self._logits(states[start : start + step])
            target = targets[start : start + step].to(logits.device)
            nats.append(logits.log_softmax(-1).gather(1, target.unsqueeze(1)).squeeze(1).cpu())
            greedy.append((logits.argmax(-1) == target).cpu())
        return torch.cat(nats), torch.cat(greedy)


def _ids_alone(rows: Sequence[Packed]) -> Batch:
    """Rows that are each one sequence, without the mask that a model makes for them itself."""
    length = max(len(row.tokens) for row in rows)
    ids = torch.tensor([[*row.tokens, *[0] * (length - len(row.tokens))] for row in rows])
    return Batch(ids, torch.arange(length).expand(len(rows), -1), torch.empty(0))


def _by_nodes(rows: Sequence[Packed], most: int) -> Iterator[list[Packed]]:
    """Rows in batches of at most so many nodes, filled up to their longest row; at least one row each."""
    batch: list[Packed] = []
    longest = 0
    for row in rows:
        longest = max(longest, len(row.tokens))
        if batch and (len(batch) + 1) * longest > most:
            yield batch
            batch, longest = [], len(row.tokens)
        batch.append(row)
    if batch:
        yield batch
