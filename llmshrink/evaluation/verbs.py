"""From what a user names to what `llmshrink_eval` measures: models to folders, `demo` to its text and tasks."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmshrink_eval.bounded import read_json
from llmshrink_eval.refused import refused

from llmshrink.errors import LlmshrinkError, OutputError
from llmshrink.evaluation.naming import DEMO, is_demo_task, task_names
from llmshrink.evaluation.settings import Settings
from llmshrink.limits import LIMITS, check_numbers
from llmshrink.paths import expanded
from llmshrink.run.lock import LOCK, locked

if TYPE_CHECKING:
    from llmshrink_eval.options import ModelSpec, Options
    from llmshrink_eval.outcome import Evaluation
    from llmshrink_eval.progress import Progress
    from llmshrink_eval.results import Results, SiteError
    from llmshrink_eval.text import Text

DEMO_TEXT_SEED = 40_000
"""Far from the seeds of training, calibration and the tests, so that what is scored was never seen."""
DEMO_CHARACTERS = 120_000
REPORT = "results.json"
REPORT_FILES = frozenset({REPORT, "table.md", "report.html", "samples", LOCK})


def evaluate(
    original: str | None,
    models: Sequence[str],
    output: Path,
    settings: Settings,
    *,
    command: str | None,
    progress: Progress | None,
) -> Results:
    """Measure and write the report. Raises LlmshrinkError or EvalError for bad input, EvalFailed for a NaN."""
    check_report_folder(output)
    with locked(output):
        return _evaluate(original, models, output, settings, command=command, progress=progress)


def _evaluate(
    original: str | None,
    models: Sequence[str],
    output: Path,
    settings: Settings,
    *,
    command: str | None,
    progress: Progress | None,
) -> Results:
    from llmshrink.evaluation.known import Known

    check_numbers(vars(settings))
    known = Known(original, models, settings)
    found = known.find()
    if found is not None:
        return _again(found, output, command, progress)
    from llmshrink_eval.evaluate import evaluate as measure
    from llmshrink_eval.prepare import refuse

    with tempfile.TemporaryDirectory(prefix="llmshrink-offload-") as scratch:
        options = options_of(settings, Path(scratch), command=command)
        refuse(options, baseline=original is not None)
        specs = [spec_of(model, settings) for model in models]
        first = None if original is None else spec_of(original, settings)
        known.look()
        evaluation = measure(first, specs, options, progress)
        results = evaluation.write(output)
        known.keep(evaluation)
        return results


def _again(found: Evaluation, output: Path, command: str | None, progress: Progress | None) -> Results:
    """Say and write what an earlier run found."""
    from llmshrink_eval.outcome import now, tell
    from llmshrink_eval.progress import Silent

    for model in found.results.models:
        tell(model, progress or Silent())
    results = found.results.model_copy(update={"command": command, "created": now()})
    return replace(found, results=results).write(output)


def check_report_folder(folder: Path) -> None:
    """Refuse, before hours of work, where no report can or should be written: it takes an empty folder, a new one, or
    the place of a report. Raises OutputError."""
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder} is a file; name a folder for the report with -o")
    if not folder.exists():
        parent = next(parent for parent in folder.absolute().parents if parent.exists())
        if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
            raise OutputError(f"{folder} can't be made: {parent} can't be written; choose another folder with -o")
        return
    if not os.access(folder, os.W_OK | os.X_OK):
        raise OutputError(f"{folder} can't be written; choose another folder with -o")
    written = folder / REPORT
    if written.exists():
        _refuse_foreign_results(written)
        return
    # What was cut off while it wrote has everything but results.json.
    strange = sorted({file.name.removesuffix(".part") for file in folder.iterdir()} - REPORT_FILES)
    if strange:
        raise OutputError(
            f"{folder} holds {strange[0]} and no report of llmshrink's; choose an empty or a new folder with -o"
        )


def _refuse_foreign_results(written: Path) -> None:
    try:
        schema = read_json(written)["schema_version"]
    except (OSError, ValueError, KeyError, TypeError):
        schema = None
    if not isinstance(schema, int):
        raise OutputError(f"{written} is there and no report of llmshrink's; choose another folder with -o")


def spec_of(model: str, settings: Settings) -> ModelSpec:
    """A model by the name that a user gives it. Raises SourceError when there is none."""
    from llmshrink_eval.options import ModelSpec

    from llmshrink.checkpoint.source import resolve
    from llmshrink.evaluation import loader

    source = resolve(model, trust_remote_code=settings.trust_remote_code)
    name = f"{source.name}@{source.revision[:12]}" if source.revision else source.name
    own = loader.reader_of(source.folder, offload=settings.offload)
    return ModelSpec(name=name, folder=source.folder, loader=own, site_errors=_site_errors(source.folder))


def options_of(settings: Settings, scratch: Path, *, command: str | None) -> Options:
    """The evaluation's options. scratch: a folder for what streaming writes.

    Raises LlmshrinkError for a device that isn't there, and for what is no list of batch sizes.
    """
    from llmshrink_eval.cache import default_folder
    from llmshrink_eval.options import Options, Running, Scoring

    from llmshrink.run.asked import pick_device

    device = "cpu" if settings.engine == "vllm" and settings.device is None else str(pick_device(settings.device))
    cache = default_folder() if settings.cache is None else expanded(settings.cache)
    tasks = task_names(settings.tasks)
    folders = [] if settings.tasks_dir is None else [expanded(settings.tasks_dir)]
    if any(map(is_demo_task, tasks)):
        folders.append(_demo_tasks(cache))
    return Options(
        scoring=Scoring(
            text=_text(settings.text),
            protocol=settings.protocol,
            window=settings.window,
            stride=settings.stride,
            max_tokens=settings.max_tokens,
        ),
        running=Running(
            engine=settings.engine,
            device=device,
            dtype=settings.dtype or "auto",
            batch_size=settings.batch_size,
            offload=scratch if settings.offload else None,
            trust_remote_code=settings.trust_remote_code,
            bos=settings.bos,
        ),
        tasks=tasks,
        tasks_dir=tuple(folders),
        limit=settings.limit,
        sample=settings.sample,
        num_fewshot=settings.num_fewshot,
        apply_chat_template=settings.apply_chat_template,
        speed=_speed(settings),
        prompts=tuple(settings.prompts) if settings.prompts else (() if settings.offload else None),
        require=settings.require,
        seed=settings.seed,
        cache=cache,
        fresh=settings.fresh,
        command=command,
    )


def _demo_tasks(cache: Path) -> Path:
    """The folder of the demo language's tasks, each file whole at any time: another run may be reading them."""
    from llmshrink.demo.tasks import write_tasks

    folder = cache / "demo-tasks"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".writing-", dir=cache) as fresh:
            write_tasks(Path(fresh))
            for file in Path(fresh).iterdir():
                if not _same(file, folder / file.name):
                    file.replace(folder / file.name)
    except OSError as error:
        reason = refused(error, "choose another folder with --cache")
        raise OutputError(f"{cache}: can't be written: {reason}") from error
    return folder


