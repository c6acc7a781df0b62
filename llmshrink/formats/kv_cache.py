"""compressed-tensors' word for a cache of FP8, and the tensors that hold its scales.

config.json's quantization_config has a `kv_cache_scheme`, and each attention, called `name` as its parameters are,

    name.k_scale, name.v_scale    [1], stored dtype

as llm-compressor writes them, and vLLM and transformers with compressed-tensors read them (`weights.kv_cache`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from llmshrink.errors import CheckpointError
from llmshrink.formats.groups import checked
from llmshrink.weights import CacheScales

SUFFIXES = (".k_scale", ".v_scale")
SCALE_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
S = TypeVar("S")
FIELD = "kv_cache_scheme"


def kv_cache_scheme() -> dict[str, object]:
    """The one that is written: FP8 E4M3, one scale for all keys of a layer and one for all values, found before."""
    return {
        "num_bits": 8,
        "type": "float",
        "symmetric": True,
        "group_size": None,
        "strategy": "tensor",
        "block_structure": None,
        "dynamic": False,
        "actorder": None,
        "observer": "minmax",
        "observer_kwargs": {},
    }


def rounds(config: Mapping[str, Any] | None) -> bool:
    """Whether a `quantization_config` has keys and values cached in FP8 with scales of the checkpoint's.

    Raises CheckpointError for a cache of another kind.
    """
    scheme = (config or {}).get(FIELD)
    if not scheme:
        return False
    if isinstance(scheme, dict):
        asked = {name: scheme.get(name) for name in ("num_bits", "type", "strategy")}
        known = asked == {"num_bits": 8, "type": "float", "strategy": "tensor"}
        if known and scheme.get("symmetric", True) and not scheme.get("dynamic"):
            return True
    raise CheckpointError(
        f"quantization_config has a {FIELD} of another kind than FP8 with one scale a layer for keys and one for "
        "values; only that can be computed here: serve it with vLLM"
    )


def keys_of(name: str) -> tuple[str, str]:
    """The checkpoint's keys of an attention's two scales. name: of the attention there."""
    return f"{name}{SUFFIXES[0]}", f"{name}{SUFFIXES[1]}"


def scales(
    config: Mapping[str, Any] | None, keys: Iterable[str], get: Callable[[str], Tensor]
) -> dict[str, CacheScales]:
    """What each attention is called in a checkpoint -> its scales; empty where keys and values aren't rounded.

    config: the `quantization_config`. keys: of the checkpoint. get: key -> tensor. Raises CheckpointError for a cache
    of another kind, and naming a scale that is missing or isn't one.
    """
    if not rounds(config):
        return {}
    there = set(keys)
    names = sorted({key.removesuffix(suffix) for key in there for suffix in SUFFIXES if key.endswith(suffix)})
    absent = next((key for name in names for key in keys_of(name) if key not in there), None)
    if absent is not None:
        raise CheckpointError(f"{absent}: no such tensor in the checkpoint; it is damaged: copy it again")
    if not names:
        raise CheckpointError(f"quantization_config has a {FIELD}, and no tensor is called *.k_scale; it is damaged")
    return {name: _read(keys_of(name), get) for name in names}


def placed(caches: Mapping[str, S], key_of: Mapping[str, str]) -> dict[str, S]:
    """By the model's name of each attention what is known by the checkpoint's. key_of: of parameters.

    Raises CheckpointError for an attention that the model has no place for.
    """
    found: dict[str, S] = {}
    for name, what in caches.items():
        inside = next(((p, key) for p, key in key_of.items() if key.startswith(f"{name}.")), None)
        rest = None if inside is None else inside[1].removeprefix(name)
        if inside is None or rest is None or not inside[0].endswith(rest):
            raise CheckpointError(
                f"{name}{SUFFIXES[0]}: the model that config.json describes has no such attention; the two don't "
                "belong together: copy the checkpoint again"
            )
        found[inside[0].removesuffix(rest)] = what
    return found


def _read(pair: tuple[str, str], get: Callable[[str], Tensor]) -> CacheScales:
    found = [checked(get, key, SCALE_DTYPES, (1,), "a cache of FP8") for key in pair]
    for key, scale in zip(pair, found, strict=True):
        if not (bool(torch.isfinite(scale)) and float(scale) > 0):
            raise CheckpointError(f"{key} is {float(scale):g}, and a scale is above zero; the checkpoint is damaged")
    return CacheScales(*found)
