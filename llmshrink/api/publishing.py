"""`llmshrink.push`: a finished folder to the Hugging Face Hub; and the same at the end of a run."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from llmshrink.api.checkpoints import _folder
from llmshrink.errors import LlmshrinkError, PathLike
from llmshrink.paths import expanded

if TYPE_CHECKING:
    from llmshrink.distillation.report import DistillReport
    from llmshrink.hub.push import PushReport
    from llmshrink.run.progress import Progress
    from llmshrink.run.report import QuantizeReport

    Report = TypeVar("Report", QuantizeReport, QuantizeReport | DistillReport | None, DistillReport | None)


def push(
    path: PathLike,
    name: str,
    *,
    private: bool = False,
    revision: str = "main",
    report: PathLike | None = None,
    dry_run: bool = False,
    yes: bool = False,
    progress: Progress | None = None,
) -> PushReport:
    """Publish a folder that llmshrink wrote as `name` (owner/name) on the Hub, in one commit.

    private: of a repository that isn't there yet. revision: the branch, which is made where there is none. report: what
    `llmshrink eval` or `compare` left, whose figures of these weights go into the card. dry_run: check everything and
    list what would go, without the network. yes: publish what would otherwise be asked about (a licence that restricts
    it, weights of another model in the repository, files changed since the run). Returns what was sent. Raises
    LlmshrinkError for what is in the way, saying what is on the Hub by then: all of it or nothing.
    """
    _check(
        name=(name, str), revision=(revision, str), private=(private, bool), dry_run=(dry_run, bool), yes=(yes, bool)
    )
    folder = _folder(path)
    if report is not None and not isinstance(report, str | os.PathLike):
        raise LlmshrinkError(f"report={report!r}: not a path; pass the folder of `llmshrink eval`")
    from llmshrink.hub.push import Asked
    from llmshrink.hub.push import push as run
    from llmshrink.run.progress import Silent

    asked = Asked(name, revision, private, None if report is None else expanded(report), dry_run, yes)
    return run(folder, asked, progress or Silent())


def and_push(
    run: Callable[[], Report],
    output: Path,
    source: str,
    reads: Iterable[PathLike | None],
    name: str | None,
    *,
    private: bool,
    yes: bool,
    progress: Progress,
) -> Report:
    """Carry out a run, and publish its output as `name`; what can be refused of that is refused before the work.

    source: the model whose licence the output comes under. reads: what else it is made of, as it was named. A push that
    fails is in the run's report: the output is complete all the same.
    """
    check_publishing(name, private=private, yes=yes)
    if name is None:
        return run()
    from llmshrink.hub.push import check, check_licence, pushed

    check(name, "main")
    check_licence(source, yes=yes)
    named = [expanded(path) for path in (source, *reads) if path is not None]
    places = tuple(os.path.abspath(path) for path in named if path.exists())
    report = run()
    if report is None or not report.ok:
        return report
    return replace(report, pushed=pushed(output, name, private=private, yes=yes, places=places, progress=progress))


def check_publishing(push: str | None, *, private: bool, yes: bool) -> None:
    """Raise LlmshrinkError when what a run is told of publishing isn't meant so, or has no `push` to go with."""
    _check(private=(private, bool), yes=(yes, bool))
    if push is not None:
        return _check(push=(push, str))
    given = next((name for name, value in (("--private", private), ("--yes", yes)) if value), None)
    if given is not None:
        raise LlmshrinkError(f"{given}: is of publishing the result; give --push OWNER/NAME as well, or leave it out")


def _check(**given: tuple[object, type]) -> None:
    for name, (value, wanted) in given.items():
        if not isinstance(value, wanted):
            what = {str: "text", bool: "True or False"}[wanted]
            raise LlmshrinkError(f"{name}={value!r}: not {what}; pass one, as 'owner/name' for a repository")
