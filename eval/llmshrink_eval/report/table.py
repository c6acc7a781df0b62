"""table.md: the measured models as one Markdown table, to be pasted into a model card.

Nothing in it is interpreted as Markdown or HTML: names come from users, and a card is rendered on someone's site.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

from llmshrink_eval.inert import escaped
from llmshrink_eval.report import inference, numbers
from llmshrink_eval.report.scores import task_score
from llmshrink_eval.results import ModelResult, Results


def perplexity_decimals(results: Results) -> int:
    """For the whole column: as many as tell its models apart, by the narrowest interval; three at most."""
    shown = [inference.perplexity_shown(model.perplexity) for model in results.models if model.perplexity]
    widths = [interval.half_width for interval in shown if interval and interval.half_width > 0]
    wanted = [numbers.decimals_for(width, 1) for width in widths]
    return min(3, max(1, *wanted)) if wanted else 2


def perplexity_cell(model: ModelResult, decimals: int) -> str:
    """`12.34 (11.90 to 12.81)`; without the interval where the model was held to the original: see `change_cell`."""
    perplexity = model.perplexity
    if perplexity is None:
        return numbers.NOT_MEASURED
    value = numbers.fixed(perplexity.token, decimals)
    interval = inference.perplexity_interval(perplexity) if perplexity.excess_nats is None else None
    return f"{value} ({numbers.span(interval.low, interval.high, decimals)})" if interval else value


def change_cell(model: ModelResult) -> str:
    """Perplexity against the original's, paired by window: `+2.9 % (2.5 to 3.3)`, or `×41 (38 to 45)`."""
    perplexity = model.perplexity
    if perplexity is None or perplexity.excess_nats is None:
        return numbers.NOT_MEASURED
    if perplexity.excess_nats == 0 and perplexity.excess_stderr == 0:
        return "identical"
    ratio = inference.perplexity_ratio(perplexity)
    if ratio is None:
        change = 100 * math.expm1(min(perplexity.excess_nats, 700.0))
        return f"{'+' if change > 0 else ''}{numbers.general(change)} %"
    if ratio.low >= 10:
        times, least, most = (numbers.significant(end, 2) for end in (ratio.value, ratio.low, ratio.high))
        return f"×{times} ({least} to {most})"
    value, low, high = (100 * (end - 1) for end in (ratio.value, ratio.low, ratio.high))
    decimals = min(3, numbers.decimals_for((high - low) / 2, 1))
    shown = numbers.fixed(value, decimals)
    return f"{'+' if value > 0 else ''}{shown} % ({numbers.span(low, high, decimals)})"


def kl_cell(model: ModelResult) -> str:
    """`0.0291 ± 0.0012`; a top-k method only bounds it from below."""
    if model.divergence is None:
        return numbers.NOT_MEASURED
    least = "" if model.divergence.method == "full" else "≥ "
    interval = inference.kl_interval(model)
    reach = interval.high - interval.value if interval else 0.0
    if not reach > 0:
        return least + numbers.significant(model.divergence.kl_mean)
    decimals = numbers.decimals_for(reach)
    return f"{least}{numbers.fixed(model.divergence.kl_mean, decimals)} ± {numbers.fixed(reach, decimals)}"


def agreement_cell(model: ModelResult) -> str:
    """`89.3 %`: of the places, those where both models have the same likeliest token."""
    return numbers.percent(model.divergence.top1_agreement if model.divergence else None)


def recovery_cell(model: ModelResult) -> str:
    """`98.7 % (97.5 to 99.9)`."""
    interval = inference.recovery_interval(model)
    if interval is None:
        return numbers.percent(model.recovery)
    within = numbers.span(100 * interval.low, 100 * interval.high, 1)
    return f"{numbers.percent(model.recovery)} ({within})"


def task_cell(name: str, model: ModelResult) -> str:
    """`63.1 ± 2.1 %`."""
    task = model.tasks.get(name)
    return numbers.NOT_MEASURED if task is None else task_score(task)


def task_names(results: Results) -> list[str]:
    """Of every task of any model, in the order in which they were first run."""
    return list(dict.fromkeys(name for model in results.models for name in model.tasks))


def markdown(results: Results) -> str:
    """The table, and a line on how to read it. Columns for what no model has are left out."""
    labels = inference.labels(results)
    models = results.models
    columns: list[tuple[str, Callable[[ModelResult], str]]] = [("Model", lambda model: escaped(labels[model.name]))]
    if any(model.cost for model in models):
        columns.append(("Size", lambda model: numbers.size(model.cost.bytes_on_disk if model.cost else None)))
        columns.append(
            ("Bits/weight", lambda model: numbers.fixed(model.cost.bits_per_weight if model.cost else None, 2))
        )
    if any(model.perplexity for model in models):
        columns.append(("Perplexity", partial(perplexity_cell, decimals=perplexity_decimals(results))))
    if any(model.perplexity and model.perplexity.excess_nats is not None for model in models):
        columns.append(("Perplexity change", change_cell))
    if any(model.divergence for model in models):
        columns.append(("KL, nats/token", kl_cell))
        columns.append(("Same first choice", agreement_cell))
    if any(model.recovery is not None for model in models):
        columns.append(("Recovery", recovery_cell))
    for name in task_names(results):
        columns.append((escaped(name), partial(task_cell, name)))
    lines = [
        _row([title for title, _ in columns]),
        _row(["---"] + ["---:"] * (len(columns) - 1)),
        *(_row([cell(model) for _, cell in columns]) for model in models),
    ]
    return "\n".join(lines) + "\n\n" + _note(results) + "\n"


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _note(results: Results) -> str:
    parts = ["Intervals are 95 %."]
    if any(model.perplexity and model.perplexity.excess_nats is not None for model in results.models):
        parts.append(
            "The interval of the original's perplexity is its own; a compressed model's is that of its change from the "
            "original, window by window on the same text."
        )
    if results.text is not None:
        text, opened = results.text, ", BOS before each" if results.text.bos else ""
        opened += ", without the BOS that this family needs" if text.lacks_bos else ""
        parts.append(
            f"Perplexity per token and KL divergence from the original over {numbers.count(text.tokens)} tokens of "
            f"{escaped(text.name)} ({text.protocol} protocol, window {text.window}, stride {text.stride}{opened})."
        )
    if any(model.recovery is not None for model in results.models):
        parts.append("Recovery is the mean over tasks of compressed / original score.")
    if any(inference.too_few(task) for model in results.models for task in model.tasks.values()):
        parts.append(f"Fewer than {inference.FEWEST_ITEMS} items are too few to compare models by.")
    return " ".join(parts)
