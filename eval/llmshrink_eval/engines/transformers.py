"""A model run by transformers, in this process. It is loaded when something is first asked of it, and let go after."""

from __future__ import annotations

import gc
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmshrink_eval.beginning import beginning_of
from llmshrink_eval.errors import EvalError
from llmshrink_eval.generation import follow
from llmshrink_eval.model import LoadOptions, load_model, model_limit
from llmshrink_eval.options import SHOWN_TOKENS, SPEED_NEW, SPEED_PROMPT, ModelSpec, Running
from llmshrink_eval.progress import Progress
from llmshrink_eval.results import Generation
from llmshrink_eval.running import Usage, measure_speed, read_once

if TYPE_CHECKING:
    from torch import Tensor

    from llmshrink_eval.passes import Pass
    from llmshrink_eval.protocol import Windows
    from llmshrink_eval.tasks import TaskOptions, TaskRun

SPEED_TOKEN = 10
"""Any token that isn't special in most vocabularies: what is read doesn't change how long it takes."""


class TransformersEngine:
    """One model. spec, running: what to load and how. tokenizer: its own."""

    method = "full"

    def __init__(self, spec: ModelSpec, running: Running, tokenizer: Any) -> None:
        import torch

        self._spec, self._running, self._tokenizer = spec, running, tokenizer
        dtype = getattr(torch, own_dtype(spec, running) if running.dtype == "auto" else running.dtype, None)
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise EvalError(f"--dtype {running.dtype}: float32, bfloat16 or float16")
        self._options = LoadOptions(running.device, dtype, running.offload, running.trust_remote_code)
        self._model: Any = None

    @property
    def dtype(self) -> str:
        """What it computes in."""
        return str(self._options.used_dtype).removeprefix("torch.")

    @property
    def loaded(self) -> Any:
        """The model of transformers."""
        if self._model is None:
            self._model = load_model(self._spec.folder, self._options, self._spec.loader)
        return self._model

    def cost(self, batch_sizes: Sequence[int]) -> dict[str, Any]:
        """load_seconds, peak_rss_bytes, peak_vram_bytes and speed, as results.Cost has them, in a process of its own
        (see `cost_process`)."""
        from llmshrink_eval.engines.cost_process import cost_process

        self.close()
        return cost_process().ask(self._spec, self._running, batch_sizes)

    def cost_here(self, batch_sizes: Sequence[int]) -> dict[str, Any]:
        """The same in this process: load it, let it read a prompt, and time it at the batch sizes, if any."""
        import torch

        with Usage() as usage:
            started = time.perf_counter()
            model = self.loaded
            load_seconds = time.perf_counter() - started
            limit = model_limit(model)
            prompt_tokens = SPEED_PROMPT if limit is None else max(1, min(SPEED_PROMPT, limit - SPEED_NEW))
            prompt = torch.full((1, prompt_tokens), SPEED_TOKEN)
            read_once(model, prompt)
            speed = measure_speed(model, prompt, batch_sizes=batch_sizes, new_tokens=SPEED_NEW)
        return {
            "load_seconds": load_seconds,
            "peak_rss_bytes": usage.peak_rss_bytes,
            "peak_vram_bytes": usage.peak_vram_bytes,
            "speed": [one.model_dump() for one in speed],
        }

    def finished(self, windows: Windows, folder: Path, *, keep: Path | None) -> Pass | None:
        """The whole pass, if an earlier run left it."""
        from llmshrink_eval.passes import finished

        return finished(windows, folder, keep=keep)

    def read(
        self, windows: Windows, *, keep: Path | None, against: Path | None, folder: Path, progress: Progress
    ) -> Pass:
        """Read every window; `passes.run_pass` says what the folders are."""
        from llmshrink_eval.passes import run_pass

        return run_pass(
            self.loaded,
            windows,
            self._tokenizer,
            batch_size=self._running.batch_size,
            keep=keep,
            against=against,
            folder=folder,
            on_progress=lambda done, total, nats: progress.step(done, total, f"{nats:.4f} nats/token"),
        )

    def tasks(self, options: TaskOptions, progress: Progress) -> dict[str, TaskRun]:
        """Run lm-eval's tasks."""
        from llmshrink_eval.tasks import run_tasks

        return run_tasks(self.loaded, self._tokenizer, options, progress.step)

    def generations(self, prompts: Sequence[str]) -> list[dict[str, Any]]:
        """Greedy continuations."""
        import torch

        from llmshrink_eval.passes import input_device

        beginning = beginning_of(self._tokenizer, self.loaded.config.model_type, self._running.bos)
        follow(self.loaded)
        found = []
        for prompt in prompts:
            read = beginning.of(self._tokenizer(prompt)["input_ids"])
            ids: Tensor = torch.tensor([read], device=input_device(self.loaded))
            limit = model_limit(self.loaded)
            if limit is not None and ids.shape[1] >= limit:
                raise EvalError(f"--prompt: has {ids.shape[1]} tokens, the model reads {limit}; give a shorter one")
            room = SHOWN_TOKENS if limit is None else max(1, min(SHOWN_TOKENS, limit - ids.shape[1]))
            with torch.inference_mode(), warnings.catch_warnings():
                # A streamed model has no device of its own; what it reads goes where accelerate computes.
                warnings.filterwarnings("ignore", message=r"You are calling \.generate\(\) with the `input_ids`")
                said = self.loaded.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=room,
                    do_sample=False,
                    pad_token_id=0,
                    use_cache=True,
                    return_dict_in_generate=False,
                )
            text = self._tokenizer.decode(said[0, ids.shape[1] :], skip_special_tokens=True)
            found.append(Generation(prompt=prompt, text=text).model_dump())
        return found

    def close(self) -> None:
        """Let the model go."""
        self._model = None
        gc.collect()


def own_dtype(spec: ModelSpec, running: Running) -> str:
    """What the model's config says that it computes in; float32 where it says nothing."""
    from llmshrink_eval.configured import running_config

    config = running_config(spec.folder, trust_remote_code=running.trust_remote_code)
    return str(getattr(config.get_text_config(), "dtype", None) or "float32").removeprefix("torch.")
