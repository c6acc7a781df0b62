"""The whole evaluation: model after model, part after part, from the cache where it was measured before.

The original goes first, since the others are held to what it said: its pass over the text is kept on disk, its answers
to the tasks item by item. One model is in memory at a time, and only while something of it isn't known yet.

What lies in the cache is never trusted unseen: every entry and every window carries a checksum, and the original's pass
is read through before a model is compared with it. What is damaged is measured again.
"""

from __future__ import annotations

import dataclasses
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmshrink_eval import prepare, require
from llmshrink_eval.cache import Cache
from llmshrink_eval.cost import stored_cost
from llmshrink_eval.engines import open_engine
from llmshrink_eval.errors import EvalFailed
from llmshrink_eval.fingerprint import fingerprint_folder
from llmshrink_eval.options import ModelSpec, Options
from llmshrink_eval.outcome import Evaluation, Samples, now, tell
from llmshrink_eval.progress import Progress, Silent
from llmshrink_eval.results import Cost, Divergence, Generation, ModelResult, Perplexity, Results, Task
from llmshrink_eval.templates import DATE
from llmshrink_eval.used import settings_used

if TYPE_CHECKING:
    from llmshrink_eval.passes import Pass
    from llmshrink_eval.prepare import Prepared, Subject
    from llmshrink_eval.protocol import Windows
    from llmshrink_eval.tasks import TaskRun


def evaluate(
    original: ModelSpec | None, models: Sequence[ModelSpec], options: Options, progress: Progress | None = None
) -> Evaluation:
    """Measure `models`, each against `original` where there is one.

    Raises EvalError for bad input before any model is loaded, EvalFailed when what was measured is no measurement.
    """
    progress = progress or Silent()
    prepared = prepare.prepare(original, models, options)
    for note in prepared.notes:
        progress.note(note)
    cache = Cache(options.cache)
    reference: _Measured | None = None
    measured = []
    for subject in prepared.subjects:
        one = _Measuring(subject, prepared, options, cache, progress, reference).all()
        if subject.role == "original" and original is not None:
            reference = one
        measured.append(one)
    results = Results(
        created=now(),
        command=options.command,
        seed=options.seed,
        device=prepared.device,
        versions=prepared.versions,
        settings=settings_used(options, prepared, {one.result.name: one.result.dtype for one in measured}),
        text=prepared.text_used,
        tasks_fingerprint=prepared.task_data.fingerprint if prepared.task_data is not None else None,
        models=tuple(one.result for one in measured),
    )
    from llmshrink_eval.report.summary import sentences

    results = results.model_copy(update={"requirements": require.check(prepared.conditions, results)})
    results = results.model_copy(update={"summary": sentences(results)})
    return Evaluation(
        results,
        samples={path: rows for one in measured for path, rows in one.samples.items()},
        parts={one.result.name: one.parts for one in measured},
        files=() if prepared.task_data is None else prepared.task_data.files,
    )


@dataclass(frozen=True)
class _Measured:
    """One model's result, and what later models are compared with. baseline: the folder of its pass over the text.
    parts: what was measured of it, now or before."""

    subject: Subject
    result: ModelResult
    samples: Samples
    reading: Pass | None
    baseline: Path | None
    tasks: dict[str, TaskRun]
    parts: tuple[str, ...]


