"""A block made narrower: its consuming matrices solved in running order, their producers cut to match.

The modules of the compressed block really shrink, so that the compressed stream is what the published model computes,
to the bit: the forward that fed a cut matrix is run again through the narrower block instead of being finished.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llmshrink.calibration.statistics import Statistics
from llmshrink.checkpoint.conserve import Ledger
from llmshrink.errors import CheckpointError
from llmshrink.methods import Narrowed, narrow
from llmshrink.model.cuts import KV_GROUPS, Cut
from llmshrink.model.paused import pausing_at
from llmshrink.model.sites import Site, sites_of
from llmshrink.run.job import Job
from llmshrink.run.journal import Part
from llmshrink.run.memory import give_back
from llmshrink.run.report import SiteRow
from llmshrink.run.shards import open_shards
from llmshrink.run.structure import Fewer, Structure
from llmshrink.run.transform import gather
from llmshrink.run.walk import Forwards, Walk, replace_parameters, shared_twin
from llmshrink.run.work import Finished, bytes_of


class NarrowWork:
    """Fewer channels or KV groups, as the job's structure says. checkpoint: where finished shards are."""

    def __init__(self, job: Job, structure: Structure, checkpoint: Path) -> None:
        self._job, self._structure, self._checkpoint = job, structure, checkpoint

    def solve(self, walk: Walk, number: int) -> Finished:
        assert not walk.keep_paused, "a narrower block is run again from its start"
        chain, stages = walk.chain, self._job.stages[number]
        stored = chain.load_block(number)
        block = chain.blocks[number]
        twin = shared_twin(block)
        tensors, solved, seconds = dict(stored), dict[str, Narrowed](), dict[str, float]()
        todo = {each.cuts[number].consumer.local: each for each in self._structure.fewer}
        active = [stage for stage in stages if any(site.local in todo for site in stage.sites)]
        taps = [stage.tap for stage in active]
        with ExitStack() as stack:
            stack.enter_context(pausing_at(block, taps))
            stack.enter_context(pausing_at(twin, taps))
            forwards = Forwards(walk, number, block, twin)
            for position, stage in enumerate(active):
                statistics = gather(walk, active, forwards, position, stored)
                assert statistics is not None, "every narrowing reads the Hessian"
                for site in stage.sites:
                    if site.local not in todo:
                        continue
                    started = time.perf_counter()
                    fewer = todo[site.local]
                    result = self._narrowed(stored[site.key], site, statistics, fewer)
                    tensors |= self._cut(fewer.cuts[number], result, tensors)
                    solved[site.name], seconds[site.name] = result, time.perf_counter() - started
                    install(twin, fewer.cuts[number], self._keys(fewer.cuts[number]), tensors)
                    self._tell(twin, fewer)
                del statistics
            give_back()
            forwards.finish_all()
        chain.skeleton.release(chain.name(number))
        errors = [result.error for result in solved.values()]
        return Finished(tensors, self._rows(number, tensors, solved), sum(errors) / len(errors), seconds)

    def replay(self, walk: Walk, number: int, part: Part) -> None:
        chain = walk.chain
        chain.load_block(number)
        block = chain.blocks[number]
        twin = shared_twin(block)
        with open_shards(self._checkpoint, part.shards) as shards:
            for fewer in self._structure.fewer:
                keys = self._keys(fewer.cuts[number])
                install(twin, fewer.cuts[number], keys, {key: shards.read(key) for key in keys.values()})
                self._tell(twin, fewer)
        Forwards(walk, number, block, twin).finish_all()
        chain.skeleton.release(chain.name(number))

    @property
    def inside(self) -> frozenset[str]:
        return frozenset()

    @property
    def structure(self) -> dict[str, Any]:
        return self._structure.record()

    def ledger(self) -> Ledger:
        cuts = [cut for fewer in self._structure.fewer for cut in fewer.cuts]
        cut = {key for each in cuts for key in self._keys(each).values()}
        index = self._job.index
        return Ledger(replaced={key: [key] for key in index if key in cut}, copied={k for k in index if k not in cut})

    def config(self, config: dict[str, Any]) -> dict[str, Any]:
        return self._structure.config(config)

    def _tell(self, twin: nn.Module, fewer: Fewer) -> None:
        """A block that has a parameter for all heads finds them in it by their numbers: these must be the new ones.

        twin: whose modules have a config of their own, as they are copies of the original's.
        """
        if fewer.what != KV_GROUPS:
            return
        for module in twin.modules():
            for owner in (module, getattr(module, "config", None)):
                for name, count in self._structure.fields.items():
                    if hasattr(owner, name):
                        setattr(owner, name, count)

    def _narrowed(self, weight: Tensor, site: Site, statistics: Statistics, fewer: Fewer) -> Narrowed:
        device = self._job.chain.skeleton.device
        result = narrow(weight.to(device), statistics, fewer.spec, weight.dtype)
        if not math.isfinite(result.error):
            raise CheckpointError(
                f"{site.key}: weights of up to {float(weight.float().abs().max()):.3g} overflow float32 in its output; "
                "the checkpoint is damaged: download or export it again"
            )
        if not bool(torch.isfinite(result.weight).all()):
            raise CheckpointError(
                f"{site.key}: what is left of it can't be stored in {str(weight.dtype).removeprefix('torch.')}: it "
                "overflows; give more --samples, or leave the least squares out with --no-repair"
            )
        return result

    def _cut(self, cut: Cut, result: Narrowed, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The narrower tensors of a cut: the solved consumer, and its producers' rows and biases that stay."""
        keys = self._keys(cut)
        units = result.units.cpu()
        found = {keys[f"{cut.consumer.local}.weight"]: result.weight.cpu()}
        for number, (site, _) in enumerate(cut.producers):
            rows = cut.rows(number, units)
            for name in (f"{site.local}.weight", f"{site.local}.bias"):
                if name in keys:
                    found[keys[name]] = tensors[keys[name]].index_select(0, rows)
        return found

    def _keys(self, cut: Cut) -> dict[str, str]:
        """Parameter of the block -> checkpoint key, of every parameter that a cut makes smaller."""
        key_of = self._job.chain.skeleton.key_of
        found = {f"{cut.consumer.local}.weight": cut.consumer.key}
        for site, _ in cut.producers:
            found[f"{site.local}.weight"] = site.key
            if f"{site.name}.bias" in key_of:
                found[f"{site.local}.bias"] = key_of[f"{site.name}.bias"]
        return found

    def _rows(self, number: int, tensors: Mapping[str, Tensor], solved: Mapping[str, Narrowed]) -> list[SiteRow]:
        rows = []
        cut_by = {
            name: f"{each.what} {each.count}"
            for each in self._structure.fewer
            for name in (each.cuts[number].consumer.name, *(site.name for site, _ in each.cuts[number].producers))
        }
        for site in sites_of(self._job.stages[number]):
            result = solved.get(site.name)
            shape = tensors[site.key].shape
            rows.append(
                SiteRow(
                    name=site.name,
                    shape=(shape[0], shape[1]),
                    bits=None,
                    group_size=None,
                    method=None,
                    bytes=bytes_of(site.key, tensors),
                    error=result.error if result else None,
                    damping=result.damping if result else None,
                    note=None,
                    events=result.events if result else (),
                    pruned=cut_by.get(site.name),
                )
            )
        return rows


def install(block: nn.Module, cut: Cut, keys: Mapping[str, str], tensors: Mapping[str, Tensor]) -> None:
    """Put narrower parameters into a block's linears. keys: parameter -> key; tensors: by key, as they are stored."""
    replace_parameters(block, {name: tensors[key] for name, key in keys.items()})
    for name in keys:
        linear = block.get_submodule(name.rpartition(".")[0])
        assert isinstance(linear, nn.Linear), name
        linear.out_features, linear.in_features = linear.weight.shape
