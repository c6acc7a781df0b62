"""What was measured, as a table to read, as markdown for the README, and as JSON.

A row that another state of the code measured is shown only where that is asked for, marked with its commit; one that
couldn't be measured is named with the reason.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.real import kept, source
from benchmarks.real.judge import TOKENS, WINDOW
from benchmarks.real.measuring import Inputs, cpu
from benchmarks.real.rows import GROUPS, OURS, SAMPLES, SEQ_LEN, Row
from benchmarks.real.store import Place

BEGIN, END = "<!-- real: begin, by `python -m benchmarks.real table --readme README.md` -->", "<!-- real: end -->"
SOURCE_GRID = "source grid"
NEVER = "not measured yet"


@dataclass(frozen=True)
class Line:
    """A row with what is known of it. older: measured by other code. reason: why there are no figures."""

    row: Row
    figures: dict[str, Any] | None
    older: bool = False
    reason: str | None = None

    def marks(self, usual: str | None = None, machine: str | None = None) -> str:
        """What has to be said beside its figures. usual, machine: the commit, the machine that is said of the whole
        table: seconds on another don't compare."""
        said = [SOURCE_GRID] if self.row.source_grid else []
        if self.figures is not None:
            known = self.figures["commit"] == usual if self.row.tool == OURS else not self.older
            said += [] if known or not (self.older or usual) else [f"at {self.figures['commit']}"]
            said += [f"on {self.figures['machine']}"] if machine not in (None, self.figures["machine"]) else []
            said += [] if self.figures["cpu_whole"] else ["killed once: more CPU seconds than these"]
        return "; ".join(said)


def place_of(row: Row, given: Inputs, *, keep: bool) -> Place:
    """Where the row's figures are: of this code, or with `keep`, where there are none, of other code."""
    place = given.place(row)
    older = place.older() if keep and place.result() is None else None
    return place if older is None else older


def lines(rows: Sequence[Row], given: Inputs, *, keep: bool) -> list[Line]:
    """The rows, in the order of the groups: as filed here, else as the repository keeps them."""
    found = []
    for row in sorted(rows, key=lambda row: GROUPS.index(row.group)):
        place, here = place_of(row, given, keep=keep), given.place(row)
        figures, other = place.result(), place != here
        reason = None
        if figures is None and (figures := kept.find(row)) is not None:
            other = figures["code"] != given.code(row)
        if figures is None:
            failure, older = here.failure(), here.older()
            known = None if older is None else older.result()
            reason = NEVER if known is None else f"measured with other code ({known['commit']}); --keep shows it"
            reason = reason if failure is None else str(failure["reason"])
        found.append(Line(row, figures, other, reason))
    return found


def usual_commit(found: Sequence[Line]) -> str | None:
    """The commit of most of our rows, where it isn't this code's: said once, and not beside each."""
    ours = [line for line in found if line.row.tool == OURS and line.figures is not None]
    commits = Counter(str(line.figures["commit"]) for line in ours if line.figures is not None and line.older)
    commit, count = commits.most_common(1)[0] if commits else ("", 0)
    return commit if 2 * count > len(ours) else None


def usual_machine(found: Sequence[Line]) -> str | None:
    """Where most rows were measured."""
    machines = Counter(str(line.figures["machine"]) for line in found if line.figures is not None)
    return machines.most_common(1)[0][0] if machines else None


def original_perplexity(found: Sequence[Line]) -> float | None:
    """As the judging of any row had it: it is the same pass."""
    return next((line.figures["original_perplexity"] for line in found if line.figures is not None), None)


def text(found: Sequence[Line]) -> str:
    """For a terminal."""
    perplexity = original_perplexity(found)
    machine = usual_machine(found)
    told = [f"{'':34} {'KL':>8} {'+-':>7} {'perpl.':>8} {'CPU s':>6} {'GB':>5}  {'load':>4}"]
    told += [f"{'original':34} {'':>8} {'':>7} {perplexity:8.2f}"] if perplexity is not None else []
    for group, members in _grouped(found):
        told.append(group)
        for line in members:
            figures = line.figures
            if figures is None:
                told.append(f"  {line.row.name:32} {_why(line)}")
                continue
            load, marks = max(figures["load"], default=0.0), line.marks(machine=machine)
            told.append(
                f"  {line.row.name:32} {figures['kl']:8.4f} {figures['kl_stderr']:7.4f} {figures['perplexity']:8.2f}"
                f" {figures['cpu_seconds']:6.0f} {figures['peak_bytes'] / 1e9:5.2f}  {load:4.1f}  {marks}".rstrip()
            )
    return "\n".join([*told, "", *_said(found)])


