"""lm-eval's model, answering sooner what the log-probability of a continuation is.

lm-eval reads each choice of an item as a sequence of its own, in batches that are padded to the longest, and makes the
logits of the whole vocabulary at every position. Here what sequences share at their beginning is computed once
(`forest`), and logits are made at the positions that are asked for, a few at a time (`head`). The answers are the same
up to rounding, as they are between two sizes of a batch: 1e-4 nats in float32, and hundredths for a model that rounds
its inputs to 8 bits, where what lies at the edge of two steps falls on either side.

A model for which that doesn't hold reads sequences in batches as lm-eval does: one that has no mask of attention, keeps
a state, or looks at a window shorter than the sequences. Each stretch of requests finds out with some of its own
sequences. Where the longest position in a forward decides how all are turned (rope of the types `longrope` and
`dynamic`), sequences beyond the original length are read one by one.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from llmshrink_kernels.products import multiply_fast
from lm_eval.models.huggingface import HFLM
from torch import Tensor

from llmshrink_eval.errors import EvalError
from llmshrink_eval.forest import Batch, Packed, batch_of, pack, row_of
from llmshrink_eval.head import Splitter, split
from llmshrink_eval.passes import BATCH_TOKENS, LOGITS, PROOF_TOKENS, ROWS, WHOLE_LOGITS, input_device

ROW_NODES = 256
"""Of a row of a forest, or twice the longest sequence: attention costs as the length, and a longer row shares more."""
LEAST_SHARED = 1.1
"""Tokens of the sequences alone to those of the forest, below which there is nothing to share."""
PROOF_SEQUENCES, PROOF_ROWS = 8, 16
"""Of a stretch, from its shortest to its longest, and positions of each, the last, at which logits are compared."""
CLOSE = {torch.float32: 1e-4, torch.float64: 1e-9}
"""How far a log-probability in a forest may be from that of the sequence alone, relative to 1 or to itself. In other
dtypes it is APART steps of theirs, and MOVED from other tokens beside the sequence."""
APART, MOVED = 64, 2

LONGEST_DECIDES = ("dynamic", "longrope")
"""transformers' names of ropes that go by the longest position of a forward."""

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
        if not context or not 0 < len(continuation) <= self.max_length:
            raise EvalError(
                f"tasks: a continuation of {len(continuation):,} tokens after {len(context):,} can't be scored: there"
                f" must be some of both, and the model reads {self.max_length:,}; leave that task or item out"
            )
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
    reader = Reader(model, asked[0].tokens)
    limit = _rope_limit(model.config)
    beyond = [index for index, one in enumerate(asked) if limit is not None and len(one.tokens) > limit]
    within = sorted(set(range(len(asked))) - set(beyond))
    for place, answer in _answer_together(reader, [asked[index] for index in within], most):
        yield within[place], answer
    for index in beyond:
        for _, answer in reader.alone([asked[index]]):
            yield index, answer


