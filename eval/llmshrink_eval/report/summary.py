"""The findings in plain language, each claiming no more than its interval allows.

A difference is claimed where it is significant (see `inference`); where it is not, the sentence says so and how large a
loss the data leave possible, because "no difference was found" over fifty items means little.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from llmshrink_eval import require
from llmshrink_eval.errors import EvalError
from llmshrink_eval.leftout import LeftOut
from llmshrink_eval.report import inference, numbers
from llmshrink_eval.report.inference import Comparison, Interval
from llmshrink_eval.report.scores import amount, is_share, outcome_difference, task_score
from llmshrink_eval.results import ModelResult, Perplexity, Requirement, Results

Tone = Literal["plain", "good", "bad", "caution"]


@dataclass(frozen=True)
class Finding:
    """A sentence. model: the name of the model that it is about; None when it is about several or none."""

    model: str | None
    tone: Tone
    text: str


def sentences(results: Results) -> tuple[str, ...]:
    """The findings as they go into results.json: with the model's name before each, where there are several."""
    labels = inference.labels(results)
    several = sum(model.role == "compressed" for model in results.models) > 1
    said = []
    for finding in findings(results):
        named = several and finding.model is not None
        said.append(f"{labels[finding.model or '']}: {_uncapitalised(finding.text)}" if named else finding.text)
    return tuple(said)


def findings(results: Results) -> tuple[Finding, ...]:
    """Everything worth saying, in the order in which a reader needs it: the gate, the original, model by model."""
    original = results.original
    alone = len(results.models) == 1
    found = [*_requirements(results), *_left_out(results), *_original(results, alone)]
    for model in results.models:
        if model is original and not alone:
            continue
        said = [_size(model, original), _perplexity(model), _divergence(model), *_tasks(model), _recovery(model)]
        for about in (*said, _beaten(model, results)):
            if about is not None:
                tone, text = about
                found.append(Finding(model.name, tone, text))
    return tuple(found)


def _uncapitalised(text: str) -> str:
    return text if text[1:2].isupper() else text[:1].lower() + text[1:]


def _requirements(results: Results) -> list[Finding]:
    if not results.requirements:
        return []
    labels = inference.labels(results)
    failed = [requirement for requirement in results.requirements if not requirement.passed]
    total = len(results.requirements)
    if not failed:
        text = "The requirement is met." if total == 1 else f"All {numbers.plural(total, 'requirement')} are met."
        return [Finding(None, "good", text), *_narrowly(results)]
    named = [
        f"{failure.condition} by {labels.get(failure.model, failure.model)} ({numbers.general(failure.value)})"
        for failure in failed
    ]
    text = f"{len(failed)} of {numbers.plural(total, 'requirement')} failed: {numbers.listed(named, 6)}."
    return [Finding(None, "bad", text), *_narrowly(results)]


def _left_out(results: Results) -> list[Finding]:
    """Records of the text that hold none."""
    text = results.text
    if text is None or not text.left_out.count:
        return []
    left_out = LeftOut(text.left_out.count, text.left_out.read, text.left_out.named)
    return [Finding(None, "caution", f"{text.name}: {left_out.words()}.")]


def _narrowly(results: Results) -> list[Finding]:
    """The conditions that the measured value meets, and the far end of its interval doesn't."""
    models = {model.name: model for model in results.models}
    labels = inference.labels(results)
    narrow = []
    for requirement in results.requirements:
        interval = _interval_of(requirement, models.get(requirement.model)) if requirement.passed else None
        if interval is not None:
            within = f"{numbers.general(interval.low)} to {numbers.general(interval.high)}"
            narrow.append(f"{requirement.condition} by {labels[requirement.model]} (95 % interval {within})")
    if not narrow:
        return []
    text = f"Met as measured, though the interval reaches past the bound: {numbers.listed(narrow, 6)}."
    return [Finding(None, "caution", text)]


def _interval_of(requirement: Requirement, model: ModelResult | None) -> Interval | None:
    """The interval of what a condition is about, where one of its ends fails the condition."""
    try:
        (condition,) = require.parse(requirement.condition)
    except EvalError:
        return None
    if model is None or condition.name not in ("recovery", "kl", "kl_mean"):
        return None
    interval = inference.recovery_interval(model) if condition.name == "recovery" else inference.kl_interval(model)
    if interval is None or (condition.met(interval.low) and condition.met(interval.high)):
        return None
    return interval


