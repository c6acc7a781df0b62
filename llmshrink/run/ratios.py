"""Ratios by error: how much of each weight goes is found in a pass of its own over the original.

Pruning a weight at some ratio changes its block's output by some share of that output's energy, and the residual stream
carries it on. These shares are comparable between weights: on wiki7m the KL that pruning one weight alone causes is
1.4 to 3.4 times its share, falling slowly from the first block to the last, whatever the weight. The error of a
weight's own output is not: by that the first block would be pruned hardest, and the model be worse than with equal
ratios.

Each weight is pruned at the recipe's ratio and at two around it, and the block run on some of the calibration tokens.
Scores are tried as they will be used, with their repair; SparseGPT's sweep makes good by itself, and stands in for
ALPS, which would take too long. The ratios found lie between those two; the journal keeps them.

KL on wiki7m at 50 %, all repaired and corrected: SparseGPT .1615 against .1765 with equal ratios, Wanda .213 against
.218 (and .232, were it given the ratios that suit SparseGPT).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llmshrink.calibration.activations import Batch
from llmshrink.calibration.statistics import Statistics
from llmshrink.errors import CheckpointError
from llmshrink.methods import Pattern, PruneSpec, SiteSpec
from llmshrink.methods.pruning import allocate, prune
from llmshrink.model.blocks import Call
from llmshrink.model.sites import Site, Stage
from llmshrink.run.depth import embedded
from llmshrink.run.job import Job
from llmshrink.run.memory import give_back
from llmshrink.run.report import SiteRow
from llmshrink.run.walk import SolvedSite, Walk, install
from llmshrink.run.work import Finished, SiteWork
from llmshrink.weights import Dense

WIDEST = 0.15
"""How far a ratio may be from the recipe's."""
PROBE_TOKENS = 2048
"""Tokens on which the block is run with a pruned weight."""


class RatioWork(SiteWork):
    """Sites are pruned, those that are to have a ratio by error with it. `settle` must be told which before `solve`."""

    def __init__(self, job: Job, checkpoint: Path) -> None:
        super().__init__(job, checkpoint)
        marked = {name: spec.prune for name, spec in self._specs.items() if spec.prune and spec.prune.by_error}
        self._marked = marked
        self._shares = {name: prune.pattern.ratio for name, prune in marked.items()}
        self._ratios: dict[str, float] = {}

    def analyse(self, spill: Path | None, room: Path) -> dict[str, Any]:
        """Find the ratios. spill: the folder of activations where memory can't hold them, else None."""
        tried = {name: [_trial(spec, r) for r in _around(spec.pattern.ratio)] for name, spec in self._marked.items()}
        costs = curves(self._job, tried, spill)
        sizes = {site.name: site.out_features * site.in_features for site in self._job.sites}
        found: dict[str, float] = {}
        # Sites that are asked for different shares are different pools.
        for share in sorted(set(self._shares.values())):
            pool = {name: costs[name] for name in costs if self._shares[name] == share}
            found |= allocate(pool, _around(share), sizes, share)
        return {"ratios": found}

    def settle(self, choice: dict[str, Any]) -> None:
        """Go by what `analyse` found, now or in an earlier process."""
        self._ratios = choice["ratios"]
        self._specs = {name: self._own(name, spec) for name, spec in self._specs.items()}

    @property
    def summary(self) -> str:
        """One line for the user."""
        order = sorted(self._ratios, key=lambda name: self._ratios[name])
        least, most = (f"{100 * self._ratios[name]:.1f} % of {name}" for name in (order[0], order[-1]))
        return f"ratios by error: from {least} to {most}"

    def solve(self, walk: Walk, number: int) -> Finished:
        return super().solve(replace(walk, specs=self._specs), number)

    def _own(self, name: str, spec: SiteSpec) -> SiteSpec:
        if name not in self._ratios or spec.prune is None:
            return spec
        return replace(spec, prune=replace(spec.prune, pattern=Pattern.unstructured(self._ratios[name])))

    def _row(self, site: Site, solved: SolvedSite | None, tensors: Mapping[str, Tensor]) -> SiteRow:
        row = super()._row(site, solved, tensors)
        if site.name not in self._ratios or solved is None or solved.spec.prune is None:
            return row
        # What it came to is the row's `zeros`; how it was pruned is the same for all.
        return replace(row, pruned=f"{solved.spec.prune.method} {100 * self._shares[site.name]:g} % by error")


