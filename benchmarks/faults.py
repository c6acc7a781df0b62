"""Faults made on purpose, one a run: `python -m benchmarks.faults` (`make torture-faults`).

A small quantization runs again and again, each time in a process of its own in which one call of the system on one of
the run's files fails with a seeded error (EIO, EROFS, EACCES and the like), or at which the process is killed and one
file of its workspace is damaged (a byte flipped, cut short, emptied, gone, a folder in its place). Each such run must
end in the reference's bytes, or in one line on stderr with exit code 1 or 2; the same command without a fault must then
end in the reference's bytes too. Only damage may be refused there instead, and is when the workspace has been removed.

    python -m benchmarks.faults --faults 40 --seed 1      # a minute
"""

from __future__ import annotations

import argparse
import builtins
import errno
import io
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from benchmarks.torture import contents, differences
from llmshrink.run.output import partial_folder

ERRORS = ("EIO", "EROFS", "EACCES", "ESTALE", "EFBIG", "ENOSPC", "EDQUOT", "EMFILE", "ENAMETOOLONG", "EPERM")
CALLS = (
    *("open", "write", "fsync", "replace", "rename", "mkdir", "unlink", "rmdir", "listdir", "scandir", "stat", "lstat"),
    *("readlink", "chmod", "utime", "truncate", "ftruncate"),
)
"""Of `os`, as our code and the standard library's call them; `open` itself besides."""
DAMAGES = ("flip", "cut", "empty", "gone", "folder", "longer")
PATIENCE = 120
"""Seconds after which a run counts as one that never ends."""
LONGEST_LINE = 700


@dataclass(frozen=True)
class Fault:
    """at: which call on the run's files, from 0. error: what it raises, by name; empty: the process is killed there.

    damage: what is done to a file of the workspace after a kill; chosen: which, by this number.
    """

    at: int
    error: str
    damage: str = ""
    chosen: int = 0

    def __str__(self) -> str:
        """As a line of the report names it."""
        return f"call {self.at}: {self.error or f'killed, then a file {self.damage}'} ({self.chosen})"