def _original(results: Results, alone: bool) -> list[Finding]:
    """What the original itself shows: the measure of everything after it, and its tasks that can't show damage."""
    original = results.original
    if original is None:
        return []
    found = []
    if original.perplexity is not None and not alone:
        found.append(Finding(original.name, "plain", f"The original has {_absolute_perplexity(original.perplexity)}."))
    idle = [name for name, task in original.tasks.items() if inference.at_chance(task)]
    if idle:
        they = "it can't show damage" if len(idle) == 1 else "they can't show damage"
        which = "model" if alone else "original itself"
        text = f"The {which} is not told apart from guessing on {numbers.listed(idle)}: {they}."
        found.append(Finding(original.name, "caution", text))
    return found


def _absolute_perplexity(perplexity: Perplexity) -> str:
    interval = inference.perplexity_interval(perplexity)
    over = f"over {numbers.count(perplexity.tokens)} tokens"
    if interval is None:
        return f"perplexity {numbers.significant(perplexity.token, 4)} per token {over}, without an interval"
    decimals = numbers.decimals_for(interval.half_width)
    within = numbers.span(interval.low, interval.high, decimals)
    return f"perplexity {numbers.fixed(perplexity.token, decimals)} per token (95 % interval {within}) {over}"


def _size(model: ModelResult, original: ModelResult | None) -> tuple[Tone, str] | None:
    if model.cost is None:
        return None
    bits = f"{numbers.fixed(model.cost.bits_per_weight, 2)} bits per weight"
    size = numbers.size(model.cost.bytes_on_disk)
    if original is None or original.cost is None or model is original:
        return "plain", f"{size} on disk, {bits}."
    share = numbers.percent(model.cost.bytes_on_disk / original.cost.bytes_on_disk, 0)
    return "plain", f"{size} on disk instead of {numbers.size(original.cost.bytes_on_disk)} ({share}), {bits}."


def _perplexity(model: ModelResult) -> tuple[Tone, str] | None:
    perplexity = model.perplexity
    if perplexity is None:
        return None
    if perplexity.excess_nats is None:
        return "plain", _capitalised(_absolute_perplexity(perplexity)) + "."
    ratio = inference.perplexity_ratio(perplexity)
    if ratio is None:
        change = _change(math.expm1(min(perplexity.excess_nats, 700.0)))
        return "caution", f"Perplexity {change}, from too few windows for an interval."
    if ratio.low >= 10:
        times, least, most = (numbers.significant(end, 2) for end in (ratio.value, ratio.low, ratio.high))
        return "plain", f"Perplexity {times} times the original's (95 % interval {least} to {most} times)."
    excess = Interval(*(100 * (end - 1) for end in (ratio.value, ratio.low, ratio.high)))
    if perplexity.excess_nats == 0 and perplexity.excess_stderr == 0:
        return "plain", f"Perplexity identical to the original's in all of {perplexity.windows:,} windows."
    if excess.low <= 0 <= excess.high:
        decimals = numbers.decimals_for(excess.half_width, 1)
        text = f"{numbers.fixed(excess.value, decimals)} % ({numbers.span(excess.low, excess.high, decimals)} %)"
        return "plain", f"Perplexity not told apart from the original's at 95 %: a change of {text}."
    way, sign = ("higher", 1) if excess.value > 0 else ("lower", -1)
    low, high = sorted((sign * excess.low, sign * excess.high))
    decimals = min(numbers.decimals_for(excess.half_width, 1), 3)
    size, within = numbers.fixed(abs(excess.value), decimals), numbers.span(low, high, decimals)
    return "plain", f"Perplexity {size} % {way} than the original's (95 % interval {within} %)."


def _capitalised(text: str) -> str:
    return text[:1].upper() + text[1:]


def _change(share: float) -> str:
    size = numbers.significant(100 * abs(share), 2)
    return f"{size} % {'higher' if share > 0 else 'lower'} than the original's" if share else "as the original's"


def _divergence(model: ModelResult) -> tuple[Tone, str] | None:
    divergence = model.divergence
    if divergence is None:
        return None
    agreement = f"the same first choice in {_agreement(divergence.top1_agreement)} of places"
    if inference.below_resolution(divergence):
        if divergence.kl_mean <= 0:
            return "plain", f"KL divergence from the original is 0; {agreement}."
        bound = numbers.significant(divergence.baseline_error, 2)
        text = f"KL divergence below what the stored original resolves ({bound} nats/token)"
        return "plain", f"{text}; {agreement}."
    interval = inference.kl_interval(model)
    if interval is None:
        value = numbers.significant(divergence.kl_mean)
    else:
        reach = interval.high - interval.value
        decimals = numbers.decimals_for(reach, 1)
        value = f"{numbers.fixed(divergence.kl_mean, decimals)} ± {numbers.fixed(reach, decimals)}"
    least = "" if divergence.method == "full" else "at least "
    return "plain", f"KL divergence from the original {least}{value} nats/token; {agreement}."