def _answer_together(reader: Reader, asked: Sequence[Asked], most: int | None) -> Iterator[tuple[int, Answer]]:
    """As `answer_all`, of requests that may be read in one forward."""
    if not asked:
        return
    longest = max(len(one.tokens) for one in asked)
    nodes = reader.fitting if most is None else most * longest
    rows = pack([one.tokens for one in asked], max(longest, min(nodes, max(ROW_NODES, 2 * longest))))
    read, shared = sum(len(one.tokens) for one in asked), sum(len(row.tokens) for row in rows)
    widest = max(len(row.tokens) for row in rows)
    if read >= LEAST_SHARED * shared and forest_holds(reader, asked, widest):
        for batch in _by_nodes(rows, nodes):
            yield from reader.forest(asked, batch)
        return
    order = sorted(range(len(asked)), key=lambda one: (-len(asked[one].tokens), asked[one].tokens, one))
    size = max(1, nodes // longest)
    for start in range(0, len(order), size):
        batch_order = order[start : start + size]
        for place, answer in reader.alone([asked[index] for index in batch_order]):
            yield batch_order[place], answer


def forest_holds(reader: Reader, asked: Sequence[Asked], nodes: int) -> bool:
    """Whether this model says of sequences in a forest what it says of them alone.

    Some sequences, the shortest and the longest among them, are each read alone, and at the end of a row of at least so
    many nodes, after one that has nothing in common with the longest and others that leave it half way. Where rounding
    hides more than CLOSE, once more with other tokens in these: that mustn't change anything.
    """
    order = sorted((one.tokens for one in asked), key=lambda tokens: (-len(tokens), tokens))
    last = min(PROOF_SEQUENCES, len(order)) - 1
    sequences = [order[round(number * (len(order) - 1) / max(1, last))] for number in range(last + 1)]
    longest, half = sequences[0], len(sequences[0]) // 2
    places = [range(max(0, len(tokens) - PROOF_ROWS), len(tokens)) for tokens in sequences]
    try:
        alone = torch.cat(
            [
                reader.log_probabilities(_ids_alone([tokens]), list(place), plain=True)
                for tokens, place in zip(sequences, places, strict=True)
            ]
        )
        found = []
        for shift in (1,) if reader.dtype in CLOSE else (1, 2):
            others = [
                tuple((token + shift + 2 * number) % reader.vocabulary for token in longest)
                for number in range(max(1, nodes // (len(longest) - half) - 2))
            ]
            row = row_of([others[0], *(longest[:half] + other[half:] for other in others), *sequences])
            paths = [path for _, path in row.paths[-len(sequences) :]]
            nodes_of = [path[place] for path, wanted in zip(paths, places, strict=True) for place in wanted]
            found.append(reader.log_probabilities(batch_of([row], reader.dtype), nodes_of, plain=False))
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError, NotImplementedError):
        return False  # a model that doesn't take such a mask, or numbered positions
    step, scale = torch.finfo(reader.dtype).eps, alone.abs().clamp(min=1)
    apart, moved = (found[0] - alone).abs() / scale, (found[-1] - found[0]).abs() / scale
    return bool((apart <= CLOSE.get(reader.dtype, APART * step)).all() and (moved <= MOVED * step).all())


def _rope_limit(config: Any) -> int | None:
    """Tokens beyond which the longest position of a forward changes what is computed at all of them; None: never."""
    config = config.get_text_config()
    parameters = getattr(config, "rope_parameters", None) or {}
    limits = [
        one.get("original_max_position_embeddings")
        or getattr(config, "original_max_position_embeddings", None)
        or config.max_position_embeddings
        for one in (parameters, *parameters.values())
        if isinstance(one, Mapping) and one.get("rope_type") in LONGEST_DECIDES
    ]
    return min(limits, default=None)


class Reader:
    """A model and its output layer, apart where that is proven to be the same."""

    def __init__(self, model: Any, tokens: Sequence[int]) -> None:
        """tokens: a sequence to prove it with."""
        self._model = model
        self._device = input_device(model)
        first = torch.tensor([tokens[:PROOF_TOKENS]], device=self._device)
        self._splitter: Splitter | None = split(model, first)
        self.dtype: torch.dtype = model.dtype
        self.vocabulary = int(model.config.get_text_config().vocab_size)

    @property
    def fitting(self) -> int:
        """Tokens in a forward."""
        return (
            BATCH_TOKENS if self._splitter is not None else max(1, min(BATCH_TOKENS, WHOLE_LOGITS // self.vocabulary))
        )

    def forest(self, asked: Sequence[Asked], rows: Sequence[Packed]) -> Iterator[tuple[int, Answer]]:
        """The answers to the requests whose sequences lie in these rows."""
        batch = batch_of(rows, self.dtype)
        wanted = [
            (sequence, number, path[-len(asked[sequence].targets) :])
            for number, row in enumerate(rows)
            for sequence, path in row.paths
        ]
        yield from self._answers(self._states(batch, plain=False), asked, wanted)

    def alone(self, asked: Sequence[Asked]) -> Iterator[tuple[int, Answer]]:
        """The answers to these requests, each sequence in a row of its own; padding follows it, and isn't seen."""
        wanted = [
            (index, index, tuple(range(len(one.tokens) - len(one.targets), len(one.tokens))))
            for index, one in enumerate(asked)
        ]
        batch = _ids_alone([one.tokens for one in asked])
        yield from self._answers(self._states(batch, plain=True), asked, wanted)

    def log_probabilities(self, batch: Batch, places: Sequence[int], *, plain: bool) -> Tensor:
        """float32 [places, vocabulary]: of a batch of one row, at these places of it."""
        states = self._states(batch, plain=plain)[0]
        return self._logits(states[torch.tensor(places, device=states.device)]).log_softmax(-1)

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
        self, states: Tensor, asked: Sequence[Asked], wanted: Sequence[tuple[int, int, Sequence[int]]]
    ) -> Iterator[tuple[int, Answer]]:
        """wanted: (request, row of `states`, the places in it that foretell the request's targets)."""
        rows = torch.tensor([row for _, row, places in wanted for _ in places])
        columns = torch.tensor([place for _, _, places in wanted for place in places])
        targets = torch.tensor([token for request, _, _ in wanted for token in asked[request].targets])
        assert len(columns) == len(targets), (len(columns), len(targets))
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


def _ids_alone(sequences: Sequence[Sequence[int]]) -> Batch:
    """Rows that are each one sequence, without the mask that a model makes for them itself."""
    length = max(map(len, sequences))
    ids = torch.tensor([[*tokens, *[0] * (length - len(tokens))] for tokens in sequences])
    return Batch(ids, torch.arange(length).expand(len(sequences), -1), torch.empty(0))


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
