"""What the doctor found: facts, problems with their fixes, and remarks; and how they are said."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

SLOW = 1.0
"""Seconds of one check from which on its time is said."""


@dataclass(frozen=True)
class Problem:
    """What is wrong, and the command or the step that mends it."""

    what: str
    fix: str


@dataclass(frozen=True)
class Checked:
    """One check. facts: for programs. line: the same for a person. notes: what is worth knowing and is no problem.

    slow: what took long, where something may.
    """

    name: str
    facts: dict[str, Any]
    line: str
    problems: Sequence[Problem] = ()
    notes: Sequence[str] = ()
    slow: str = ""


@dataclass(frozen=True)
class DoctorReport:
    """All checks in order, with the seconds that each took."""

    checks: Sequence[Checked]
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def problems(self) -> list[Problem]:
        """Those of all checks."""
        return [problem for check in self.checks for problem in check.problems]

    @property
    def ok(self) -> bool:
        """Whether nothing was found that needs mending."""
        return not self.problems

    def to_dict(self) -> dict[str, Any]:
        """What `--json` prints."""
        checks = {
            check.name: {
                **check.facts,
                "problems": [asdict(problem) for problem in check.problems],
                "notes": list(check.notes),
                "seconds": round(self.seconds.get(check.name, 0.0), 3),
            }
            for check in self.checks
        }
        return {"ok": self.ok, "problems": [asdict(problem) for problem in self.problems], "checks": checks}

    def lines(self) -> list[str]:
        """A line for each check, its remarks below, and the problems last, where the eye ends."""
        said: list[str] = []
        for check in self.checks:
            said += [_row(check.name, check.line), *(_row("", note) for note in check.notes)]
            if self.seconds.get(check.name, 0.0) >= SLOW:
                said.append(_row("", f"{check.slow or 'this'} took {self.seconds[check.name]:.1f} s"))
        for problem in self.problems:
            said += [_row("problem", problem.what), _row("fix", problem.fix)]
        count = len(self.problems)
        found = "nothing to mend" if not count else f"{count} problem{'s' if count > 1 else ''} found"
        return [*said, f"{found} ({sum(self.seconds.values()):.1f} s)"]


def _row(name: str, text: str) -> str:
    return f"{name:11} {text}"
