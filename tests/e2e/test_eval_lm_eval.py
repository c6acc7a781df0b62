"""lm-eval's own command line, on the same tasks and the same model, is the oracle: count by count, item by item."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from llmshrink.demo import model_folder
from llmshrink.demo.tasks import write_tasks

pytestmark = pytest.mark.slow

SEED = 3
BATCH_SIZE = 8

LOCAL = """\
dataset_path: json
dataset_kwargs:
  data_files:
    validation: {folder}/{name}.jsonl
validation_split: validation
task: {name}
output_type: {kind}
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{target}}}}"
{more}
"""
CHOICES = """\
doc_to_choice: "{{choices}}"
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
"""
GENERATION = """\
target_delimiter: ""
generation_kwargs: {until: ["."], max_gen_toks: 4, do_sample: false}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
"""


@pytest.fixture(scope="module")
def tasks_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's tasks, and local ones of the two kinds that it lacks: choices of unequal length, and generation."""
    folder = tmp_path_factory.mktemp("tasks")
    write_tasks(folder)
    cloze = [json.loads(line) for line in (folder / "demo_cloze.jsonl").read_text().splitlines()][:60]
    facts = [json.loads(line) for line in (folder / "demo_facts.jsonl").read_text().splitlines()][:60]
    # Two of the right words, one of them wrong: the length that acc_norm divides by decides.
    uneven = [
        {
            "question": row["context"],
            "choices": [option.strip() + " and went home" * (index % 2) for index, option in enumerate(row["options"])],
            "target": row["answer"],
        }
        for row in facts
    ]
    answers = [{"question": row["context"], "target": row["answer"]} for row in cloze]
    for name, kind, more, rows in (
        ("local_uneven", "multiple_choice", CHOICES, uneven),
        ("local_answers", "generate_until", GENERATION, answers),
    ):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / f"{name}.yaml").write_text(LOCAL.format(folder=folder, name=name, kind=kind, more=more))
    return folder


@pytest.mark.parametrize(
    ("names", "limit", "num_fewshot"),
    [
        (("demo",), 60, None),
        (("demo_facts", "demo_cloze"), 40, 2),
        (("local_uneven", "local_answers"), None, None),
        (("local_uneven", "local_answers"), 30, 3),
    ],
)
def test_counts_are_those_of_lm_evals_command_line(
    tasks_dir: Path, tmp_path: Path, names: tuple[str, ...], limit: int | None, num_fewshot: int | None
) -> None:
    import torch
    from llmshrink_eval.tasks import TaskOptions, run_tasks
    from transformers import AutoModelForCausalLM, AutoTokenizer

    scores, samples = _by_command_line(tasks_dir, tmp_path, names, limit, num_fewshot)
    model = AutoModelForCausalLM.from_pretrained(model_folder(), dtype=torch.float32)
    answers = str(tmp_path / "answers.jsonl")
    options = TaskOptions(names, tasks_dir, limit, num_fewshot, BATCH_SIZE, seed=SEED, answers=answers)
    runs = run_tasks(model, AutoTokenizer.from_pretrained(model_folder()), options)

    assert runs.keys() == samples.keys()
    for name, run in runs.items():
        reported = {key.removesuffix(",none"): value for key, value in scores[name].items() if "," in key}
        assert run.metrics == {key: value for key, value in reported.items() if "_stderr" not in key}
        assert run.score == reported[run.metric]
        assert run.stderr == pytest.approx(reported[f"{run.metric}_stderr"], rel=1e-12)
        theirs = {row["doc_id"]: (row["doc_hash"], float(row[run.metric])) for row in samples[name]}
        assert {item.doc_id: (item.doc_hash, item.value) for item in run.items} == theirs
        assert len(theirs) == len(run.items) == run.documents
        assert run.score > 0, name
        assert run.num_fewshot == (num_fewshot or 0)


def test_a_sample_is_drawn_by_the_seed_and_scored_as_lm_eval_scores_those_items(
    tasks_dir: Path, tmp_path: Path
) -> None:
    import torch
    from llmshrink_eval.tasks import TaskOptions, run_tasks
    from llmshrink_eval.taskset import drawn_items, load_tasks
    from transformers import AutoModelForCausalLM, AutoTokenizer

    names = ("demo_facts", "local_answers")
    options = TaskOptions(names, tasks_dir, batch_size=BATCH_SIZE, seed=SEED, sample=25)
    drawn = drawn_items(load_tasks(options), options)
    assert drawn is not None
    for name, items in drawn.items():
        assert len(items) == len(set(items)) == 25 and items == sorted(items) and items != list(range(25)), name

    def items_of(**other: Any) -> dict[str, list[int]]:
        changed = dataclasses.replace(options, **other)
        return drawn_items(load_tasks(changed), changed) or {}

    assert items_of(names=names[:1]) == {names[0]: drawn[names[0]]}, "a task draws for itself"
    assert items_of(seed=SEED + 1)[names[0]] != drawn[names[0]]
    assert set(items_of(sample=26)[names[0]]) > set(drawn[names[0]])
    assert items_of(sample=60)[names[1]] == items_of(sample=999)[names[1]] == list(range(60))

    scores, samples = _by_command_line(tasks_dir, tmp_path, names, None, None, drawn)
    model = AutoModelForCausalLM.from_pretrained(model_folder(), dtype=torch.float32)
    runs = run_tasks(model, AutoTokenizer.from_pretrained(model_folder()), options)
    for name, run in runs.items():
        assert run.score == scores[name][f"{run.metric},none"]
        assert {item.doc_id for item in run.items} == set(drawn[name])
        theirs = {row["doc_hash"]: float(row[run.metric]) for row in samples[name]}
        assert {item.doc_hash: item.value for item in run.items} == theirs


def _by_command_line(
    tasks_dir: Path,
    tmp_path: Path,
    names: tuple[str, ...],
    limit: int | None,
    num_fewshot: int | None,
    drawn: dict[str, list[int]] | None = None,
) -> tuple[dict[str, Any], dict[str, list[dict[str, Any]]]]:
    """Its scores by task, its samples by task."""
    out = tmp_path / "out"
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--device", "cpu"]
    command += ["--model_args", f"pretrained={model_folder()},dtype=float32", "--include_path", str(tasks_dir)]
    command += ["--tasks", ",".join(names), "--batch_size", str(BATCH_SIZE), "--seed", str(SEED)]
    command += ["--log_samples", "--output_path", str(out)]
    command += [] if drawn is None else ["--samples", json.dumps(drawn)]
    command += [] if limit is None else ["--limit", str(limit)]
    command += [] if num_fewshot is None else ["--num_fewshot", str(num_fewshot)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    (results,) = out.rglob("results_*.json")
    samples = {
        file.name.removeprefix("samples_").rsplit("_", 1)[0]: [json.loads(line) for line in file.open()]
        for file in out.rglob("samples_*.jsonl")
    }
    return json.loads(results.read_text())["results"], samples
