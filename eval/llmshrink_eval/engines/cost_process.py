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
from collections.abc import Sequence
from typing import Any

from llmshrink_eval.engines.child import Answering
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
        self._worker: Answering | None = None

    def ask(self, spec: ModelSpec, running: Running, batch_sizes: Sequence[int]) -> dict[str, Any]:
        """A model's cost to load and run, as results.Cost has it. Raises EvalError or EvalFailed, in one line."""
        import torch

        line = json.dumps(_job(spec, running, list(batch_sizes), torch.get_num_threads())).encode() + b"\n"
        worker = self._started()
        try:
            answer = worker.ask(line)
        except BaseException:  # interrupted: nobody will read what is being measured
            self.close()
            raise
        if answer is None:
            said = f"status {worker.wait()}: {worker.last()}"
            self.close()
            raise EvalFailed(f"the process that measures load and speed ended with {said}")
        found: dict[str, Any] = json.loads(answer)
        if "cost" in found:
            cost: dict[str, Any] = found["cost"]
            return cost
        if found["kind"] == "input":
            raise EvalError(found["error"])
        raise EvalFailed(f"load and speed can't be measured: {found['error']}")

    def close(self) -> None:
        """End it, and the child that is at work, if any."""
        if self._worker is not None:
            self._worker.end()
            self._worker = None

    def _started(self) -> Answering:
        if self._worker is None or self._worker.ended:
            self.close()
            self._worker = Answering("llmshrink_eval.engines.cost_worker")
        return self._worker


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
