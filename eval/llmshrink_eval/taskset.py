"""Which tasks: lm-eval's by name, group, tag or pattern, and those of local folders; found before any model is loaded.

The index of lm-eval's fourteen thousand tasks takes seconds to read, so it is read only when a name isn't at home in
the local folders. Where both have a name, the local task is meant.
"""

from __future__ import annotations

import contextlib
import difflib
import fnmatch
import functools
import hashlib
import io
import json
import logging
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from llmshrink_eval.beginning import Bos
from llmshrink_eval.errors import EvalError
from llmshrink_eval.listing import below

NEAREST = 3
CAUSE_LENGTH = 200
FILE_READERS = ("json", "csv", "parquet", "text", "arrow")
"""What `datasets` calls the readers of files that a task names itself."""
NOISY = ("lm_eval", "datasets", "huggingface_hub", "httpx", "fsspec", "filelock")


@dataclass(frozen=True)
class TaskOptions:
    """What is asked of lm-eval.

    names: tasks, groups, tags, or patterns such as `arc_*`. tasks_dir: a folder of task files, or several, that stand
    before lm-eval's own. limit: only so many items of each task, the first ones. num_fewshot: None for what each task
    says; a task that fixes it at 0 keeps 0. batch_size: None for what fits the model's vocabulary. seed: of the
    few-shot examples, of sampled generation, and of `sample`. bos: whether what the model reads begins with BOS.
    answers: a file in which answers are kept while the tasks run, of one model and these tasks alone. sample: instead
    of limit, so many items of each task, drawn from all.
    """

    names: tuple[str, ...]
    tasks_dir: Path | Sequence[Path] | None = None
    limit: int | None = None
    num_fewshot: int | None = None
    batch_size: int | None = None
    apply_chat_template: bool = False
    seed: int = 0
    bos: Bos = "auto"
    answers: str | None = None
    sample: int | None = None

    @property
    def folders(self) -> tuple[Path, ...]:
        """The local folders, as a tuple."""
        if self.tasks_dir is None:
            return ()
        return (self.tasks_dir,) if isinstance(self.tasks_dir, Path) else tuple(self.tasks_dir)


@dataclass(frozen=True)
class TaskSet:
    """lm-eval's objects, fresh: running them once uses them up. tasks: every single task by name. groups: by name."""

    tasks: dict[str, Any]
    groups: dict[str, Any]


def check_tasks(options: TaskOptions) -> None:
    """Refuse what can be refused without data and without a model.

    Raises EvalError: no names, unknown names (with the nearest known ones), folders that aren't there, numbers that
    make no sense.
    """
    if not options.names:
        raise EvalError("no tasks named")
    for name, value, least in (
        ("limit", options.limit, 1),
        ("sample", options.sample, 1),
        ("num_fewshot", options.num_fewshot, 0),
        ("batch_size", options.batch_size, 1),
    ):
        if value is not None and value < least:
            raise EvalError(f"{name} {value}: at least {least}")
    if options.limit is not None and options.sample is not None:
        raise EvalError(f"limit {options.limit} and sample {options.sample}: the first items or drawn ones, not both")
    for folder in options.folders:
        if not folder.is_dir():
            raise EvalError(f"{folder}: no such folder of tasks")
        if not any(file.suffix == ".yaml" for file in below(folder)):
            raise EvalError(f"{folder}: holds no task (no .yaml file)")
    with quiet():
        _resolve(options)


def load_tasks(options: TaskOptions) -> TaskSet:
    """The tasks with their data, ready to run on one model.

    Raises EvalError where `check_tasks` does, and for data that can't be had, tasks that share a member, tasks that run
    code written by the model, and tasks on images or sound.
    """
    check_tasks(options)
    with quiet():
        manager, names = _resolve(options)
        built: list[Any] = []
        for name in names:
            loaded = _load(manager, name)
            groups = loaded.get("groups", {})
            built += [groups[name]] if name in groups else loaded["tasks"].values()
        try:
            loaded = manager.load(built)
        except ValueError as error:
            raise EvalError(f"{_one_line(error)}: name it once") from None
        for task in loaded["tasks"].values():
            _prepare(task, options)
    return TaskSet(dict(loaded["tasks"]), dict(loaded.get("groups", {})))


