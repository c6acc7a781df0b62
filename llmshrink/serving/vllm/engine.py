"""Ask the real vLLM what comes next, and with what probability.

The engine runs in a process of its own (`worker`), one for each checkpoint: after a failed start later ones in the same
process fail too, its threads and memory go away with it, and nothing that it prints is ours. What it was asked and what
it said travel as JSON. Greedy tokens and the log-probabilities of the next token are taken while generating; the
engine's own log-probabilities of a prompt crash with adapters and aren't used.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypedDict

from llmshrink_eval.bounded import OWN_LIMIT, read_json
from llmshrink_eval.engines.child import ours, python, start

from llmshrink.checkpoint.files import read_config
from llmshrink.errors import LlmshrinkError
from llmshrink.formats import bitsandbytes, compressed_tensors, sparse24
from llmshrink.formats.compressed_tensors import GroupedIntScheme
from llmshrink.formats.eight_bit import EightBitScheme
from llmshrink.formats.servable import FP8_ON_CPU
from llmshrink.model.families import FAMILIES
from llmshrink.serving.launch import AS_MEASURED, Installed, install_line, installed
from llmshrink.serving.options import EngineOptions
from llmshrink.serving.preflight import (
    BNB_PLUGIN,
    NO_BNB,
    NO_FP8_CACHE,
    ServeError,
    caches_fp8,
    check_layers,
    fp8_cache,
    plugin_here,
)
from llmshrink.serving.processor import processor_here

TOP = 20
"""How many of the likeliest next tokens the engine is asked for: as many as it gives by default."""
TIMEOUT = 1800.0
"""Seconds: a start takes 15 s of CPU, which is minutes of wall time on a busy machine."""
ENVIRONMENT = {
    **AS_MEASURED,
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB; a handful of short prompts
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the worker is the process of its own; errors reach it as exceptions
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
}


class EngineError(LlmshrinkError):
    """The engine isn't there, or doesn't serve the checkpoint."""


@dataclass(frozen=True)
class Generation:
    """What follows one prompt. tokens: greedy. top: for each of them the likeliest tokens' log-probabilities (nats)."""

    tokens: tuple[int, ...]
    top: tuple[dict[int, float], ...]


class _Said(TypedDict):
    """A generation as the worker writes it: JSON has no integers as keys."""

    tokens: list[int]
    top: list[list[tuple[int, float]]]


@dataclass(frozen=True)
class EngineResult:
    """The engine's answer: a generation for each prompt, in order."""

    engine: str
    generations: tuple[Generation, ...]


def engine_logprobs(
    checkpoint: Path,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int = 8,
    dtype: str | None = None,
    timeout: float = TIMEOUT,
) -> EngineResult:
    """Generate `max_tokens` tokens greedily after each prompt (token ids), in one engine.

    dtype: the engine's; None is the closest to float32 in which int4 kernels run: float16, or bfloat16 for an
    architecture that vLLM refuses in float16. timeout: seconds. Raises EngineError, one line, when vLLM isn't
    installed, doesn't start, or doesn't serve the checkpoint.
    """
    assert prompts and all(prompts) and max_tokens >= 1, (len(prompts), max_tokens)
    engine = installed()
    if engine is None:
        raise EngineError(
            f"vLLM isn't installed in this environment; install it beside llmshrink: {install_line()}; or verify with"
            " --engine transformers"
        )
    _refuse_bitsandbytes(checkpoint)
    if engine.cpu:
        _refuse_what_no_cpu_kernel_takes(checkpoint)
    request = {
        "model": os.fspath(checkpoint),
        "dtype": dtype or closest_dtype(checkpoint),
        "prompts": [list(prompt) for prompt in prompts],
        "max_tokens": max_tokens,
        "top": TOP,
    }
    answer = _ask(request, engine, timeout)
    return EngineResult(
        engine=f"vLLM {engine.version}",
        generations=tuple(
            Generation(
                tokens=tuple(generation["tokens"]),
                top=tuple(dict(step) for step in generation["top"]),
            )
            for generation in answer
        ),
    )


