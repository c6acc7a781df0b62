"""A compressed checkpoint, read as if it were dense."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from llmshrink.checkpoint.index import CheckpointIndex
from llmshrink.formats import kv_cache, stored
from llmshrink.weights import round_cache, round_inputs


class Decompressed:
    """A reader of a compressed checkpoint that answers with the dense names. dtype: of the dequantized weights.

    index: of the folder, where there is one already.

    Where products are of 8 bits, or keys and values are cached in FP8, that isn't all: `round_too` is for the model
    that computes with the weights.
    """

    def __init__(
        self, folder: Path, config: dict[str, Any], dtype: torch.dtype, index: CheckpointIndex | None = None
    ) -> None:
        self._index = CheckpointIndex.open(folder) if index is None else index
        self.why_not = self._index.why_not
        self._dtype = dtype
        self._schemes = stored.schemes(config.get("quantization_config"), self._index)
        packed = {key for name, scheme in self._schemes.items() for key in stored.names(name, scheme)}
        self._caches = kv_cache.scales(config.get("quantization_config"), self._index, self._index.read)
        packed.update(key for name in self._caches for key in kv_cache.keys_of(name))
        self._keys = [key for key in self._index if key not in packed]
        self._keys += [f"{name}.weight" for name in self._schemes]

    @property
    def rounds_too(self) -> str | None:
        """What the model does beside its weights, in words; None where it is its weights alone."""
        if any(stored.activations_of(scheme) for scheme in self._schemes.values()):
            return "rounds the inputs of its linears to 8 bits"
        return "caches keys and values in FP8" if self._caches else None

    def round_too(self, model: nn.Module, key_of: Mapping[str, str], *, cut: bool = False) -> None:
        """Let the dense model round what the checkpoint's does: inputs of linears, keys and values that it caches.

        key_of: the model's name of each parameter -> its dense name here. cut: keys and values as vLLM's CPU build has
        them, towards zero.
        """
        for name, scheme in self._schemes.items():
            kind = stored.activations_of(scheme)
            if kind is not None:
                round_inputs(model.get_submodule(name), kind)
        for module, scales in kv_cache.placed(self._caches, key_of).items():
            round_cache(model.get_submodule(module), scales, cut=cut)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the files that reads have opened; a later read opens its own again."""
        self._index.close()

    def keys(self) -> list[str]:
        return self._keys

    def read(self, key: str) -> Tensor:
        name = key.removesuffix(".weight")
        if name not in self._schemes:
            return self._index.read(key)
        return stored.read(name, self._index.read, self._schemes[name]).dequantize(self._dtype)
