"""What the page shows that isn't in the results as such: verdict, findings by model, flipped items, shortened texts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from llmshrink_eval.report import figure, inference, numbers
from llmshrink_eval.report.inference import Comparison
from llmshrink_eval.report.summary import Finding, Tone, findings
from llmshrink_eval.results import ModelResult, Results, Speed, Task

_SYMBOLS = dict(zip(figure.MARKERS, "●■▲◆▼✚✖★", strict=True))
_FLIPS_SHOWN = 2
_IDS_SHOWN = 12
_FIELD_LENGTH = 400

Samples = Mapping[str, Sequence[Mapping[str, Any]]]


@dataclass(frozen=True)
class Swatch:
    """How a model is marked everywhere in the page. style: the CSS class of its colour."""

    label: str
    symbol: str
    style: str


@dataclass(frozen=True)
class Verdict:
    """What stands under the title."""

    tone: Tone
    text: str


@dataclass(frozen=True)
class Field:
    """A field of an item: as both models have it, or how it changed."""

    name: str
    original: str
    compressed: str


@dataclass(frozen=True)
class Flip:
    """An item whose outcome changed, as far as the samples tell."""

    document: int
    fields: tuple[Field, ...]


@dataclass(frozen=True)
class Flips:
    """The flipped items of one task of one model: all counted, the first ones named, a few shown."""

    comparison: Comparison
    lost_ids: str
    won_ids: str
    lost: tuple[Flip, ...]
    won: tuple[Flip, ...]


def swatches(results: Results) -> dict[str, Swatch]:
    """By model name."""
    labels = inference.labels(results)
    made = {}
    index = 0
    for model in results.models:
        if model.role == "original":
            made[model.name] = Swatch(labels[model.name], "○", "original")
        else:
            symbol = _SYMBOLS[figure.marker(index)]
            made[model.name] = Swatch(labels[model.name], symbol, f"model-{index % figure.MODEL_COLOURS}")
            index += 1
    return made


def title(results: Results) -> str:
    """The page's heading."""
    labels = inference.labels(results)
    original = results.original
    if original is not None and len(results.models) > 1:
        return f"What compression cost {labels[original.name]}"
    return f"Evaluation of {numbers.listed(list(labels.values()), 3)}"


def verdict(results: Results) -> Verdict:
    """Whether it passed, where that was asked; otherwise what was done."""
    failed = sum(not requirement.passed for requirement in results.requirements)
    total = len(results.requirements)
    if failed:
        return Verdict("bad", f"{failed} of {numbers.plural(total, 'requirement')} failed")
    if total:
        return Verdict(
            "good", f"{numbers.plural(total, 'requirement')} met" if total == 1 else f"All {total} requirements met"
        )
    compressed = sum(model.role == "compressed" for model in results.models)
    held = " held to the original" if results.original is not None and compressed else ""
    return Verdict(
        "plain", f"{numbers.plural(compressed or len(results.models), 'model')}{held}; no requirement was set"
    )


def findings_by_model(results: Results) -> tuple[list[Finding], list[tuple[ModelResult, list[Finding]]]]:
    """Those about the whole and the original, and those about each other model, in the models' order."""
    found = findings(results)
    original = results.original
    shared = (None, original.name if original else None)
    general = [finding for finding in found if finding.model in shared]
    others = [model for model in results.models if model is not original]
    by_model = [(model, [finding for finding in found if finding.model == model.name]) for model in others]
    return general, [pair for pair in by_model if pair[1]]


def measured(results: Results) -> list[str]:
    """What was measured on what, in a few words each: the line under the title."""
    said = [numbers.plural(sum(model.role == "compressed" for model in results.models), "compressed model")]
    if results.text is not None:
        said.append(f"{numbers.count(results.text.tokens)} tokens of {results.text.name}")
    tasks = {name for model in results.models for name in model.tasks}
    if tasks:
        said.append(numbers.plural(len(tasks), "task"))
    computed = dict.fromkeys(f"{model.dtype} by {model.engine}" for model in results.models)
    return [*said, f"{numbers.listed(list(computed))} on {results.device}"]


