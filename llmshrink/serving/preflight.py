"""Can the vLLM of this environment serve this checkpoint on this device? Asked before half a minute of starting it.

The engine, the device, the plugin where the checkpoint needs it, the model's attention, and every compressed layer as
vLLM will make it: its parts stored alike, its bits, groups and shape taken by one of vLLM's kernels, which are fewer on
some CPUs, or by the plugin's.
What can't be judged from here (other tools' formats, patterns for names, architectures that llmshrink doesn't know) is
left to vLLM, and a note says so.
"""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from llmshrink.checkpoint import files
from llmshrink.checkpoint.index import CheckpointIndex
from llmshrink.errors import CheckpointError, LlmshrinkError, SourceError
from llmshrink.formats import bitsandbytes, compressed_tensors, kv_cache, sparse24
from llmshrink.formats.compressed_tensors import GroupedIntScheme
from llmshrink.formats.eight_bit import EightBitScheme
from llmshrink.formats.servable import (
    CPU_NEEDS,
    FP8_CACHE,
    FP8_CACHE_CUT,
    Verdict,
    attention,
    eight_bit,
    plugin_eight_bit,
    plugin_kernel,
    servable,
    sparse24_kernel,
)
from llmshrink.formats.sparse24 import Sparse24Scheme
from llmshrink.model.families import FAMILIES, Family
from llmshrink.serving.fused import one_scheme
from llmshrink.serving.launch import INSTALL_CPU, INSTALL_CUDA, Installed, install_line, installed
from llmshrink.serving.options import EngineOptions
from llmshrink.serving.processor import Processor, processor_here
from llmshrink.serving.vllm.plugin import GROUP, KERNELS, NAME, kernels_place

BNB_PLUGIN = "vllm_bnb_plugin"
NO_BNB = "vLLM has had no bitsandbytes of its own since 0.28, and vllm-bnb-plugin, which brings it, isn't here"
NO_FP8_CACHE = (
    "keys and values are cached in FP8, which vLLM's CPU build does with AVX-512 alone, and this CPU has none"
)
SLOW_DENSE = (
    "this CPU has no instructions for bfloat16 and multiplies in 16 bits several times as slowly as in float32: where "
    "memory holds twice the weights, add --dtype float32"
)
SLOW_FLOAT16 = (
    "on this CPU llmshrink's plugin multiplies 4 bits, and in float16 several times as slowly as in bfloat16: add "
    "--dtype bfloat16"
)
OLDEST = (0, 32)
"""The vLLM whose kernels and plugin interface are known."""
OLDEST_CAPABILITY = (8, 0)
"""Of the plugin's kernels: Ampere."""

FLOAT32 = ("float32", "float")
"""What vLLM's --dtype calls it."""

Scheme = GroupedIntScheme | EightBitScheme | Sparse24Scheme


class ServeError(LlmshrinkError):
    """This vLLM can't serve this checkpoint on this device."""


@dataclass(frozen=True)
class Plugin:
    """llmshrink's plugin as vLLM will see it. why: None when it is loaded, else why not and what to do.

    kernel: whether its kernel for grouped integers is offered, and the CPU build's cache of FP8 mended.
    """

    why: str | None
    kernel: bool


@dataclass(frozen=True)
class Passed:
    """A checkpoint that can be served. device: "the CPU" or a GPU's name. notes: what a user should know,
    and what wasn't checked.
    """

    engine: Installed
    device: str
    notes: tuple[str, ...] = ()


