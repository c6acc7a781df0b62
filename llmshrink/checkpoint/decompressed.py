"""A compressed checkpoint, read as if it were dense."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llmshrink.checkpoint.index import CheckpointIndex
from llmshrink.formats import stored
from llmshrink.weights import round_inputs


class Decompressed:
    """A reader of a compressed checkpoint that answers with the dense names. dtype: of the dequantized weights.

    Where products are of 8 bits that isn't all: `round_inputs` is for the model that computes with the weights.
    """

    def __init__(self, folder: Path, config: dict[str, Any], dtype: torch.dtype) -> None:
        self._index = CheckpointIndex.open(folder)
        self._dtype = dtype
        self._schemes = stored.schemes(config.get("quantization_config"), self._index)
        packed = {key for name, scheme in self._schemes.items() for key in stored.names(name, scheme)}
        self._keys = [key for key in self._index if key not in packed]
        self._keys += [f"{name}.weight" for name in self._schemes]

    @property
    def rounds_inputs(self) -> bool:
        """Whether the model isn't its weights alone."""
        return any(stored.activations_of(scheme) for scheme in self._schemes.values())

    def round_inputs(self, model: nn.Module) -> None:
        """Let the linears of the dense model round their inputs as the checkpoint's do."""
        for name, scheme in self._schemes.items():
            kind = stored.activations_of(scheme)
            if kind is not None:
                round_inputs(model.get_submodule(name), kind)

    def keys(self) -> list[str]:
        return self._keys

    def read(self, key: str) -> Tensor:
        name = key.removesuffix(".weight")
        if name not in self._schemes:
            return self._index.read(key)
        return stored.read(name, self._index.read, self._schemes[name]).dequantize(self._dtype)
