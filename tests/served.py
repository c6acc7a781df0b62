"""What the tests with the real engine share."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from llmshrink.serving.vllm.engine import EngineResult

TESTS = Path(__file__).parent
AVX2 = {
    "PYTHONPATH": os.pathsep.join([os.fspath(TESTS / "avx2"), os.fspath(TESTS)]),
    "ATEN_CPU_CAPABILITY": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
}
"""What makes a process, and vLLM in it, run as on an x86 CPU with AVX2 alone."""


def llmshrink(
    *words: str | Path, status: int = 0, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run the command line through its entry point and hold it to an exit status. environment: beside this one's."""
    command = [str(Path(sys.executable).with_name("llmshrink")), *map(str, words)]
    variables = {**os.environ, **(environment or {})}
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800, check=False, env=variables)
    assert done.returncode == status, f"{command} exited {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


@dataclass(frozen=True)
class Served:
    """A checkpoint that the command line made, prompts for it, and what the engine said to them."""

    folder: Path
    prompts: list[list[int]]
    result: EngineResult
