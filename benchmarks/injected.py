"""One command line in a process of its own, with a fault in it: a call that fails, a kill, a limit of the system's.

The process is forked, so that nothing is imported again. Calls of `os`, and reads and writes of files that Python
opens, go through ours there, for files below one folder; nothing else is touched.
"""

from __future__ import annotations

import builtins
import ctypes
import errno
import io
import json
import os
import re
import resource
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

CALLS = (
    *("open", "read", "pread", "preadv", "write", "pwrite", "fsync", "replace", "rename", "link", "mkdir", "unlink"),
    *("remove", "rmdir", "listdir", "scandir", "stat", "lstat", "fstat", "access", "readlink", "chmod", "fchmod"),
    *("utime", "truncate", "ftruncate"),
)
"""Of `os`, as our code and the standard library's call them; `open` itself, its reads and its writes besides."""
PATIENCE = 120.0
"""Seconds after which a command counts as one that never ends."""
LONGEST_LINE = 700
_ROOT = os.fspath(Path(__file__).parents[1]) + os.sep
_READLINK = os.readlink


@dataclass(frozen=True)
class Site:
    """A place in our code and what it asks for: the call, `file:line`, and the file's path with N for numbers."""

    call: str
    where: str
    file: str

    def __str__(self) -> str:
        """As a line of a report names it."""
        return f"{self.call} of {self.file} at {self.where}"


@dataclass(frozen=True)
class Strike:
    """What happens at the `nth` time, from 0, that a site is come to. error: by name; empty: the process is killed."""

    site: Site
    nth: int
    error: str


@dataclass(frozen=True)
class Limits:
    """What the process may have, each None for no limit: bytes of addresses, bytes of a file, files open beyond those
    that it begins with. full: its standard output goes to a disk that is full."""

    memory: int | None = None
    file: int | None = None
    opened: int | None = None
    full: bool = False


@dataclass(frozen=True)
class Ended:
    """How a command ended. code: its exit code, negative for a signal, None where it never did. sites: as `carried_out`
    says."""

    code: int | None
    said: str
    sites: tuple[Site, ...] = ()

    def complaint(self) -> str:
        """What is wrong with how it ended, whatever its output; empty if nothing."""
        if self.code is None:
            return f"didn't end in {PATIENCE:.0f} s"
        lines = [line for line in self.said.splitlines() if line.startswith("llmshrink: error:")]
        if "Traceback" in self.said or self.code not in (0, 1, 2):
            return f"exit code {self.code}: {self.said.strip().splitlines()[-3:]}"
        if self.code and len(lines) != 1:
            return f"exit code {self.code} with {len(lines)} lines of error: {self.said[-300:]!r}"
        if self.code and len(lines[0]) > LONGEST_LINE:
            return f"a line of {len(lines[0])} characters: {lines[0][:200]}"
        return ""


def strike_at(sites: Sequence[Site], index: int, error: str) -> Strike:
    """At the call of that index among those that a command made."""
    return Strike(sites[index], sites[:index].count(sites[index]), error)


def carried_out(
    command: Sequence[str],
    below: Path,
    strike: Strike | None = None,
    limits: Limits | None = None,
    *,
    look: bool = False,
) -> Ended:
    """Carry out a command in a process forked from this one, with `strike` at a call on files below a folder.

    look: tell the sites of all those calls, in order.
    """
    with tempfile.TemporaryDirectory() as outside:
        log, seen = Path(outside) / "log", Path(outside) / "sites"
        child = os.fork()
        if child == 0:
            _child(command, Injected(below, strike, look=look), log, seen, limits or Limits())
        code = waited_for(child, PATIENCE)
        sites = tuple(Site(*each) for each in json.loads(seen.read_text())) if look else ()
        return Ended(code, log.read_text(errors="replace"), sites)


def _child(command: Sequence[str], injected: Injected, log: Path, seen: Path, limits: Limits) -> None:
    """Carry out the command in this process, which it never leaves."""
    code = 70
    try:
        printing_to(log)
        from llmshrink.cli import run

        torch.set_num_threads(1)
        injected.install()
        _limit(limits)
        code = run(command)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        try:
            sys.stderr.flush()
            sys.stdout.flush()
        except OSError:  # as Python's own end of a process has it
            code = code or 120
        if injected.look:
            seen.write_text(json.dumps([(each.call, each.where, each.file) for each in injected.seen]))
        os._exit(code)


def printing_to(log: Path) -> None:
    """From now on what this process prints goes to a file, whoever forked it and whatever was put in place there."""
    fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o600)
    for stream in (1, 2):
        os.dup2(fd, stream)
    os.close(fd)
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115


def _limit(limits: Limits) -> None:
    if limits.full:
        os.dup2(os.open("/dev/full", os.O_WRONLY), 1)
    if limits.memory is not None:
        resource.setrlimit(resource.RLIMIT_AS, (limits.memory, limits.memory))
    if limits.file is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limits.file, resource.RLIM_INFINITY))
    if limits.opened is not None:
        # The system gives the lowest number that is free, and refuses those from the limit on.
        free = os.open(os.devnull, os.O_RDONLY)
        os.close(free)
        resource.setrlimit(resource.RLIMIT_NOFILE, (free + limits.opened, free + limits.opened))