def _agreement(share: float) -> str:
    """Never 100 % by rounding: that would hide the flips that there are."""
    text = numbers.percent(share, 0 if share < 0.985 else 1)
    return "more than 99.9 %" if share < 1 and text.startswith("100") else text


def _tasks(model: ModelResult) -> list[tuple[Tone, str]]:
    compared = inference.comparisons(model)
    if not compared:
        return [("plain", _scores(model))] if model.tasks else []
    said: list[tuple[Tone, str]] = []
    same = [one for one in compared if one.outcome == "same"]
    judged = sum(one.outcome != "few" for one in compared)
    if same:
        said.append(("plain", _indistinguishable(same, len(compared), judged)))
    outcomes: tuple[tuple[str, Tone], ...] = (("worse", "bad"), ("better", "good"))
    for outcome, tone in outcomes:
        there = [f"{one.name} by {outcome_difference(one)}" for one in compared if one.outcome == outcome]
        if there:
            said.append((tone, f"{_capitalised(outcome)} on {numbers.listed(there, len(there))}."))
    for outcome, sign in (("worse", 1), ("better", -1)):
        alone = [f"{one.name} by {outcome_difference(one)}" for one in same if one.alone and sign * one.loss.value > 0]
        if alone:
            text = f"Taken alone it would count as {outcome} on {numbers.listed(alone, len(alone))}"
            said.append(("caution", f"{text}; over {judged} comparisons chance can bring that about."))
    few = [f"{one.name} ({numbers.plural(one.task.items, 'item')})" for one in compared if one.outcome == "few"]
    if few:
        fewest = f"no outcome of fewer than {inference.FEWEST_ITEMS} could tell two models apart"
        said.append(("caution", f"Too few items to say on {numbers.listed(few)}: {fewest}."))
    return said


def _scores(model: ModelResult) -> str:
    texts = [f"{name} {task_score(task)}" for name, task in model.tasks.items()]
    return f"Scores (± 95 %): {numbers.listed(texts)}."


def _indistinguishable(same: list[Comparison], total: int, judged: int) -> str:
    """total: compared tasks; judged: those of enough items."""
    names = numbers.listed([one.name for one in same])
    corrected = f", Holm-corrected for {judged}" if judged > 1 else ""
    share = f"all {total}" if len(same) == total else f"{len(same)} of {total}"
    on = f"on {share} tasks" if total > 1 else f"on {same[0].name}"
    text = f"Indistinguishable from the original {on} at 95 %{corrected}"
    if total > 1:
        text += f": {names}"
    possible = [(one.possible_loss, one) for one in same if one.possible_loss is not None]
    if not possible:
        return text + "."
    shares = [pair for pair in possible if is_share(pair[1].task.metric)]
    loss, one = max(shares or possible, key=lambda pair: pair[0])
    where = f"on {one.name}, {numbers.plural(one.task.items, 'item')}"
    return f"{text}; a loss of up to {amount(one.task.metric, loss)} ({where}) can't be excluded."


def _recovery(model: ModelResult) -> tuple[Tone, str] | None:
    if model.recovery is None:
        return None
    names = list(model.tasks)
    where = f", mean over {len(names)} tasks" if len(names) != 1 else f" on {names[0]}"
    interval = inference.recovery_interval(model)
    if interval is None:
        return "caution", f"Recovers {numbers.percent(model.recovery)} of the original's score{where}; no interval."
    decimals = numbers.decimals_for(100 * interval.half_width, 1)
    decimals = max(1, min(2, decimals))
    within = numbers.span(100 * interval.low, 100 * interval.high, decimals)
    value = numbers.percent(model.recovery, decimals)
    return "plain", f"Recovers {value} of the original's score{where} (95 % interval {within} %)."


def _beaten(model: ModelResult, results: Results) -> tuple[Tone, str] | None:
    """When another compressed model is as small and, with intervals that don't touch, closer to the original."""
    interval = inference.kl_interval(model)
    if interval is None or model.cost is None:
        return None
    labels = inference.labels(results)
    better = [
        labels[other.name]
        for other in results.models
        if other.role == "compressed"
        and other.cost is not None
        and other.cost.bytes_on_disk <= model.cost.bytes_on_disk
        and (theirs := inference.kl_interval(other)) is not None
        and theirs.high < interval.low
    ]
    return (
        ("caution", f"No smaller than {numbers.listed(better, 3)}, and further from the original.") if better else None
    )
