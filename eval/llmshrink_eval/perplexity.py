"""Perplexity from the nats of each window, with an error bar that knows that tokens of a window are not independent.

    nats/token = sum of -log p over all scored tokens / their number
    token perplexity = exp(nats/token)      word perplexity = exp(all nats / words)
    bits per byte = all nats / ln 2 / bytes

It is a ratio of two sums over clusters, and its standard error is the ratio estimator's (Cochran, Sampling Techniques,
eq. 2.45, without the finite population): with e_c = nats_c - ratio * tokens_c for each of n clusters,

    stderr = sqrt(n / (n - 1) * sum e_c^2) / all tokens

Clusters are documents when there are enough of them, else windows: neighbouring tokens share their context and their
topic, so an error bar by tokens would be too small.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from llmshrink_eval.protocol import Windows
from llmshrink_eval.results import Perplexity

MIN_DOCUMENTS = 30

Unit: TypeAlias = Literal["windows", "documents"]


def perplexity(
    windows: Windows, window_nats: Sequence[float], original_nats: Sequence[float] | None = None
) -> Perplexity:
    """Sum up a pass.

    window_nats: for each window the sum of -log p over its scored tokens, in nats. original_nats: the same of the
    original, for the paired excess.
    """
    nats = torch.tensor(window_nats, dtype=torch.float64)
    counts = windows.scored.sum(1).double()
    total, tokens = math.fsum(window_nats), windows.tokens
    unit, numbers = clusters(windows)
    excess = excess_stderr = None
    if original_nats is not None:
        difference = nats - torch.tensor(original_nats, dtype=torch.float64)
        excess = math.fsum(difference.tolist()) / tokens
        excess_stderr = stderr(windows, difference, counts)
    return Perplexity(
        token=_exp(total / tokens),
        word=_exp(total / max(1, windows.words)),
        bits_per_byte=total / math.log(2) / max(1, windows.bytes),
        nats_per_token=total / tokens,
        stderr=stderr(windows, nats, counts),
        stderr_over=unit,
        units=len(numbers.unique()),
        tokens=tokens,
        words=windows.words,
        bytes=windows.bytes,
        windows=len(windows),
        excess_nats=excess,
        excess_stderr=excess_stderr,
    )


def clusters(windows: Windows) -> tuple[Unit, Tensor]:
    """What counts as one independent observation, and the number of each window's (int64 [windows], from 0)."""
    distinct, numbers = windows.document.unique(return_inverse=True)
    if len(distinct) >= MIN_DOCUMENTS:
        return "documents", numbers
    return "windows", torch.arange(len(windows))


def stderr(windows: Windows, sums: Tensor, counts: Tensor) -> float:
    """Of sum(sums) / sum(counts), both float64 [windows]. 0 for a single cluster, which tells nothing of its spread."""
    _, numbers = clusters(windows)
    n = int(numbers.max()) + 1
    if n < 2:
        return 0.0
    errors = torch.zeros(n, dtype=torch.float64).index_add_(0, numbers, sums - sums.sum() / counts.sum() * counts)
    return math.sqrt(n / (n - 1) * float(errors.square().sum())) / float(counts.sum())


def _exp(nats: float) -> float:
    """A model broken beyond the range of a float has the largest one as its perplexity: JSON has no infinity."""
    return math.exp(nats) if nats < math.log(sys.float_info.max) else sys.float_info.max
