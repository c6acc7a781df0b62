"""llmshrink in vLLM: what the entry point `vllm.general_plugins` calls, in every vLLM process of the machine.

Most of those serve models that have nothing to do with llmshrink, so importing this file and calling `register` take
milliseconds: of vLLM only what is there already is imported, and our kernel is offered when, and where, vLLM's own are
loaded. It may be called again, and never raises: what goes wrong is one line in the log, and a checkpoint that needs
the plugin is then refused by vLLM itself.

    VLLM_PLUGINS=""                 vLLM's own switch: no plugins
    LLMSHRINK_VLLM_KERNELS=first    our kernel for compressed-tensors' `pack-quantized` before vLLM's own, not after
    LLMSHRINK_VLLM_KERNELS=off      without it, and on CPUs int4, int8 and caches of FP8 as vLLM has them; checkpoints
                                    in llmshrink's own format are served all the same
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable

NAME = "llmshrink"
"""The entry point, as VLLM_PLUGINS lists it, and the quant_method of llmshrink's own format."""
GROUP = "vllm.general_plugins"
KERNELS = "LLMSHRINK_VLLM_KERNELS"
KERNELS_TAKEN = ("last", "first", "off")
UNOFFERED = "its kernel for 2, 3, 4 and 8 bits can't be used"
UNASKED = "4 bits without AVX-512 and int8 without VNNI stay as vLLM has them"
UNMENDED = "keys and values cached in FP8 are cut off on CPUs"

# Below vLLM's own logger, whose handlers it shares.
_logger = logging.getLogger("vllm.plugins.llmshrink")


def register() -> None:
    """Register the quantization config `llmshrink`, offer our kernels, mend what vLLM's CPU build has wrong."""
    _safely("its format can't be served", _config)
    _safely(UNOFFERED, _kernels)
    _safely(UNMENDED, _cache)


def kernels_place(said: str | None) -> str:
    """Where our kernel stands among vLLM's, from LLMSHRINK_VLLM_KERNELS. Raises ValueError for what isn't a place."""
    if (said or KERNELS_TAKEN[0]) not in KERNELS_TAKEN:
        raise ValueError(f"{KERNELS}={said}: one of {', '.join(KERNELS_TAKEN)} is expected")
    return said or KERNELS_TAKEN[0]


def _config() -> None:
    from llmshrink.serving.vllm import config

    config.register()


def _kernels() -> None:
    place = kernels_place(os.environ.get(KERNELS))
    if place == "off":
        return
    from llmshrink.serving.vllm import compat

    def offer() -> None:
        from llmshrink.serving.vllm.wna16 import LlmshrinkLinearKernel

        compat.offer_kernel(LlmshrinkLinearKernel, first=place == "first")

    def mend() -> None:
        from llmshrink.serving.vllm import cpu

        cpu.mend()

    def loaded() -> None:
        _safely(UNOFFERED, offer)
        _safely(UNASKED, mend)

    compat.once_imported(compat.KERNELS, loaded)


def _cache() -> None:
    if kernels_place(os.environ.get(KERNELS)) == "off":
        return
    from llmshrink.serving.vllm import compat

    def mend() -> None:
        from llmshrink.serving.vllm import kv_cache

        kv_cache.mend()

    compat.once_imported(compat.CPU_ATTENTION, lambda: _safely(UNMENDED, mend))


def _safely(otherwise: str, step: Callable[[], None]) -> None:
    try:
        step()
    except Exception as error:
        line = " ".join(str(error).split())
        _logger.warning("llmshrink's plugin: %s: %s: %s", otherwise, type(error).__name__, line)
