"""A model's sites from its config and the shapes of its weights alone: zeros stand for what isn't read.

Which linears read the same tensor, and in which order they run, doesn't depend on a number in them. Blocks that are
built alike run alike, so that one of each kind is run on a few tokens, and the others are named after it.
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import replace

import torch
from torch import Tensor, nn

from llmshrink.calibration.activations import Batch
from llmshrink.checkpoint.index import CheckpointIndex
from llmshrink.model.chain import Chain
from llmshrink.model.sites import Stage, find_stages


class Blank:
    """A `TensorReader` of zeros in the shapes that an index names; memory that nobody writes to isn't resident."""

    def __init__(self, index: CheckpointIndex) -> None:
        self._index = index
        self.why_not = index.why_not

    def keys(self) -> list[str]:
        return self._index.keys()

    def read(self, key: str) -> Tensor:
        entry = self._index.entry(key)
        return torch.zeros(entry.shape, dtype=entry.dtype)


def outlined_stages(chain: Chain, tokens: int) -> list[list[Stage]]:
    """Each block's stages, as `Chain.analyse` finds them. tokens: in the forward of one block of each kind."""
    calls = chain.calls(Batch(torch.zeros(1, tokens, dtype=torch.int64), None, held_out=False))
    width = chain.skeleton.model.config.get_text_config().hidden_size
    hidden = torch.zeros(1, tokens, width, dtype=chain.skeleton.dtype, device=chain.skeleton.device)
    known: dict[Hashable, tuple[int, list[Stage]]] = {}
    found: list[list[Stage]] = []
    for number, block in enumerate(chain.blocks):
        kind = kind_of(block)
        if kind not in known:
            chain.skeleton.load(chain.name(number))
            stages, _ = find_stages(block, chain.name(number), number, calls[number], hidden, chain.skeleton.key_of)
            chain.skeleton.release(chain.name(number))
            known[kind] = (number, stages)
        found.append([_moved(stage, chain, number) for stage in known[kind][1]])
    return found


def kind_of(block: nn.Module) -> Hashable:
    """What two blocks must share to run alike: modules by name and type, parameters by shape."""
    modules = tuple((name, type(module)) for name, module in block.named_modules())
    return modules, tuple((name, tuple(parameter.shape)) for name, parameter in block.named_parameters())


def fill_with_noise(block: nn.Module, noise: torch.Generator) -> None:
    """Give a block's parameters the sizes of a trained one's: matrices that keep a norm, vectors around 1."""
    with torch.no_grad():
        for parameter in block.parameters():
            values = torch.randn(parameter.shape, generator=noise)
            wide = parameter.dim() > 1
            parameter.copy_(values / math.sqrt(parameter.shape[-1]) if wide else 1 + values / 8)


def _moved(stage: Stage, chain: Chain, number: int) -> Stage:
    """The same stage of another block."""
    prefix, key_of = chain.name(number), chain.skeleton.key_of
    return Stage(
        tuple(
            replace(site, name=f"{prefix}.{site.local}", key=key_of[f"{prefix}.{site.local}.weight"], block=number)
            for site in stage.sites
        )
    )