def check(checkpoint: Path, asked: EngineOptions) -> Passed:
    """Raise ServeError, one line with the reason and the way out, where the checkpoint can't be served."""
    config = read_config(checkpoint)
    engine, device = engine_here()
    plugin = plugin_here(os.environ)
    target = "vllm-cpu" if engine.cpu else "vllm-cuda"
    text = config.get("text_config") if isinstance(config.get("text_config"), dict) else config
    quantization = config.get("quantization_config")
    processor = processor_here() if engine.cpu else Processor()
    cached = fp8_cache(quantization, asked)
    refused = _attention(text or {}, asked.tp, fp8_cache=cached)
    if target in refused:
        ways = _ways_out(target, asked.tp, cuda="vllm-cuda" not in refused)
        raise ServeError(f"{checkpoint}: {refused[target]}; {ways}")
    if cached and engine.cpu and not caches_fp8():
        raise ServeError(f"{checkpoint}: {NO_FP8_CACHE}; {_ways_out(target, asked.tp, cuda=True)}")
    if quantization is None:
        slow = not processor.multiplies_bfloat16 and asked.dtype not in FLOAT32
        return Passed(engine, device, (SLOW_DENSE,) if slow else ())
    if quantization == {}:
        raise ServeError(
            f"{checkpoint}: the quantization_config of config.json is empty, which vLLM takes for a method without a "
            "name; remove it from the file"
        )
    if not isinstance(quantization, dict):
        raise ServeError(f"{checkpoint}: the quantization_config of config.json is no mapping; copy the folder again")
    notes = check_layers(checkpoint, config, quantization, asked, target, plugin, processor)
    if cached:
        notes += [FP8_CACHE, *([FP8_CACHE_CUT] if engine.cpu and not plugin.kernel else [])]
    return Passed(engine, device, tuple(notes))


def read_config(checkpoint: Path) -> dict[str, Any]:
    """config.json of a folder, as `files.read_config` reads it; ServeError where it can't be."""
    try:
        return files.read_config(checkpoint)
    except SourceError as error:
        raise ServeError(f"{error} (hf download gets one)") from error


def engine_here() -> tuple[Installed, str]:
    """The vLLM and the name of the device that it will run on; ServeError where there isn't one, or it is too old."""
    import torch

    engine = installed()
    if engine is None:
        raise ServeError(f"vLLM isn't installed in this environment; install it beside llmshrink: {install_line()}")
    numbers = re.match(r"(\d+)\.(\d+)", engine.version)
    if numbers is not None and (int(numbers[1]), int(numbers[2])) < OLDEST:
        install = INSTALL_CPU if engine.cpu else INSTALL_CUDA
        raise ServeError(f"vLLM {engine.version} is older than {'.'.join(map(str, OLDEST))}; update it: {install}")
    if engine.cpu:
        return engine, "the CPU"
    if not torch.cuda.is_available():
        raise ServeError(
            f"vLLM {engine.version} is built for GPUs and torch sees none here; show it one (nvidia-smi,"
            f" CUDA_VISIBLE_DEVICES), or in another environment take vLLM's CPU build: {INSTALL_CPU}"
        )
    return engine, torch.cuda.get_device_name()


def plugin_here(environment: Mapping[str, str]) -> Plugin:
    """Whether vLLM's processes will load the plugin. Raises ServeError for a LLMSHRINK_VLLM_KERNELS that isn't one."""
    try:
        place = kernels_place(environment.get(KERNELS))
    except ValueError as error:
        raise ServeError(str(error)) from error
    allowed = environment.get("VLLM_PLUGINS")
    why = None
    if not any(point.name == NAME for point in entry_points(group=GROUP)):
        why = "vLLM doesn't see llmshrink's plugin; install llmshrink into this environment again (pip install -e .)"
    elif allowed is not None and NAME not in allowed.split(","):
        why = f"VLLM_PLUGINS={allowed!r} keeps llmshrink's plugin out; add {NAME} to it, or unset it"
    return Plugin(why, why is None and place != "off")


