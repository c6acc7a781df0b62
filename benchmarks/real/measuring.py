"""From a row to its figures: made by a child on one thread, judged by another, filed.

What can't be had is said before anything runs: texts are named by options, or lie beside the checkout; peers have an
environment each, made once from its list of constraints/.
"""

from __future__ import annotations

import datetime
import fcntl
import importlib.metadata
import json
import platform
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.real import judge, source, store
from benchmarks.real.process import end_all, last_line, run
from benchmarks.real.rows import OURS, SAMPLES, SEQ_LEN, Row

BESIDE = source.ROOT.parent / "shared" / "data"
"""Where the texts and tasks lie, unless options say otherwise."""
SCRIPTS = {
    "llm-compressor": "benchmarks/peer_llmcompressor.py",
    "gptqmodel": "benchmarks/peer_gptqmodel.py",
    "auto-round": "benchmarks/peer_autoround.py",
}
PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "numpy")

Say = Callable[[str], None]


ENDED = {-signal.SIGTERM, -signal.SIGINT, 128 + signal.SIGTERM, 128 + signal.SIGINT}
"""Exit codes of a child that was asked to end: nothing is wrong with its row, which goes on the next time. A kill isn't
among them: it may be the kernel's, for want of memory."""


class Missing(Exception):
    """What a measurement needs isn't there, in one line."""


class Ended(Exception):
    """A measurement was broken off from outside."""


@dataclass(frozen=True)
class Inputs:
    """What all rows share. model: the converted checkpoint. cache: where everything is kept."""

    model: Path
    calibration: Path
    text: Path
    cache: Path

    @property
    def tokens(self) -> Path:
        """The calibration windows, for the peers; made when it is first needed."""
        name = f"{SAMPLES}x{SEQ_LEN}-{source.checksum()}-{store.file_digest(self.calibration)}.safetensors"
        return self.cache / "tokens" / name

    def place(self, row: Row) -> store.Place:
        """Where a row is filed."""
        key: dict[str, Any] = {
            "source": source.checksum(),
            "command": row.command,
            "calibration": store.file_digest(self.calibration),
            "judge": [store.file_digest(self.text), judge.VERSION, judge.WINDOW, judge.TOKENS],
            "machine": cpu(),
            "threads": 1,
        }
        if row.tool == OURS:
            key["versions"] = versions(row.packages)
            if row.student is not None:
                key["student"] = row.student.command
        else:
            key["versions"] = store.file_digest(constraints(row.tool))
        return store.place(self.cache, row.name, key, self.code(row))

    @staticmethod
    def code(row: Row) -> str:
        """The state of the code that decides a row's figures."""
        if row.tool != OURS:
            return store.code_state(SCRIPTS[row.tool])
        commands = (*row.command, *(row.student.command if row.student is not None else ()))
        return store.code_state(*store.NUMERIC_ROOMS, *store.recipes_in(commands))


def inputs(*, calibration: Path | None, text: Path | None, cache: Path | None) -> Inputs:
    """Find all of it. Raises Missing for a text, source.Unavailable for the model."""
    found = []
    for given, name, option in (
        (calibration, "calibration.txt", "--calibration"),
        (text, "wikitext2-test.txt", "--text"),
    ):
        path = (BESIDE / name if given is None else given).absolute()
        if not path.is_file():
            raise Missing(f"no {name} at {path}; name a text file with {option}")
        found.append(path)
    cache = (source.cache_folder() if cache is None else cache).absolute()
    return Inputs(source.model(cache), found[0], found[1], cache)


def versions(more: Sequence[str] = ()) -> dict[str, str]:
    """Of what our numbers depend on."""
    found = {"python": platform.python_version()}
    for name in (*PACKAGES, *more):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            raise Missing(f"the package {name} isn't installed in {sys.prefix}; `make venv` installs it") from None
    return found


def cpu() -> str:
    """The processor's name and its vector instructions: sums are rounded by them."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").partition("\n\n")[0].splitlines()
    except OSError:
        return f"{platform.processor() or platform.machine()}"
    said = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    flags = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in said.get("flags", "").split()]
    return " ".join([said.get("model name", platform.machine()), *flags])


def constraints(tool: str) -> Path:
    """The pinned list of a peer's environment."""
    return source.ROOT / "constraints" / f"peer-{tool}.txt"


