"""How far a compressed model's next-token distribution is from the original's, over the whole vocabulary.

At each position, with the original's probabilities p and the compressed model's q,

    KL(p || q) = sum_i p_i (log p_i - log q_i) = sum_i p_i (a_i - b_i) - (lse(a) - lse(b))        a, b: logits

in float64 from float32 logits, in as few rows at a time as keep the work in the processor's cache. Equal logits give
exactly 0. Sums are exact to rounding; the KL of every position is kept in float32 (4 bytes a position), for the median,
the 99th percentile, the maximum and the histogram.

Of each window the few worst positions are kept with both models' likeliest tokens, so that the worst of all can be
shown without running anything again.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from llmshrink_eval.perplexity import clusters, stderr
from llmshrink_eval.protocol import Windows
from llmshrink_eval.results import Divergence, WorstContext

TOP = 5
WORST = 10
CONTEXT_TOKENS = 24
CELLS = 1 << 18
"""Vocabulary entries in float64 at a time: 2 MB a copy, which the processor's cache holds."""
CELLS_ELSEWHERE = 1 << 24
"""On an accelerator, where small operations cost more than memory: 128 MB a copy."""

EDGES = tuple(10.0 ** (exponent / 4) for exponent in range(-32, 9))
"""Of the histogram: 1e-8 to 100 nats, four bins a decade."""


@dataclass(frozen=True)
class Rows:
    """What is known of some positions. All on the CPU.

    nats: float64 [rows], -log p of the next token under the compressed model, 0 where none is scored. finite: bool
    [rows], whether the model's logits make a distribution. With an original: kl float64 [rows]; original_ids,
    compressed_ids int64 and original_logprobs, compressed_logprobs float32 [rows, TOP], likeliest first.
    """

    nats: Tensor
    finite: Tensor
    kl: Tensor | None = None
    original_ids: Tensor | None = None
    original_logprobs: Tensor | None = None
    compressed_ids: Tensor | None = None
    compressed_logprobs: Tensor | None = None


@dataclass(frozen=True)
class Disagreement:
    """A position of a window, and the likeliest tokens there: (id, log-probability in nats), likeliest first."""

    position: int
    kl: float
    original: tuple[tuple[int, float], ...]
    compressed: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class WindowDivergence:
    """A window's part. kl: float32 [positions]; kl_sum: of the float64 values; same_top1: positions where both have
    the same likeliest token; shared_top5: tokens that both have among their five likeliest, over all positions."""

    kl: Tensor
    kl_sum: float
    same_top1: int
    shared_top5: int
    worst: tuple[Disagreement, ...]
    error: float = 0.0


