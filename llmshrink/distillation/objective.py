"""What a student is punished for, row by row: the loss and its gradient with respect to the student's logits.

    L = alpha * CE(y, p_s) + (1 - alpha) * T^2 * D(p_t, p_s)

p_t and p_s are softmaxes of logits / T, the cross-entropy is at T = 1 (Hinton, Vinyals and Dean 2015, section 2). D is

- `forward_kl`: KL(p_t || p_s). As KL(p_t || p_s) = CE(p_t, p_s) - H(p_t) and the teacher's entropy has no gradient, at
  T = 1 this is alpha * CE(y, p_s) + (1 - alpha) * CE(p_t, p_s): quantization-aware distillation has alpha = 0;
- `reverse_kl`: KL(p_s || p_t), which a student meets by leaving out what it can't imitate;
- `jsd`: beta * KL(p_t || m) + (1 - beta) * KL(p_s || m) with m = beta p_t + (1 - beta) p_s (Agarwal et al. 2024,
  eq. 1).

A teacher that was stored as its k likeliest tokens has a last bucket, the sum of all others: D is then between
distributions over k + 1 outcomes, exactly. Leaving the bucket out would make a student too sure of those k.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

Divergence = Literal["forward_kl", "reverse_kl", "jsd"]
DIVERGENCES: tuple[Divergence, ...] = get_args(Divergence)
IGNORED = -100
"""The label of a position that has no cross-entropy."""


@dataclass(frozen=True)
class Objective:
    """alpha: share of the cross-entropy, 0 to 1. temperature: T, above 0. beta: of `jsd`, between 0 and 1."""

    alpha: float = 0.0
    temperature: float = 1.0
    divergence: Divergence = "forward_kl"
    beta: float = 0.5

    def __post_init__(self) -> None:
        if not 0.0 <= self.alpha <= 1.0:
            raise ValueError(f"alpha {self.alpha}: must be from 0 (only the teacher) to 1 (only the text)")
        if not (self.temperature > 0.0 and math.isfinite(self.temperature)):
            raise ValueError(f"temperature {self.temperature}: must be above 0")
        if self.divergence not in DIVERGENCES:
            raise ValueError(f"divergence {self.divergence}: isn't one of {', '.join(DIVERGENCES)}")
        if not 0.0 < self.beta < 1.0:
            raise ValueError(f"beta {self.beta}: must be between 0 and 1, both apart")


@dataclass(frozen=True)
class TopK:
    """A teacher's rows as their likeliest tokens.

    ids: int64 [rows, k], no token twice in a row. logprobs: [rows, k], at the objective's temperature. tail: [rows],
    the log-probability of all other tokens together; -inf where there are none.
    """

    ids: Tensor
    logprobs: Tensor
    tail: Tensor

    @classmethod
    def of(cls, logits: Tensor, k: int, temperature: float = 1.0) -> TopK:
        """From logits [rows, vocabulary]; k is at most the vocabulary. The tail is summed over the tokens in it."""
        logprobs = (logits / temperature).log_softmax(-1)
        values, ids = logprobs.topk(min(k, logits.shape[-1]), dim=-1)
        rest = logprobs.scatter(-1, ids, -torch.inf)
        return cls(ids, values, rest.logsumexp(-1))


def row_losses(
    objective: Objective, logits: Tensor, teacher: Tensor | TopK, labels: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(cross-entropy [rows], T^2 * divergence [rows], gradient of L [rows, vocabulary]), all of logits' dtype.

    logits: the student's, float32 or float64 [rows, vocabulary]. teacher: logits of the same shape, or a TopK.
    labels: int64 [rows], IGNORED for a row without; None: no row has one.
    """
    alpha, temperature = objective.alpha, objective.temperature
    entropy = logits.new_zeros(len(logits))
    gradient: Tensor | None = None
    if alpha > 0.0 and labels is not None:
        entropy, gradient = _cross_entropy(logits, labels)
        gradient *= alpha
    if alpha == 1.0:
        return entropy, torch.zeros_like(entropy), torch.zeros_like(logits) if gradient is None else gradient
    student = _logprobs(logits, temperature)
    if isinstance(teacher, TopK):
        divergence, slope = _over_buckets(objective, student, teacher)
    else:
        divergence, slope = _divergence(objective, student, _logprobs(teacher, temperature))
    # d/dz of T^2 D, where D knows z / T: one T is left.
    share = (1.0 - alpha) * temperature
    if share != 1.0:
        slope *= share
    return entropy, temperature**2 * divergence, slope if gradient is None else gradient.add_(slope)


