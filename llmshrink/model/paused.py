"""A block's forward that stops at each tap and goes on later.

Solving a stage needs every batch's input at its tap before any batch may run past it. Running the block again from
its start for each stage would cost 2.2 forwards of a Llama block; keeping each batch's half-finished forward costs
none. A half-finished forward is a greenlet: the modules' own Python code, suspended inside a pre-hook. Where the
suspended activations of all batches don't fit the memory budget, the caller drops the greenlet and runs it again up
to the next tap: the same operations on the same numbers, so both ways give the same bits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from greenlet import getcurrent, greenlet
from torch import Tensor, nn

from llmshrink.model.blocks import Call


class PausedForward:
    """One batch on its way through one block. Only used while `pausing_at` is open for that block."""

    def __init__(self, block: nn.Module, call: Call, hidden: Tensor) -> None:
        self._start: tuple[nn.Module, Call, Tensor] | None = (block, call, hidden)
        self._glet = greenlet(self._run)

    def _run(self) -> Tensor:
        assert self._start is not None
        block, call, hidden = self._start
        self._start = None  # the frame of the forward alone decides how long the input lives
        return call.run(block, hidden)

    def advance(self) -> Tensor:
        """Run to the next tap and return its input [batch, tokens, in], or to the end and return the block's output."""
        with torch.no_grad():
            value = self._glet.switch()
        assert isinstance(value, Tensor)
        return value

    def finish(self) -> Tensor:
        """Run past all taps that are left to the end, and return the block's output."""
        value = self.advance()
        while not self._glet.dead:
            value = self.advance()
        return value

    def close(self) -> None:
        """Give up a forward that isn't finished, and with it the activations that it holds."""
        if self._glet and not self._glet.dead:
            self._glet.throw()


def pause(value: Tensor) -> None:
    """Inside a PausedForward, stop, and hand `value` to whoever advanced it; outside of one nothing happens."""
    current = getcurrent()
    if current.parent is not None:
        current.parent.switch(value)


@contextmanager
def pausing_at(block: nn.Module, taps: Sequence[str]) -> Iterator[None]:
    """While open, a forward of `block` inside a PausedForward stops before each linear named in `taps`."""

    def stop(_module: nn.Module, args: tuple[Any, ...]) -> None:
        pause(args[0])

    handles = [block.get_submodule(tap).register_forward_pre_hook(stop) for tap in taps]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
