"""`push`: everything is checked here first, then sent, then held to what the Hub says it has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmshrink.hub import upload
from llmshrink.hub.client import HubError, check_branch, check_name, check_token
from llmshrink.hub.folder import check_leaks, contents
from llmshrink.hub.upload import Target
from llmshrink.run.progress import Progress, size
from llmshrink.run.verify import read_record


@dataclass(frozen=True)
class PushReport:
    """What was pushed, or would be. files: path -> bytes. commit, url: None for a dry run.

    notes: what a user should know; ask: what a push needs --yes for.
    """

    folder: Path
    name: str
    revision: str
    private: bool
    dry_run: bool
    licence: str | None
    files: dict[str, int]
    notes: tuple[str, ...]
    ask: tuple[str, ...]
    commit: str | None = None
    url: str | None = None
    removed: tuple[str, ...] = ()

    ok = True

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON-ready values."""
        shown = {key: value for key, value in vars(self).items() if key != "folder"}
        return {"folder": str(self.folder), "bytes": sum(self.files.values()), **shown, "ok": self.ok}

    def lines(self) -> list[str]:
        """The report for a person."""
        total = sum(self.files.values())
        where = f"{self.name}, {self.revision}{', private' if self.private else ''}"
        found = []
        if self.dry_run:
            found += [f"{count:>15,}  {path}" for path, count in self.files.items()]
            found += [f"{total:>15,}  bytes would go to {where}; nothing was sent"]
        else:
            found += [f"{self.folder} -> {where}", f"sent        {len(self.files)} files, {size(total)}, in one commit"]
            found += [f"commit      {self.commit}", f"see         {self.url}"]
        found += [f"licence     {self.licence or 'unknown'}"]
        found += [f"removed     {path}" for path in self.removed]
        found += [f"note        {note}" for note in self.notes]
        return found + [f"needs --yes {line}" for line in self.ask if self.dry_run]


def check(name: str, revision: str) -> None:
    """What can be refused before a run whose result will be pushed: the name, and that a token is there."""
    check_name(name)
    check_branch(revision)
    check_token()


def push(
    folder: Path,
    name: str,
    *,
    private: bool,
    revision: str,
    dry_run: bool,
    yes: bool,
    progress: Progress,
) -> PushReport:
    """Publish `folder`, an output of llmshrink, as `name`. Raises LlmshrinkError for what is in the way."""
    check_name(name)
    check_branch(revision)
    if not dry_run:
        check_token()
    record = read_record(folder)
    found = contents(folder, record)
    check_leaks(folder, found, _token())
    report = PushReport(
        folder=folder,
        name=name,
        revision=revision,
        private=private,
        dry_run=dry_run,
        licence=None,
        files={item.path: item.size for item in found.items},
        notes=found.notes,
        ask=found.ask,
    )
    if dry_run:
        return report
    _check_asked(folder, found.ask, yes)
    made = upload.upload(
        Target(name, revision, private or None), found.items, _message(record), replace=yes, progress=progress
    )
    return PushReport(**{**vars(report), "commit": made.commit, "url": made.url, "removed": made.removed})


def _check_asked(folder: Path, ask: Sequence[str], yes: bool) -> None:
    if ask and not yes:
        raise HubError(f"{folder}: nothing was sent: {'; '.join(ask)}; push with --yes to publish it all the same")


def _token() -> str | None:
    from huggingface_hub import get_token

    return get_token()


def _message(record: dict[str, Any]) -> str:
    return f"{record['model']}, {record['recipe']}, by llmshrink {record['identity']['versions']['llmshrink']}"
