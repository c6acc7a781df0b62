"""Kernels on whatever device is here: a CUDA device, or the CPU through Triton's interpreter.

Whether a kernel is interpreted is settled when it is decorated, so TRITON_INTERPRET is set while Triton and every
kernel's file are imported, and only then: subprocesses (the vLLM engine's, the compiler's) don't inherit it. Triton's
own library is decorated too: an import of Triton before this one would leave half of everything compiled.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from llmshrink_kernels.static import Case, Facts

INTERPRETED = not torch.cuda.is_available()


def _import_kernels() -> None:
    import llmshrink_kernels

    package = Path(llmshrink_kernels.__file__).parent
    for path in sorted(package.glob("*/kernel.py")):
        importlib.import_module(f"llmshrink_kernels.{path.parent.name}.kernel")


if INTERPRETED:
    if "triton" in sys.modules:
        raise pytest.UsageError("something imported Triton before tests/kernels could set TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        _import_kernels()
        # The interpreter imports it when the first kernel runs, and it asks again whether this is interpreted.
        importlib.import_module("triton.experimental.gluon")
    finally:
        del os.environ["TRITON_INTERPRET"]


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where kernels run here: the CUDA device, or the CPU, interpreted."""
    return torch.device("cpu" if INTERPRETED else "cuda")


@pytest.fixture(scope="session")
def compiled() -> Callable[[Sequence[Case]], list[Facts]]:
    """Cases -> their facts, from compile.py in a process of its own: an interpreted kernel can't be compiled."""

    def run(cases: Sequence[Case]) -> list[Facts]:
        done = subprocess.run(
            [sys.executable, str(Path(__file__).with_name("compile.py"))],
            input=json.dumps([dataclasses.asdict(case) for case in cases]),
            capture_output=True,
            text=True,
            env={name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"},
        )
        assert done.returncode == 0, done.stderr[-4000:]
        return [Facts(**facts) for facts in json.loads(done.stdout)]

    return run