def waited_for(child: int, seconds: float) -> int | None:
    """A child's exit code, negative for a signal; None where it doesn't end in time, and is killed."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


class Injected:
    """Stands before the calls on files below a folder, and fails the one that is asked for."""

    def __init__(self, below: Path, strike: Strike | None, *, look: bool = False) -> None:
        self.below, self.strike, self.look = os.fspath(below) + os.sep, strike, look
        self.seen: list[Site] = []
        self._counts: Counter[Site] = Counter()

    def install(self) -> None:
        """Put ourselves before the calls, in this process, for good."""
        if self.strike is None and not self.look:
            return
        for name in CALLS:
            setattr(os, name, self._before(name, getattr(os, name)))
        builtins.open = io.open = self._opening(io.open)

    def _before(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any, **named: Any) -> Any:
            self.at(name, given[0] if given else named.get("path"), lambda: real(given[0], _half(given[1])))
            return real(*given, **named)

        return call

    def _opening(self, real: Callable[..., Any]) -> Callable[..., Any]:
        """`open`, whose files come to us before they read and write."""
        injected = self

        class Watched(io.FileIO):
            def readinto(self, buffer: Any, /) -> Any:
                injected.at("read", self.name)
                return super().readinto(buffer)

            def readall(self) -> Any:
                injected.at("read", self.name)
                return super().readall()

            def write(self, data: Any, /) -> Any:
                injected.at("write", self.name, lambda: super(Watched, self).write(_half(data)))
                return super().write(data)

        def opened(file: Any, mode: str = "r", buffering: int = -1, *given: Any, **named: Any) -> Any:
            if injected.path_of(file) is None:
                return real(file, mode, buffering, *given, **named)
            injected.at("open", file)
            kind = mode.replace("b", "").replace("t", "")
            if buffering == 0 or "+" in kind or not isinstance(file, str | os.PathLike):
                return real(file, mode, buffering, *given, **named)
            raw = Watched(os.fspath(file), kind, opener=named.pop("opener", None))
            stream: Any = io.BufferedReader(raw) if kind == "r" else io.BufferedWriter(raw)
            named.pop("closefd", None)
            return stream if "b" in mode else io.TextIOWrapper(stream, *given, **named)

        return opened

    def path_of(self, place: Any) -> str | None:
        """The path below the folder that a call is about, from there; None where it's about anything else."""
        if isinstance(place, bool) or place is None:
            return None
        if isinstance(place, int):
            try:
                place = _READLINK(f"/proc/self/fd/{place}")
            except OSError:
                return None
        try:
            path = os.path.abspath(os.fsdecode(place))
        except (TypeError, ValueError):
            return None
        return path[len(self.below) :] if path.startswith(self.below) else None

    def at(self, name: str, place: Any, half: Callable[[], Any] | None = None) -> None:
        """Note a call that is about to be made, and fail it if it's the one. half: writes half of what it would."""
        path = self.path_of(place)
        if path is None:
            return
        site = Site(name, _caller(), re.sub(r"\d+", "N", re.sub(r"tmp\w{8}", "tmpN", path)))
        if self.look:
            self.seen.append(site)
        if self.strike is None or site != self.strike.site:
            return
        nth, self._counts[site] = self._counts[site], self._counts[site] + 1
        if nth != self.strike.nth:
            return
        if self.strike.error:
            number = getattr(errno, self.strike.error)
            raise OSError(number, os.strerror(number), None if isinstance(place, int) else os.fsdecode(place))
        if name in ("write", "pwrite") and half is not None:
            half()  # half of it reached the disk
        os.kill(os.getpid(), signal.SIGKILL)


def _half(data: Any) -> bytes:
    return bytes(data)[: len(data) // 2]


def _caller() -> str:
    """`file:line` of the innermost of our packages' frames; empty where none is on the way."""
    frame: Any = sys._getframe(2)
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith(_ROOT) and not name.startswith((_ROOT + "benchmarks", _ROOT + ".venv")):
            return f"{name[len(_ROOT) :]}:{frame.f_lineno}"
        frame = frame.f_back
    return ""


_NEW_USER, _NEW_MOUNTS = 0x1000_0000, 0x2_0000
_PRIVATE, _REMOUNT = 0x4_4000, 0x20


def on_small_disk(place: Path, size: int, act: Callable[[Callable[[int], None]], str]) -> str:
    """What `act` returns in a process that alone has a disk of `size` bytes at `place`; it is handed a way to resize.

    Raises OSError where this user, on this system, may have no such disk.
    """
    place.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as outside:
        answer, refused = Path(outside) / "answer", Path(outside) / "refused"
        child = os.fork()
        if child == 0:
            try:
                try:
                    _mounted(place, size)
                except OSError as error:
                    refused.write_text(str(error.errno))
                    os._exit(0)
                answer.write_text(act(lambda more: _mount(place, more, _REMOUNT)))
            except BaseException as error:
                answer.write_text(f"{type(error).__name__}: {error}")
            finally:
                os._exit(0)
        waited_for(child, 3 * PATIENCE)
        if refused.exists():
            raise OSError(int(refused.read_text()), "no disk of our own may be mounted here")
        return answer.read_text() if answer.exists() else "the process with the small disk never ended"


def _mounted(place: Path, size: int) -> None:
    user, group = os.getuid(), os.getgid()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_NEW_MOUNTS | (_NEW_USER if user else 0)):
        raise OSError(ctypes.get_errno(), "unshare")
    if user:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
        Path("/proc/self/gid_map").write_text(f"{group} {group} 1")
    if libc.mount(b"none", b"/", None, _PRIVATE, None):
        raise OSError(ctypes.get_errno(), "mount")
    _mount(place, size, 0)


def _mount(place: Path, size: int, flags: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"tmpfs", os.fsencode(place), b"tmpfs", flags, f"size={size}".encode()):
        raise OSError(ctypes.get_errno(), "mount", os.fspath(place))