def score_rows(logits: Tensor, targets: Tensor, original: Tensor | None) -> Rows:
    """Look at some positions.

    logits: float32 [rows, vocabulary]; original: the same of the original model, or None. targets: int64 [rows], the
    next token, negative where none is scored. A logit of -inf is a token that can't come; NaN and inf are no numbers.
    """
    cells = CELLS if logits.device.type == "cpu" else CELLS_ELSEWHERE
    step = max(1, cells // logits.shape[-1])
    parts = range(0, len(logits), step)
    if original is None:
        pieces = [_nats(logits[i : i + step].double(), targets[i : i + step]) for i in parts]
        nats, lse = (torch.cat(column) for column in zip(*pieces, strict=True))
        return Rows(nats.cpu(), lse.isfinite().cpu())
    compared = [_compare(logits[i : i + step], targets[i : i + step], original[i : i + step]) for i in parts]
    nats, lse, kl, original_lse = (torch.cat(column) for column in zip(*compared, strict=True))
    return Rows(nats.cpu(), lse.isfinite().cpu(), kl.cpu(), *_top(original, original_lse), *_top(logits, lse))


def _nats(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """(-log p of the targets, lse), float64 [rows] each; logits: float64."""
    lse = logits.logsumexp(-1)
    nats = lse - logits.gather(-1, targets.clamp(min=0)[:, None]).squeeze(-1)
    return torch.where(targets < 0, 0.0, nats), lse


def _compare(logits: Tensor, targets: Tensor, original: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(nats, lse, kl, lse of the original), float64 [rows] each."""
    b = logits.double()
    nats, lse_b = _nats(b, targets)
    a = original.double()
    lse_a = a.logsumexp(-1)
    terms = (a - lse_a[:, None]).exp_().mul_(a.sub_(b))
    kl = terms.sum(-1)
    if not bool(kl.isfinite().all()):
        # 0 * inf: a token that the original can't say costs nothing, whatever the other one thinks of it.
        kl = terms.nansum(-1)
    return nats, lse_b, (kl - (lse_a - lse_b)).clamp_(min=0.0), lse_a


def _top(logits: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    top = logits.topk(min(TOP, logits.shape[-1]), dim=-1)
    return top.indices.cpu(), (top.values.double() - lse[:, None]).float().cpu()


def join_rows(pieces: Sequence[Rows]) -> Rows:
    """Consecutive rows as one."""
    columns = {field.name: [getattr(piece, field.name) for piece in pieces] for field in fields(Rows)}
    return Rows(**{name: torch.cat(column) for name, column in columns.items() if column[0] is not None})


def window_divergence(rows: Rows, positions: Tensor, error: float = 0.0) -> WindowDivergence:
    """A window's part from its rows, which stand at the given positions of the window (int64 [rows]).

    error: what the stored form of the original can have put into the sum of its KL, in nats.
    """
    assert rows.kl is not None and rows.original_ids is not None and rows.compressed_ids is not None
    assert rows.original_logprobs is not None and rows.compressed_logprobs is not None
    worst = [
        Disagreement(
            int(positions[index]),
            float(rows.kl[index]),
            tuple(zip(rows.original_ids[index].tolist(), rows.original_logprobs[index].tolist(), strict=True)),
            tuple(zip(rows.compressed_ids[index].tolist(), rows.compressed_logprobs[index].tolist(), strict=True)),
        )
        for index in rows.kl.topk(min(WORST, len(rows.kl))).indices.tolist()
    ]
    return WindowDivergence(
        kl=rows.kl.float(),
        kl_sum=math.fsum(rows.kl.tolist()),
        same_top1=int((rows.original_ids[:, 0] == rows.compressed_ids[:, 0]).sum()),
        shared_top5=int((rows.original_ids[:, :, None] == rows.compressed_ids[:, None, :]).sum()),
        worst=tuple(worst),
        error=error,
    )


def divergence(
    windows: Windows, parts: Sequence[WindowDivergence], tokenizer: Any, *, method: str = "full"
) -> Divergence:
    """Sum up a pass: parts[w] is of window w. The standard error is the ratio estimator's, as perplexity's."""
    kl = torch.cat([part.kl for part in parts]).double()
    sums = torch.tensor([part.kl_sum for part in parts], dtype=torch.float64)
    counts = torch.tensor([len(part.kl) for part in parts], dtype=torch.float64)
    ordered = kl.sort().values
    positions = len(kl)
    top = len(parts[0].worst[0].original)
    return Divergence(
        kl_mean=math.fsum(sums.tolist()) / positions,
        kl_stderr=stderr(windows, sums, counts),
        kl_median=_quantile(ordered, 0.5),
        kl_p99=_quantile(ordered, 0.99),
        kl_max=float(ordered[-1]),
        top1_agreement=sum(part.same_top1 for part in parts) / positions,
        top5_overlap=sum(part.shared_top5 for part in parts) / (top * positions),
        positions=positions,
        kl_units=len(clusters(windows)[1].unique()),
        method=method,
        baseline_error=math.fsum(part.error for part in parts) / positions,
        histogram_edges=EDGES,
        histogram_counts=_histogram(kl),
        worst=tuple(_worst(windows, parts, tokenizer)),
    )


def _quantile(ordered: Tensor, share: float) -> float:
    """Linear between the two nearest ranks, as numpy's default."""
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return float(ordered[low] + (ordered[high] - ordered[low]) * (place - low))


def _histogram(kl: Tensor) -> tuple[int, ...]:
    inner = torch.tensor(EDGES[1:-1], dtype=torch.float64)
    return tuple(torch.bincount(torch.bucketize(kl, inner, right=True), minlength=len(EDGES) - 1).tolist())


def _worst(windows: Windows, parts: Sequence[WindowDivergence], tokenizer: Any) -> Iterator[WorstContext]:
    everything = [(place, window) for window, part in enumerate(parts) for place in part.worst if place.kl > 0]
    for place, window in sorted(everything, key=lambda one: (-one[0].kl, one[1], one[0].position))[:WORST]:
        ids = windows.input_ids[window, : int(windows.lengths[window])].tolist()
        position = place.position
        actual = tokenizer.decode(ids[position + 1 : position + 2])

        def likeliest(top: tuple[tuple[int, float], ...]) -> tuple[tuple[str, float], ...]:
            return tuple((tokenizer.decode([token]), math.exp(logprob)) for token, logprob in top)

        yield WorstContext(
            window=window,
            position=position,
            kl=place.kl,
            text=tokenizer.decode(ids[max(0, position + 1 - CONTEXT_TOKENS) : position + 1]),
            actual=actual,
            original_top=likeliest(place.original),
            compressed_top=likeliest(place.compressed),
        )