class _Measuring:
    """One model's parts, each from the cache or from the engine."""

    def __init__(
        self,
        subject: Subject,
        prepared: Prepared,
        options: Options,
        cache: Cache,
        progress: Progress,
        reference: _Measured | None,
    ) -> None:
        self._subject, self._prepared, self._options = subject, prepared, options
        self._cache, self._progress, self._reference = cache, progress, reference
        self._engine = open_engine(subject.spec, options.running, subject.tokenizer)
        self._parts: list[str] = []
        self._cached: list[str] = []
        self._seconds = 0.0

    def all(self) -> _Measured:
        try:
            cost = self._cost()
            reading, baseline = self._reading()
            perplexity, divergence = self._numbers(reading)
            runs = self._tasks()
            generations = self._generations()
        except EvalFailed as error:
            raise EvalFailed(f"{self._subject.spec.name}: {error}") from error
        finally:
            self._engine.close()
        tasks, samples = self._compared(runs)
        recoveries = [task.versus_original.recovery for task in tasks.values() if task.versus_original is not None]
        known = [recovery for recovery in recoveries if recovery is not None]
        result = ModelResult(
            path=str(self._subject.spec.folder),
            name=self._subject.spec.name,
            fingerprint=self._subject.fingerprint,
            role=self._subject.role,
            engine=self._prepared.engine,
            dtype=self._engine.dtype,
            perplexity=perplexity,
            divergence=divergence,
            tasks=tasks,
            cost=cost,
            # A task whose recovery isn't known must not make the mean of the others pass for that of all.
            recovery=sum(known) / len(known) if known and len(known) == len(tasks) else None,
            site_errors=self._subject.spec.site_errors,
            generations=generations,
            seconds=self._seconds,
            cached=tuple(self._cached),
        )
        tell(result, self._progress)
        return _Measured(self._subject, result, samples, reading, baseline, runs, tuple(self._parts))

    def _key(self, **more: object) -> dict[str, object]:
        running = self._options.running
        how = {
            "batch_size": running.batch_size,
            "offload": running.offload is not None,
            "trust_remote_code": running.trust_remote_code,
        }
        run = {**self._prepared.run_key(self._engine.dtype), **how}
        return {"model": self._subject.fingerprint, "run": run, **more}

    def _filed(self, part: str, key: dict[str, object], entry: dict[str, Any]) -> None:
        """Keep what was measured. Raises EvalFailed, and keeps nothing, where the model isn't what it was before."""
        spec = self._subject.spec
        if fingerprint_folder(spec.folder, self._options.cache) != self._subject.fingerprint:
            self._cache.drop_folder(part, key)
            raise EvalFailed(
                f"{spec.folder} changed while it was measured, so that the figures are of no model; run again when "
                "whoever writes it has finished"
            )
        self._cache.put(part, key, entry)

    def _kept(self, part: str, key: dict[str, object], measure: Callable[[], Any], label: str) -> Any:
        """A part's value from the cache, or measured and kept, with the seconds it took."""
        self._parts.append(part)
        entry = None if self._options.fresh else self._cache.get(part, key)
        if entry is None:
            self._progress.part(f"{self._subject.spec.name}: {label}")
            started = time.perf_counter()
            entry = {"value": measure()}
            entry["seconds"] = time.perf_counter() - started
            self._filed(part, key, entry)
        else:
            self._cached.append(part)
        self._seconds += entry["seconds"]
        return entry["value"]

    def _cost(self) -> Cost:
        folder = self._subject.spec.folder
        stored = stored_cost(folder, trust_remote_code=self._options.running.trust_remote_code)
        sizes = self._options.speed
        key = self._key(speed=list(sizes), machine=self._prepared.machine)
        label = "load and speed" if sizes else "load"
        measured = self._kept("cost", key, lambda: self._engine.cost(sizes), label)
        return Cost.model_validate({**dataclasses.asdict(stored), **measured})

    def _reading(self) -> tuple[Pass | None, Path | None]:
        """The pass over the text. The original's is kept as the baseline of the models after it."""
        from llmshrink_eval.passes import begun

        windows = self._prepared.windows
        if windows is None:
            return None, None
        self._parts.append("text")
        first = self._subject.role == "original" and self._prepared.compares
        key = self._key(
            windows=windows.fingerprint,
            bos=windows.bos,
            original=self._reference.subject.fingerprint if self._reference is not None else None,
        )
        if self._options.fresh:
            self._cache.drop_folder("reading", key)
        folder = self._cache.folder("reading", key)
        keep = folder / "baseline" if first else None
        found = self._engine.finished(windows, folder, keep=keep)
        if found is None:
            against = self._sound_baseline(windows)
            self._progress.part(f"{self._subject.spec.name}: text {windows.name}")
            self._goes_on(f"text {windows.name}", begun(windows, folder, keep=keep), f"of {len(windows)} windows")
            started = time.perf_counter()
            found = self._engine.read(windows, keep=keep, against=against, folder=folder, progress=self._progress)
            seconds = time.perf_counter() - started
            self._filed("reading", key, {"seconds": seconds})
        else:
            self._cached.append("text")
            seconds = (self._cache.get("reading", key) or {"seconds": 0.0})["seconds"]
        self._seconds += seconds
        return found, keep

    def _goes_on(self, what: str, done: int, of: str) -> None:
        """Say where an interrupted run is taken up."""
        if done:
            self._progress.note(f"{self._subject.spec.name}: {what}: goes on after {done} {of}, where a run stopped")

    def _sound_baseline(self, windows: Windows) -> Path | None:
        """The original's pass to compare with, made again where it isn't as it was written."""
        from llmshrink_eval.baseline import intact

        reference = self._reference
        if reference is None or reference.baseline is None:
            return None
        if not intact(reference.baseline, windows):
            name = reference.subject.spec.name
            self._progress.note(f"{name}: its pass over {windows.name} is damaged in the cache, and is made again")
            shutil.rmtree(reference.baseline)
            options = dataclasses.replace(self._options, fresh=False)
            original = _Measuring(reference.subject, self._prepared, options, self._cache, self._progress, None)
            try:
                original._reading()
            finally:
                original._engine.close()
        return reference.baseline

    def _numbers(self, reading: Pass | None) -> tuple[Perplexity | None, Divergence | None]:
        from llmshrink_eval.divergence import divergence
        from llmshrink_eval.perplexity import perplexity

        windows = self._prepared.windows
        if reading is None or windows is None:
            return None, None
        before = self._reference.reading if self._reference is not None else None
        scored = perplexity(windows, reading.window_nats, before.window_nats if before is not None else None)
        if before is None:
            return scored, None
        parts = [record.divergence for record in reading.windows if record.divergence is not None]
        return scored, divergence(windows, parts, self._subject.tokenizer, method=self._engine.method)

    def _tasks(self) -> dict[str, TaskRun]:
        from llmshrink_eval.answers import kept_answers
        from llmshrink_eval.tasks import TaskRun

        options = self._prepared.tasks
        data = self._prepared.task_data
        if options is None or data is None:
            return {}
        key = self._key(tasks=data.fingerprint, bos=self._options.running.bos, date=DATE)
        if self._options.fresh:
            self._cache.drop_folder("tasks", key)

        def measure() -> dict[str, Any]:
            answers = self._cache.folder("tasks", key).absolute() / "answers.jsonl"
            self._goes_on("tasks", kept_answers(answers), "answers")
            runs = self._engine.tasks(dataclasses.replace(options, answers=str(answers)), self._progress)
            return {name: run.to_dict() for name, run in runs.items()}

        found = self._kept("tasks", key, measure, f"tasks {', '.join(options.names)}")
        self._cache.drop_folder("tasks", key)
        return {name: TaskRun.from_dict(made) for name, made in found.items()}

    def _generations(self) -> tuple[Generation, ...]:
        prompts = self._prepared.prompts
        if not prompts:
            return ()
        key = self._key(prompts=list(prompts), bos=self._prepared.bos)
        found = self._kept("generations", key, lambda: self._engine.generations(prompts), "what it says")
        return tuple(Generation.model_validate(one) for one in found)

    def _compared(self, runs: dict[str, TaskRun]) -> tuple[dict[str, Task], Samples]:
        from llmshrink_eval.tasks import compare_tasks

        if not runs:
            return {}, {}
        before = self._reference.tasks if self._reference is not None else None
        tasks = compare_tasks(before, runs, seed=self._options.seed)
        samples: Samples = {}
        for name, task in tasks.items():
            path = f"samples/{self._subject.slug}/{name}.jsonl"
            samples[path] = [item.to_dict() for item in runs[name].items]
            tasks[name] = task.model_copy(update={"samples": path})
        return tasks, samples