def drawn_items(loaded: TaskSet, options: TaskOptions) -> dict[str, list[int]] | None:
    """Which items of each task `options.sample` draws, as places among all of its items, in their order.

    Each task draws for itself, by its name and the seed: the same items whatever is asked beside it, and of N and more
    items, those of N are among them. None where nothing is drawn; a task with no more items than are asked for gives
    all.
    """
    if options.sample is None:
        return None
    drawn = {}
    for name, task in loaded.tasks.items():
        order = list(range(len(task.eval_docs)))
        random.Random(f"{options.seed} {name}").shuffle(order)
        drawn[name] = sorted(order[: options.sample])
    return drawn


@dataclass(frozen=True)
class TaskData:
    """What tasks are made of.

    fingerprint: sha256 of all that decides the items and their scoring: the tasks' definitions (local Python files
    too), the documents that are asked and those that few-shot examples are drawn from, the options, and lm-eval's
    version; not of where the files lie. num_fewshot: as used, by task. files: the local files that the data come from;
    None where a task's data may come from elsewhere.
    """

    fingerprint: str
    num_fewshot: dict[str, int]
    files: tuple[Path, ...] | None


def survey_tasks(options: TaskOptions) -> TaskData:
    """Read the tasks' definitions and data. Raises EvalError where `load_tasks` does, and for more examples in a prompt
    than a task has."""
    loaded = load_tasks(options)
    for name, task in sorted(loaded.tasks.items()):
        _check_examples(name, task)
    digest = hashlib.sha256()

    def enter(*parts: object) -> None:
        digest.update(json.dumps(parts, sort_keys=True, default=str).encode() + b"\n")

    enter(version("lm_eval"), options.names, options.limit, options.num_fewshot, options.batch_size)
    enter(options.apply_chat_template, options.seed, options.sample)
    drawn = drawn_items(loaded, options)
    for folder in options.folders:
        for file in sorted(file for file in below(folder) if file.suffix == ".py"):
            enter(file.relative_to(folder).as_posix(), hashlib.sha256(file.read_bytes()).hexdigest())
    with quiet():
        for name, task in sorted(loaded.tasks.items()):
            enter(name, _definition(task))
            for _, document in task.doc_iterator(limit=options.limit, samples=drawn and drawn[name]):
                enter(document)
            if task.get_config("num_fewshot"):
                enter(*getattr(getattr(task, "sampler", None), "df", ()))
        for name, group in sorted(loaded.groups.items()):
            enter(name, group.child_names)
    return TaskData(
        fingerprint=digest.hexdigest(),
        num_fewshot={name: int(task.get_config("num_fewshot") or 0) for name, task in loaded.tasks.items()},
        files=_local_files(loaded.tasks.values()),
    )


def _check_examples(name: str, task: Any) -> None:
    """Raise EvalError for a number of few-shot examples that the task can't draw: lm-eval fails in the middle of it."""
    wanted = int(task.get_config("num_fewshot") or 0)
    sampler = getattr(task, "sampler", None)
    pool = getattr(sampler, "fewshot_indices", None) or getattr(sampler, "df", None)
    if not wanted or not isinstance(pool, Sized) or not len(pool):
        return
    config = task.config
    # Of the items that are asked one more is drawn, as the one in question may be among them.
    asked = (config.test_split or config.validation_split) == config.fewshot_split
    most = len(pool) - (1 if asked and type(sampler).__name__ == "ContextSampler" else 0)
    if wanted > most:
        raise EvalError(f"--num-fewshot {wanted}: task {name} has {most:,} examples to draw from; give at most that")


def fingerprint_documents(task: Any, samples: Sequence[Mapping[str, Any]]) -> str:
    """sha256 of the documents of a task that were asked, by lm-eval's hashes of them, and of those that few-shot
    examples were drawn from, if any were."""
    asked = {int(sample["doc_id"]): str(sample["doc_hash"]) for sample in samples}
    examples = getattr(getattr(task, "sampler", None), "df", ()) if task.get_config("num_fewshot") else ()
    said = json.dumps([sorted(asked.items()), list(examples)], sort_keys=True, default=str)
    return hashlib.sha256(said.encode()).hexdigest()


