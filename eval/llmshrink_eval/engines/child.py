"""Python processes of ours: how each is started, and how it ends when whoever started it does.

A child is given `-P`, and `PYTHONSAFEPATH` for what it starts in turn: otherwise the current folder comes first among
the places where it looks for modules, and a `torch.py` that lies there, or came with a model, would run.

All of them are started by `start`, and end with the process that did, and all that they started with them: after a
`kill -9` too, when nobody can say anything any more (`watched`).
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO

from llmshrink_eval.engines import watched


def python(module: str, *words: str) -> list[str]:
    """The command that runs a module with this Python, nothing of the current folder among what it imports."""
    return [sys.executable, "-P", "-m", module, *words]


def isolated(environment: Mapping[str, str]) -> dict[str, str]:
    """An environment in which Python processes that a child starts leave the current folder out too."""
    return {**environment, "PYTHONSAFEPATH": "1"}


def ours(more: Mapping[str, str]) -> dict[str, str]:
    """The environment of a child that runs a module of ours: this process's, `more`, and where it finds them."""
    return isolated({**os.environ, **more, "PYTHONPATH": import_path()})


def start(
    command: Sequence[str],
    environment: Mapping[str, str],
    *,
    stdout: int | IO[bytes],
    stderr: int | IO[bytes] | None = None,
) -> subprocess.Popen[bytes]:
    """Start a command of `python`, in a session of its own; its standard input is a pipe, and ends it when it ends.

    environment: all of it, as `ours` or `isolated` make it. stderr: None is this process's. Raises OSError where the
    system starts no process.
    """
    executable, safe, _, module, *words = command
    assert list(command[:3]) == python("")[:3], "a child of ours is a module that `python` runs"
    return subprocess.Popen(
        [executable, safe, watched.__file__, str(os.getpid()), module, *words],
        env=isolated(environment),
        stdin=subprocess.PIPE,
        stdout=stdout,
        stderr=stderr,
        start_new_session=True,
    )


def end_with_parent() -> None:
    """For a process that was forked and runs nothing else: end when the one that forked it does. Linux only."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(watched.PR_SET_PDEATHSIG, signal.SIGKILL)


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
