"""Blocks, found by running the model, and their calls, recorded.

The model's own forward runs over blocks whose `forward` is replaced by a stub. The stubs record what each block is
called with (masks, rotary tables: some models pass other ones to each layer type) and hand the hidden state on
untouched, so the cost is that of the embedding. From then on a block can be called without the model: `Call.run`.
The same trick gives the model's own tail (final norm, head, any logit scaling) a hidden state of our choosing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llmshrink.errors import UnsupportedModelError


@dataclass(frozen=True)
class Call:
    """How the model calls one block: everything but the hidden state."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    hidden_keyword: str | None

    def run(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """hidden: [batch, tokens, dim] -> the block's output, the same shape."""
        if self.hidden_keyword is None:
            out = block(hidden, *self.args, **self.kwargs)
        else:
            out = block(*self.args, **{**self.kwargs, self.hidden_keyword: hidden})
        result = out[0] if isinstance(out, tuple) else out
        assert isinstance(result, Tensor)
        return result


def find_blocks(model: nn.Module) -> tuple[str, list[nn.Module]]:
    """Name and members of the ModuleList that the model is a chain of: the one that holds most parameters."""
    lists = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) > 0]
    if not lists:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no list of blocks to work through: it isn't covered yet"
        )
    name, found = max(lists, key=lambda item: sum(p.numel() for p in item[1].parameters()))
    return name, list(found)


class Enough(Exception):
    """Raised by a visitor that has seen what it wanted, to leave the model's forward."""


@contextmanager
def visiting(blocks: Sequence[nn.Module], visit: Any) -> Iterator[None]:
    """While open, the model's forward calls `visit(i, own_forward, args, kwargs)` in place of each block's forward."""

    def visitor(i: int, block: nn.Module) -> Any:
        own = type(block).forward.__get__(block)
        return lambda *args, **kwargs: visit(i, own, args, kwargs)

    for i, block in enumerate(blocks):
        block.forward = visitor(i, block)
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


def record_calls(
    model: Any, blocks: Sequence[nn.Module], outside: Sequence[nn.Module], hidden: Tensor, attention_mask: Tensor | None
) -> list[Call]:
    """One Call per block for a batch of this shape and mask.

    outside: the modules outside the blocks that own parameters. They may have none now, and calls don't depend on what
    they say, so that a model's way from embeddings to its first block (OPT's project_in, its learned positions) gives
    `hidden` on: [batch, tokens, dim], any values. attention_mask: [batch, tokens] or None when nothing is padded.
    Raises UnsupportedModelError unless the blocks run once each, in order.
    """
    calls: list[tuple[int, Call]] = []

    def visit(i: int, own: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            calls.append((i, Call(args[1:], kwargs, None)))
        else:
            rest = {name: value for name, value in kwargs.items() if name != "hidden_states"}
            calls.append((i, Call((), rest, "hidden_states")))
        if len(calls) == len(blocks):
            raise Enough
        return args[0] if args else kwargs["hidden_states"]

    def pass_by(i: int, own: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        return hidden

    with visiting(blocks, visit), visiting(outside, pass_by), torch.no_grad(), suppress(Enough):
        model.base_model(inputs_embeds=hidden, attention_mask=attention_mask, use_cache=False)
    if [i for i, _ in calls] != list(range(len(blocks))):
        raise UnsupportedModelError(
            f"{type(model).__name__} doesn't run its {len(blocks)} blocks once each in order: it isn't covered yet"
        )
    return [call for _, call in calls]


def logits_of(model: Any, blocks: Sequence[nn.Module], hidden: Tensor) -> Tensor:
    """The model's logits when its last block puts out `hidden`: [batch, tokens, dim] -> [batch, tokens, vocabulary]."""

    def visit(i: int, own: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        return hidden

    # One token is enough to get there, and more than a model has positions for may come out of the last block.
    embedded = torch.zeros(1, 1, model.get_input_embeddings().weight.shape[1], dtype=hidden.dtype, device=hidden.device)
    with visiting(blocks, visit), torch.no_grad():
        out = model(inputs_embeds=embedded, use_cache=False)
    logits = out.logits
    assert isinstance(logits, Tensor)
    return logits