def _local_files(tasks: Iterable[Any]) -> tuple[Path, ...] | None:
    """The files named as data of the tasks, if all of them are named and here."""
    found: dict[Path, None] = {}
    for task in tasks:
        named = (task.get_config("dataset_kwargs") or {}).get("data_files")
        if task.get_config("dataset_path") not in FILE_READERS or not named:
            return None
        for entry in named.values() if isinstance(named, dict) else [named]:
            for file in [entry] if isinstance(entry, str) else entry:
                path = Path(file).absolute()
                if not path.is_file():
                    return None
                found[path] = None
    return tuple(found)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """lm-eval and the libraries under it log, print and draw bars; whoever runs an evaluation shows its own."""
    loggers = [logging.getLogger(name) for name in NOISY]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _resolve(options: TaskOptions) -> tuple[Any, list[str]]:
    """The index that knows all names, and the names with patterns expanded."""
    stamp = tuple(
        (str(file), file.stat().st_mtime_ns, file.stat().st_size)
        for folder in options.folders
        for file in sorted(file for file in below(folder) if file.suffix == ".yaml")
    )
    manager = _index(options.folders, stamp, False) if options.folders else None
    if manager is None or not _self_contained(manager, options.names):
        manager = _index(options.folders, stamp, True)
    names: dict[str, None] = {}
    unknown = []
    for name in options.names:
        known = [name] if name in manager.task_index else fnmatch.filter(manager.all_tasks, name)
        names |= dict.fromkeys(known)
        if not known:
            unknown.append(_unknown(name, manager.all_tasks))
    if unknown:
        raise EvalError("; ".join(unknown))
    return manager, list(names)


@functools.lru_cache(maxsize=4)
def _index(folders: tuple[Path, ...], _stamp: tuple[object, ...], library: bool) -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=[str(folder) for folder in folders], include_defaults=library)


def _self_contained(manager: Any, names: Sequence[str]) -> bool:
    """Whether these names, and all that they stand for, are in this index."""
    waiting, seen = list(names), set()
    while waiting:
        name = waiting.pop()
        entry = manager.task_index.get(name)
        if entry is None:
            return False
        if name in seen:
            continue
        seen.add(name)
        members = (entry.cfg or {}).get("task") if entry.kind.name == "GROUP" else None
        waiting += entry.tags if entry.kind.name == "TAG" else ()
        for member in members if isinstance(members, list) else ():
            waiting.append(member if isinstance(member, str) else str(member.get("task", member.get("group"))))
    return True


def _unknown(name: str, known: Sequence[str]) -> str:
    nearest = difflib.get_close_matches(name, known, n=NEAREST, cutoff=0.5)
    hint = f"did you mean {', '.join(nearest)}?" if nearest else "`lm-eval ls tasks` lists them"
    return f"task {name}: unknown; {hint}"


def _load(manager: Any, name: str) -> dict[str, Any]:
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        loaded: dict[str, Any] = manager.load([name])
    except ImportError as error:
        raise EvalError(f"task {name}: needs a package that isn't installed ({_one_line(error)})") from error
    except (OSError, DatasetsError, HfHubHTTPError, OfflineModeIsEnabled) as error:
        raise EvalError(
            f"task {name}: its data can't be had ({_one_line(error)}); run it once with access to the network, "
            "or give a task with local data by --tasks-dir"
        ) from error
    except Exception as error:  # task files run code of their own: anything may come out
        raise EvalError(f"task {name}: can't be set up ({type(error).__name__}: {_one_line(error)})") from error
    return loaded


def _prepare(task: Any, options: TaskOptions) -> None:
    """Number and seed of the few-shot examples, by lm-eval's own rule; refuse what isn't run here."""
    name = task.task_name
    if getattr(task, "UNSAFE_CODE", False):
        raise EvalError(f"task {name}: runs code that the model writes, which isn't done here")
    if getattr(task, "MULTIMODAL", False):
        raise EvalError(f"task {name}: asks about images or sound; only text is evaluated here")
    fixed = task.get_config("num_fewshot")
    if options.num_fewshot is not None and fixed != 0:
        task.set_config(key="num_fewshot", value=options.num_fewshot)
    elif fixed is None:
        task.set_config(key="num_fewshot", value=0)
    task.set_fewshot_seed(seed=options.seed)


def _definition(task: Any) -> dict[str, object]:
    """The configuration, functions as their source, without where it was read from."""
    config = dict(task.dump_config())
    config.pop("dataset_kwargs", None)
    metadata = config.get("metadata")
    if isinstance(metadata, dict):
        config["metadata"] = {key: value for key, value in metadata.items() if key != "config_source"}
    return config


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= CAUSE_LENGTH else text[: CAUSE_LENGTH - 3] + "..."