def _same(file: Path, other: Path) -> bool:
    return other.is_file() and file.read_bytes() == other.read_bytes()


def _text(spec: str | None) -> Text | None:
    from llmshrink_eval.text import Text, load_text

    if spec is None:
        return None
    if spec != DEMO:
        return load_text(spec)
    from llmshrink.demo import language

    documents: list[str] = []
    for story in language.stories(DEMO_TEXT_SEED):
        documents.append(story)
        if sum(map(len, documents)) >= DEMO_CHARACTERS:
            return Text(DEMO, ("".join(documents),))
    raise AssertionError("the demo language has no end")


def _speed(settings: Settings) -> tuple[int, ...]:
    """Batch sizes to time. Streamed from disk a model reads everything again for each token: then only when asked."""
    speed = settings.speed
    if speed is None:
        return () if settings.offload else (1, 8)
    if isinstance(speed, str):
        words = [] if speed == "none" else speed.split(",")
        if not all(word.strip().isdecimal() for word in words):
            raise LlmshrinkError(f"--speed {speed}: batch sizes as 1,8, or none")
        speed = [int(word[:20]) for word in words]
    if any(not 1 <= size <= LIMITS["batch_size"][1] for size in speed):
        said = ",".join(map(str, speed))
        raise LlmshrinkError(f"--speed {said}: a batch has one sequence at least and a million at most")
    return tuple(speed)


def _site_errors(folder: Path) -> tuple[SiteError, ...]:
    """What the compressor recorded of each layer, where it was llmshrink."""
    from llmshrink_eval.results import SiteError

    try:
        sites: list[dict[str, Any]] = read_json(folder / "llmshrink.json")["sites"]
        return tuple(SiteError(name=site["name"], bits=site["bits"], error=site["error"]) for site in sites)
    except (OSError, ValueError, KeyError, TypeError):
        return ()
