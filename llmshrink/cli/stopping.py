"""How a command ends before its time: Ctrl-C, SIGTERM (a scheduler's), a reader that leaves; and what is said then.

Nothing heavy is imported here: an import may be what was interrupted.
"""

from __future__ import annotations

import os
import select
import shlex
import signal
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from types import FrameType
from typing import IO, Any, Self

PROGRAM = "llmshrink"
INTERRUPTED = 128 + signal.SIGINT
TERMINATED = 128 + signal.SIGTERM
BESIDE = (
    *(".partial", "/.llmshrink.partial"),
    *(".student", ".student.partial", "/.llmshrink.student", "/.llmshrink.student.partial"),
)
"""What a run that has begun has beside its output or in it, its name with these endings; what gives them imports
torch."""
KEPT = {
    "quantize": "every finished block",
    "prune": "every finished block",
    "compress": "every finished block",
    "convert": "every finished file",
    "distill": "what was finished",
    "eval": "what was measured",
    "compare": "what was measured",
    "push": "what was uploaded",
}
"""Verb -> what the same command goes on from."""
MEASURING = ("eval", "compare")
ANEW = ("plan", "verify")
"""Verbs that take their time and write nothing; so does any with --dry-run."""
NOTHING = "nothing was written: start it again with the same command"


class Signals:
    """While open, SIGINT and SIGTERM raise KeyboardInterrupt; `exit_code` remembers which it was, None: neither.

    A library that is being imported may swallow the exception, and fail of what it left half-done.
    """

    def __init__(self) -> None:
        self.exit_code: int | None = None
        self._process = os.getpid()
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        # A handler can be set in the main thread only; one that isn't Python's own is the caller's business.
        if threading.current_thread() is threading.main_thread():
            for number, own in ((signal.SIGINT, signal.default_int_handler), (signal.SIGTERM, signal.SIG_DFL)):
                if signal.getsignal(number) is own:
                    self._before[number] = signal.signal(number, self._stop)
        return self

    def __exit__(self, *exc: object) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)

    def ignore(self) -> None:
        """From here on neither does anything: what is said last is said whole."""
        for number in self._before:
            signal.signal(number, signal.SIG_IGN)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a fork of ours: it dies of the signal, as its parent expects
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.exit_code = 128 + number
        raise KeyboardInterrupt


def leave_with(code: int) -> None:
    """From here on SIGINT and SIGTERM end the process with `code`: what it was asked is done, and Python cleans up."""

    def leave(number: int, frame: FrameType | None) -> None:
        os._exit(code)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, leave)


def say_stopped(arguments: Sequence[str], code: int) -> int:
    """Say on stderr that a command line was stopped, and how it goes on; returns the exit code, which is `code`."""
    line = f"{PROGRAM}: {'terminated' if code == TERMINATED else 'interrupted'}"
    found = goes_on(arguments)
    if found is not None:
        line += f"; {found.said}:\n  {shlex.join([PROGRAM, *found.words])}"
    say_last(line)
    return code


def say_last(line: str) -> None:
    """A line on stderr before the command ends, whose exit code stays what it is where stderr takes no more."""
    try:
        print(line, file=sys.stderr, flush=True)
    except OSError:
        silence(sys.stderr)


def silence(stream: IO[str]) -> None:
    """Have a stream that can't be written go nowhere, or Python complains again while it shuts down."""
    with suppress(OSError, ValueError):  # nothing can be opened, or it is no real file
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


@dataclass(frozen=True)
class GoesOn:
    """What there is to go on from, in words, and the command (without the program's name) that does. kept: whether
    there is anything, or it begins anew."""

    said: str
    words: Sequence[str]
    kept: bool


def goes_on(arguments: Sequence[str]) -> GoesOn | None:
    """What becomes of a command line that was stopped; None when there is nothing to say."""
    verb = arguments[0] if arguments else ""
    kept = KEPT.get(verb)
    given = _given(arguments) if kept is not None else {}
    if verb in ANEW or given.get("dry_run"):
        return GoesOn(NOTHING, arguments, False)
    if kept is None:
        return None
    if verb in MEASURING and not _measured():
        return GoesOn(NOTHING, arguments, False)
    if verb not in (*MEASURING, "push"):
        output = _written(str(given["output"])) if given.get("output") else None
        # With --overwrite it may be an older output that is there.
        made = (
            output
            and os.path.isdir(output)
            and not any(os.path.isdir(output + ending) for ending in BESIDE[:2])
            and not given.get("overwrite")
        )
        if made and given.get("push"):
            also = [f"--{name}" for name in ("private", "yes") if given.get(name)]
            words = ["push", str(given["output"]), str(given["push"]), *also]
            return GoesOn("the output is whole, publish it with", words, True)
        if not (output and any(os.path.isdir(output + ending) for ending in BESIDE)):
            models = [os.path.expanduser(str(given.get(name) or "demo")) for name in ("model", "teacher", "student")]
            if all(model == "demo" or os.path.exists(model) for model in models):
                return GoesOn(NOTHING, arguments, False) if output and not os.path.exists(output) else None
            kept = "what was downloaded"
    return GoesOn(f"{kept} is kept: go on from there with the same command", arguments, True)


def _measured() -> bool:
    """Whether this process has kept a measurement. What keeps them may not be imported yet: then it hasn't."""
    cache = sys.modules.get("llmshrink_eval.cache")
    try:
        return cache is not None and bool(cache.kept_here())
    except (OSError, AttributeError):  # a disk that fails; an import that was interrupted
        return False


def _written(output: str) -> str:
    """The folder that an output means."""
    folder = os.path.abspath(os.path.expanduser(output))
    return os.path.realpath(folder) if os.path.islink(folder) else folder


def _given(arguments: Sequence[str]) -> dict[str, object]:
    """A verb's arguments and options by name; nothing for a line that can't be read."""
    import typer

    from llmshrink.cli.app import command

    try:
        context = command().commands[arguments[0]].make_context(arguments[0], list(arguments[1:]))
    except Exception as error:
        if not isinstance(error, typer.Exit | usage_error()):
            raise
        return {}
    return dict(context.params)


def usage_error() -> type[BaseException]:
    """The parent of every error that the parser raises; Typer names only its child BadParameter in public."""
    import typer

    parent = typer.BadParameter.__base__
    assert parent is not None
    return parent


def reader_left() -> bool:
    """Whether what reads this process's output (`| head`) is gone; if so, nothing is written there any more.

    A broken pipe to another process, as an engine that died, is no such thing.
    """
    gone = [stream for stream in (sys.stdout, sys.stderr) if _broken(stream)]
    for stream in gone:
        silence(stream)
    return bool(gone)


def _broken(stream: IO[str]) -> bool:
    """Whether a stream is a pipe without a reader."""
    try:
        poll = select.poll()
        poll.register(stream.fileno(), 0)
        return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))
    except (OSError, ValueError):  # not a real file
        return False
