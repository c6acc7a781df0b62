"""An evaluation that was carried out before, found without importing what could carry it out.

Every part of an evaluation is kept by what it depends on; but to look a part up, models' tokenizers, the text's tokens
and the tasks' documents have to be made, by libraries that take seconds to import. So what a whole evaluation found is
kept too, under what can be told without them: the options, the content of the models' folders, of the text and of the
tasks' files, the versions of the libraries, the machine, and our own code. Where anything is otherwise, the parts are
looked up one by one.

What lies elsewhere can't be told so: with a model, a text or a task's data that is named on the Hub, an evaluation
isn't kept whole.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import llmshrink_eval
from llmshrink_eval.cache import Cache, default_folder
from llmshrink_eval.errors import EvalError
from llmshrink_eval.fingerprint import file_digest, fingerprint_folder
from llmshrink_eval.listing import below
from llmshrink_eval.outcome import Evaluation
from llmshrink_eval.prepare import versions_of
from llmshrink_eval.results import Results

import llmshrink
from llmshrink.errors import LlmshrinkError
from llmshrink.evaluation.naming import DEMO, is_demo_task, task_names
from llmshrink.paths import expanded

if TYPE_CHECKING:
    from llmshrink.evaluation.settings import Settings

PART = "whole"
TEXT_FILES = (".txt", ".jsonl", ".parquet")
ENVIRONMENT = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "ATEN_CPU_CAPABILITY",
    "CUDA_VISIBLE_DEVICES",
    "NVIDIA_VISIBLE_DEVICES",
)
"""What decides, beside the machine itself, which device a model runs on and how."""
ROOMS = ("checkpoint", "demo", "evaluation", "formats", "model", "weights")
"""Those of our own packages that read a model, or make the demo's text and tasks."""
_INCLUDE = re.compile(r"^\s*include\s*:\s*(\S+)", re.MULTILINE)


class Known:
    """One evaluation's place among those that are kept whole."""

    def __init__(self, original: str | None, models: Sequence[str], settings: Settings) -> None:
        self._asked = (original, models, settings)
        self._folder = default_folder() if settings.cache is None else expanded(settings.cache)
        self._cache, self._fresh = Cache(self._folder), settings.fresh
        # Our own tasks are made by our own code.
        self._only_demo = settings.tasks_dir is None and all(map(is_demo_task, task_names(settings.tasks)))
        self._key: dict[str, Any] | None = None
        # Whoever has imported torch already may have told it how many threads to use. Later on we'll have imported it.
        torch = sys.modules.get("torch")
        self._threads: int | None = torch.get_num_threads() if torch is not None else None

    def look(self) -> None:
        """Take note of everything that the results depend on, as it is now. What is wrong with the input is found, and
        told, by who measures."""
        if self._key is None:
            with contextlib.suppress(EvalError, LlmshrinkError, OSError):
                self._key = self._told(*self._asked)

    def find(self) -> Evaluation | None:
        """What was found before, if all of it still holds."""
        if self._fresh or not (self._folder / PART).is_dir():
            return None
        self.look()
        if self._key is None:
            return None
        kept = self._cache.get(PART, self._key)
        if kept is None:
            return None
        files = tuple(map(Path, kept["files"]))
        try:
            if any(file_digest(file, self._folder) != kept["files"][str(file)] for file in files):
                return None
        except EvalError:
            return None
        results = Results.model_validate(kept["results"])
        models = tuple(
            model.model_copy(update={"cached": tuple(kept["parts"][model.name])}) for model in results.models
        )
        return Evaluation(results.model_copy(update={"models": models}), kept["samples"], kept["parts"], files)

    def keep(self, evaluation: Evaluation) -> None:
        """Remember what was found, under what `look` has seen; nothing, where a file of the tasks' data has gone or is
        being written. Raises EvalError when the cache can't be written."""
        files = () if self._only_demo else evaluation.files
        if self._key is None or files is None:
            return
        try:
            digests = {str(file): file_digest(file, self._folder) for file in files}
        except EvalError:
            return
        value = {
            "results": json.loads(evaluation.results.to_json()),
            "samples": evaluation.samples,
            "parts": evaluation.parts,
            "files": digests,
        }
        self._cache.put(PART, self._key, value)

    def _told(self, original: str | None, models: Sequence[str], settings: Settings) -> dict[str, Any] | None:
        """All that the results depend on; None where that can't be told from here."""
        folders = [_folder(model) for model in (*([original] if original is not None else ()), *models)]
        text = _text(settings.text, self._folder)
        tasks = [] if settings.tasks_dir is None else _tasks(expanded(settings.tasks_dir), self._folder)
        if text is None or tasks is None:
            return None
        told = []
        for folder in folders:
            if folder is None:
                return None
            record = folder / "llmshrink.json"
            record_digest = file_digest(record, self._folder) if record.is_file() else None
            told.append([str(folder), fingerprint_folder(folder, self._folder), record_digest])
        asked = {name: value for name, value in asdict(settings).items() if name not in ("cache", "fresh")}
        return {
            "asked": json.loads(json.dumps([original, *models, asked], default=os.fspath)),
            "here": os.getcwd(),
            "models": told,
            "text": text,
            "tasks": tasks,
            "versions": versions_of(settings.engine),
            "machine": _machine(),
            "threads": self._threads,
            "code": _code(),
        }


