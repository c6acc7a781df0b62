"""What a model costs to run: time and memory of a stretch of work, and tokens per second.

Memory: it is the whole process's: interpreter, libraries, weights, the checkpoint's mapped pages, activations. An
evaluation measures each model in a process of its own (`engines.cost_process`), since neither what an earlier model
left behind nor what the first one imported may count. `Usage` can be used within one process too, whose high-water
mark in the kernel never falls. (It can be reset by writing to /proc/self/clear_refs; then everybody else who reads it,
`time -v` among them, is told too little.) So the resident memory is sampled every 10 ms while the work runs, and where
the mark itself rose meanwhile, the mark is the peak, exactly. What the sampling can miss is what came and went within
10 ms.

A process that has run no model yet imports, allocates and starts a good deal with its first one. `warm_up` has that
behind it before a clock starts.

Speed: prefill is one forward over the prompt that keeps the last position's logits, as generation does; decode is one
forward for each new token over the model's own cache. The next token is taken from the prompt instead of the logits,
so that choosing it costs nothing. A model that gives no cache reads everything anew for each token, and is timed so.
"""

from __future__ import annotations

import gc
import inspect
import statistics
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import psutil

from llmshrink_eval.errors import EvalError, EvalFailed
from llmshrink_eval.results import Speed

if TYPE_CHECKING:
    import torch
    from torch import Tensor

SAMPLE_SECONDS = 0.01
REPEATS = 3
"""Timed runs of each batch size, after one that isn't timed; the median counts."""


class Usage:
    """Time and memory of the work inside a `with`: load and run one model in it.

    After it: seconds (wall), peak_rss_bytes, and peak_vram_bytes (None without CUDA; torch's own count, all devices
    together). Stretches must not be nested on CUDA, where the counter is reset at the start of each.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self.peak_rss_bytes = 0
        self.peak_vram_bytes: int | None = None

    def __enter__(self) -> Self:
        gc.collect()  # what the model before this one has left behind isn't this one's
        for device in _cuda_devices():
            _cuda().reset_peak_memory_stats(device)
        self._mark = high_water()
        self._done = threading.Event()
        self._sampler = threading.Thread(target=self._sample, name="memory sampler", daemon=True)
        self._started = time.perf_counter()
        self._sampler.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = time.perf_counter() - self._started
        self._done.set()
        self._sampler.join()
        mark = high_water()
        if mark is not None and self._mark is not None and mark > self._mark:
            self.peak_rss_bytes = mark
        devices = _cuda_devices()
        if devices:
            self.peak_vram_bytes = sum(_cuda().max_memory_allocated(device) for device in devices)

    def _sample(self) -> None:
        process = psutil.Process()
        while True:
            self.peak_rss_bytes = max(self.peak_rss_bytes, process.memory_info().rss)
            if self._done.wait(SAMPLE_SECONDS):
                return


def warm_up(device: str, *, offload: bool) -> None:
    """Load and run a model of a few kilobytes, by the way that all models are loaded and run.

    device: as torch spells it. offload: whether models are streamed from disk. The random numbers of the process are
    not touched.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from llmshrink_eval.model import LoadOptions, load_model, quiet

    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    with tempfile.TemporaryDirectory(prefix="llmshrink-first-") as folder:
        with quiet(), torch.random.fork_rng(devices=[]):
            LlamaForCausalLM(config).save_pretrained(folder)
        model = load_model(folder, LoadOptions(device, offload=Path(folder) / "offload" if offload else None))
        measure_speed(model, torch.ones(1, 16, dtype=torch.int64), new_tokens=2, repeats=1)


def high_water() -> int | None:
    """The process's high-water mark of resident memory in bytes, where the kernel keeps one that can be read."""
    try:
        with open("/proc/self/status", encoding="ascii", errors="replace") as status:
            line = next((line for line in status if line.startswith("VmHWM:")), None)
    except OSError:
        return None
    return None if line is None else int(line.split()[1]) * 1024


def _cuda() -> Any:
    import torch

    return torch.cuda


def _cuda_devices() -> range:
    """Devices in use: asking others would start a context on them."""
    cuda = _cuda()
    return range(cuda.device_count()) if cuda.is_available() and cuda.is_initialized() else range(0)


def measure_speed(
    model: Any, prompt: Tensor, *, batch_sizes: Sequence[int] = (1,), new_tokens: int = 16, repeats: int = REPEATS
) -> tuple[Speed, ...]:
    """Prefill and decode speed of a transformers causal language model, medians over `repeats`.

    prompt: token ids, int64 [rows, length], repeated where a batch has more rows. new_tokens: decoded one at a time
    after it; at least 1. Raises EvalError when prompt and new tokens don't fit the model's positions, EvalFailed when
    a batch doesn't fit the memory.
    """
    import torch

    assert prompt.ndim == 2 and prompt.numel() and new_tokens >= 1 and repeats >= 1 and min(batch_sizes, default=1) >= 1
    from llmshrink_eval.passes import input_device

    length = prompt.shape[1]
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if isinstance(limit, int) and length + new_tokens > limit:
        raise EvalError(
            f"the speed of {length} + {new_tokens} tokens was asked for, and the model has {limit} positions;"
            " ask for fewer"
        )
    found = []
    for batch_size in batch_sizes:
        rows = prompt.repeat(-(-batch_size // len(prompt)), 1)[:batch_size].to(input_device(model))
        following = rows[:, torch.arange(new_tokens, device=rows.device) % length]
        try:
            with torch.inference_mode():
                _timed(model, rows, following[:, :2])
                times = [_timed(model, rows, following) for _ in range(repeats)]
        except (torch.OutOfMemoryError, MemoryError) as error:
            raise EvalFailed(f"no memory for {batch_size} sequences of {length + new_tokens} tokens") from error
        prefill, decode = (statistics.median(column) for column in zip(*times, strict=True))
        found.append(
            Speed(
                batch_size=batch_size,
                prompt_tokens=length,
                new_tokens=new_tokens,
                prefill_tokens_per_second=batch_size * length / prefill,
                decode_tokens_per_second=batch_size * new_tokens / decode,
            )
        )
    return tuple(found)


def read_once(model: Any, prompt: Tensor) -> None:
    """One forward over a prompt that isn't timed: what the model needs to run at all shows in the memory.

    prompt: token ids, int64 [rows, length].
    """
    import torch

    from llmshrink_eval.passes import input_device

    with torch.inference_mode():
        _timed(model, prompt.to(input_device(model)), prompt[:, :0])


def _timed(model: Any, rows: Tensor, following: Tensor) -> tuple[float, float]:
    """Seconds of the prefill of `rows`, and of decoding the tokens `following` after them, one after another."""
    import torch

    keep = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    started = _now(rows.device)
    output = model(rows, use_cache=True, **keep)
    prefilled = _now(rows.device)
    name = next((name for name in ("past_key_values", "cache_params") if getattr(output, name, None) is not None), None)
    for step in range(following.shape[1]):
        if name is None:
            model(torch.cat([rows, following[:, : step + 1]], dim=1), **keep)
        else:
            output = model(following[:, step : step + 1], use_cache=True, **{name: getattr(output, name)}, **keep)
    return prefilled - started, _now(rows.device) - prefilled


def _now(device: torch.device) -> float:
    """Seconds on a clock, when everything asked of the device is done."""
    if device.type == "cuda":
        _cuda().synchronize(device)
    return time.perf_counter()
