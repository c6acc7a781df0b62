"""Loads, runs and times models, each in a process that begins like every other.

`python -m llmshrink_eval.engines.cost_worker` imports what models need, and then answers until its input ends.

Every line on the standard input is a JSON object, written by `cost_process`: folder, loader (`module:function`, or
null), running (the fields of options.Running), batch_sizes, threads. For each a child is forked; its answer is a line
on the standard output, either {"cost": ...} or {"error": one line, "kind": "input" | "failed" | "died"}. This process
itself only imports, and runs nothing: it has no other threads when it forks than those that wait for its end
(`watched`), and no child finds a trace of the model before it.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from llmshrink_eval.configfile import read_config
from llmshrink_eval.engines.child import end_with_parent
from llmshrink_eval.errors import EvalError, EvalFailed, raised_by_model
from llmshrink_eval.options import ModelSpec, Running
from llmshrink_eval.refused import told, way_out


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """What the job's model costs to load and run, as results.Cost has it; everything is imported before it counts."""
    import torch

    from llmshrink_eval.cost import architecture
    from llmshrink_eval.engines.transformers import TransformersEngine
    from llmshrink_eval.running import warm_up

    torch.set_num_threads(job["threads"])
    offload = job["running"]["offload"]
    running = Running(**{**job["running"], "offload": None if offload is None else Path(offload)})
    loader = None
    if job["loader"] is not None:
        module, _, function = job["loader"].partition(":")
        loader = getattr(importlib.import_module(module), function)
    spec = ModelSpec(name=job["folder"], folder=Path(job["folder"]), loader=loader)
    # Building the model without weights imports its classes.
    architecture(spec.folder, trust_remote_code=running.trust_remote_code)
    if _compressed(spec.folder):
        import_if_there("compressed_tensors.quantization")
        import_if_there("transformers.quantizers.auto")
    warm_up(running.device, offload=running.offload is not None)
    return TransformersEngine(spec, running, None).cost_here(job["batch_sizes"])


def import_if_there(name: str) -> None:
    """Import a module, whose absence is for whoever needs it to report."""
    try:
        importlib.import_module(name)
    except ImportError:
        return


def _compressed(folder: Path) -> bool:
    return bool(read_config(folder).get("quantization_config"))


def _answer(job: dict[str, Any]) -> dict[str, Any]:
    try:
        return {"cost": measure(job)}
    except EvalError as error:
        return {"error": str(error), "kind": "input"}
    except EvalFailed as error:
        return {"error": str(error), "kind": "failed"}
    except Exception as error:
        if isinstance(error, OSError) and way_out(error):
            return {"error": told(error), "kind": "died"}
        said = raised_by_model(error)
        if said is not None:
            return {"error": said, "kind": "input"}
        return {"error": f"{type(error).__name__}: {' '.join(str(error).split())}"[:600], "kind": "died"}


def main() -> None:
    """Import, then answer until the input ends."""
    out = os.dup(1)
    os.dup2(2, 1)  # what libraries print is no answer
    for name in ("torch", "transformers.models.llama.modeling_llama", "accelerate", "safetensors.torch"):
        importlib.import_module(name)
    for line in sys.stdin.buffer:
        child = os.fork()
        if child == 0:
            end_with_parent()
            os.write(out, json.dumps(_answer(json.loads(line))).encode() + b"\n")
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if status != 0:
            code = os.waitstatus_to_exitcode(status)
            reason = f"signal {signal.Signals(-code).name}" if code < 0 else f"status {code}"
            died = {"error": f"the process that ran it ended with {reason}", "kind": "died"}
            os.write(out, json.dumps(died).encode() + b"\n")


if __name__ == "__main__":
    main()
