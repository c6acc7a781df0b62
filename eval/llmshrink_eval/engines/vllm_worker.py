"""The process in which vLLM runs one model: `python -m llmshrink_eval.engines.vllm_worker START.json`.

START: model, dtype, max_model_len, kv_cache_bytes, trust_remote_code. Then each line on the standard input is a JSON
object that asks something: `do`, its arguments, and `answer`, a path. On the standard output one line says how it went:
{"done": true} when the answer lies at its path as JSON, or {"error": one line, "kind": "input" | "failed" | "engine"};
before it any number of {"progress": [done, total, state]}. The first such line, without a question, says that the model
is loaded. Whatever vLLM and its libraries print goes to the standard error.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llmshrink_eval.bounded import OWN_LIMIT, read_json
from llmshrink_eval.errors import EvalError, EvalFailed

LONGEST_ERROR = 600
SPEED_REPEATS = 3
TASK_BATCH = 256
"""Requests handed to vLLM together, which schedules them itself: it keeps all their answers until the last is there."""


class Worker:
    """A loaded model and what can be asked of it. Each question is a method, its JSON arguments the keywords."""

    def __init__(self, start: dict[str, Any], tell: Callable[[dict[str, Any]], None]) -> None:
        from vllm import LLM

        self._start, self._tell = start, tell
        started = time.perf_counter()
        self._llm = LLM(
            model=start["model"],
            dtype=start["dtype"],
            max_model_len=start["max_model_len"],
            # No request is cut, so that a window is one forward.
            max_num_batched_tokens=max(start["batched_tokens"], start["max_model_len"]),
            enable_chunked_prefill=False,
            enable_prefix_caching=False,
            enforce_eager=True,
            generation_config="vllm",
            kv_cache_memory_bytes=start["kv_cache_bytes"],
            trust_remote_code=start["trust_remote_code"],
            seed=0,
        )
        self._load_seconds = time.perf_counter() - started
        self._reader: Any = None

    def cost(self, *, batch_sizes: list[int], prompt_tokens: int, new_tokens: int, token: int) -> dict[str, Any]:
        """load_seconds, speed, and the memory that this process has taken so far, as results.Cost has them."""
        from llmshrink_eval.running import high_water

        speed = [self._speed(size, [token] * prompt_tokens, new_tokens) for size in batch_sizes]
        return {
            "load_seconds": self._load_seconds,
            "peak_rss_bytes": high_water(),
            "peak_vram_bytes": _peak_vram(),
            "speed": speed,
        }

    def _speed(self, batch_size: int, prompt: list[int], new_tokens: int) -> dict[str, Any]:
        """The prefill is a request for one token; decoding is what more tokens take beyond it."""
        self._timed(batch_size, prompt, 2)
        # What disturbs a run makes it longer: of a difference the shortest runs say most.
        prefill, whole = (
            min(self._timed(batch_size, prompt, tokens) for _ in range(SPEED_REPEATS)) for tokens in (1, 1 + new_tokens)
        )
        if whole <= prefill:
            raise EvalFailed("the machine was too busy to tell how long decoding takes; run again, or without --speed")
        return {
            "batch_size": batch_size,
            "prompt_tokens": len(prompt),
            "new_tokens": new_tokens,
            "prefill_tokens_per_second": batch_size * len(prompt) / prefill,
            "decode_tokens_per_second": batch_size * new_tokens / (whole - prefill),
        }

    def _timed(self, batch_size: int, prompt: list[int], new_tokens: int) -> float:
        started = time.perf_counter()
        self._generate([prompt] * batch_size, new_tokens, ignore_eos=True)
        return time.perf_counter() - started

    def generations(self, *, prompts: list[list[int]], new_tokens: list[int], stop: list[int]) -> list[list[int]]:
        """Token ids of the greedy continuations, up to one of the tokens `stop`."""
        return [
            self._generate([prompt], room, stop_token_ids=stop)[0]
            for prompt, room in zip(prompts, new_tokens, strict=True)
        ]

    def _generate(self, prompts: list[list[int]], new_tokens: int, **more: Any) -> list[list[int]]:
        from vllm import SamplingParams

        asked = SamplingParams(temperature=0, max_tokens=new_tokens, detokenize=False, **more)
        outputs = self._llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], asked, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    def read(self, *, windows: str, batch_size: int | None, keep: str | None, against: str | None, folder: str) -> None:
        """A pass over the windows; its results are in the folders (see `passes.run_pass`)."""
        from llmshrink_eval.engines.vllm_reader import EngineModel
        from llmshrink_eval.engines.windows_file import load_windows
        from llmshrink_eval.passes import run_pass

        read = load_windows(Path(windows))
        if self._reader is None:
            self._reader = EngineModel(self._llm)
        self._reader.prove(read.input_ids[0, : int(read.lengths[0])].tolist())
        run_pass(
            self._reader,
            read,
            self._llm.get_tokenizer(),
            batch_size=batch_size,
            keep=None if keep is None else Path(keep),
            against=None if against is None else Path(against),
            folder=Path(folder),
            on_progress=lambda done, total, nats: self._progress(done, total, f"{nats:.4f} nats/token"),
        )

    def tasks(self, *, options: dict[str, Any]) -> dict[str, Any]:
        """lm-eval's tasks by its own class for vLLM."""
        from unittest.mock import patch

        from llmshrink_eval.tasks import TaskOptions, bos_of_tasks, run_lm_tasks

        # lm-eval asks for the version of a distribution named `vllm`; the CPU build has another name.
        with patch.object(importlib.metadata, "version", _version):
            from lm_eval.models import vllm_causallms

        folders = tuple(map(Path, options["tasks_dir"]))
        made = TaskOptions(**{**options, "names": tuple(options["names"]), "tasks_dir": folders})
        model_type = self._llm.llm_engine.model_config.hf_config.model_type
        # The class makes an engine of its own; it is given the one that runs.
        with patch.object(vllm_causallms, "LLM", return_value=self._llm):
            lm = vllm_causallms.VLLM(
                pretrained=self._start["model"],
                dtype=self._start["dtype"],
                max_model_len=self._start["max_model_len"],
                batch_size=made.batch_size or TASK_BATCH,
                trust_remote_code=self._start["trust_remote_code"],
                add_bos_token=bos_of_tasks(self._llm.get_tokenizer(), model_type, made.bos),
            )
        return {name: run.to_dict() for name, run in run_lm_tasks(lm, made, self._progress).items()}

    def _progress(self, done: int, total: int, state: str = "") -> None:
        self._tell({"progress": [done, total, state]})


