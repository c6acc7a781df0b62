"""`push`: everything is checked here first, then sent, then held to what the Hub says it has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from llmshrink.checkpoint.source import resolve
from llmshrink.errors import LlmshrinkError
from llmshrink.hub.client import HubError, check_branch, check_name, check_token
from llmshrink.hub.evaluated import evaluation_of
from llmshrink.hub.folder import Contents, check_card, check_leaks, contents, settle, with_card
from llmshrink.hub.upload import Target, upload
from llmshrink.run.card import beyond, card
from llmshrink.run.licence import licence_of
from llmshrink.run.progress import Progress, size
from llmshrink.run.report import Pushed
from llmshrink.run.verify import read_record


@dataclass(frozen=True)
class Asked:
    """What a user asks of a push; the names are those of `llmshrink.push`.

    places: files and folders of this machine, of which no word may leave, that the run just finished has read.
    """

    name: str
    revision: str = "main"
    private: bool = False
    report: Path | None = None
    dry_run: bool = False
    yes: bool = False
    places: tuple[str, ...] = ()


@dataclass(frozen=True)
class PushReport:
    """What was pushed, or would be. files: path -> bytes. commit, url: None for a dry run.

    notes: what a user should know; ask: what a push needs --yes for; removed: files of another model's weights.
    """

    folder: Path
    asked: Asked
    licence: str
    files: dict[str, int]
    notes: tuple[str, ...]
    ask: tuple[str, ...]
    commit: str | None = None
    url: str | None = None
    removed: tuple[str, ...] = ()
    ok: bool = field(default=True, init=False)

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON-ready values."""
        asked = {key: value for key, value in vars(self.asked).items() if key not in ("report", "yes", "places")}
        rest = {key: value for key, value in vars(self).items() if key not in ("folder", "asked")}
        return {"folder": str(self.folder), **asked, "bytes": sum(self.files.values()), **rest}

    def lines(self) -> list[str]:
        """The report for a person."""
        total = sum(self.files.values())
        where = f"{self.asked.name}, {self.asked.revision}{', private' if self.asked.private else ''}"
        if self.asked.dry_run:
            found = [f"{count:>15,}  {path}" for path, count in self.files.items()]
            found += [f"{total:>15,}  bytes would go to {where}; nothing was sent"]
        else:
            found = [f"{self.folder} -> {where}", f"sent        {len(self.files)} files, {size(total)}, in one commit"]
            found += [f"commit      {self.commit}", f"see         {self.url}"]
        found.append(f"licence     {self.licence}")
        found += [f"removed     {path}" for path in self.removed]
        found += [f"note        {note}" for note in self.notes]
        return found + [f"needs --yes {line}" for line in self.ask if self.asked.dry_run]


def check(name: str, revision: str) -> None:
    """What can be refused before a run whose result will be pushed: the name, and that a token is there."""
    check_name(name)
    check_branch(revision)
    check_token()


def check_licence(source: str, *, yes: bool) -> None:
    """Refuse, before a run, a model whose licence will want a --yes at its end; its weights don't come for that."""
    licence = licence_of(resolve(source, stream=True).folder)
    if licence.bound and not yes:
        raise HubError(
            f"{source}: nothing was begun: the original's licence is {licence}: {licence.bound}; look, and give --yes "
            "with --push if the result may be published, or leave --push out"
        )


def pushed(folder: Path, name: str, *, private: bool, yes: bool, places: tuple[str, ...], progress: Progress) -> Pushed:
    """Publish what a run has just finished; a failure is told, not raised."""
    try:
        report = push(folder, Asked(name, private=private, yes=yes, places=places), progress)
    except LlmshrinkError as error:
        return Pushed(name, None, str(error))
    return Pushed(name, report.url, None)


def push(folder: Path, asked: Asked, progress: Progress) -> PushReport:
    """Publish `folder`, an output of llmshrink. Raises LlmshrinkError for what is in the way."""
    check_name(asked.name)
    check_branch(asked.revision)
    if not asked.dry_run:
        check_token()
    record, licence = read_record(folder), licence_of(folder)
    found = _with_card(contents(folder, record), folder, record, asked)
    check_card(folder, found)
    check_leaks(folder, found, asked.places)
    report = PushReport(
        folder=folder,
        asked=asked,
        licence=str(licence),
        files={item.path: item.size for item in found.items},
        notes=(*found.notes, *([licence.warning] if licence.warning else [])),
        ask=(*found.ask, *([f"the original's licence is {licence}: {licence.bound}"] if licence.bound else [])),
    )
    if asked.dry_run:
        return report
    _check_asked(folder, report.ask, asked.yes)
    target = Target(asked.name, asked.revision, asked.private or None)
    made = upload(target, found.items, _message(record), replace=asked.yes, progress=progress)
    settle(folder, found)
    return replace(report, commit=made.commit, url=made.url, removed=made.removed)


def _with_card(found: Contents, folder: Path, record: dict[str, Any], asked: Asked) -> Contents:
    """The card under the name that it is published as, with what was evaluated; a card that was edited stays."""
    evaluation = None if asked.report is None else evaluation_of(asked.report, folder, record["model"])
    more = beyond(folder)
    if more is None:
        if evaluation is None:
            return replace(found, notes=(*found.notes, "README.md was edited, and goes as it is"))
        found = replace(found, ask=(*found.ask, "README.md was edited, and --report writes it anew"))
    return with_card(found, card(folder, name=asked.name, evaluation=evaluation, seal=found.seal) + (more or ""))


def _check_asked(folder: Path, ask: Sequence[str], yes: bool) -> None:
    if ask and not yes:
        raise HubError(
            f"{folder}: nothing was sent: {'; '.join(ask)}; look, and push with --yes if it may be published"
        )


def _message(record: dict[str, Any]) -> str:
    return f"{record['model']}, {record['recipe']}, by llmshrink {record['identity']['versions']['llmshrink']}"