def markdown(found: Sequence[Line]) -> str:
    """For the README, without its markers."""
    told = ["| | what | KL | perplexity | CPU s | peak GB |", "|---|---|---|---|---|---|"]
    perplexity, usual = original_perplexity(found), usual_commit(found)
    machine = usual_machine(found)
    told += [] if perplexity is None else [f"| original | bfloat16 | 0 | {perplexity:.2f} | | |"]
    for group, members in _grouped([line for line in found if line.figures is not None]):
        told.append(f"| **{group}** | | | | | |")
        for line in members:
            figures = line.figures or {}
            name = f"`{line.row.name}`" if line.row.tool == OURS and "," not in line.row.name else line.row.name
            said = line.marks(usual, machine)
            marks = f" ({said})" if said else ""
            told.append(
                f"| {name}{marks} | {line.row.what} | {figures['kl']:.4f} | {figures['perplexity']:.2f}"
                f" | {figures['cpu_seconds']:.0f} | {figures['peak_bytes'] / 1e9:.2f} |"
            )
    return "\n".join([*told, "", " ".join(_said(found)), *_absent(found)])


def _why(line: Line) -> str:
    return NEVER if line.reason == NEVER else f"not measured: {line.reason}"


def _grouped(found: Sequence[Line]) -> Iterator[tuple[str, list[Line]]]:
    for group in GROUPS:
        members = [line for line in found if line.row.group == group]
        if members:
            yield group, members


def _said(found: Sequence[Line]) -> list[str]:
    """What belongs under the table, a sentence each."""
    measured = [line.figures for line in found if line.figures is not None]
    dates = sorted(str(figures["date"])[:10] for figures in measured)
    told = [
        f"{source.NAME} (135 M parameters), calibrated on {SAMPLES} x {SEQ_LEN} tokens in float32 on one thread; KL in"
        f" nats/token over the {TOKENS // WINDOW * WINDOW:,} first tokens of WikiText-2's test text in windows of"
        f" {WINDOW}; CPU seconds and peak memory of the whole process.",
        source.GRID,
    ]
    if any(line.row.source_grid for line in found):
        told.append(f"Rows marked '{SOURCE_GRID}' nearly reproduce that grid and decide nothing.")
    if dates:
        when = dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"
        told.append(
            f"Measured {when} on {usual_machine(found)}, unless a row says where: `make real`, `make real-peers`."
        )
    usual = usual_commit(found)
    if usual is not None:
        told.append(f"Our rows are of commit {usual}, unless one names another.")
    return told


def _absent(found: Sequence[Line]) -> list[str]:
    """The rows without figures, where that has a reason: without what a log said last, which may name places here."""
    reasons = {line.row.name: line.reason for line in found if line.figures is None}
    told = [
        f"{name}: {reason.partition(': ')[0]}"
        for name, reason in reasons.items()
        if reason is not None and reason != NEVER
    ]
    return ["", f"Not measured: {'; '.join(told)}."] if told else []


def document(found: Sequence[Line]) -> dict[str, Any]:
    """All of it, as plain data."""
    return {
        "model": source.NAME,
        "source": source.checksum(),
        "note": source.GRID,
        "machine": cpu(),
        "original_perplexity": original_perplexity(found),
        "rows": [
            {
                "name": line.row.name,
                "group": line.row.group,
                "tool": line.row.tool,
                "what": line.row.what,
                "source_grid": line.row.source_grid,
                "older": line.older,
                "not_measured": line.reason,
                "figures": line.figures,
            }
            for line in found
        ],
    }


def fill(page: Path, made: str, begin: str = BEGIN, end: str = END) -> None:
    """Put a table between the markers of a page. Raises ValueError where they aren't, each once and in order."""
    whole = page.read_text(encoding="utf-8")
    if whole.count(begin) != 1 or whole.count(end) != 1 or whole.index(begin) > whole.index(end):
        raise ValueError(f"{page}: needs the line {begin} and, after it, {end}, each once")
    between = re.compile(f"{re.escape(begin)}.*{re.escape(end)}", re.DOTALL)
    page.write_text(between.sub(lambda _: f"{begin}\n{made}\n{end}", whole), encoding="utf-8")
