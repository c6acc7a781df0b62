"""Where a model is loaded and timed: a process of its own, forked from one that has imported all and run nothing.

In the process of an evaluation the first model would pay for imports and the start of thread pools, and later ones
would find memory that earlier ones have left. Here all begin alike, so that load time and peak memory don't depend on
the order of the models, and the same folder twice gives the same figures. What remains of an order is the system's
cache of files: who is read a second time is read from memory.

The process that forks takes as long to start as the libraries take to import, once for a whole Python process; it ends
with this one, and holds no model.
"""

from __future__ import annotations

import atexit
import dataclasses
import functools
import json
import os
import signal
import subprocess
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from llmshrink_eval.engines.child import ours, python, start
from llmshrink_eval.errors import EvalError, EvalFailed
from llmshrink_eval.options import ModelSpec, Running


@functools.cache
def cost_process() -> CostProcess:
    """The one of this Python process, started when something is first asked of it."""
    made = CostProcess()
    atexit.register(made.close)
    return made


class CostProcess:
    """The process that forks, seen from outside."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 (closed with the process)

    def ask(self, spec: ModelSpec, running: Running, batch_sizes: Sequence[int]) -> dict[str, Any]:
        """A model's cost to load and run, as results.Cost has it. Raises EvalError or EvalFailed, in one line."""
        import torch

        line = json.dumps(_job(spec, running, list(batch_sizes), torch.get_num_threads())).encode() + b"\n"
        process = self._started()
        assert process.stdin is not None and process.stdout is not None
        try:
            with suppress(BrokenPipeError):  # a dead process is noticed by who reads its answer
                process.stdin.write(line)
                process.stdin.flush()
            answer = process.stdout.readline()
        except BaseException:  # interrupted: nobody will read what is being measured
            self.close()
            raise
        if not answer:
            status = process.wait()
            self.close()
            raise EvalFailed(f"the process that measures load and speed ended with status {status}: {self._last()}")
        said: dict[str, Any] = json.loads(answer)
        if "cost" in said:
            found: dict[str, Any] = said["cost"]
            return found
        if said["kind"] == "input":
            raise EvalError(said["error"])
        raise EvalFailed(f"load and speed can't be measured: {said['error']}")

    def close(self) -> None:
        """End it, and the child that is at work, if any."""
        if self._process is None:
            return
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with suppress(BrokenPipeError):
                pipe.close()
        self._process = None

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._process.poll() is not None:
            self.close()
            self._process = start(
                python("llmshrink_eval.engines.cost_worker"), ours({}), stdout=subprocess.PIPE, stderr=self._log
            )
        return self._process

    def _last(self) -> str:
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "it printed nothing")[:600]


def _job(spec: ModelSpec, running: Running, batch_sizes: list[int], threads: int) -> dict[str, Any]:
    """What the process is asked, as `cost_worker` has it. Raises EvalError for a loader that it can't find."""
    loader = None
    if spec.loader is not None:
        loader = f"{spec.loader.__module__}:{spec.loader.__qualname__}"
        if "<" in loader or spec.loader.__module__ == "__main__":
            raise EvalError(f"{spec.name}: its loader ({loader}) must be a function of a module that can be imported")
    asked = dataclasses.asdict(running)
    asked["offload"] = None if running.offload is None else os.fspath(running.offload.absolute() / "cost")
    folder = os.fspath(spec.folder.absolute())
    return {"folder": folder, "loader": loader, "running": asked, "batch_sizes": batch_sizes, "threads": threads}
