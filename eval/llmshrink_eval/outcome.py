"""A finished evaluation, and its report in a folder."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Any

from llmshrink_eval.bounded import parse_json
from llmshrink_eval.errors import EvalError
from llmshrink_eval.progress import Progress
from llmshrink_eval.refused import refused
from llmshrink_eval.results import ModelResult, Results

Samples = dict[str, list[dict[str, Any]]]

RESULTS_FILE = "results.json"
PAGES = ("table.md", "report.html")


@dataclass(frozen=True)
class Evaluation:
    """results: what becomes results.json. samples: rows of the per-item files, by their path in the report. parts: what
    was measured of each model, by its name. files: the local files that the tasks' data come from; None where some come
    from elsewhere."""

    results: Results
    samples: Samples
    parts: dict[str, tuple[str, ...]]
    files: tuple[Path, ...] | None

    def write(self, folder: Path) -> Results:
        """The report, results.json last: where it is, the rest is. Files of items that only the report before had go.

        A report that is there and says the same is left as it is: drawing it takes seconds. Returns what results.json
        holds. Raises EvalError when the folder can't be written.
        """
        before = self._written(folder)
        if before is not None:
            return before
        from llmshrink_eval.report.write import write_report

        try:
            stale = _samples_of(folder / RESULTS_FILE) - self.samples.keys()
            write_report(self.results, folder, self.samples)
            self.results.write(folder / RESULTS_FILE)
            for name in stale:
                (folder / name).unlink(missing_ok=True)
        except OSError as error:
            reason = refused(error, "choose another folder with -o")
            raise EvalError(f"{folder}: the report can't be written: {reason}") from error
        return self.results

    def _written(self, folder: Path) -> Results | None:
        """The report that is there, if it differs in nothing but when it was written and what came from the cache."""
        try:
            before = Results.read(folder / RESULTS_FILE)
            there = {name: (folder / name).read_text(encoding="utf-8") for name in (*PAGES, *self.samples)}
            rows = {name: [parse_json(line) for line in there[name].split("\n")[:-1]] for name in self.samples}
        except (OSError, ValueError):
            return None
        same = _said(before) == _said(self.results) and rows == json.loads(json.dumps(self.samples))
        return before if same else None


def now() -> str:
    """As results.json has it: ISO 8601, in UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def tell(result: ModelResult, progress: Progress) -> None:
    """What there is to say of a model when it is done: what its tasks warned of, and what was measured before."""
    for warning in dict.fromkeys(warning for task in result.tasks.values() for warning in task.warnings):
        progress.note(f"{result.name}: tasks: {warning}")
    if result.cached:
        progress.note(f"{result.name}: {', '.join(result.cached)} from the cache")


def _said(results: Results) -> dict[str, Any]:
    made: dict[str, Any] = json.loads(results.to_json())
    del made["created"]
    for model in made["models"]:
        del model["cached"]
    return made


def _samples_of(path: Path) -> set[str]:
    """The files of items that the report there speaks of, none outside its folder."""
    try:
        models = Results.read(path).models
    except (OSError, ValueError):
        return set()
    named = {task.samples for model in models for task in model.tasks.values() if task.samples}
    return {name for name in named if not PurePosixPath(name).is_absolute() and ".." not in PurePosixPath(name).parts}
