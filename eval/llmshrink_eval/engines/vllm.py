"""A model run by vLLM, in a process of its own, with the same windows, tasks and prompts as by transformers.

Its numbers are those of `engines.transformers` up to the engines' arithmetic: perplexity and the full-vocabulary KL are
made of vLLM's final hidden states by the very same code (`vllm_reader` says how, and why not of vLLM's own top-k
log-probabilities), tasks by lm-eval's own class for vLLM. The original is run by vLLM too: what is compared is then the
models and not the engines, and the KL of a model with itself is 0.

On a CPU a plain checkpoint computes in float32, as everything here does; vLLM's 4-bit kernels don't run in float32, so
a compressed one computes in float16, which costs about 3e-6 nats of KL, or in bfloat16 (2e-4) where vLLM refuses the
architecture in float16. On CUDA the dtype is that asked for, or the config's own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmshrink_eval.beginning import beginning_of
from llmshrink_eval.engines.transformers import SPEED_TOKEN, own_dtype
from llmshrink_eval.engines.vllm_process import VllmProcess, device_of, installed
from llmshrink_eval.errors import EvalError
from llmshrink_eval.model import model_limit
from llmshrink_eval.options import SHOWN_TOKENS, SPEED_NEW, SPEED_PROMPT, ModelSpec, Running
from llmshrink_eval.progress import Progress
from llmshrink_eval.results import Generation
from llmshrink_eval.sidefiles import check_generation

if TYPE_CHECKING:
    from llmshrink_eval.passes import Pass
    from llmshrink_eval.protocol import Windows
    from llmshrink_eval.tasks import TaskOptions, TaskRun

ROOM = 8192
"""Tokens that a request may have where the model reads more: the cache must hold one whole."""
CACHE_BYTES = 1 << 30
SLACK = 256
"""Tokens: the cache comes in blocks, the largest of which are of 128."""
DTYPES = ("float32", "bfloat16", "float16")
NOT_IN_FLOAT16 = ("gemma2", "gemma3", "gemma3_text", "glm4")
"""Architectures that vLLM refuses to compute in float16, which their numbers outgrow."""


class VllmEngine:
    """One model. spec, running: what to load and how. tokenizer: its own."""

    method = "full"

    def __init__(self, spec: ModelSpec, running: Running, tokenizer: Any) -> None:
        from llmshrink_eval.configured import running_config

        if running.offload is not None:
            raise EvalError(
                "--offload: vLLM doesn't stream a model from disk; leave it out, or use --engine transformers"
            )
        build = installed()
        if build is not None and device_of(*build) != running.device.partition(":")[0]:
            raise EvalError(f"--device {running.device}: the vLLM of this environment runs on {device_of(*build)}")
        self._spec, self._running, self._tokenizer = spec, running, tokenizer
        self._config = running_config(spec.folder, trust_remote_code=running.trust_remote_code)
        self._limit = model_limit(self._config)
        self._dtype = self._chosen_dtype()
        self._process: VllmProcess | None = None
        self._room = 0

    @property
    def dtype(self) -> str:
        """What it computes in."""
        return self._dtype

    def cost(self, batch_sizes: Sequence[int]) -> dict[str, Any]:
        """Load it and time it: load_seconds, peak_rss_bytes, peak_vram_bytes, speed, as results.Cost has them.

        The memory is vLLM's process at its highest, with the cache that it sets aside at the start.
        """
        self.close()
        prompt_tokens = SPEED_PROMPT if self._limit is None else max(1, min(SPEED_PROMPT, self._limit - SPEED_NEW))
        found: dict[str, Any] = self._running_process().ask(
            "cost",
            batch_sizes=list(batch_sizes),
            prompt_tokens=prompt_tokens,
            new_tokens=SPEED_NEW,
            token=SPEED_TOKEN,
        )
        return found

    def finished(self, windows: Windows, folder: Path, *, keep: Path | None) -> Pass | None:
        """The whole pass, if an earlier run left it."""
        from llmshrink_eval.passes import finished

        return finished(windows, folder, keep=keep)

    def read(
        self, windows: Windows, *, keep: Path | None, against: Path | None, folder: Path, progress: Progress
    ) -> Pass:
        """Read every window; `passes.run_pass`, which runs in vLLM's process, says what the folders are."""
        from llmshrink_eval.engines.windows_file import save_windows

        process = self._running_process(windows.input_ids.shape[1])
        path = process.folder / "windows.safetensors"
        save_windows(windows, path)
        process.ask(
            "read",
            progress.step,
            windows=str(path),
            batch_size=self._running.batch_size,
            keep=None if keep is None else str(keep.absolute()),
            against=None if against is None else str(against.absolute()),
            folder=str(folder.absolute()),
        )
        found = self.finished(windows, folder, keep=keep)
        assert found is not None, folder
        return found

    def tasks(self, options: TaskOptions, progress: Progress) -> dict[str, TaskRun]:
        """Run lm-eval's tasks."""
        from llmshrink_eval.tasks import TaskRun

        folders = [str(folder.absolute()) for folder in options.folders]
        asked = {**dataclasses.asdict(options), "tasks_dir": folders}
        found = self._running_process().ask("tasks", progress.step, options=asked)
        return {name: TaskRun.from_dict(made) for name, made in found.items()}

    def generations(self, prompts: Sequence[str]) -> list[dict[str, Any]]:
        """Greedy continuations."""
        beginning = beginning_of(self._tokenizer, self._config.model_type, self._running.bos)
        asked = [beginning.of(self._tokenizer(prompt)["input_ids"]) for prompt in prompts]
        longest = max(map(len, asked))
        if self._limit is not None and longest >= self._limit:
            raise EvalError(f"--prompt: has {longest} tokens, the model reads {self._limit}; give a shorter one")
        limit = self._limit or longest + SHOWN_TOKENS
        room = [max(1, min(SHOWN_TOKENS, limit - len(ids))) for ids in asked]
        said = self._running_process(longest + SHOWN_TOKENS).ask(
            "generations", prompts=asked, new_tokens=room, stop=self._stops()
        )
        texts = [self._tokenizer.decode(ids, skip_special_tokens=True) for ids in said]
        return [Generation(prompt=prompt, text=text).model_dump() for prompt, text in zip(prompts, texts, strict=True)]

    def close(self) -> None:
        """Let the model go."""
        if self._process is not None:
            self._process.close()
        self._process = None

    def _running_process(self, longest: int = 0) -> VllmProcess:
        """vLLM with the model in it, and room for requests of `longest` tokens."""
        if self._process is not None and self._room < longest:
            self.close()
        if self._process is None:
            from llmshrink_eval.passes import BATCH_TOKENS

            room = max(ROOM, longest)
            self._room = room if self._limit is None else min(room, self._limit)
            self._process = VllmProcess(
                {
                    "model": str(self._spec.folder.absolute()),
                    "dtype": self._dtype,
                    # vLLM wants to decode a token after the last; it is never read.
                    "max_model_len": self._room + 1,
                    "batched_tokens": BATCH_TOKENS,
                    "kv_cache_bytes": self._cache_bytes(),
                    "trust_remote_code": self._running.trust_remote_code,
                }
            )
        return self._process

    def _cache_bytes(self) -> int:
        """A gibibyte, or more where one request of the full room needs it: keys and values of every layer."""
        text = self._config.get_text_config()
        attention: int = getattr(text, "num_attention_heads", None) or 1
        heads: int = getattr(text, "num_key_value_heads", None) or attention
        width: int = getattr(text, "head_dim", None) or text.hidden_size // attention
        layers: int = text.num_hidden_layers
        size = 4 if self._dtype == "float32" else 2
        return max(CACHE_BYTES, 2 * layers * heads * width * size * (self._room + SLACK))

    def _chosen_dtype(self) -> str:
        asked, compressed = self._running.dtype, getattr(self._config, "quantization_config", None) is not None
        if asked == "auto":
            asked = own_dtype(self._spec, self._running)
        if asked not in DTYPES:
            raise EvalError(f"--dtype {asked}: {', '.join(DTYPES[:-1])} or {DTYPES[-1]}")
        if compressed and (asked == "float32" or self._running.device == "cpu"):
            return "bfloat16" if self._config.model_type in NOT_IN_FLOAT16 else "float16"
        return "float32" if self._running.device == "cpu" else asked

    def _stops(self) -> list[int]:
        """Where the model itself says that it ends."""
        from transformers import GenerationConfig

        check_generation(self._spec.folder)
        try:
            ends = GenerationConfig.from_pretrained(self._spec.folder, local_files_only=True).eos_token_id
        except OSError:
            ends = self._config.get_text_config().eos_token_id
        return [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
