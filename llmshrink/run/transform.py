"""The loop's body: one block from real weights to solved ones, with both streams carried through it.

For each stage (qkv, o, gate/up, down in a Llama) every batch runs up to the stage's tap in the compressed model and,
where the corrected target wants it, in the original; what arrives there becomes the tap's statistics; its sites are
solved as one matrix where they ask for the same; the solved weights go into the compressed block, and all batches go
on. At the end both streams hold the block's outputs.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from llmshrink.calibration.statistics import Statistics, through_one
from llmshrink.errors import CheckpointError
from llmshrink.methods import SiteSpec, shrunk, solve
from llmshrink.model.paused import pausing_at
from llmshrink.model.sites import Site, Stage, sites_of
from llmshrink.run.caches import CalibratedCache
from llmshrink.run.memory import give_back
from llmshrink.run.smooth import Smoothed, loudest_inputs, smoothed
from llmshrink.run.walk import Forwards, SolvedBlock, SolvedSite, Walk, install, replace_parameters, shared_twin
from llmshrink.weights import Activations, CacheScales, Solvable, round_cache, round_inputs


def transform_block(walk: Walk, number: int, stages: Sequence[Stage]) -> SolvedBlock:
    """Solve one block. Raises CheckpointError when activations are not finite."""
    chain = walk.chain
    stored = chain.load_block(number)
    block = chain.blocks[number]
    twin = shared_twin(block)
    smooth = smooth_block(walk, number, stages, twin, stored)
    stored = smooth.stored
    # Before any tap is set there: a tap's input is then what the compressed model multiplies.
    for site in sites_of(stages):
        kind = walk.specs[site.name].activations if site.name in walk.specs else None
        if kind is not None:
            round_inputs(twin.get_submodule(site.local), kind)
    cache = CalibratedCache(twin, walk.caches[number]) if walk.caches else None
    solved: dict[str, SolvedSite] = {}
    if walk.tune is not None:
        walk.tune.remember(walk)
    active = [stage for stage in stages if any(site.name in walk.specs for site in stage.sites)]
    taps = [stage.tap for stage in active]
    with ExitStack() as stack:
        stack.enter_context(pausing_at(block, taps))
        stack.enter_context(pausing_at(twin, taps))
        forwards = Forwards(walk, number, block, twin)
        for position, stage in enumerate(active):
            if cache is not None and position == cache.site.place(stages, active):
                calibrate(cache, walk, forwards, position)
            statistics = gather(walk, active, forwards, position, stored, smooth.factors.get(stage.tap))
            give_back()
            for result in _solve_stage(walk, stage, statistics, stored, smooth.events.get(stage.tap, ())):
                solved[result.site.key] = result
                install(twin, result.site.local, result.weight)
        if cache is not None and cache.scales is None:
            calibrate(cache, walk, forwards, len(active))
        give_back()
        forwards.finish_all()
    tuned = None
    if walk.tune is not None:
        solved, tuned = walk.tune.block(walk, number, solved, stored, None if cache is None else cache.scales)
    chain.skeleton.release(chain.name(number))
    return SolvedBlock(solved, stored, tuned, {} if cache is None else cache.tensors())


def smooth_block(
    walk: Walk, number: int, stages: Sequence[Stage], twin: nn.Module, stored: Mapping[str, Tensor]
) -> Smoothed:
    """Make the compressed block the smoothed one, nothing of which is rounded yet. stored: its tensors, by key."""
    taps = {stage.tap: walk.smoothing[stage.sites[0].name] for stage in stages if stage.sites[0].name in walk.smoothing}
    if not taps:
        return Smoothed(dict(stored), {}, {})

    def run(i: int) -> None:
        give_back()
        with torch.no_grad():
            walk.chain.calls(walk.batches[i])[number].run(twin, walk.compressed.get(i))

    loudest = loudest_inputs(twin, [stage for stage in stages if stage.tap in taps], walk.batches, run)
    found = smoothed(taps, loudest, stored)
    for asked in taps.values():
        replace_parameters(twin, {name: found.stored[key] for name, key in asked.parameters.items()})
    return found


def calibrate(cache: CalibratedCache, walk: Walk, forwards: Forwards, position: int) -> None:
    """Run every calibration batch of the compressed model to its cache, and fix the scales by all of them.

    position: of the first active stage after it.
    """
    for i, batch in enumerate(walk.batches):
        if not batch.held_out:
            give_back()
            cache.see(batch, forwards.at_tap(i, False, position))
            forwards.rest(i, False)
    cache.settle(walk.scale_dtype)


def replay_block(
    walk: Walk,
    number: int,
    weights: Mapping[str, Solvable],
    activations: Mapping[str, Activations] | None = None,
    cache: CacheScales | None = None,
    others: Mapping[str, Tensor] | None = None,
) -> None:
    """Carry both streams through a block that an earlier run solved. weights: by the site's path inside the block.

    activations: what the inputs of some are rounded to. cache: the scales that its keys and values are rounded by.
    others: further parameters that aren't the source's, by their path inside the block.
    """
    chain = walk.chain
    chain.load_block(number)
    block = chain.blocks[number]
    twin = shared_twin(block)
    replace_parameters(twin, others or {})
    for local, weight in weights.items():
        install(twin, local, weight)
    for local, kind in (activations or {}).items():
        round_inputs(twin.get_submodule(local), kind)
    if cache is not None:
        round_cache(twin.get_submodule(walk.caches[number].local), cache)
    Forwards(walk, number, block, twin).finish_all()
    chain.skeleton.release(chain.name(number))


def gather(
    walk: Walk,
    stages: Sequence[Stage],
    forwards: Forwards,
    position: int,
    stored: Mapping[str, Tensor],
    factors: Tensor | None = None,
) -> Statistics | None:
    """The statistics at a stage's tap from all calibration batches; None when no method of the stage reads any.

    stored: the block's tensors, by checkpoint key. factors: what the compressed model's inputs are divided by there,
    where they are smoothed.

    Nothing that is solved here changes the original, so it needn't wait for it: from the last tap at which it is read
    it goes on to the block's end at once, and from one that isn't narrower than the next it goes on to that. So it
    doesn't hold the queries, keys and values of all batches together, nor their widest activations.
    """
    stage = stages[position]
    if not walk.needs_calibration:
        return None
    last = max((number for number, each in enumerate(stages) if walk.compares(each)), default=-1)
    reads = frozenset[str]().union(*(walk.reads.get(site.name, ()) for site in stage.sites))
    cross = "cross" in reads
    device, readers = walk.chain.skeleton.device, walk.crossing(stage)
    through = None
    if through_one([site.out_features for site in readers], stage.sites[0].in_features):
        through = stored[readers[0].key].to(device=device, dtype=torch.float32)
    statistics = Statistics(stage.sites[0].in_features, cross=cross, through=through, device=device)
    for i, batch in enumerate(walk.batches):
        if batch.held_out:
            continue
        give_back()
        compressed = batch.real(forwards.at_tap(i, False, position))
        forwards.rest(i, False)
        original = None
        if position <= last:
            original = batch.real(forwards.at_tap(i, True, position))
            if position == last:
                forwards.finish(i, True)
            else:
                ahead = stages[position + 1].sites[0].in_features <= stage.sites[0].in_features
                forwards.rest(i, True, ahead=ahead, last=position + 1 == last)
        if cross and factors is not None and original is not None:
            original = shrunk(original, factors)
        if reads:
            statistics.add(compressed, original if cross else None)
    if not reads:
        return None
    if not bool(torch.isfinite(statistics.hessian.diagonal()).all()):
        raise CheckpointError(
            f"{stage.sites[0].name}: its input has NaN or Inf in {walk.chain.skeleton.dtype}; "
            "run in float32 with --dtype float32, or check the calibration text"
        )
    return statistics


def _solve_stage(
    walk: Walk,
    stage: Stage,
    statistics: Statistics | None,
    stored: Mapping[str, Tensor],
    events: tuple[str, ...] = (),
) -> Iterator[SolvedSite]:
    """Solve a stage's sites, those with equal specs stacked into one matrix: rows don't depend on each other.

    Where a share of a whole matrix goes, they do: such sites are solved one by one. events: of the stage, before.
    """
    groups: dict[tuple[SiteSpec, str], list[Site]] = {}
    for site in stage.sites:
        if site.name in walk.specs:
            spec = walk.specs[site.name]
            groups.setdefault((spec, site.name if spec.rows_together else ""), []).append(site)
    for (spec, _), sites in groups.items():
        started = time.perf_counter()
        device = walk.chain.skeleton.device
        stacked = torch.cat([stored[site.key].to(device=device, dtype=torch.float32) for site in sites])
        result = solve(stacked, statistics, spec, walk.scale_dtype)
        seconds = time.perf_counter() - started
        start = 0
        for site in sites:
            stop = start + site.out_features
            lost, total = float(result.row_error[start:stop].sum()), float(result.row_energy[start:stop].sum())
            if not math.isfinite(lost) or not math.isfinite(total):
                raise CheckpointError(
                    f"{site.key}: weights of up to {float(stored[site.key].float().abs().max()):.3g} overflow float32 "
                    "in its output; the checkpoint is damaged: download or export it again"
                )
            yield SolvedSite(
                site=site,
                spec=spec,
                weight=result.weight.rows(start, stop),
                error=lost / total if total > 0 else lost,
                damping=result.damping,
                events=(*events, *result.events, *(("all weights are zero",) if total == 0.0 else ())),
                seconds=seconds * site.out_features / stacked.shape[0],
                residual=None if result.residual is None else result.residual[start:stop],
            )
            start = stop