def _config(checkpoint: Path) -> dict[str, Any]:
    try:
        config: dict[str, Any] = read_config(checkpoint)
    except (OSError, ValueError) as error:
        raise EngineError(f"{checkpoint}: no readable config.json there; name a checkpoint's folder") from error
    return config


def _quantization(checkpoint: Path) -> dict[str, Any]:
    """The quantization_config of config.json; empty where there is none."""
    found: dict[str, Any] = _config(checkpoint).get("quantization_config") or {}
    return found


def closest_dtype(checkpoint: Path) -> str:
    """The dtype of 16 bits in which vLLM comes closest to float32 for a checkpoint's architecture."""
    family = FAMILIES.get(str(_config(checkpoint).get("model_type")))
    return "float16" if family is None or family.float16_in_vllm else "bfloat16"


def _refuse_bitsandbytes(checkpoint: Path) -> None:
    if _quantization(checkpoint).get("quant_method") == bitsandbytes.METHOD and find_spec(BNB_PLUGIN) is None:
        raise EngineError(f"{checkpoint}: {NO_BNB}; verify with --engine transformers")


def _refuse_what_no_cpu_kernel_takes(checkpoint: Path) -> None:
    """Say at once what the engine would say after half a minute, in words of its kernels."""
    quantization = _quantization(checkpoint)
    if not quantization or quantization.get("quant_method") in (sparse24.METHOD, bitsandbytes.METHOD):
        return
    if fp8_cache(quantization, EngineOptions()) and not caches_fp8():
        raise EngineError(f"{checkpoint}: {NO_FP8_CACHE}; verify it there, or with --engine transformers")
    schemes = list(compressed_tensors.schemes(quantization).values())
    if any(isinstance(scheme, EightBitScheme) and scheme.activations == "fp8" for scheme in schemes):
        raise EngineError(f"{checkpoint}: {FP8_ON_CPU}; verify it there, or with --engine transformers")
    plugin, processor = plugin_here(os.environ), processor_here()
    served = {4, 2, 3, 8} if plugin.kernel else {4}
    others = sorted({scheme.bits for scheme in schemes if isinstance(scheme, GroupedIntScheme)} - served)
    if others:
        bits, here = " and ".join(map(str, others)), ", ".join(map(str, sorted(served)))
        raise EngineError(
            f"{checkpoint} has {bits}-bit weights, and vLLM's CPU build serves {here} bits only here; verify it where"
            " vLLM runs on CUDA, or with --engine transformers"
        )
    if processor.lacks:
        try:
            check_layers(checkpoint, _config(checkpoint), quantization, EngineOptions(), "vllm-cpu", plugin, processor)
        except ServeError as error:
            raise EngineError(f"{error}; or verify with --engine transformers") from error


def _ask(request: dict[str, object], engine: Installed, timeout: float) -> list[_Said]:
    """Run the worker on a request and return its generations."""
    with tempfile.TemporaryDirectory(prefix="llmshrink-vllm-") as folder:
        question, answer, log = (Path(folder) / name for name in ("question.json", "answer.json", "log.txt"))
        question.write_text(json.dumps(request))
        command = python("llmshrink.serving.vllm.worker", os.fspath(question), os.fspath(answer))
        with log.open("wb") as output:
            process = start(command, ours(ENVIRONMENT), stdout=output, stderr=subprocess.STDOUT)
            try:
                status = process.wait(timeout)
            except subprocess.TimeoutExpired as expired:
                raise EngineError(
                    f"vLLM {engine.version} didn't answer within {timeout:.0f} s for {request['model']}; try again on a"
                    " less busy machine, or verify with --engine transformers"
                ) from expired
            finally:
                # The worker's own children too, whichever way it ended.
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                assert process.stdin is not None
                process.stdin.close()
        if not answer.is_file():
            raise EngineError(
                f"vLLM {engine.version} ended with status {status} for {request['model']}: {_last_line(log)}"
            )
        said = read_json(answer, limit=OWN_LIMIT)
    if "error" in said:
        raise EngineError(f"vLLM {engine.version} doesn't serve {request['model']}: {said['error']}")
    generations: list[_Said] = said["generations"]
    return generations


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "it printed nothing")
