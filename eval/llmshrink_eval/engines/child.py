"""Python processes of ours: how each is started, and how it ends when whoever started it does.

A child is given `-P`, and `PYTHONSAFEPATH` for what it starts in turn: otherwise the current folder comes first among
the places where it looks for modules, and a `torch.py` that lies there, or came with a model, would run.

All of them are started by `start`, and end with the process that did, and all that they started with them: after a
`kill -9` too, when nobody can say anything any more (`watched`).
"""

from __future__ import annotations

import atexit
import ctypes
import json
import os
import resource
import select
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from llmshrink_eval.engines import watched
from llmshrink_eval.errors import EvalFailed
from llmshrink_eval.refused import NotStarted

LOOK_SECONDS = 1.0
"""Between two looks at a child that hasn't answered."""
ATTEMPTS = 2
"""What ended a child may have been somebody else, who is out of memory; and may have been what it was asked."""
_LIMITS = resource.getrlimit(resource.RLIMIT_AS)
"""Of this process's memory, as it was started."""


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
    bufsize: int = -1,
) -> subprocess.Popen[bytes]:
    """Start a command of `python`, in a session of its own; its standard input is a pipe, and ends it when it ends.

    environment: all of it, as `ours` or `isolated` make it. stderr: None is this process's. bufsize: as Popen
    takes it. Raises NotStarted where the system starts no process.
    """
    executable, safe, _, module, *words = command
    assert list(command[:3]) == python("")[:3], "a child of ours is a module that `python` runs"
    try:
        return subprocess.Popen(
            [executable, safe, watched.__file__, str(os.getpid()), module, *words],
            env=isolated(environment),
            stdin=subprocess.PIPE,
            stdout=stdout,
            stderr=stderr,
            bufsize=bufsize,
            start_new_session=True,
        )
    except OSError as error:
        raise NotStarted(error, module) from error


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


class Answering:
    """A module of ours in a process of its own, which answers each line of its standard input with one of its output.

    It leads a group of its own, so that Ctrl-C is this process's to deal with. Close it: `end`, or `forget` in a fork.
    """

    def __init__(self, module: str) -> None:
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 (closed with the process)
        try:
            # Nothing is buffered here: a fork would write again what waits.
            self._process = start(python(module), ours({}), stdout=subprocess.PIPE, stderr=self._log, bufsize=0)
        except BaseException:
            self._log.close()
            raise
        assert self._process.stdin is not None and self._process.stdout is not None
        self._input, self._output = self._process.stdin, self._process.stdout
        os.set_blocking(self._input.fileno(), False)

    @property
    def pid(self) -> int:
        """Its number among the system's processes."""
        return self._process.pid

    @property
    def ended(self) -> bool:
        """Whether it has, by itself or by somebody else."""
        return self._process.poll() is not None

    def ask(self, line: bytes, seconds: float | None = None) -> bytes | None:
        """Its answer to a line that ends with the sign for that; None: it ended without one.

        seconds: to wait, None for ever. Those in which this process didn't run, as in a machine that sleeps, don't
        count. Raises TimeoutError: the answer would come to the next question, so `end` it.
        """
        waiting = select.poll()
        waiting.register(self._output, select.POLLIN)
        waiting.register(self._input, select.POLLOUT)
        left, pieces, waited = memoryview(line), list[bytes](), 0.0
        while True:
            events = waiting.poll(LOOK_SECONDS * 1000)
            if not events:
                waited += LOOK_SECONDS
                if seconds is not None and waited >= seconds:
                    raise TimeoutError(f"no answer within {seconds:g} s")
            for number, _ in events:
                if number == self._output.fileno():
                    piece = os.read(number, 1 << 20)
                    pieces.append(piece)
                    if not piece:
                        return None
                    if piece.endswith(b"\n"):
                        return b"".join(pieces)
                    continue
                try:
                    left = left[os.write(number, left[: 1 << 20]) :]
                except BrokenPipeError:  # it has ended, which the output tells
                    left = left[:0]
                if not left:
                    waiting.unregister(number)

    def end(self) -> int:
        """Kill it where it still runs, and what it started; its status, which is that of before where it had ended."""
        if self._process.poll() is None:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, signal.SIGKILL)
        status = self._process.wait()
        self._input.close()
        self._output.close()
        self._log.close()
        return status

    def wait(self) -> int:
        """Its status, of one that has closed its output."""
        return self._process.wait()

    def forget(self) -> None:
        """In a fork: it is the parent's, so what leads to it is closed here."""
        self._process.returncode = 0  # else Python says that it is left running
        for each in (self._input, self._output, self._log):
            each.close()

    def last(self) -> str:
        """The last line that it wrote to its standard error, cut to 600 characters."""
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "it printed nothing")[:600]


class Ended(Exception):
    """A signal ended a child at its work: `number`, and its name as text."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


class Kept:
    """An `Answering` of this process's own: started at first use, started again where it ended, and gone with it.

    Asked by any thread, one question at a time; a fork has one of its own. what: it is, in messages. final: signals
    that its work ends it with, for which nothing is asked again.
    """

    def __init__(self, module: str, what: str, *, final: Collection[int] = ()) -> None:
        self._module, self._what, self._final = module, what, final
        self._lock = threading.Lock()
        self._child: Answering | None = None
        atexit.register(self.close)
        os.register_at_fork(after_in_child=self._forget)

    def answer(self, line: bytes, seconds: float | None = None) -> bytes:
        """To a line, as `Answering.ask` does. Raises TimeoutError, Ended, or EvalFailed where it can't work at all."""
        with self._lock:
            try:
                return self._answer(line, seconds)
            except BaseException:  # interrupted, it may be: nobody will read what is being made
                self._end()
                raise

    def close(self) -> None:
        """End it; the next question starts it again."""
        with self._lock:
            self._end()

    def _answer(self, line: bytes, seconds: float | None) -> bytes:
        status = 0
        for _ in range(ATTEMPTS):
            child = self._started()
            said = child.ask(line, seconds)
            if said is not None:
                return said
            status = child.wait()
            if status >= 0:
                raise EvalFailed(f"the process that {self._what} ended with status {status}: {child.last()}")
            if -status in self._final:
                break
        raise Ended(-status)

    def _started(self) -> Answering:
        if self._child is None or self._child.ended:
            self._end()
            self._child = Answering(self._module)
        return self._child

    def _end(self) -> None:
        if self._child is not None:
            self._child.end()
            self._child = None

    def _forget(self) -> None:
        """In a fork: the child is the parent's, whose threads aren't here to let go of the lock."""
        self._lock = threading.Lock()
        if self._child is not None:
            self._child.forget()
            self._child = None


def encode(value: Any, default: Callable[[Any], Any] | None = None) -> bytes:
    """JSON on a line, in which halves of surrogate pairs stay what they are. default: as json.dumps takes it."""
    return json.dumps(value, ensure_ascii=False, default=default).encode("utf-8", "surrogatepass") + b"\n"


def decode(line: bytes) -> Any:
    """What `encode` made a line of."""
    return json.loads(line.decode("utf-8", "surrogatepass"))


def bound_memory(nbytes: int) -> None:
    """From here on this process may ask for so much more memory; what wants more gets a MemoryError. On Linux alone:
    nothing else tells how much it has."""
    if sys.platform == "linux":
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
        given = [each for each in _LIMITS if each != resource.RLIM_INFINITY]
        limit = min([pages * resource.getpagesize() + nbytes, *given])
        resource.setrlimit(resource.RLIMIT_AS, (limit, _LIMITS[1]))
