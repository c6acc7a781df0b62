"""What a walk over a model's blocks has with it: both streams, what happens to each site, and what came of a block.

`Forwards` carries every batch through one block, in the original and in the compressed model, from tap to tap.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from llmshrink.calibration.activations import Batch, Stream
from llmshrink.methods import SiteSpec
from llmshrink.model.caches import CacheSite
from llmshrink.model.chain import Chain
from llmshrink.model.paused import PausedForward
from llmshrink.model.sites import Site, Stage
from llmshrink.run.memory import give_back
from llmshrink.run.smooth import Smoothing
from llmshrink.weights import CacheScales, Solvable


@dataclass(frozen=True, eq=False)
class SolvedSite:
    """One site's solved weight and the facts for its row in the report; error is relative, seconds are wall."""

    site: Site
    spec: SiteSpec
    weight: Solvable
    error: float
    damping: float
    events: tuple[str, ...]
    seconds: float
    residual: Tensor | None = None


@dataclass(frozen=True, eq=False)
class SolvedBlock:
    """solved: by checkpoint key of the weight they replace; stored: every tensor of the block as the source has it, or,
    where it was smoothed, as the equivalent block has it.

    tuned: the block's error on the held-out windows before and after it was tuned, relative to its output's energy.
    cache: the scales of its cache, by checkpoint key; empty where that isn't rounded.
    """

    solved: dict[str, SolvedSite]
    stored: dict[str, Tensor]
    tuned: tuple[float, float] | None = None
    cache: Mapping[str, Tensor] = field(default_factory=dict)


class Tuning(Protocol):
    """What trains a block once its sites are solved (`run.tune`)."""

    def remember(self, walk: Walk) -> None:
        """Keep what enters the next block, before it is run."""
        ...

    def block(
        self,
        walk: Walk,
        number: int,
        solved: dict[str, SolvedSite],
        stored: Mapping[str, Tensor],
        cache: CacheScales | None,
    ) -> tuple[dict[str, SolvedSite], tuple[float, float] | None]:
        """The sites as they came to be, and the block's error before and after; the compressed stream holds its new
        output. cache: the scales that its keys and values are rounded by."""
        ...


@dataclass(frozen=True)
class Walk:
    """What stays the same from block to block.

    specs: site name -> what happens to it; absent: it stays. reads: site name -> the statistics gathered for it.
    keep_paused: hold half-finished forwards in memory instead of running each block again for each stage. tune: how
    blocks are trained after their sites are solved. caches: where each block's keys and values are rounded to FP8;
    empty where they aren't. smoothing: by the name of a tap's first site; empty where no input is smoothed.
    """

    chain: Chain
    batches: Sequence[Batch]
    original: Stream
    compressed: Stream
    specs: Mapping[str, SiteSpec]
    reads: Mapping[str, frozenset[str]]
    scale_dtype: torch.dtype
    keep_paused: bool
    tune: Tuning | None = None
    caches: Sequence[CacheSite] = ()
    smoothing: Mapping[str, Smoothing] = field(default_factory=dict)

    @property
    def two_streams(self) -> bool:
        """Whether any site's target is corrected, or a block is tuned, so that calibration batches run through the
        original too."""
        return self.tune is not None or any("cross" in reads for reads in self.reads.values())

    def compares(self, stage: Stage) -> bool:
        """Whether what arrives at a stage's tap in the original is read."""
        return bool(self.crossing(stage))

    def crossing(self, stage: Stage) -> list[Site]:
        """The sites of a stage that read the cross term."""
        return [site for site in stage.sites if "cross" in self.reads.get(site.name, ())]

    @property
    def needs_calibration(self) -> bool:
        return self.tune is not None or bool(self.caches) or bool(self.smoothing) or any(self.reads.values())

    def carries(self, batch: Batch, *, original: bool) -> bool:
        """Whether a batch travels in a stream. The held-out ones travel in both: they are the closing summary."""
        if batch.held_out:
            return True
        return self.two_streams if original else self.needs_calibration


