"""Python processes of ours: how each is started, and how it ends when whoever started it does.

A child is given `-P`, and `PYTHONSAFEPATH` for what it starts in turn: otherwise the current folder comes first among
the places where it looks for modules, and a `torch.py` that lies there, or came with a model, would run.

A child whose parent is killed reads the end of its standard input, which is a pipe that the parent alone holds open
(`end_with_input`). That holds for `kill -9` too, when the parent can't say anything.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path


def python(module: str, *words: str) -> list[str]:
    """The command that runs a module with this Python, nothing of the current folder among what it imports."""
    return [sys.executable, "-P", "-m", module, *words]


def isolated(environment: Mapping[str, str]) -> dict[str, str]:
    """An environment in which Python processes that a child starts leave the current folder out too."""
    return {**environment, "PYTHONSAFEPATH": "1"}


def ours(more: Mapping[str, str]) -> dict[str, str]:
    """The environment of a child that runs a module of ours: this process's, `more`, and where it finds them."""
    return isolated({**os.environ, **more, "PYTHONPATH": import_path()})


def import_path() -> str:
    """For another process of ours: where this package was found comes first, installed or not, and what this process
    can import the other can."""
    here = os.fspath(Path(__file__).parents[2])
    return os.pathsep.join(dict.fromkeys([here, *filter(None, sys.path)]))


def end_with_input(heard: Callable[[bytes], None] | None = None) -> None:
    """Watch the standard input from now on: at its end, end this process and all that it started.

    heard: gets each line before. The process must lead a group of its own (`start_new_session`).
    """

    def listen() -> None:
        for line in sys.stdin.buffer:
            if heard is not None:
                heard(line)
        os.killpg(os.getpgrp(), signal.SIGKILL)

    threading.Thread(target=listen, daemon=True).start()
