"""What the measured intervals allow to be said.

Two models are told apart on a task by McNemar's exact test where an item is right or wrong, else by how far the
bootstrap interval of the difference is from zero. Over the tasks of one model the p-values are corrected by Holm's
step-down procedure (Holm 1979), which holds the chance of even one false claim at 5 % without assuming anything of how
the tasks depend on each other. Intervals that are shown are the tasks' own, uncorrected.

Of fewer than six items nothing is said, whatever they show: were all n to change the same way, an even chance of either
way brings that about with probability 2^(1 - n), 6.25 % at n = 5. Since that is known before any item is run, such
tasks don't count among those that are corrected for.

A difference that isn't significant is not shown to be absent. `possible_loss` says how large a loss is compatible with
the data: the far end of the interval (of right-or-wrong items the score interval of paired shares, of others the
bootstrap's; see `paired`). Of right-or-wrong items it is never less than the exact bound of none having changed: if a
share q of all items changed, none of n sampled ones would with probability (1 - q)^n, which falls below 2.5 % at
q = 1 - 0.025^(1/n), about 3.7 / n.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist

from llmshrink_eval.report import numbers
from llmshrink_eval.results import Divergence, ModelResult, Paired, Perplexity, Results, Task

LEVEL = 0.05
_NORMAL = NormalDist()
Z = _NORMAL.inv_cdf(1 - LEVEL / 2)
FEWEST_ITEMS = math.floor(1 - math.log2(LEVEL)) + 1
"""The fewest of which any outcome could be significant: 6."""


@dataclass(frozen=True)
class Interval:
    """A value between the ends of its 95 % interval."""

    value: float
    low: float
    high: float

    @property
    def half_width(self) -> float:
        """Half its length; for an asymmetric one the mean of both sides."""
        return (self.high - self.low) / 2


@lru_cache
def _t(units: int) -> float:
    """The 97.5 % quantile of Student's t for a mean over so many windows or documents."""
    from scipy.stats import t

    return float(t.ppf(1 - LEVEL / 2, units - 1))


def _around(value: float, stderr: float | None, units: int) -> Interval | None:
    if stderr is None or units < 2 or not (math.isfinite(value) and math.isfinite(stderr)):
        return None
    reach = _t(units) * stderr
    return Interval(value, value - reach, value + reach)


def _exponential(interval: Interval | None) -> Interval | None:
    if interval is None or interval.high > 700:  # exp overflows a float64 above 709
        return None
    return Interval(math.exp(interval.value), math.exp(interval.low), math.exp(interval.high))


def perplexity_interval(perplexity: Perplexity) -> Interval | None:
    """Of token perplexity: exp of the interval of nats/token. None for one window, or where it isn't finite."""
    return _exponential(_around(perplexity.nats_per_token, perplexity.stderr, perplexity.units))


def perplexity_ratio(perplexity: Perplexity) -> Interval | None:
    """Compressed over original perplexity, from the paired difference in nats/token."""
    if perplexity.excess_nats is None:
        return None
    return _exponential(_around(perplexity.excess_nats, perplexity.excess_stderr, perplexity.units))


def perplexity_shown(perplexity: Perplexity) -> Interval | None:
    """Of token perplexity, as it stands beside that of the original: paired where the model was held to one.

    Both models read the same windows, and how hard those are moves both alike. What tells them apart is the difference
    window by window; its interval, laid around the measured value, takes the original's value as it was measured. A
    model that was held to none has its own.
    """
    if perplexity.excess_nats is None:
        return perplexity_interval(perplexity)
    ratio = perplexity_ratio(perplexity)
    if ratio is None:
        return None
    low, high = (perplexity.token * end / ratio.value for end in (ratio.low, ratio.high))
    return Interval(perplexity.token, low, high) if math.isfinite(high) else None


def kl_interval(model: ModelResult) -> Interval | None:
    """Of kl_mean, which is never negative."""
    divergence = model.divergence
    if divergence is None:
        return None
    interval = _around(divergence.kl_mean, divergence.kl_stderr, divergence.kl_units)
    return interval and Interval(interval.value, max(0.0, interval.low), interval.high)


def below_resolution(divergence: Divergence) -> bool:
    """Whether the stored form of the original may account for all of the measured KL."""
    return divergence.kl_mean <= divergence.baseline_error


def task_recovery(paired: Paired | None) -> Interval | None:
    """Of one task's recovery, as stored: from 0, or to infinity, where it has no bound."""
    if paired is None or paired.recovery is None or not math.isfinite(paired.recovery):
        return None
    low, high = paired.recovery_low, paired.recovery_high
    low = low if low is not None and math.isfinite(low) else 0.0
    return Interval(paired.recovery, low, high if high is not None and math.isfinite(high) else math.inf)