def check_layers(
    checkpoint: Path,
    config: Mapping[str, Any],
    quantization: Mapping[str, Any],
    asked: EngineOptions,
    target: str,
    plugin: Plugin,
    processor: Processor,
) -> list[str]:
    """Hold every compressed layer to the kernels; returns what a user should know and what wasn't checked.

    target: "vllm-cpu" or "vllm-cuda". processor: the CPU that serves, where it is the first.
    """
    sparsity = quantization.get("sparsity_config")
    if sparsity and sparsity.get("format") != "dense":
        raise ServeError(
            f"{checkpoint} has a sparsity_config, with which no vLLM since 0.19 starts; compress the original again"
            " with llmshrink, whose formats need none"
        )
    method, form = quantization.get("quant_method"), quantization.get("format")
    own = method == sparse24.METHOD
    if method == bitsandbytes.METHOD and importlib.util.find_spec(BNB_PLUGIN) is None:
        raise ServeError(f"{checkpoint}: {NO_BNB}; run it with llmshrink generate, or compress the original again")
    if not own and (method != "compressed-tensors" or form not in compressed_tensors.FORMATS):
        return [f"quantized by {method}{f', format {form}' if form else ''}: whether vLLM serves that wasn't checked"]
    if own and plugin.why is not None:
        raise ServeError(f"{checkpoint} is in llmshrink's own format, and {plugin.why}")
    if asked.dtype in FLOAT32:
        raise ServeError(f"{checkpoint}: vLLM's kernels for compressed weights compute in 16 bits; --dtype float16")
    try:
        schemes = sparse24.schemes(quantization) if own else compressed_tensors.schemes(quantization)
    except CheckpointError as error:
        if own:
            raise ServeError(f"{checkpoint}: {error}") from error
        return [f"the layers weren't checked: {error}"]
    family = FAMILIES.get(str(config.get("model_type")))
    layers = _Layers(checkpoint, schemes, family, asked.tp, target, plugin, processor)
    notes = [] if family else [f"fused layers weren't checked: architecture {config.get('model_type')!r} isn't known"]
    notes += layers.check()
    four = any(isinstance(scheme, GroupedIntScheme) and scheme.bits == 4 for scheme in schemes.values())
    if four and "AVX-512" in processor.lacks and _computes_in_float16(config, asked):
        notes.append(SLOW_FLOAT16)
    return notes


@dataclass(frozen=True)
class _Layers:
    """The compressed layers of a checkpoint, and what is asked of them."""

    checkpoint: Path
    schemes: Mapping[str, Scheme]
    family: Family | None
    tp: int
    target: str
    plugin: Plugin
    processor: Processor

    def check(self) -> list[str]:
        """Raise ServeError naming the first layer of each fault; returns notes."""
        faults: dict[str, list[str]] = {}
        ways: set[str] = set()
        needs: set[str] = set()
        fused = self.family.fused if self.family else {}
        for layer, parts in self._fused().items():
            try:
                scheme = one_scheme(self.schemes, layer, fused.get)
            except CheckpointError as error:
                raise ServeError(f"{self.checkpoint}: {error}") from error
            assert scheme is not None
            why, package = self._refusal(scheme, layer, parts)
            if why is not None:
                faults.setdefault(why, []).append(layer)
                ways.add(self._ways_out(scheme, layer, parts))
            elif package is not None:
                needs.add(package)
        if faults:
            told = "; ".join(f"{_named(layers)}: {why}" for why, layers in faults.items())
            raise ServeError(f"{self.checkpoint}: {told}; {min(ways, key=len)}")
        return [f"some layers need {package}" for package in sorted(needs)]

    def _fused(self) -> dict[str, list[tuple[int, int]]]:
        """vLLM's layers, each with the shapes of its parts."""
        layers: dict[str, list[tuple[int, int]]] = {}
        with CheckpointIndex.open(self.checkpoint) as index:
            for name, scheme in self.schemes.items():
                key = f"{name}.weight" if isinstance(scheme, EightBitScheme) else f"{name}.weight_shape"
                if key not in index:
                    raise ServeError(f"{self.checkpoint}: no {key} there, which config.json promises; copy it again")
                rows, columns = index.entry(key).shape if key.endswith(".weight") else index.read(key).tolist()
                layer = (self.family.fused_name(name) if self.family else None) or name
                layers.setdefault(layer, []).append((rows, columns))
        return layers

    def _refusal(self, scheme: Scheme, layer: str, parts: list[tuple[int, int]]) -> tuple[str | None, str | None]:
        """(why no kernel takes a layer or None, the optional package that it takes or None)."""
        parallel = self.family.parallel(layer) if self.family else None
        if isinstance(scheme, Sparse24Scheme):
            return sparse24_kernel(scheme.group_size, parts, self.tp, parallel), None
        verdict = self._verdict(scheme, layer, parts)
        why = verdict.engines[self.target]
        if why is None and self.target == "vllm-cpu" and verdict.cpu in self.processor.lacks:
            why = f"{CPU_NEEDS[verdict.cpu]}, and this CPU has none"
        if why is None and verdict.needs is None:
            return None, None
        if self.plugin.kernel and self._plugin_takes(scheme, layer, parts):
            return None, None
        if why is None and importlib.util.find_spec("humming") is None:
            return f"{scheme.bits} bits need {verdict.needs}, which aren't installed", None
        return why, verdict.needs

    def _verdict(self, scheme: GroupedIntScheme | EightBitScheme, layer: str, parts: list[tuple[int, int]]) -> Verdict:
        parallel = self.family.parallel(layer) if self.family else None
        if isinstance(scheme, EightBitScheme):
            return eight_bit(scheme.activations, parts, self.tp, parallel)
        return servable(scheme.bits, scheme.group_size, scheme.symmetric, parts, self.tp, parallel)

    def _plugin_takes(
        self, scheme: GroupedIntScheme | EightBitScheme, layer: str, parts: list[tuple[int, int]]
    ) -> bool:
        parallel = self.family.parallel(layer) if self.family else None
        if isinstance(scheme, EightBitScheme):
            return self.target == "vllm-cpu" and plugin_eight_bit(scheme.activations, parts, self.tp, parallel) is None
        return plugin_kernel(scheme.bits, scheme.group_size, scheme.symmetric, parts, self.tp, parallel) is None

    def _ways_out(self, scheme: Scheme, layer: str, parts: list[tuple[int, int]]) -> str:
        """What a user can do about a layer that no kernel takes."""
        if isinstance(scheme, Sparse24Scheme):
            return _ways_out(self.target, self.tp, cuda=False)
        verdict = self._verdict(scheme, layer, parts)
        ways = _ways_out(self.target, self.tp, cuda=verdict.engines["vllm-cuda"] is None)
        if not self.plugin.kernel and self._plugin_takes(scheme, layer, parts):
            return f"llmshrink's kernel takes it: {self.plugin.why or f'unset {KERNELS}'}; or {ways}"
        return ways