def _logprobs(logits: Tensor, temperature: float) -> Tensor:
    return (logits if temperature == 1.0 else logits / temperature).log_softmax(-1)


def _cross_entropy(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    logprobs = logits.log_softmax(-1)
    counted = labels != IGNORED
    target = labels.clamp(min=0)[:, None]
    entropy = -logprobs.gather(-1, target).squeeze(-1) * counted
    gradient = logprobs.exp_()
    gradient.scatter_add_(-1, target, -torch.ones_like(target, dtype=logits.dtype))
    return entropy, gradient * counted[:, None]


def _divergence(objective: Objective, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """(D [rows], its gradient by student logits over T [rows, n]) of log-probabilities [rows, n]."""
    p_s, p_t = student.exp(), teacher.exp()
    if objective.divergence == "forward_kl":
        return _mean(p_t, teacher - student), p_s.sub_(p_t)
    if objective.divergence == "reverse_kl":
        excess = _relevant(p_s, student - teacher)
        value = (p_s * excess).sum(-1)
        return value, p_s.mul_(excess.sub_(value[:, None]))
    beta = objective.beta
    middle = torch.logaddexp(teacher + math.log(beta), student + math.log1p(-beta))
    value = beta * _mean(p_t, teacher - middle)
    excess = _relevant(p_s, student - middle)
    mean = (p_s * excess).sum(-1)
    return value + (1.0 - beta) * mean, p_s.mul_(excess.sub_(mean[:, None])).mul_(1.0 - beta)


def _relevant(p: Tensor, difference: Tensor) -> Tensor:
    """`difference`, itself, 0 where p is: an impossible outcome adds nothing, even where logarithms are infinite.

    What isn't a number stays so, and is seen in the loss.
    """
    return difference.masked_fill_(p == 0, 0.0)


def _mean(p: Tensor, difference: Tensor) -> Tensor:
    """sum_i p_i difference_i of each row; what is impossible adds nothing, as in `_relevant`, which costs two passes
    that hardly any row needs."""
    found: Tensor = torch.linalg.vecdot(p, difference)
    odd = found.isnan()
    if bool(odd.any()):
        found[odd] = torch.linalg.vecdot(p[odd], _relevant(p[odd], difference[odd]))
    return found


def _over_buckets(objective: Objective, student: Tensor, teacher: TopK) -> tuple[Tensor, Tensor]:
    """As `_divergence`, between distributions over the teacher's k tokens and the bucket of all others.

    By the chain rule: a token in the bucket moves the bucket's probability by its own share of it, so the gradient of a
    bucket is spread over its tokens as the student's probabilities are.
    """
    kept = student.gather(-1, teacher.ids)
    rest = student.scatter(-1, teacher.ids, -torch.inf)
    tail = rest.logsumexp(-1, keepdim=True)
    reference = torch.cat([teacher.logprobs, teacher.tail[:, None]], -1).to(student.dtype)
    value, slope = _divergence(objective, torch.cat([kept, tail], -1), reference)
    share = (rest - tail).exp().nan_to_num_(0.0)
    gradient = slope[:, -1:] * share
    return value, gradient.scatter(-1, teacher.ids, slope[:, :-1])
