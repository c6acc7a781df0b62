"""What every timed child shares: its wall seconds without imports and its peak resident memory, as one JSON line."""

from __future__ import annotations

import importlib
import json
import pkgutil
import resource
import sys
import time
from collections.abc import Callable

ROOMS = tuple(f"llmshrink.{name}" for name in ("recipe", "checkpoint", "model", "calibration", "methods", "run"))
"""What a run imports from; distillation's Trainer, say, brings 250 MB of libraries that no run of these has."""


def import_everything() -> None:
    """Import what a run would import while it is timed, as it does it: our own modules, and transformers' Llama."""
    for room in ROOMS:
        for module in pkgutil.walk_packages(importlib.import_module(room).__path__, f"{room}."):
            importlib.import_module(module.name)
    for name in (
        "safetensors.torch",
        "transformers.models.auto.modeling_auto",
        "transformers.models.auto.tokenization_auto",
        "transformers.models.llama.modeling_llama",
    ):
        importlib.import_module(name)


def report(work: Callable[[], object]) -> None:
    """Run `work` and print {"seconds", "peak_rss"} (seconds of wall, bytes) on stdout's last line."""
    started = time.perf_counter()
    work()
    seconds = time.perf_counter() - started
    # Linux counts ru_maxrss in KiB, macOS in bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    print(json.dumps({"seconds": seconds, "peak_rss": peak}), flush=True)
