"""table.md: the measured models as one Markdown table, to be pasted into a model card.

Nothing in it is interpreted as Markdown or HTML: names come from users, and a card is rendered on someone's site.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial

from llmshrink_eval.report import inference, numbers
from llmshrink_eval.report.summary import score
from llmshrink_eval.results import ModelResult, Results

_MARKED = re.compile(r"([\\`*_{}\[\]()<>|$~#!&])")


def escaped(text: str) -> str:
    """The text as Markdown shows it as it is, on one line, inside a cell of a table too."""
    return _MARKED.sub(r"\\\1", " ".join(text.split()))


def perplexity_cell(model: ModelResult) -> str:
    """`12.34 (11.90 to 12.81)`."""
    if model.perplexity is None:
        return numbers.NOT_MEASURED
    interval = inference.perplexity_interval(model.perplexity)
    if interval is None:
        return numbers.significant(model.perplexity.token, 4)
    decimals = numbers.decimals_for(interval.half_width)
    within = numbers.span(interval.low, interval.high, decimals)
    return f"{numbers.fixed(model.perplexity.token, decimals)} ({within})"


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
    if task is None:
        return numbers.NOT_MEASURED
    return score(task.metric, task.score, None if task.stderr is None else inference.Z * task.stderr)


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
        columns.append(("Perplexity", perplexity_cell))
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
    if results.text is not None:
        text = results.text
        parts.append(
            f"Perplexity per token and KL divergence from the original over {numbers.count(text.tokens)} tokens of "
            f"{escaped(text.name)} ({text.protocol} protocol, window {text.window}, stride {text.stride})."
        )
    if any(model.recovery is not None for model in results.models):
        parts.append("Recovery is the mean over tasks of compressed / original score.")
    return " ".join(parts)
