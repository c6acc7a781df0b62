"""What lm-eval reports of a run, as plain data with every item's value of one metric, the primary one:

    acc_norm, else acc, else exact_match, else the task's first metric that is a mean over items

with the first filter that has it (`exact_match,strict-match`). A task none of whose metrics is a mean over its items
(word perplexity, F1 over the whole set) keeps its score and no items, and isn't compared item by item.

A group that lm-eval itself scores as the mean over all its items (mmlu) becomes one task with all those items, its
members' scores among its metrics; the members of any other group or tag stand for themselves.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from hashlib import sha256
from importlib.metadata import version
from typing import Any, Self

from llmshrink_eval.errors import EvalFailed
from llmshrink_eval.results import Frozen
from llmshrink_eval.taskset import TaskOptions, TaskSet, fingerprint_documents

PRIMARY = ("acc_norm", "acc", "exact_match")
GUESSABLE = ("acc_norm", "acc", "acc_bytes", "acc_mutual_info")
TEXT_LENGTH = 300


class Item(Frozen):
    """One document of a task and what the model made of it. value: of the task's metric. question: the prompt's end."""

    doc_id: int
    doc_hash: str
    value: float
    question: str
    target: str
    answer: str

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return self.model_dump()


class TaskRun(Frozen):
    """A task on a model.

    metric: the primary one, with its filter unless that is "none". stderr: of the score, as the mean over items.
    chance: what guessing scores, known for accuracies over choices. metrics: all that lm-eval reports. items: empty
    where the score is no mean over items. documents: how many were asked. num_fewshot: as used. data_fingerprint: of
    the documents, see `taskset.fingerprint_documents`. warnings: what lm-eval's model had to say while it ran (prompts
    that were cut off), alike ones once, with their number.
    """

    name: str
    metric: str
    higher_is_better: bool
    score: float
    stderr: float | None
    chance: float | None
    metrics: dict[str, float]
    items: tuple[Item, ...]
    documents: int
    num_fewshot: int
    task_version: str
    data_fingerprint: str
    lm_eval_version: str
    warnings: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for a cache."""
        return self.model_dump(mode="json")

    @classmethod
    def from_dict(cls, made: Mapping[str, Any]) -> Self:
        """What `to_dict` gave."""
        return cls.model_validate(made)


def collect(
    results: Mapping[str, Any], loaded: TaskSet, options: TaskOptions, warnings: tuple[str, ...]
) -> dict[str, TaskRun]:
    """One run for each task; groups that are means over their items take the place of their members.

    results: of lm-eval's `evaluate` with samples. Raises EvalFailed where the model's log-probabilities are NaN.
    """
    runs = {name: _task_run(task, name, results, warnings) for name, task in loaded.tasks.items()}
    place: dict[str, TaskRun] = {}
    for name in options.names:
        if name in loaded.groups:
            members = [runs[task.task_name] for task in loaded.groups[name].get_all_tasks()]
            pooled = _pooled(name, members, results["results"].get(name, {}))
            if pooled is not None:
                place |= {member.name: pooled for member in members}
    found = [place.get(name, run) for name, run in runs.items()]
    return {run.name: run for run in found}


def _task_run(task: Any, name: str, results: Mapping[str, Any], warnings: tuple[str, ...]) -> TaskRun:
    samples = results["samples"][name]
    _refuse_nan(name, samples)
    metrics = {_label(key): float(value) for key, value in _scores(results["results"][name])}
    chosen = _primary(results["results"][name], samples)
    metric, items = chosen or (next(iter(metrics)), [])
    bare = metric.split(",")[0]
    values = [float(sample[bare]) for sample in items]
    return TaskRun(
        name=name,
        metric=metric,
        higher_is_better=bool(results["higher_is_better"].get(name, {}).get(bare, True)),
        score=metrics[metric],
        stderr=_stderr(values),
        chance=_chance(task, bare, items),
        metrics=metrics,
        items=tuple(_item(task, bare, sample) for sample in items),
        documents=int(results["n-samples"][name]["effective"]),
        num_fewshot=int(results["n-shot"].get(name) or 0),
        task_version=str(results["versions"].get(name)),
        data_fingerprint=fingerprint_documents(task, samples),
        lm_eval_version=version("lm_eval"),
        warnings=warnings,
    )


def _scores(reported: Mapping[str, Any]) -> list[tuple[str, float]]:
    """lm-eval's `metric,filter` keys that hold numbers, in its order."""
    return [
        (key, value)
        for key, value in reported.items()
        if "," in key and isinstance(value, (int, float)) and not isinstance(value, bool)
    ]


def _label(key: str) -> str:
    return key.removesuffix(",none")


def _primary(reported: Mapping[str, Any], samples: Sequence[Mapping[str, Any]]) -> tuple[str, list[Any]] | None:
    """The metric and the samples that have it; None where no score is the mean of its items' values."""
    keys = [key for key, _ in _scores(reported)]
    order = [key for metric in PRIMARY for key in keys if key.split(",")[0] == metric]
    for key in dict.fromkeys((*order, *keys)):
        metric, _, kept = key.partition(",")
        items = [sample for sample in samples if sample["filter"] == kept and metric in sample["metrics"]]
        if items and all(_is_number(sample[metric]) for sample in items):
            mean = math.fsum(float(sample[metric]) for sample in items) / len(items)
            if math.isclose(mean, reported[key], rel_tol=1e-6, abs_tol=1e-9):
                return _label(key), items
    return None


