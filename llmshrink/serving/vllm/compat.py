"""All of vLLM's internals that the plugin stands on, named here and nowhere else; each is imported when asked for.

Read from vLLM 0.32.0 and 0.33.0. When a version moves one of them, this file is what changes; until it does, one line
is logged and vLLM serves everything else as if llmshrink weren't installed. They are imported late because the plugin
runs in vLLM's API process too, which needs neither layers nor kernels: those take a second of CPU to import.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

KERNELS = "vllm.model_executor.kernels.linear"
CPU_ATTENTION = "vllm.v1.attention.backends.cpu_attn"
_SCALED = f"{KERNELS}.scaled_mm.cpu"
_NARROWED = "_narrowed_by_llmshrink"
_OPS = "vllm._custom_ops"
_QUANTIZATION = "vllm.model_executor.layers.quantization"
_LINEAR = "vllm.model_executor.layers.linear"
_PARAMETER = "vllm.model_executor.parameter"
_WHERE = {
    "BasevLLMParameter": _PARAMETER,
    "CPUAttentionBackendImpl": CPU_ATTENTION,
    "CPUInt8ScaledMMLinearKernel": KERNELS,
    "CPUWNA16LinearKernel": KERNELS,
    "ChannelQuantScaleParameter": _PARAMETER,
    "GroupQuantScaleParameter": _PARAMETER,
    "Int8ScaledMMLinearKernel": KERNELS,
    "LinearBase": _LINEAR,
    "LinearMethodBase": _LINEAR,
    "MPLinearKernel": KERNELS,
    "ModelWeightParameter": _PARAMETER,
    "PlatformEnum": "vllm.platforms.interface",
    "QuantizationConfig": f"{_QUANTIZATION}.base_config",
    "UnquantizedLinearMethod": _LINEAR,
    "_POSSIBLE_INT8_KERNELS": KERNELS,
    "_POSSIBLE_KERNELS": KERNELS,
    "create_onednn_scaled_mm": _OPS,
    "onednn_scaled_mm": _OPS,
    "register_linear_kernel": KERNELS,
    "register_quantization_config": _QUANTIZATION,
    "register_weight_loader_v2_supported_method": _LINEAR,
    "replace_parameter": f"{_QUANTIZATION}.utils",
    "scalar_types": "vllm.scalar_type",
}


def __getattr__(name: str) -> Any:
    """One of vLLM's internals. Raises ImportError or AttributeError where this vLLM doesn't have it there."""
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_WHERE[name]), name)


def offer_kernel(kernel: type, *, first: bool) -> None:
    """Let vLLM's choice of mixed-precision kernels know one more, on CUDA and CPUs; once, however often it is asked.

    first: before vLLM's own, which is then asked only for what this one refuses; else after them.
    """
    possible, platforms = __getattr__("_POSSIBLE_KERNELS"), __getattr__("PlatformEnum")
    for platform in (platforms.CUDA, platforms.CPU):
        if kernel in possible.get(platform, ()):
            continue
        __getattr__("register_linear_kernel")(kernel, platform, "mp")
        if first:
            possible[platform].insert(0, possible[platform].pop())


def offer_int8_kernel(kernel: type) -> None:
    """Let vLLM's choice of kernels for products of int8 on CPUs know one more, after its own; once."""
    cpu = __getattr__("PlatformEnum").CPU
    if kernel not in __getattr__("_POSSIBLE_INT8_KERNELS").get(cpu, ()):
        __getattr__("register_linear_kernel")(kernel, cpu, "int8")


def narrow_amx(packs: Callable[[int, Any], bool]) -> None:
    """Have vLLM take a weight to its AMX kernels for int8 only where `packs` (outputs, dtype) says so too; once."""
    scaled = import_module(_SCALED)
    own: Callable[[int, int, Any], bool] = scaled.check_cpu_sgl_kernel
    if hasattr(own, _NARROWED):
        return

    def narrowed(n: int, k: int, dtype: Any) -> bool:
        return own(n, k, dtype) and packs(n, dtype)

    setattr(narrowed, _NARROWED, True)
    scaled.check_cpu_sgl_kernel = narrowed  # type: ignore[attr-defined]


def has_own_int4() -> bool:
    """Whether the extension that vLLM's CPU build loaded for this CPU has the int4 kernel."""
    import torch

    import_module(_OPS)  # which loads the extension
    return hasattr(torch.ops._C, "cpu_gemm_wna16")


def once_imported(module: str, then: Callable[[], None]) -> None:
    """Call `then` as soon as `module` has been imported: now, if it has. `then` must not raise."""
    if module in sys.modules:
        then()
    elif not any(isinstance(finder, _Watch) and finder.module == module for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watch(module, then))


class _Watch(MetaPathFinder):
    """Finds one module as everyone would, and has its loader say when it's done. Gone after that."""

    def __init__(self, module: str, then: Callable[[], None]) -> None:
        self.module, self._then = module, then

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The module's own spec, its loader wrapped; None for every other module."""
        if fullname != self.module:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Announcing(spec.loader, self._then)
        return spec


class _Announcing(Loader):
    """A loader that calls something after the module ran, and is the module's own loader from then on."""

    def __init__(self, loader: Loader, then: Callable[[], None]) -> None:
        self._loader, self._then = loader, then

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """As the module's own."""
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """Run the module, then say so."""
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        self._then()