def speeds(results: Results) -> tuple[list[tuple[int, int, int]], dict[str, dict[tuple[int, int, int], Speed]]]:
    """The (batch, prompt, new tokens) at which any model was timed, and each model's times by them."""
    times = {
        model.name: {(speed.batch_size, speed.prompt_tokens, speed.new_tokens): speed for speed in model.cost.speed}
        for model in results.models
        if model.cost and model.cost.speed
    }
    return sorted({point for by_point in times.values() for point in by_point}), times


def flips(results: Results, samples: Samples) -> list[tuple[ModelResult, list[Flips]]]:
    """For each model its compared tasks with flipped items."""
    by_model = [(model, _flips_of(model, results.original, samples)) for model in results.models]
    return [pair for pair in by_model if pair[1]]


def _flips_of(model: ModelResult, original: ModelResult | None, samples: Samples) -> list[Flips]:
    found = []
    for comparison in inference.comparisons(model):
        paired = comparison.paired
        if not paired.flipped:
            continue
        before = _by_document(original.tasks.get(comparison.name) if original else None, samples)
        after = _by_document(comparison.task, samples)
        lost, won = paired.flipped[: paired.lost], paired.flipped[paired.lost :]
        shown = _shown(lost, before, after), _shown(won, before, after)
        found.append(Flips(comparison, _ids(lost), _ids(won), *shown))
    return found


def _by_document(task: Task | None, samples: Samples) -> dict[int, Mapping[str, Any]]:
    rows = samples.get(task.samples, ()) if task is not None and task.samples else ()
    return {row["doc_id"]: row for row in rows}


def _ids(documents: Sequence[int]) -> str:
    return numbers.listed([str(document) for document in documents], _IDS_SHOWN) or "none"


def _shown(
    documents: Sequence[int], before: Mapping[int, Mapping[str, Any]], after: Mapping[int, Mapping[str, Any]]
) -> tuple[Flip, ...]:
    both = [document for document in documents if document in before and document in after]
    return tuple(
        Flip(
            document,
            tuple(
                Field(name, _text(before[document].get(name)), _text(after[document].get(name)))
                for name in dict.fromkeys((*before[document], *after[document]))
                if name not in ("doc_id", "doc_hash")
            ),
        )
        for document in both[:_FLIPS_SHOWN]
    )


def _text(value: Any) -> str:
    if value is None:
        return numbers.NOT_MEASURED
    if isinstance(value, float):
        return f"{value:g}"
    return numbers.shortened(str(value), _FIELD_LENGTH)


def side_by_side(results: Results) -> list[tuple[str, list[tuple[ModelResult, str, str]]]]:
    """Prompt -> (model, what it says like the original, what it says on its own), the original itself first."""
    prompts = dict.fromkeys(generation.prompt for model in results.models for generation in model.generations)
    original = results.original
    rows = []
    for prompt in prompts:
        texts = [
            (model, generation.text)
            for model in results.models
            for generation in model.generations
            if generation.prompt == prompt
        ]
        reference = next((text for model, text in texts if model is original), None)
        rows.append((prompt, [(model, *_split(reference, text, model is original)) for model, text in texts]))
    return rows


def _split(reference: str | None, text: str, is_reference: bool) -> tuple[str, str]:
    """The words that agree with the reference from the start, and the rest."""
    if reference is None or is_reference:
        return text.lstrip(), ""
    agreeing = takewhile(lambda pair: pair[0] == pair[1], zip(reference.split(" "), text.split(" "), strict=False))
    same = " ".join(word for word, _ in agreeing)
    return text[: len(same)].lstrip(), text[len(same) :]


def visible(token: str) -> str:
    """A token whose blanks and line ends can be seen."""
    return token.replace(" ", "␣").replace("\n", "⏎").replace("\t", "⇥") or "∅"


def tail(text: str, length: int = 320) -> str:
    """The end of a text: what stands nearest to the place in question."""
    text = text.lstrip()
    return text if len(text) <= length else "…" + text[-length:]


def bar(share: float) -> str:
    """A CSS length for a share, whatever number it is."""
    return f"{100 * min(1.0, max(0.0, share)):.1f}%" if math.isfinite(share) else "0%"