class Injected:
    """Counts the calls on files below a folder, and fails the one that is asked for."""

    def __init__(self, below: Path, fault: Fault | None) -> None:
        self.below, self.fault = os.fspath(below), fault
        self.count = 0
        self.what = ""

    def install(self) -> None:
        """Put ourselves before the calls, in this process, for good."""
        for name in CALLS:
            setattr(os, name, self._before(name, getattr(os, name)))
        opened = self._before("open", io.open)
        builtins.open = io.open = opened

    def _before(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any, **named: Any) -> Any:
            place = given[0] if given else named.get("path")
            if self._concerns(place):
                self._strike(name, place, real, given)
            return real(*given, **named)

        return call

    def _concerns(self, place: Any) -> bool:
        if isinstance(place, bool) or place is None:
            return False
        if isinstance(place, int):
            try:
                place = _READLINK(f"/proc/self/fd/{place}")
            except OSError:
                return False
        try:
            path = os.path.abspath(os.fsdecode(place))
        except TypeError:
            return False
        return path.startswith(self.below + os.sep)

    def _strike(self, name: str, place: Any, real: Callable[..., Any], given: tuple[Any, ...]) -> None:
        at, self.count = self.count, self.count + 1
        if self.fault is None or at != self.fault.at:
            return
        if self.fault.error:
            number = getattr(errno, self.fault.error)
            raise OSError(number, os.strerror(number), None if isinstance(place, int) else os.fsdecode(place))
        if name == "write":
            real(given[0], bytes(given[1])[: len(given[1]) // 2])  # half of it reached the disk
        os.kill(os.getpid(), signal.SIGKILL)


_READLINK = os.readlink


@dataclass(frozen=True)
class Ended:
    """How a run ended. code: its exit code, negative for a signal, None where it never ended. calls: on its files."""

    code: int | None
    said: str
    calls: int

    def complaint(self) -> str:
        """What is wrong with how it ended, whatever its output; empty if nothing."""
        if self.code is None:
            return f"didn't end in {PATIENCE} s"
        lines = [line for line in self.said.splitlines() if line.startswith("llmshrink: error:")]
        if "Traceback" in self.said or self.code not in (0, 1, 2):
            return f"exit code {self.code}: {self.said.strip().splitlines()[-1:]}"
        if self.code and len(lines) != 1:
            return f"exit code {self.code} with {len(lines)} lines of error: {self.said[-300:]!r}"
        if self.code and len(lines[0]) > LONGEST_LINE:
            return f"a line of {len(lines[0])} characters: {lines[0][:200]}"
        return ""


def carried_out(command: list[str], below: Path, fault: Fault | None, *, memory: int | None = None) -> Ended:
    """One command in a process of its own, forked from this one, so that nothing is imported again.

    memory: bytes of addresses that it may have, None for no limit.
    """
    with tempfile.TemporaryDirectory() as outside:
        log, counted = Path(outside) / "log", Path(outside) / "calls"
        child = os.fork()
        if child == 0:
            _child(command, Injected(below, fault), log, counted, memory)
        code = _waited_for(child)
        calls = int(counted.read_text()) if counted.exists() else 0
        return Ended(code, log.read_text(errors="replace"), calls)


def _child(command: list[str], injected: Injected, log: Path, counted: Path, memory: int | None) -> None:
    """Run the command line in this process, which it never leaves."""
    code = 70
    try:
        fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        for stream in (1, 2):
            os.dup2(fd, stream)
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115  whoever forked us may have put others there
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
        from llmshrink.cli import run

        torch.set_num_threads(1)
        if memory is not None:
            resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
        injected.install()
        code = run(command)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stderr.flush()
        sys.stdout.flush()
        counted.write_text(str(injected.count))
        os._exit(code)


def _waited_for(child: int) -> int | None:
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def damaged(folder: Path, fault: Fault) -> str:
    """Do a fault's damage to one file of a folder; its name, empty where there is none."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    if not files:
        return ""
    path = files[fault.chosen % len(files)]
    data = bytearray(path.read_bytes())
    if fault.damage == "flip" and data:
        data[fault.chosen % len(data)] ^= 1 << fault.chosen % 8
    elif fault.damage == "cut":
        del data[fault.chosen % (len(data) + 1) :]
    elif fault.damage == "empty":
        data.clear()
    elif fault.damage == "longer":
        data += b"\0more"
    path.unlink()
    if fault.damage == "folder":
        path.mkdir()
    elif fault.damage != "gone":
        path.write_bytes(data)
    return path.name


def faults(calls: int, count: int, seed: int) -> Iterator[Fault]:
    """So many, by a seed: two errors for each kill with damage."""
    rng = random.Random(seed)
    for index in range(count):
        at, chosen = rng.randrange(calls), rng.randrange(1 << 20)
        yield Fault(at, "", rng.choice(DAMAGES), chosen) if index % 3 == 2 else Fault(at, rng.choice(ERRORS))


@dataclass
class Bench:
    """A folder with a model and a text, and what an undisturbed run makes of them."""

    folder: Path
    reference: dict[str, bytes]
    calls: int

    @classmethod
    def made(cls, folder: Path) -> Bench:
        """Set up in an empty folder. Raises RuntimeError where the undisturbed run doesn't end well."""
        from llmshrink.demo import model_folder
        from llmshrink.demo.language import text

        shutil.copytree(model_folder(), folder / "model")
        (folder / "story.txt").write_text(text(7, 20_000), encoding="utf-8")
        bench = cls(folder, {}, 0)
        ended = bench.run(None)
        if ended.code:
            raise RuntimeError(f"the undisturbed run ended with {ended.code}: {ended.said}")
        return cls(folder, contents(bench.output), ended.calls)

    @property
    def output(self) -> Path:
        """Where the run writes."""
        return self.folder / "out"

    @property
    def workspace(self) -> Path:
        """What a killed run leaves."""
        return partial_folder(self.output)

    def run(self, fault: Fault | None) -> Ended:
        """The command, with one fault or none."""
        words = ["quantize", self.folder / "model", "-o", self.output, "--calibration", self.folder / "story.txt"]
        words += ["--samples", "2", "--seq-len", "32", "--group-size", "32", "--batch-size", "2"]
        return carried_out([str(word) for word in words], self.folder, fault)

    def tidy(self) -> None:
        """Away with what a run wrote."""
        for path in (self.output, self.workspace):
            shutil.rmtree(path, ignore_errors=True)

    def wrong(self) -> list[str]:
        """How the output differs from the reference."""
        return differences(self.reference, contents(self.output)) if self.output.exists() else ["there is no output"]

    def tried(self, fault: Fault) -> str:
        """What goes wrong with one fault; empty if nothing does."""
        self.tidy()
        first = self.run(fault)
        if fault.error:
            if said := first.complaint():
                return said
            if self.output.exists() and not self.workspace.exists() and self.wrong():
                return f"exit code {first.code}, and an output that differs in {self.wrong()}"
            if first.code == 0:
                return "" if not self.wrong() else f"exit code 0, and {self.wrong()}"
        touched = "" if fault.error or not self.workspace.exists() else damaged(self.workspace, fault)
        return self._again(touched)

    def _again(self, touched: str) -> str:
        """The same command without a fault. touched: the file that was damaged."""
        if self.output.exists() and not self.workspace.exists():
            return f"differs in {self.wrong()}" if self.wrong() else ""
        again = self.run(None)
        if said := again.complaint():
            return f"then ({touched or 'nothing'} damaged) {said}"
        if again.code and not touched:
            return f"the same command without a fault: {again.said.strip().splitlines()[-1]}"
        if again.code:
            shutil.rmtree(self.workspace, ignore_errors=True)
            again = self.run(None)
            if again.code:
                return f"{touched} damaged, workspace removed: {again.said.strip().splitlines()[-1]}"
        return f"{touched or 'nothing'} damaged: differs in {self.wrong()}" if self.wrong() else ""


def made(count: int, seed: int) -> list[str]:
    """Make so many faults, by a seed, and print how it goes. Returns a line for each that ended as none should."""
    for each in ("transformers.models.llama.modeling_llama", "llmshrink.run.quantize"):
        import_module(each)  # once, before the runs are forked
    found: list[str] = []
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench.made(Path(scratch).resolve())
        print(f"{bench.calls} calls in an undisturbed run", flush=True)
        for index, fault in enumerate(faults(bench.calls, count, seed), 1):
            if said := bench.tried(fault):
                found.append(f"{fault}: {said}")
                print(found[-1], flush=True)
            if index % 50 == 0:
                print(f"{index} of {count} faults, {len(found)} wrong", flush=True)
    return found


def main() -> int:
    """1 and a line for each fault that ended as none should, or 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    found = made(arguments.faults, arguments.seed)
    print(
        f"{arguments.faults} faults: each ended in the same bytes or one line" if not found else f"{len(found)} wrong"
    )
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
