"""The loss over a batch without the batch's logits: a few rows at a time, with a backward of its own.

Logits of 8 windows of 1,024 tokens over 128 k tokens of vocabulary are 4 GB in float32, and autograd would keep several
such tensors. Here the output layer, the loss and the loss's gradient by the logits are done for `chunk` rows, and of
them only the sums stay: the gradient by the hidden states and by the output layer's weight. So the forward does the
work of the backward too, and the backward is a multiplication by the gradient that comes from above.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llmshrink.distillation.objective import Objective, TopK, row_losses

Teacher = Callable[[slice], Tensor | TopK]
"""Rows of the batch -> what the teacher says of them: logits [rows, vocabulary], or its likeliest tokens."""
CHUNK_LOGITS = 1 << 22
"""Logits in memory at a time, unless the caller says otherwise: 16 MB in float32, and some four times as much with the
probabilities and gradients beside them."""
CACHED_LOGITS, FEWEST_ROWS = 1 << 19, 128
"""On a CPU, logits that stay in its caches between the passes over them (a fifth less time for 2,040 rows of 4,096);
and rows below which the products suffer."""


@dataclass(frozen=True)
class Tail:
    """What a family does to the logits after the output layer: `cap` (c tanh(z / c)), or a factor."""

    cap: float | None = None
    factor: float = 1.0

    def __call__(self, logits: Tensor) -> Tensor:
        """The same shape; may be the same tensor."""
        if self.cap is None:
            return logits if self.factor == 1.0 else logits * self.factor
        return self.cap * torch.tanh(logits / self.cap)

    def through(self, gradient: Tensor, after: Tensor) -> Tensor:
        """The gradient by the logits before, from that by the result `after`; in place."""
        if self.cap is not None:
            return gradient.mul_(1.0 - (after / self.cap) ** 2)
        return gradient if self.factor == 1.0 else gradient.mul_(self.factor)


@dataclass(frozen=True)
class Losses:
    """Sums over the rows that count. total: L, with its gradient; entropy, divergence: its two parts, without."""

    total: Tensor
    entropy: Tensor
    divergence: Tensor


def chunk_rows(vocabulary: int, device: torch.device) -> int:
    """Rows at a time: within `CHUNK_LOGITS`, and on a CPU within its caches."""
    most = max(1, CHUNK_LOGITS // vocabulary)
    return min(most, max(FEWEST_ROWS, CACHED_LOGITS // vocabulary)) if device.type == "cpu" else most


def chunked_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    teacher: Teacher,
    objective: Objective,
    *,
    labels: Tensor | None = None,
    tail: Tail | None = None,
    chunk: int | None = None,
) -> Losses:
    """The objective, summed over rows.

    hidden: [rows, width], what the output layer reads, of the rows that count only (leave masked ones out before).
    weight: [vocabulary, width]; bias: [vocabulary] or None. labels: int64 [rows]. chunk: rows at a time. The loss and
    its gradients are in float32, or in float64 where hidden is; the products with the weight are in hidden's dtype.
    """
    rows = chunk_rows(weight.shape[0], weight.device) if chunk is None else chunk
    job = _Job(teacher, objective, labels, Tail() if tail is None else tail, rows)
    return Losses(*_Chunked.apply(hidden, weight, bias, job))  # type: ignore[no-untyped-call]


@dataclass(frozen=True)
class _Job:
    teacher: Teacher
    objective: Objective
    labels: Tensor | None
    tail: Tail
    chunk: int


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, job: _Job) -> tuple[Tensor, ...]:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        sums = hidden.new_zeros(2, dtype=wide)
        wants = ctx.needs_input_grad
        to_hidden = torch.empty_like(hidden) if wants[0] else None
        to_weight = torch.zeros_like(weight, dtype=wide) if wants[1] else None
        to_bias = torch.zeros_like(bias, dtype=wide) if bias is not None and wants[2] else None
        matrix = weight.to(hidden.dtype)
        for start in range(0, len(hidden), job.chunk):
            rows = slice(start, min(start + job.chunk, len(hidden)))
            before = torch.nn.functional.linear(hidden[rows], matrix, None if bias is None else bias.to(hidden.dtype))
            logits = job.tail(before.to(wide))
            labels = None if job.labels is None else job.labels[rows]
            entropy, divergence, gradient = row_losses(job.objective, logits, job.teacher(rows), labels)
            sums += torch.stack([entropy.sum(), divergence.sum()])
            gradient = job.tail.through(gradient, logits)
            narrow = gradient.to(hidden.dtype)
            if to_hidden is not None:
                torch.mm(narrow, matrix, out=to_hidden[rows])
            if to_weight is not None:
                if to_weight.dtype == hidden.dtype:
                    to_weight.addmm_(narrow.t(), hidden[rows])
                else:
                    to_weight += narrow.t() @ hidden[rows]
            if to_bias is not None:
                to_bias += gradient.sum(0)
        ctx.gradients = (to_hidden, to_weight, to_bias)
        ctx.dtypes = (weight.dtype, None if bias is None else bias.dtype)
        alpha = job.objective.alpha
        total = alpha * sums[0] + (1.0 - alpha) * sums[1]
        entropy, divergence = (part.clone() for part in sums)
        ctx.mark_non_differentiable(entropy, divergence)
        return total, entropy, divergence

    @staticmethod
    def backward(ctx: Any, total: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("a chunked loss has one backward: its gradients are made in the forward")
        (to_hidden, to_weight, to_bias), ctx.gradients = ctx.gradients, None
        of_weight, of_bias = ctx.dtypes
        return (
            None if to_hidden is None else to_hidden.mul_(total.to(to_hidden.dtype)),
            None if to_weight is None else to_weight.mul_(total).to(of_weight),
            None if to_bias is None else to_bias.mul_(total).to(of_bias),
            None,
        )
