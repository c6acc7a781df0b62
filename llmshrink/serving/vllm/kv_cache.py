"""Keys and values rounded for the cache of FP8 of vLLM's CPU build, which cuts them off towards zero (0.32).

It is handed numbers that it can't but cut off to the nearest one: each number of the cache, a thirty-second of itself
further from zero. That is less than half a step, so that a build which rounds does the same, and more than what the
model's dtype adds by its own rounding. Only where the checkpoint has scales of its own (a `kv_cache_scheme`): what a
user asks of other models by `--kv-cache-dtype` stays as vLLM has it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from llmshrink.serving.vllm import compat
from llmshrink.weights.kv_cache import cached

INSIDE = 1 + 2**-5
_DONE = "_rounded_by_llmshrink"


def uncut(x: Tensor, scale: float) -> Tensor:
    """What `weights.kv_cache.cut_off` makes into what `cached` makes of `x`, in the dtype of `x`."""
    nearest = cached(x, torch.tensor([scale], device=x.device)).to(torch.float32)
    return (nearest * INSIDE).to(x.dtype)


def mend() -> None:
    """Let the CPU build's attention round what it caches; once, however often it is asked."""
    attention = compat.CPUAttentionBackendImpl
    own: Callable[..., None] = attention.do_kv_cache_update
    if hasattr(own, _DONE):
        return

    @wraps(own)
    def update(self: Any, layer: Any, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> None:
        declared = getattr(getattr(layer, "quant_config", None), "kv_cache_scheme", None)
        if declared and self.kv_cache_dtype in ("fp8", "fp8_e4m3"):
            key, value = uncut(key, layer._k_scale_float), uncut(value, layer._v_scale_float)
        own(self, layer, key, value, *args, **kwargs)

    setattr(update, _DONE, True)
    attention.do_kv_cache_update = update
