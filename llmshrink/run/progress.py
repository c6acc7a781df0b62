"""What a person sees while a run works: the block, its error, memory, and the time left.

On a terminal a bar that moves; anywhere else, and with `--json`, plain lines on stderr, one a block.
"""

from __future__ import annotations

import resource
import sys
import time
from types import TracebackType
from typing import Any, Protocol


class Progress(Protocol):
    """The run tells, an implementation shows. A block's state is its error, relative: ||(W - Q) X||^2 / ||W X||^2 over
    its sites; or a word."""

    def begin(self, blocks: int, kept: int) -> None: ...
    def block(self, number: int, state: float | str) -> None: ...
    def note(self, line: str) -> None: ...
    def close(self) -> None: ...


def peak_memory() -> int:
    """Bytes: the largest resident size of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def duration(seconds: float) -> str:
    """Seconds as m:ss or h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def size(count: int) -> str:
    """Bytes for people, in powers of 1000."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            return f"{count / factor:.2f} {unit}"
    return f"{count} B"


class Silent:
    """The Python twin's default: says nothing."""

    def begin(self, blocks: int, kept: int) -> None: ...
    def block(self, number: int, state: float | str) -> None: ...
    def note(self, line: str) -> None: ...
    def close(self) -> None: ...


class PlainLines:
    """One line a block, on stderr."""

    def __init__(self) -> None:
        self._blocks = 0
        self._first = 0
        self._started = time.monotonic()

    def begin(self, blocks: int, kept: int) -> None:
        self._blocks, self._first, self._started = blocks, kept, time.monotonic()
        if kept:
            self.note(f"resumed: {kept} of {blocks} blocks were finished and verified, {blocks - kept} to go")

    def block(self, number: int, state: float | str) -> None:
        self.note(f"block {number + 1}/{self._blocks}  {self._state(number, state)}")

    def _state(self, number: int, state: float | str) -> str:
        done = number + 1 - self._first
        elapsed = time.monotonic() - self._started
        left = elapsed / max(done, 1) * (self._blocks - number - 1)
        shown = state if isinstance(state, str) else f"error {state:.5f}"
        return f"{shown}  memory {peak_memory() / 1e9:.2f} GB  left {duration(left)}"

    def note(self, line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    def close(self) -> None: ...


class Bar(PlainLines):
    """A bar on a terminal, with the same facts."""

    def __init__(self) -> None:
        super().__init__()
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn
        from rich.progress import Progress as RichProgress

        self._console = Console(stderr=True)
        self._bar = RichProgress(
            TextColumn("block {task.completed:.0f}/{task.total:.0f}"),
            BarColumn(),
            TextColumn("{task.fields[state]}"),
            console=self._console,
        )
        self._task: Any = None

    def begin(self, blocks: int, kept: int) -> None:
        super().begin(blocks, kept)
        self._task = self._bar.add_task("", total=blocks, completed=kept, state="")
        self._bar.start()

    def block(self, number: int, state: float | str) -> None:
        self._bar.update(self._task, completed=number + 1, state=self._state(number, state))

    def note(self, line: str) -> None:
        self._console.print(line, markup=False, highlight=False)

    def close(self) -> None:
        self._bar.stop()


class Shown:
    """Context manager: the progress that suits where we run, closed at the end however the run ends."""

    def __init__(self, *, json: bool) -> None:
        self.progress: Progress = Bar() if sys.stderr.isatty() and not json else PlainLines()

    def __enter__(self) -> Progress:
        return self.progress

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.progress.close()
