"""What an evaluation says while it works; whoever runs it shows it."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """The evaluation tells. A part is a stretch of work on one model, and takes the place of the one before."""

    def part(self, label: str) -> None: ...
    def step(self, done: int, total: int, state: str = "") -> None: ...
    def note(self, line: str) -> None: ...


class Silent:
    """Says nothing."""

    def part(self, label: str) -> None: ...
    def step(self, done: int, total: int, state: str = "") -> None: ...
    def note(self, line: str) -> None: ...