def _version(distribution: str) -> str:
    """importlib.metadata's, but vLLM is told by its module."""
    if distribution != "vllm":
        return importlib.metadata.distribution(distribution).version
    import vllm

    return str(vllm.__version__)


def _peak_vram() -> int | None:
    import torch

    if not torch.cuda.is_available():
        return None
    return sum(torch.cuda.max_memory_allocated(device) for device in range(torch.cuda.device_count()))


def main(start: Path) -> None:
    """Load, then answer until the input ends. What an engine raises is an answer too: no one else is there to hear."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def tell(said: dict[str, Any]) -> None:
        out.write(json.dumps(said) + "\n")
        out.flush()

    try:
        worker = Worker(read_json(start, limit=OWN_LIMIT), tell)
    except Exception as error:
        tell(_error(error))
        return
    tell({"done": True})
    for line in sys.stdin.buffer:
        question = json.loads(line)
        answer = Path(question.pop("answer"))
        try:
            said = getattr(worker, question.pop("do"))(**question)
            answer.write_text(json.dumps(said), encoding="utf-8")
            tell({"done": True})
        except Exception as error:
            tell(_error(error))


def _error(error: Exception) -> dict[str, Any]:
    kind = "input" if isinstance(error, EvalError) else "failed" if isinstance(error, EvalFailed) else "engine"
    line = " ".join(str(error).split())
    return {"kind": kind, "error": line if kind != "engine" else f"{type(error).__name__}: {line}"[:LONGEST_ERROR]}


if __name__ == "__main__":
    main(Path(sys.argv[1]))