def shared_twin(block: nn.Module) -> nn.Module:
    """A copy of a block's modules around the very same parameters and buffers."""
    tensors = [*block.parameters(), *block.buffers()]
    return copy.deepcopy(block, {id(tensor): tensor for tensor in tensors})


def install(block: nn.Module, local: str, weight: Solvable) -> None:
    """Put the dequantized weight, as an engine computes with it, in place of a linear's own."""
    linear = block.get_submodule(local)
    old = linear._parameters["weight"]
    assert old is not None
    linear._parameters["weight"] = nn.Parameter(weight.dequantize(old.dtype).to(old.device), requires_grad=False)


def replace_parameters(block: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Give a block other values. tensors: by a parameter's path inside it, in any dtype."""
    for name, tensor in tensors.items():
        owner, _, leaf = name.rpartition(".")
        module = block.get_submodule(owner)
        old = module._parameters[leaf]
        assert old is not None, name
        module._parameters[leaf] = nn.Parameter(tensor.to(old.device, old.dtype), requires_grad=False)


class Forwards:
    """Every batch's way through one block, in both streams, kept half-finished or run again up to each tap."""

    def __init__(self, walk: Walk, number: int, block: nn.Module, twin: nn.Module) -> None:
        self._walk, self._number = walk, number
        self._last = number == len(walk.chain.blocks) - 1
        self._sides = {True: (block, walk.original), False: (twin, walk.compressed)}
        self._paused: dict[tuple[int, bool], PausedForward] = {}
        self._waiting: dict[int, Tensor] = {}
        self._done: set[tuple[int, bool]] = set()

    def at_tap(self, batch: int, original: bool, position: int) -> Tensor:
        """The input of the `position`-th tap, [batch, tokens, in]."""
        if original and batch in self._waiting:
            return self._waiting.pop(batch)
        paused = self._paused.get((batch, original))
        if paused is None:
            block, stream = self._sides[original]
            call = self._walk.chain.calls(self._walk.batches[batch])[self._number]
            hidden = stream.take(batch) if self._walk.keep_paused else stream.get(batch)
            paused = self._paused[batch, original] = PausedForward(block, call, hidden)
            for _ in range(0 if self._walk.keep_paused else position):
                paused.advance()
        return paused.advance()

    def rest(self, batch: int, original: bool, *, ahead: bool = False, last: bool = False) -> None:
        """Between two taps: where half-finished forwards aren't kept, let this one go.

        ahead: the original waits at its next tap instead of at this one. last: that is the last tap at which it is
        looked at, so that only the input there waits, and the forward goes on to the block's end.
        """
        if not self._walk.keep_paused:
            self._paused.pop((batch, original)).close()
        elif ahead:
            self._waiting[batch] = self._paused[batch, original].advance()
            if last:
                self.finish(batch, original)

    def finish(self, batch: int, original: bool) -> None:
        """Run a batch to the block's end and store its output; after the last block nothing reads calibration's."""
        if (batch, original) in self._done:
            return
        self._done.add((batch, original))
        block, stream = self._sides[original]
        paused = self._paused.pop((batch, original), None)
        if self._last and not self._walk.batches[batch].held_out and self._walk.tune is None:
            if paused is not None:
                paused.close()
            stream.drop(batch)
        elif paused is not None:
            stream.put(batch, paused.finish())
        else:
            call = self._walk.chain.calls(self._walk.batches[batch])[self._number]
            with torch.no_grad():
                stream.put(batch, call.run(block, stream.get(batch)))

    def finish_all(self) -> None:
        """Run all that still travels to the block's end."""
        for original in (True, False):
            for i, batch in enumerate(self._walk.batches):
                if self._walk.carries(batch, original=original):
                    give_back()
                    self.finish(i, original)
