"""What the tests with the real engine share."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from llmshrink.serving.vllm.engine import EngineResult


def llmshrink(*words: str | Path, status: int = 0) -> subprocess.CompletedProcess[str]:
    """Run the command line through its entry point and hold it to an exit status."""
    command = [str(Path(sys.executable).with_name("llmshrink")), *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800, check=False)
    assert done.returncode == status, f"{command} exited {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


@dataclass(frozen=True)
class Served:
    """A checkpoint that the command line made, prompts for it, and what the engine said to them."""

    folder: Path
    prompts: list[list[int]]
    result: EngineResult