def peer_python(tool: str, say: Say) -> Path:
    """The Python of a peer's environment, made at the first call. Raises Missing where it can't be installed."""
    pinned, folder = constraints(tool), source.ROOT / "build" / "peers" / tool
    python, stamp = folder / "bin" / "python", folder / "installed.txt"
    if python.exists() and stamp.is_file() and stamp.read_text() == pinned.read_text():
        return python
    say(f"{tool}: installing {pinned.relative_to(source.ROOT)} into {folder}")
    torch = next(line for line in pinned.read_text().splitlines() if line.startswith("torch=="))
    pip = [str(python), "-m", "pip", "install", "--quiet"]
    for command in (
        [sys.executable, "-m", "venv", "--clear", str(folder)],
        # By itself and first: where there is a CPU build, an ordinary install takes that.
        [*pip, torch],
        [*pip, "--no-deps", "--requirement", str(pinned)],
    ):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            said = [line for line in done.stderr.splitlines() if "ERROR" in line or "error" in line.lower()]
            raise Missing(f"{tool} can't be installed: {(said or ['no message'])[-1].strip()[:200]}")
    stamp.write_text(pinned.read_text())
    return python


def measure(row: Row, given: Inputs, *, checkpoint: bool, say: Say, wait: bool = False) -> dict[str, Any] | None:
    """A row's figures, filed or measured now; None where it failed, which is filed too.

    checkpoint: the model itself is wanted, which is made again where it was let go. wait: for another process or
    thread that is measuring the same row; else that is said, and it is left to it.
    """
    place = given.place(row)
    found = place.result()
    if found is not None and (place.out.is_dir() or not checkpoint):
        return found
    student = None
    if row.student is not None:
        # Another may be making it just now.
        if measure(row.student, given, checkpoint=True, say=say, wait=True) is None:
            place.fail(f"there is no {row.student.name}", today())
            return None
        student = given.place(row.student).out
    with _alone(place, wait=wait) as free:
        if not free:
            say(f"{row.name}: another process is measuring it")
            return None
        found = place.result()
        if found is not None and (place.out.is_dir() or not checkpoint):
            return found
        # Asked for before the run: a checkout may move on beside it.
        state = {"commit": store.commit(), "code": given.code(row)}
        try:
            _make(row, given, place, student, say)
            figures = found or {**_figures(row, place), **state, **_judged(row, given, place, say)}
        except Ended:
            say(f"{row.name}: broken off; it goes on the next time")
            return None
        except Missing as error:
            place.fail(str(error), today())
            say(f"{row.name}: not measured: {error}")
            return None
        place.keep(figures)
        if not (checkpoint or row.tasks):
            shutil.rmtree(place.out)
    cpu_seconds = f"{figures['cpu_seconds']:.0f} CPU s"
    say(f"{row.name}: KL {figures['kl']:.4f}, perplexity {figures['perplexity']:.2f}, {cpu_seconds}")
    return figures


def measure_all(
    rows: Sequence[Row], given: Inputs, *, jobs: int, checkpoint: bool = False, say: Say
) -> dict[str, dict[str, Any] | None]:
    """Rows by name, `jobs` of them side by side, each on one thread."""
    with ThreadPoolExecutor(jobs) as pool:
        running = {row.name: pool.submit(measure, row, given, checkpoint=checkpoint, say=say) for row in rows}
        try:
            return {name: future.result() for name, future in running.items()}
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            end_all()
            raise


