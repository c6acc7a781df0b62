"""A task's score, and what became of it, as text: in percent and points where the metric is a share of items."""

from __future__ import annotations

import math

from llmshrink_eval.report import inference, numbers
from llmshrink_eval.report.inference import Comparison
from llmshrink_eval.results import Task

_SHARES = ("acc", "exact_match", "em", "f1", "pass@", "contains")


def is_share(metric: str) -> bool:
    """Whether a metric is a share of items, whose differences are spoken of in percentage points."""
    return metric.split(",")[0].lower().startswith(_SHARES)


def score(metric: str, value: float, reach: float | None = None) -> str:
    """A task's score with the reach of its interval: in percent for a share, else in the metric's own unit."""
    scale, unit = (100, " %") if is_share(metric) else (1, "")
    if reach is None or not reach > 0 or not math.isfinite(reach):
        return f"{numbers.fixed(100 * value, 1) if unit else numbers.significant(value)}{unit}"
    decimals = 1 if unit else numbers.decimals_for(scale * reach)
    return f"{numbers.fixed(scale * value, decimals)} ± {numbers.fixed(scale * reach, decimals)}{unit}"


def task_score(task: Task) -> str:
    """`63.1 ± 2.1 %`; `50.0 % (2 items)` for too few; `100.0 % (≥ 98.2)`, the exact bound, where none or all are right.

    Items that are all alike have no spread, and a score without one would look certain.
    """
    if inference.too_few(task):
        return f"{score(task.metric, task.score)} ({numbers.plural(task.items, 'item')})"
    if is_share(task.metric) and task.score in (0.0, 1.0):
        others = 1 - math.pow(inference.LEVEL / 2, 1 / task.items)
        bound = f"≥ {numbers.fixed(100 * (1 - others), 1)}" if task.score else f"≤ {numbers.fixed(100 * others, 1)}"
        return f"{score(task.metric, task.score)} ({bound})"
    return score(task.metric, task.score, None if task.stderr is None else inference.Z * task.stderr)


def outcome_difference(one: Comparison) -> str:
    """`2.1 points (0.8 to 3.4)`, positive in the direction of the outcome."""
    sign = 1 if one.loss.value > 0 else -1
    low, high = sorted((sign * one.loss.low, sign * one.loss.high))
    scale, unit = (100, " points") if is_share(one.task.metric) else (1, f" {one.task.metric.split(',')[0]}")
    decimals = 1 if scale == 100 else numbers.decimals_for(one.loss.half_width)
    value = numbers.fixed(scale * abs(one.loss.value), decimals)
    return f"{value}{unit} ({numbers.span(scale * low, scale * high, decimals)})"


def amount(metric: str, difference: float) -> str:
    """A difference with its unit: `2.3 points`."""
    if is_share(metric):
        return f"{numbers.fixed(100 * difference, 1)} points"
    return f"{numbers.significant(difference, 2)} {metric.split(',')[0]}"


def signed_difference(one: Comparison) -> str:
    """Compressed less original in the task's unit: `−2.1 points (−3.4 to −0.8)`."""
    paired = one.paired
    scale, unit = (100, " points") if is_share(one.task.metric) else (1, "")
    decimals = 1 if unit else numbers.decimals_for((paired.high - paired.low) / 2)
    within = numbers.span(scale * paired.low, scale * paired.high, decimals)
    return f"{numbers.fixed(scale * paired.difference, decimals)}{unit} ({within})"


def p_text(p: float) -> str:
    """A p-value to three decimals; what is smaller is only said to be."""
    return "< 0.001" if p < 0.001 else numbers.fixed(p, 3)