def caches_fp8() -> bool:
    """Whether this CPU has what the cache of FP8 of vLLM's CPU build takes."""
    import torch

    return bool(torch.cpu._is_avx512_supported() or torch.cpu._is_amx_tile_supported())


def _computes_in_float16(config: Mapping[str, Any], asked: EngineOptions) -> bool:
    """Whether vLLM computes in float16: asked to, or by config.json."""
    if asked.dtype not in (None, "auto"):
        return asked.dtype in ("float16", "half")
    return str(config.get("dtype", config.get("torch_dtype"))) == "float16"


def fp8_cache(quantization: object, asked: EngineOptions) -> bool:
    """Whether config.json has keys and values cached in FP8 and vLLM's options don't; of other caches vLLM decides."""
    if asked.kv_cache_dtype not in (None, "auto", "fp8", "fp8_e4m3"):
        return False
    try:
        return isinstance(quantization, dict) and kv_cache.rounds(quantization)
    except CheckpointError:
        return False


def _attention(config: Mapping[str, Any], tp: int, *, fp8_cache: bool) -> dict[str, str]:
    """The engines that can't compute the model's attention, and why; none where config.json doesn't tell."""
    heads, hidden = config.get("num_attention_heads"), config.get("hidden_size")
    if not isinstance(heads, int) or not isinstance(hidden, int) or heads < 1:
        return {}
    width = config.get("head_dim") or hidden // heads
    return attention(width, heads, tp, fp8_cache=fp8_cache)


def _named(layers: Iterable[str]) -> str:
    first, *others = layers
    return first + (f" and {len(others)} more" if others else "")


def _ways_out(target: str, tp: int, *, cuda: bool) -> str:
    """What a user can do. cuda: whether vLLM on CUDA would serve what this one, `target`, doesn't."""
    ways = ["serve it with a smaller --tensor-parallel-size"] if tp > 1 else []
    ways += ["serve it where vLLM runs on CUDA"] if cuda and target != "vllm-cuda" else []
    return ", ".join([*ways, "run it with llmshrink generate"]) + ", or compress the original again as vLLM serves it"