def recovery_interval(model: ModelResult) -> Interval | None:
    """Of the mean recovery: the tasks' own errors in quadrature, since tasks share no items.

    None where a task that counts into the mean has no interval.
    """
    if model.recovery is None or not model.tasks:
        return None
    variance = 0.0
    for task in model.tasks.values():
        paired = task.versus_original
        if paired is None or paired.recovery_low is None or paired.recovery_high is None:
            return None
        variance += ((paired.recovery_high - paired.recovery_low) / (2 * Z)) ** 2
    reach = Z * math.sqrt(variance) / len(model.tasks)
    return Interval(model.recovery, model.recovery - reach, model.recovery + reach) if math.isfinite(reach) else None


def p_value(paired: Paired) -> float:
    """Two-sided, of no difference: McNemar's where there is one, else from the interval as if normal."""
    if paired.mcnemar_p is not None:
        return paired.mcnemar_p
    stderr = (paired.high - paired.low) / (2 * Z)
    if not stderr > 0:
        return 1.0 if paired.difference == 0 else 0.0
    return 2 * (1 - _NORMAL.cdf(abs(paired.difference) / stderr))


def holm(p_values: list[float]) -> list[float]:
    """Holm's adjusted p-values, in the order given: significant at 5 % where below 0.05."""
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    adjusted = [0.0] * len(p_values)
    running = 0.0
    for rank, index in enumerate(order):
        running = max(running, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = running
    return adjusted


@dataclass(frozen=True)
class Comparison:
    """A task of a compressed model held to the original. loss: positive is worse, in the metric's unit.

    outcome: "same" is short for "not told apart", "few" for "too few items to say"; the latter has no adjusted_p.
    alone: significant by itself, though not among all tasks. possible_loss: the largest loss that the data don't
    exclude; None where that can't be said.
    """

    name: str
    task: Task
    paired: Paired
    loss: Interval
    p: float
    adjusted_p: float | None
    outcome: str
    alone: bool
    possible_loss: float | None


def comparisons(model: ModelResult) -> list[Comparison]:
    """All tasks of a model that were compared item by item; those of enough items Holm-corrected among each other."""
    paired = [(name, task, task.versus_original) for name, task in model.tasks.items() if task.versus_original]
    judged = {name: p_value(versus) for name, task, versus in paired if not too_few(task)}
    adjusted = dict(zip(judged, holm(list(judged.values())), strict=True))
    return [_comparison(name, task, versus, p_value(versus), adjusted.get(name)) for name, task, versus in paired]


def too_few(task: Task) -> bool:
    """Whether no outcome of so few items could tell two models apart."""
    return task.items < FEWEST_ITEMS


def _comparison(name: str, task: Task, paired: Paired, p: float, adjusted: float | None) -> Comparison:
    if task.higher_is_better:
        loss = Interval(-paired.difference, -paired.high, -paired.low)
    else:
        loss = Interval(paired.difference, paired.low, paired.high)
    outcome = "few" if adjusted is None else _outcome(adjusted, loss)
    alone = adjusted is not None and p < LEVEL <= adjusted
    return Comparison(name, task, paired, loss, p, adjusted, outcome, alone, _possible_loss(task, paired, loss))


def _outcome(adjusted: float, loss: Interval) -> str:
    if adjusted >= LEVEL:
        return "same"
    return "worse" if loss.value > 0 else "better"


def _possible_loss(task: Task, paired: Paired, loss: Interval) -> float | None:
    if paired.mcnemar_p is None:
        return max(loss.high, 0.0) if loss.high > loss.low else None
    unchanged = LEVEL / 2
    return max(loss.high, 1 - math.pow(unchanged, 1 / max(1, task.items)))


def at_chance(task: Task) -> bool:
    """Whether a score isn't told apart from guessing: such a task can't show damage.

    Exact where items are right or wrong, which a whole number of right ones is taken to mean: with probability above
    2.5 % guesses get as many right. Else by the score's standard error.
    """
    if task.chance is None:
        return False
    right = task.score * task.items
    if task.higher_is_better and 0 <= task.score <= 1 and abs(right - round(right)) < 1e-6:
        from scipy.stats import binom

        return float(binom.sf(round(right) - 1, task.items, task.chance)) > LEVEL / 2
    sign = 1 if task.higher_is_better else -1
    return sign * (task.score - task.chance) <= Z * (task.stderr or 0.0)


def labels(results: Results) -> dict[str, str]:
    """Model name -> what the report calls it: the last part of its path where that is enough to tell models apart."""
    last = [model.name.replace("\\", "/").rstrip("/").rsplit("/", 1)[-1] for model in results.models]
    return {
        model.name: numbers.printable(short if short and last.count(short) == 1 else model.name)
        for model, short in zip(results.models, last, strict=True)
    }