@contextmanager
def _alone(place: store.Place, *, wait: bool) -> Iterator[bool]:
    """Whether nobody else is at this row; nobody will be meanwhile."""
    place.folder.mkdir(parents=True, exist_ok=True)
    with (place.folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError:
            yield False
            return
        yield True


def _make(row: Row, given: Inputs, place: store.Place, student: Path | None, say: Say) -> None:
    """The row's checkpoint at `place.out`. Raises Missing where it doesn't come to be."""
    if (place.out / "config.json").is_file():
        return
    # Ours appears whole by itself, and goes on in out.partial; a peer's appears so by being renamed.
    out = place.out if row.tool == OURS else place.folder / "peer.partial"
    program = (
        [sys.executable, "-m", "llmshrink"]
        if row.tool == OURS
        else [str(peer_python(row.tool, say)), str(source.ROOT / SCRIPTS[row.tool])]
    )
    if row.tool != OURS:
        shutil.rmtree(out, ignore_errors=True)
        _tokens(given)
    paths = {
        "model": given.model,
        "calibration": given.calibration,
        "tokens": given.tokens,
        "out": out,
        "student": student,
    }
    attempt = len(place.attempts())
    say(f"{row.name}: {'goes on' if attempt else 'starts'}, about {row.minutes:.0f} CPU minutes; {place.log}")
    place.note({"attempt": attempt, "started": today()})
    used = run([*program, *(word.format(**paths) for word in row.command)], place.log)
    place.note(
        {
            "attempt": attempt,
            "cpu_seconds": used.cpu_seconds,
            "wall_seconds": used.wall_seconds,
            "peak_bytes": used.peak_bytes,
            "load": used.load,
            "code": used.code,
        }
    )
    if used.code in ENDED:
        raise Ended
    if used.code or not (out / "config.json").is_file():
        raise Missing(f"its run ended with {used.code}: {last_line(place.log)}")
    out.rename(place.out)


def _figures(row: Row, place: store.Place) -> dict[str, Any]:
    """What is known without judging. Time is that of all attempts since the last failure that made nothing."""
    attempts = place.attempts()
    whole = [one for one in attempts if "cpu_seconds" in one]
    if row.tool != OURS:
        whole = whole[-1:]
    return {
        "name": row.name,
        "tool": row.tool,
        "command": list(row.command),
        "cpu_seconds": sum(one["cpu_seconds"] for one in whole),
        "cpu_whole": row.tool != OURS or len(whole) == len(attempts),
        "wall_seconds": sum(one["wall_seconds"] for one in whole),
        "peak_bytes": max((one["peak_bytes"] for one in whole), default=0),
        "load": [figure for one in whole for figure in one["load"]],
        "bytes": sum(file.stat().st_size for file in place.out.glob("*.safetensors")),
        "machine": cpu(),
        "date": today(),
    }


def _judged(row: Row, given: Inputs, place: store.Place, say: Say) -> Mapping[str, Any]:
    """The row's damage. The original's pass is made by whoever is first; the others wait for it."""
    say(f"{row.name}: judged")
    log = place.folder / "judge.txt"
    log.unlink(missing_ok=True)
    command = [sys.executable, "-m", "benchmarks.real.judge", str(given.model), str(place.out), str(given.text)]
    with (given.cache / "judge.lock").open("w") as lock:
        kept = given.cache / "eval" / "judged"
        if not kept.exists():
            fcntl.flock(lock, fcntl.LOCK_EX)
        used = run([*command, "--cache", str(given.cache / "eval")], log)
        if used.code in ENDED:
            raise Ended
        if used.code:
            raise Missing(f"judging ended with {used.code}: {last_line(log)}")
        kept.touch()
    found: dict[str, Any] = json.loads(last_line(log))
    return {**found, "judge_cpu_seconds": used.cpu_seconds}


def _tokens(given: Inputs) -> None:
    if given.tokens.is_file():
        return
    given.tokens.parent.mkdir(parents=True, exist_ok=True)
    unfinished = given.tokens.with_suffix(".part.safetensors")
    shape = ["--samples", str(SAMPLES), "--seq-len", str(SEQ_LEN)]
    command = [sys.executable, "-m", "benchmarks.tokens", str(given.model), str(given.calibration), str(unfinished)]
    log = given.tokens.with_suffix(".txt")
    if run([*command, *shape], log).code:
        raise Missing(f"the calibration windows can't be made: {last_line(log)}")
    unfinished.replace(given.tokens)


def today() -> str:
    """The date and minute, as ISO 8601 writes it, in UTC."""
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%MZ")
