"""Downstream tasks: some of our rows beside the original, item by item, by `llmshrink compare`.

ARC-Easy, ARC-Challenge, PIQA, OpenBookQA and WinoGrande as lm-eval's task files, 300 items of each drawn by a fixed
seed, or all of them. The comparison keeps each answer as it goes: one that was killed goes on. `check` runs lm-eval's
own command line on the original and the same items.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.real import source, store
from benchmarks.real.measuring import Inputs, Missing, Say
from benchmarks.real.process import THREADS, last_line, run
from benchmarks.real.rows import Row
from benchmarks.real.table import place_of

TASKS = {
    "real_arc_easy": "ARC-Easy",
    "real_arc_challenge": "ARC-Challenge",
    "real_piqa": "PIQA",
    "real_openbookqa": "OpenBookQA",
    "real_winogrande": "WinoGrande",
}
SAMPLE, SEED = 300, 0
BEGIN, END = (
    "<!-- real tasks: begin, by `python -m benchmarks.real tasks --readme README.md` -->",
    "<!-- real tasks: end -->",
)


@dataclass(frozen=True)
class Asked:
    """folder: of the task files. sample: items of each task; None for all. jobs: threads."""

    folder: Path
    sample: int | None
    jobs: int


def compared(rows: Sequence[Row], given: Inputs, asked: Asked, *, keep: bool, say: Say) -> Path:
    """The folder of the comparison's report, found again or made now; the rows' checkpoints are there.

    Raises Missing where the tasks aren't there or the comparison fails.
    """
    if not all((asked.folder / f"{name}.yaml").is_file() for name in TASKS):
        raise Missing(f"no task files at {asked.folder} ({', '.join(TASKS)}); name their folder with --tasks-dir")
    places = {row.name: place_of(row, given, keep=keep) for row in rows}
    data = {file.name: store.file_digest(file) for file in sorted(asked.folder.iterdir()) if file.is_file()}
    key = [source.checksum(), {name: str(place.folder) for name, place in places.items()}, data, asked.sample, SEED]
    work = given.cache / "tasks" / store.digest(key)
    report = work / "report"
    if (report / "results.json").is_file():
        return report
    # A report calls a model by its folder's name.
    links = work / "models"
    links.mkdir(parents=True, exist_ok=True)
    for name, place in places.items():
        link = links / name.replace(", ", "-").replace(" ", "-")
        link.unlink(missing_ok=True)
        link.symlink_to(place.out)
    models = [str(link) for link in sorted(links.iterdir(), key=lambda link: _order(link, places))]
    command = [sys.executable, "-m", "llmshrink", "compare", str(given.model), *models, "--output", str(report)]
    command += ["--tasks", ",".join(TASKS), "--tasks-dir", str(asked.folder), "--seed", str(SEED), "--speed", "none"]
    command += ["--device", "cpu", "--dtype", "float32", "--cache", str(given.cache / "eval")]
    command += [] if asked.sample is None else ["--sample", str(asked.sample)]
    say(f"tasks on {len(models) + 1} models; {work / 'log.txt'}")
    used = run(command, work / "log.txt", environment=dict.fromkeys(THREADS, str(asked.jobs)))
    if used.code:
        raise Missing(f"the comparison ended with {used.code}: {last_line(work / 'log.txt')}")
    return report


def _order(link: Path, places: Mapping[str, store.Place]) -> int:
    return [place.out for place in places.values()].index(link.readlink())


def read(report: Path, rows: Sequence[Row]) -> dict[str, Any]:
    """Of each task: the original's score, and each row's with its paired difference."""
    models = json.loads((report / "results.json").read_text())["models"]
    named = dict(zip(["original", *(row.name for row in rows)], models, strict=True))
    return {
        task: {
            name: {
                key: model["tasks"][task][key]
                for key in ("metric", "score", "stderr", "items", "chance", "versus_original")
            }
            for name, model in named.items()
        }
        for task in TASKS
    }


def text(found: Mapping[str, Any]) -> str:
    """For a terminal: a line a task and model."""
    told = []
    for task, models in found.items():
        first = models["original"]
        told.append(f"{TASKS[task]} ({first['items']} items, {first['metric']}, chance {first['chance'] or 0:.3f})")
        for name, one in models.items():
            told.append(
                f"  {name:34} {one['score']:.3f} +- {one['stderr']:.3f}  {_versus(one['versus_original'])}".rstrip()
            )
    return "\n".join(told)


def markdown(found: Mapping[str, Any], date: str, machine: str) -> str:
    """For the README: a line a model, a column a task. date, machine: of the measurement."""
    models = next(iter(found.values()))
    told = [f"| | {' | '.join(TASKS[task] for task in found)} |", f"|---|{'---|' * len(found)}"]
    for name in models:
        cells = []
        for task in found:
            one = found[task][name]
            paired = one["versus_original"]
            change = "" if paired is None else f" ({_interval(paired)}{'' if _sure(paired) else ', n.s.'})"
            cells.append(f"{one['score']:.3f}{change}")
        told.append(f"| {name} | {' | '.join(cells)} |")
    items = " + ".join(str(found[task]["original"]["items"]) for task in found)
    sample = next(iter(found.values()))["original"]["items"] == SAMPLE
    said = (
        f"{source.NAME} in float32, {items} items, the same for all; in brackets the paired difference to the original"
        " with its 95 % interval,"
        " n.s. where McNemar's exact test has p >= 0.05."
        f" {date} on {machine}: `make real-tasks{'' if sample else ' FULL=1'}`."
    )
    return "\n".join([*told, "", said, source.GRID])


def _interval(paired: Mapping[str, Any]) -> str:
    return f"{paired['difference']:+.3f}, {paired['low']:+.3f} to {paired['high']:+.3f}"


def _sure(paired: Mapping[str, Any]) -> bool:
    return bool(paired["mcnemar_p"] is not None and paired["mcnemar_p"] < 0.05)


def _versus(paired: Mapping[str, Any] | None) -> str:
    if paired is None:
        return ""
    test = "" if paired["mcnemar_p"] is None else f", p = {paired['mcnemar_p']:.3g}"
    return f"{_interval(paired)}; lost {paired['lost']}, won {paired['won']}{test}"


def check(report: Path, given: Inputs, asked: Asked, say: Say) -> list[str]:
    """The original's scores beside those of lm-eval's own command line on the same items; what differs, a line each."""
    found = json.loads((report / "results.json").read_text())["models"][0]["tasks"]
    items = {}
    for task in TASKS:
        samples = (report / found[task]["samples"]).read_text().splitlines()
        items[task] = sorted(json.loads(line)["doc_id"] for line in samples)
    work = report.parent / "lm-eval"
    if next(work.rglob("results_*.json"), None) is None:
        program = Path(sys.executable).with_name("lm_eval")
        command = [str(program), "run", "--model", "hf", "--model_args", f"pretrained={given.model},dtype=float32"]
        command += ["--include_path", str(asked.folder), "--tasks", ",".join(TASKS), "--device", "cpu"]
        command += ["--batch_size", "8", "--seed", str(SEED), "--output_path", str(work)]
        command += ["--samples", json.dumps(items)]
        say(f"lm-eval's own command line; {report.parent / 'lm-eval.txt'}")
        used = run(command, report.parent / "lm-eval.txt", environment=dict.fromkeys(THREADS, str(asked.jobs)))
        if used.code:
            raise Missing(f"lm-eval ended with {used.code}: {last_line(report.parent / 'lm-eval.txt')}")
    theirs = json.loads(max(work.rglob("results_*.json")).read_text())["results"]
    told = []
    for task, one in found.items():
        other = theirs[task][f"{one['metric']},none"]
        # Sums in other batches are rounded otherwise: an item whose choices lie that close may fall either way.
        allowed = max(2 / one["items"], 0.2 * one["stderr"])
        fits = math.isclose(one["score"], other, abs_tol=allowed)
        say(f"{TASKS[task]}: {one['score']:.4f}, lm-eval {other:.4f}, {'as it' if fits else 'NOT as it'} should be")
        told += [] if fits else [f"{TASKS[task]}: {one['score']:.4f} here, {other:.4f} by lm-eval"]
    return told