def _folder(model: str) -> Path | None:
    """Where a model lies; None for one of the Hub."""
    from llmshrink.checkpoint.source import resolve

    return resolve(model).folder if model == DEMO or expanded(model).is_dir() else None


def _text(spec: str | None, cache: Path) -> str | None:
    """What tells a text's content; None for what isn't a file here."""
    if spec is None or spec == DEMO:
        return ""
    path = expanded(spec)
    return file_digest(path, cache) if path.suffix.lower() in TEXT_FILES and path.is_file() else None


def _tasks(folder: Path, cache: Path) -> list[list[str]] | None:
    """The definitions in a folder of tasks; None where one includes a file from outside."""
    found = []
    for file in sorted(file for file in below(folder) if file.suffix in (".yaml", ".py")):
        for included in (
            _INCLUDE.findall(file.read_text(encoding="utf-8", errors="replace")) if file.suffix == ".yaml" else ()
        ):
            if not (file.parent / included.strip("'\"")).resolve().is_relative_to(folder.resolve()):
                return None
        found.append([file.relative_to(folder).as_posix(), file_digest(file, cache)])
    return found


def _machine() -> dict[str, object]:
    """What a device's name and speed depend on, as far as it can be told without torch."""
    try:
        cpu = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").partition("\n\n")[0]
        # The clock changes from moment to moment.
        kind = [line for line in cpu.splitlines() if line.startswith(("model name", "flags", "Features", "CPU part"))]
    except OSError:
        kind = [platform.processor()]
    gpus = Path("/proc/driver/nvidia/gpus")
    return {
        "name": platform.node(),
        "cpu": hashlib.sha256("\n".join(kind).encode()).hexdigest(),
        "cores": [os.cpu_count(), len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None],
        "gpus": sorted(os.listdir(gpus)) if gpus.is_dir() else [],
        "environment": {name: os.environ.get(name) for name in ENVIRONMENT},
    }


def _code() -> str:
    """Changes when our own code does: sizes and times of its files."""
    digest = hashlib.sha256()
    ours, theirs = (Path(package.__file__ or "").parent for package in (llmshrink, llmshrink_eval))
    for root in (theirs, *(ours / room for room in ROOMS)):
        for file in sorted(file for file in below(root) if file.suffix in (".py", ".j2", ".css", ".js")):
            state = file.stat()
            digest.update(f"{root.name} {file.relative_to(root)} {state.st_size} {state.st_mtime_ns}\n".encode())
    return digest.hexdigest()
