"""The held-out windows: what the run promises of the finished model, and how a reload is held to it.

A few windows that no method saw travel through both streams. Their final logits give perplexity and KL before and
after for the closing summary; of the compressed model's, each token's log-probability and the few most likely
continuations are kept under `verify/`, and `verify` compares a model reloaded from disk with them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llmshrink.calibration.activations import Batch
from llmshrink.errors import CheckpointError

TOP = 8
LARGEST_LOSS = 700.0
"""Nats a token: exp of more is no number in float64."""
WAYS_OUT = {
    "original": "it is damaged, or not for such text: download it again, or give text of its kind",
    "result": "nothing is left of the model: give more bits, or take less away",
}
LOGITS = 1 << 22
"""Logits in memory at a time, for each model: 16 MB of float32, whatever the vocabulary."""


@dataclass(frozen=True)
class Quality:
    """Means over the held-out tokens, in nats/token; ppl is exp(mean negative log-likelihood of the next token)."""

    tokens: int
    ppl_before: float
    ppl_after: float
    kl_mean: float
    kl_stderr: float
    top1_agreement: float

    @classmethod
    def over(cls, before: Tensor, after: Tensor, kl: Tensor, same_top: Tensor) -> Quality:
        """before, after: log-probabilities of the next token; kl, same_top: by position; all float64 [tokens].

        Raises CheckpointError for a loss whose perplexity is no number.
        """
        for model, logprobs in (("original", before), ("result", after)):
            loss = -float(logprobs.mean())
            if not loss < LARGEST_LOSS:
                raise CheckpointError(
                    f"the {model}'s loss on the held-out text is {loss:.4g} nats a token, where a model has a few: "
                    f"{WAYS_OUT[model]}"
                )
        n = kl.numel()
        stderr = float(kl.std() / math.sqrt(n)) if n > 1 else 0.0
        return cls(
            tokens=n,
            ppl_before=math.exp(-float(before.mean())),
            ppl_after=math.exp(-float(after.mean())),
            kl_mean=float(kl.mean()),
            kl_stderr=stderr,
            top1_agreement=float(same_top.mean()),
        )


Logits = Callable[[Tensor], Tensor]


def summarize(
    batches: Sequence[Batch], original: Sequence[Tensor], compressed: Sequence[Tensor], logits: Logits
) -> tuple[Quality, dict[str, Tensor]]:
    """Compare two streams' last hidden states ([batch, tokens, dim] each) on the held-out batches.

    Returns the quality and the tensors to keep: see `reference`.
    """
    rows: list[list[Tensor]] = []
    kept: list[dict[str, Tensor]] = []
    for batch, before_hidden, after_hidden in zip(batches, original, compressed, strict=True):
        kept.append(reference(batch, after_hidden, logits))
        for target, (before, after) in _positions(batch, [before_hidden, after_hidden], logits):
            kl = (before.exp() * (before - after)).sum(-1)
            same = (before.argmax(-1) == after.argmax(-1)).double()
            rows.append([_pick(before, target), _pick(after, target), kl, same])
    columns = [torch.cat([row[i] for row in rows]).double() for i in range(4)]
    return Quality.over(*columns), merge(kept)


def divergences(
    batches: Sequence[Batch], original: Sequence[Tensor], other: Sequence[Tensor], logits: Logits
) -> Tensor:
    """KL(original || other) in nats at every position that `reference` keeps: float64 [positions].

    original, other: last hidden states of each batch, [batch, tokens, dim].
    """
    found = []
    for batch, before_hidden, after_hidden in zip(batches, original, other, strict=True):
        for _, (before, after) in _positions(batch, [before_hidden, after_hidden], logits):
            found.append((before.exp() * (before - after)).sum(-1).double())
    return torch.cat(found)


def reference(batch: Batch, hidden: Tensor, logits: Logits) -> dict[str, Tensor]:
    """What is kept of a batch: its tokens, and float32 log-probabilities.

    input_ids int64 and mask uint8 [batch, tokens]; token_logprobs float32 [positions] of each next token;
    top_ids int32 and top_logprobs float32 [positions, TOP], most likely first. Positions run over the windows in
    order, every token that has a real successor.
    """
    token, ids, values = [], [], []
    for target, (after,) in _positions(batch, [hidden], logits):
        token.append(_pick(after, target))
        top = after.topk(min(TOP, after.shape[-1]), dim=-1)
        ids.append(top.indices.int())
        values.append(top.values)
    mask = torch.ones_like(batch.input_ids, dtype=torch.uint8) if batch.mask is None else batch.mask.to(torch.uint8)
    return {
        "input_ids": batch.input_ids,
        "mask": mask,
        "token_logprobs": torch.cat(token).cpu(),
        "top_ids": torch.cat(ids).cpu(),
        "top_logprobs": torch.cat(values).cpu(),
    }


def merge(kept: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The references of several batches as one."""
    return {name: torch.cat([one[name] for one in kept]) for name in kept[0]}


def _positions(batch: Batch, hiddens: Sequence[Tensor], logits: Logits) -> Iterator[tuple[Tensor, list[Tensor]]]:
    """(next token, log-probabilities of each hidden state) for as many positions at a time as LOGITS allows."""
    mask = torch.ones_like(batch.input_ids, dtype=torch.bool) if batch.mask is None else batch.mask
    real = (mask[:, 1:] & mask[:, :-1]).reshape(-1)
    index = real.nonzero().squeeze(-1)
    targets = batch.input_ids[:, 1:].reshape(-1)[index]
    flat = [h[:, :-1].reshape(-1, h.shape[-1])[index.to(h.device)] for h in hiddens]
    chunk = max(1, LOGITS // logits(flat[0][None, :1].float()).shape[-1])
    for start in range(0, len(index), chunk):
        stop = start + chunk
        logprobs = [logits(h[None, start:stop].float())[0].float().log_softmax(-1) for h in flat]
        yield targets[start:stop].to(logprobs[0].device), logprobs


def _pick(logprobs: Tensor, target: Tensor) -> Tensor:
    return logprobs.gather(-1, target[:, None]).squeeze(-1)