def _is_number(value: object) -> bool:
    import numpy as np

    return isinstance(value, (bool, int, float, np.bool_, np.number)) and math.isfinite(float(value))


def _stderr(values: Sequence[float]) -> float | None:
    """Of the mean: standard deviation (n - 1) / sqrt(n), as lm-eval's."""
    if len(values) < 2:
        return None
    mean = math.fsum(values) / len(values)
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values))


def _refuse_nan(name: str, samples: Sequence[Mapping[str, Any]]) -> None:
    """A NaN is the largest of all numbers to argmax: it would pass for an answer."""
    for sample in samples:
        for response in sample["filtered_resps"]:
            value = response[0] if isinstance(response, (tuple, list)) and response else response
            if isinstance(value, float) and math.isnan(value):
                end = _shortened(str(sample["arguments"][0][0]))
                raise EvalFailed(f"task {name}, document {sample['doc_id']}: log-probabilities are NaN after {end!r}")


def _chance(task: Any, metric: str, items: Sequence[Mapping[str, Any]]) -> float | None:
    """Right answers / choices, in the mean over the items."""
    if task.OUTPUT_TYPE != "multiple_choice" or metric not in GUESSABLE or not items:
        return None
    return math.fsum(
        (len(set(sample["target"])) if isinstance(sample["target"], list) else 1) / _choices(task, sample)
        for sample in items
    ) / len(items)


def _choices(task: Any, sample: Mapping[str, Any]) -> int:
    """Mutual information asks for each choice a second time, without the question."""
    twice = "acc_mutual_info" in task.higher_is_better()
    return len(sample["arguments"]) // (2 if twice else 1)


def _item(task: Any, metric: str, sample: Mapping[str, Any]) -> Item:
    target, answer = sample["target"], sample["filtered_resps"][0]
    if task.OUTPUT_TYPE == "multiple_choice":
        target, answer = _chosen(task, metric, sample)
    elif task.OUTPUT_TYPE == "loglikelihood":
        answer = target if answer[1] else "(something else is likelier)"
    return Item(
        doc_id=sample["doc_id"],
        doc_hash=sample["doc_hash"],
        value=float(sample[metric]),
        question=_shortened(str(sample["arguments"][0][0])),
        target=_shortened(str(target)),
        answer=_shortened(str(answer)),
    )


def _chosen(task: Any, metric: str, sample: Mapping[str, Any]) -> tuple[str, str]:
    """The right choice and the model's, as the metric normalises."""
    number = _choices(task, sample)
    scores = [float(response[0]) for response in sample["filtered_resps"]]
    if task.multiple_input:  # the choices are contexts, and the target is what follows each
        texts, target = [str(argument[0]) for argument in sample["arguments"][:number]], task.doc_to_text(sample["doc"])
    else:
        texts, target = [str(choice) for choice in task.doc_to_choice(sample["doc"])], sample["target"]
    if metric == "acc_mutual_info":
        scores = [given - alone for given, alone in zip(scores[:number], scores[number:], strict=True)]
    lengths = {"acc_norm": [len(text) for text in texts], "acc_bytes": [len(text.encode()) for text in texts]}
    scale = lengths.get(metric, [1] * number)
    best = max(range(number), key=lambda index: scores[index] / scale[index])
    right = target if isinstance(target, list) else [target]
    return " | ".join(texts[index] if isinstance(index, int) else str(index) for index in right), texts[best]


def _shortened(text: str) -> str:
    return text if len(text) <= TEXT_LENGTH else "..." + text[3 - TEXT_LENGTH :]


def _pooled(name: str, members: Sequence[TaskRun], reported: Mapping[str, Any]) -> TaskRun | None:
    """The group as one task, if lm-eval's score of it is the mean over all items of its members."""
    first = members[0]
    items = [item for member in members for item in member.items]
    if any((member.metric, member.higher_is_better) != (first.metric, first.higher_is_better) for member in members):
        return None
    scores = {_label(key): float(value) for key, value in _scores(reported)}
    values = [item.value for item in items]
    if not items or not math.isclose(scores.get(first.metric, math.nan), math.fsum(values) / len(values), rel_tol=1e-6):
        return None
    chances = [member.chance for member in members for _ in member.items]
    known = [chance for chance in chances if chance is not None]
    return first.model_copy(
        update={
            "name": name,
            "score": scores[first.metric],
            "stderr": _stderr(values),
            "chance": math.fsum(known) / len(known) if len(known) == len(chances) else None,
            "metrics": {**scores, **{f"{member.name}: {member.metric}": member.score for member in members}},
            "items": tuple(item.model_copy(update={"doc_id": index}) for index, item in enumerate(items)),
            "documents": len(items),
            "task_version": ", ".join(dict.fromkeys(member.task_version for member in members)),
            "data_fingerprint": sha256("".join(member.data_fingerprint for member in members).encode()).hexdigest(),
        }
    )
