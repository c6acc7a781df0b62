"""How an evaluation is watched while it runs, and what of it goes to the screen at its end."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmshrink.cli.stopping import say_last

if TYPE_CHECKING:
    import typer
    from llmshrink_eval.progress import Progress
    from llmshrink_eval.results import Results

LINE_SECONDS = 10.0
"""Between two lines of one part, where no bar can move."""


class Lines:
    """One line when a part begins, and again every few seconds, on stderr."""

    def __init__(self) -> None:
        self._label = ""
        self._started = self._said = 0.0

    def part(self, label: str) -> None:
        self._label, self._started = label, time.monotonic()
        self._said = self._started
        self.note(label)

    def step(self, done: int, total: int, state: str = "") -> None:
        now = time.monotonic()
        if now - self._said >= LINE_SECONDS:
            self._said = now
            self.note(f"{self._label}  {self.state(done, total, state)}")

    def state(self, done: int, total: int, state: str) -> str:
        from llmshrink.run.progress import duration, peak_memory

        left = (time.monotonic() - self._started) / max(done, 1) * (total - done)
        facts = [f"{done}/{total}", state, f"memory {peak_memory() / 1e9:.2f} GB", f"left {duration(left)}"]
        return "  ".join(fact for fact in facts if fact)

    def note(self, line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    def close(self) -> None: ...


class Bar(Lines):
    """On a terminal, a bar for the part that runs."""

    def __init__(self) -> None:
        super().__init__()
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn
        from rich.progress import Progress as RichProgress

        self._console = Console(stderr=True)
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[state]}"))
        self._bar = RichProgress(*columns, console=self._console, transient=True)
        self._task: Any = None
        self._bar.start()

    def part(self, label: str) -> None:
        self._label, self._started = label, time.monotonic()
        if self._task is not None:
            self._bar.remove_task(self._task)
        self._task = self._bar.add_task(label, total=None, state="")

    def step(self, done: int, total: int, state: str = "") -> None:
        self._bar.update(self._task, completed=done, total=total, state=self.state(done, total, state))

    def note(self, line: str) -> None:
        self._console.print(line, markup=False, highlight=False)

    def close(self) -> None:
        self._bar.stop()


@contextmanager
def watching(*, json: bool) -> Iterator[Progress]:
    """The progress that suits where we run, closed however the run ends."""
    progress = Bar() if sys.stderr.isatty() and not json else Lines()
    try:
        yield progress
    finally:
        progress.close()


def show_results(results: Results, output: str, *, as_json: bool) -> int:
    """Print what was found; returns the exit code: 1 when a condition of --require isn't met."""
    failed = [each for each in results.requirements if not each.passed]
    if as_json:
        print(results.to_json())
    else:
        print("\n".join(results.summary))
        print(f"report      {Path(output) / 'report.html'}")
    for each in failed:
        value = "not measured" if each.value is None else f"{each.value:.6g}"
        say_last(f"llmshrink: {each.model}: {each.condition} isn't met: {value}")
    return 1 if failed else 0


def command_line(context: typer.Context) -> str:
    """The command as it was given, for the report to say how it was made."""
    return shlex.join(["llmshrink", *context.find_root().obj])
