"""One measured child: its CPU seconds and peak memory, from the kernel's own account of it and all that it started.

The child's peak includes nothing of ours only as long as this process is small: the kernel hands a parent's own peak on
to what it forks. So nothing here imports torch.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.real.source import ROOT

THREADS = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS"), "1")
OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
}
NOTHING = "no message"
_RUNNING: set[int] = set()


@dataclass(frozen=True)
class Usage:
    """code: exit status. cpu_seconds: user and system. peak_bytes: resident, of the largest process. load: the
    machine's average over a minute, at the start and at the end."""

    code: int
    cpu_seconds: float
    wall_seconds: float
    peak_bytes: int
    load: tuple[float, float]


def run(command: Sequence[str], log: Path, *, environment: Mapping[str, str] | None = None) -> Usage:
    """Run a child on one thread, its output appended to `log`, in the log's folder: some write into where they are."""
    log.parent.mkdir(parents=True, exist_ok=True)
    before, started = os.getloadavg()[0], time.monotonic()
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, **THREADS, **OFFLINE, "PYTHONPATH": path, **(environment or {})}
    with log.open("ab") as output:
        child = subprocess.Popen(command, cwd=log.parent, env=environment, stdout=output, stderr=subprocess.STDOUT)
    _RUNNING.add(child.pid)
    try:
        _, status, usage = os.wait4(child.pid, 0)
    finally:
        _RUNNING.discard(child.pid)
    child.returncode = os.waitstatus_to_exitcode(status)
    unit = 1 if sys.platform == "darwin" else 1024
    return Usage(
        code=child.returncode,
        cpu_seconds=usage.ru_utime + usage.ru_stime,
        wall_seconds=time.monotonic() - started,
        peak_bytes=usage.ru_maxrss * unit,
        load=(before, os.getloadavg()[0]),
    )


def end_all() -> None:
    """Ask the children that are running to end; whoever waits for them sees it."""
    for pid in tuple(_RUNNING):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)


def last_line(log: Path) -> str:
    """What a child said last, for a reason in a table."""
    lines = log.read_text(errors="replace").splitlines() if log.is_file() else []
    said = next((line.strip() for line in reversed(lines) if line.strip()), NOTHING)
    return said if len(said) <= 300 else said[:297] + "..."
