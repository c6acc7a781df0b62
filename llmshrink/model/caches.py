"""Where a block writes keys and values: found by running it, as its taps are.

Every module of a block that takes transformers' cache is given one that writes nothing and notes who came, and after
how many taps. A block whose attention isn't found so (none writes, or more than one) can't have a cache of FP8.
"""

from __future__ import annotations

import inspect
from collections.abc import Hashable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from llmshrink.calibration.activations import Batch
from llmshrink.errors import UnsupportedModelError
from llmshrink.formats import kv_cache
from llmshrink.model.blocks import Call
from llmshrink.model.chain import Chain
from llmshrink.model.outline import kind_of
from llmshrink.model.sites import Stage
from llmshrink.model.skeleton import TensorReader
from llmshrink.weights.kv_cache import ARGUMENT, before_cache


@dataclass(frozen=True)
class CacheSite:
    """local: path of the attention inside its block. key: what the checkpoint's names of its tensors begin with.

    after: how many of the block's stages run before it writes.
    """

    local: str
    key: str
    after: int

    @property
    def scales(self) -> tuple[str, str]:
        """The checkpoint's keys of its two scales."""
        return kv_cache.keys_of(self.key)

    def place(self, stages: Sequence[Stage], active: Sequence[Stage]) -> int:
        """How many of the active stages come before it. stages: all of the block's, in running order."""
        return sum(stages.index(stage) < self.after for stage in active)


def find_caches(chain: Chain, stages: Sequence[Sequence[Stage]], blank: TensorReader, tokens: int) -> list[CacheSite]:
    """Each block's. blank: zeros in the place of its parameters. tokens: in the forward of one block of each kind.

    Raises UnsupportedModelError where a block has none, or more than one.
    """
    skeleton = chain.skeleton
    calls = chain.calls(Batch(torch.zeros(1, tokens, dtype=torch.int64), None, held_out=False))
    width = skeleton.model.config.get_text_config().hidden_size
    hidden = torch.zeros(1, tokens, width, dtype=skeleton.dtype, device=skeleton.device)
    known: dict[Hashable, tuple[str, int]] = {}
    found = []
    reader, skeleton.reader = skeleton.reader, blank
    try:
        for number, block in enumerate(chain.blocks):
            name, kind = chain.name(number), kind_of(block)
            if kind not in known:
                skeleton.load(name)
                try:
                    known[kind] = _writer(block, name, calls[number], hidden, stages[number])
                finally:
                    skeleton.release(name)
            local, after = known[kind]
            found.append(CacheSite(local, _key(chain, f"{name}.{local}"), after))
    finally:
        skeleton.reader = reader
    return found


def _writer(block: nn.Module, name: str, call: Call, hidden: Tensor, stages: Sequence[Stage]) -> tuple[str, int]:
    """The path inside the block of the module that writes, and how many stages ran before."""
    passed: list[str] = []
    wrote: list[tuple[str, int]] = []

    def note(local: str, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        wrote.append((local, len(passed)))
        return keys, values

    with ExitStack() as stack, torch.no_grad():
        for stage in stages:
            tap = block.get_submodule(stage.tap)
            handle = tap.register_forward_pre_hook(lambda _module, _args, tap=stage.tap: passed.append(tap))
            stack.callback(handle.remove)
        for local, module in block.named_modules():
            if local and ARGUMENT in inspect.signature(module.forward).parameters:
                stack.callback(before_cache(module, partial(note, local)).remove)
        call.run(block, hidden)
    if len(wrote) != 1:
        raise UnsupportedModelError(
            f"{name} ({type(block).__name__}): keys and values are written to the cache in {len(wrote)} places where "
            "one was expected, so kv_cache fp8 isn't covered for it; leave kv_cache out"
        )
    return wrote[0]


def _key(chain: Chain, attention: str) -> str:
    """What an attention is called in the checkpoint, as its parameters are."""
    for name, key in chain.skeleton.key_of.items():
        inside = name.removeprefix(f"{attention}.")
        if inside != name and key.endswith(f".{inside}"):
            return key.removesuffix(f".{inside}")
    raise UnsupportedModelError(f"{attention}: has no parameters of its own name in the checkpoint; leave kv_cache out")