def _around(share: float) -> list[float]:
    """The ratios that are tried for a site, and the ends of what it may get."""
    wide = min(WIDEST, share / 2, (1 - share) / 2)
    return [share - wide, share, share + wide]


def _trial(spec: PruneSpec, ratio: float) -> PruneSpec:
    """How a site is pruned to see what a ratio costs."""
    pattern = Pattern.unstructured(ratio)
    if spec.method in ("alps", "sparsegpt"):
        return PruneSpec("sparsegpt", pattern, repair=False, corrected=0.0)
    return replace(spec, pattern=pattern, corrected=0.0)


def curves(job: Job, tried: Mapping[str, Sequence[PruneSpec]], spill: Path | None) -> dict[str, list[float]]:
    """By site: the share of its block's output that pruning it alone changes, in the original model.

    tried: the ways in which each site is pruned to see. spill: as `RatioWork.analyse`'s. Raises CheckpointError where
    activations are not finite.
    """
    chain = job.chain
    batches = [batch for batch in job.batches if not batch.held_out]
    stream = embedded(chain, batches, spill and spill / "original")
    found: dict[str, list[float]] = {}
    probes = _first(batches, PROBE_TOKENS)
    for number, block in enumerate(chain.blocks):
        stages = [s for s in job.stages[number] if any(site.name in tried for site in s.sites)]
        weights = chain.load_block(number)
        given = [stream.get(i) for i in range(probes)]
        statistics = {stage.tap: Statistics(stage.sites[0].in_features, device=given[0].device) for stage in stages}
        for i, batch in enumerate(batches):
            call = chain.calls(batch)[number]
            stream.put(i, _watched(block, call, stream.get(i), stages, batch, statistics))
            give_back()
        calls = [chain.calls(batch)[number] for batch in batches[:probes]]
        wanted = [batches[i].real(stream.get(i)).float() for i in range(probes)]
        for stage in stages:
            if not bool(torch.isfinite(statistics[stage.tap].hessian.diagonal()).all()):
                raise CheckpointError(
                    f"{stage.sites[0].name}: its input has NaN or Inf in {chain.skeleton.dtype}; "
                    "run in float32 with --dtype float32, or check the calibration text"
                )
            for site in stage.sites:
                if site.name in tried:
                    weight = weights[site.key].to(given[0].device)
                    pruned = (Dense(prune(weight, statistics[stage.tap], spec).weight) for spec in tried[site.name])
                    changed = partial(_changed, block, site.local, calls, given, batches[:probes], wanted)
                    found[site.name] = [changed(other) for other in pruned]
        chain.skeleton.release(chain.name(number))
    for i in range(len(batches)):
        stream.drop(i)
    return found


def _first(batches: Sequence[Batch], tokens: int) -> int:
    """How many batches hold at least so many tokens."""
    total = 0
    for count, batch in enumerate(batches, 1):
        total += batch.input_ids.numel()
        if total >= tokens:
            return count
    return len(batches)


def _watched(
    block: nn.Module,
    call: Call,
    hidden: Tensor,
    stages: Sequence[Stage],
    batch: Batch,
    statistics: dict[str, Statistics],
) -> Tensor:
    """The block's output, what arrives at its taps having been counted."""

    def count(tap: str, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        statistics[tap].add(batch.real(args[0]))

    taps = [stage.tap for stage in stages]
    handles = [block.get_submodule(tap).register_forward_pre_hook(partial(count, tap)) for tap in taps]
    try:
        with torch.no_grad():
            return call.run(block, hidden)
    finally:
        for handle in handles:
            handle.remove()


def _changed(
    block: nn.Module,
    local: str,
    calls: Sequence[Call],
    given: Sequence[Tensor],
    batches: Sequence[Batch],
    wanted: Sequence[Tensor],
    weight: Dense,
) -> float:
    """||f'(x) - f(x)||^2 / ||f(x)||^2 of the block with another weight in one linear."""
    linear = block.get_submodule(local)
    own = linear._parameters["weight"]
    install(block, local, weight)
    lost = total = 0.0
    with torch.no_grad():
        for call, hidden, batch, output in zip(calls, given, batches, wanted, strict=True):
            lost += float((batch.real(call.run(block, hidden)).float() - output).square().sum().double())
            total += float(output.square().sum().double())
    linear._parameters["weight"] = own
    return lost / total if total > 0 else lost
