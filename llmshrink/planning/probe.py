"""How long a run will take here: each kind of work is done once on one block, and multiplied by how often it comes.

Measured are the run's own functions on the run's own shapes: a batch through a block, a tap's statistics, a site's
solution, packing, writing, reading back. Real weights and text are used where they are on this machine; else noise of
the same shapes stands for them. Rows of a large weight don't depend on each other, so that a part of them is solved,
then twice as many, and what each row adds is told from what the Hessian alone costs.

Nothing is written but into a file without a name, which is gone when it's closed.
"""

from __future__ import annotations

import hashlib
import math
import os
import tempfile
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmshrink.calibration.activations import Batch
from llmshrink.calibration.statistics import Statistics
from llmshrink.checkpoint.index import CheckpointIndex, check_finite
from llmshrink.formats import stored
from llmshrink.formats.stored import Scheme
from llmshrink.methods import SiteSpec, solve
from llmshrink.model.paused import PausedForward, pausing_at
from llmshrink.model.sites import Site, Stage
from llmshrink.planning.spent import Measured, Spent, now, often, once
from llmshrink.run.heldout import LOGITS
from llmshrink.run.job import PROBE_TOKENS, Job
from llmshrink.weights import Solvable

SOLVED_WEIGHTS = 1 << 22
"""Weights of a stage that are solved to see how long it takes; of a larger one, rows of about so many."""
WRITTEN = 1 << 24
"""Bytes that are written to see how long it takes."""


class Noise:
    """A `TensorReader` of seeded noise in the shapes that an index names, of the size that trained weights have."""

    def __init__(self, index: CheckpointIndex) -> None:
        self._index = index

    def keys(self) -> list[str]:
        return self._index.keys()

    def read(self, key: str) -> Tensor:
        entry = self._index.entry(key)
        if len(entry.shape) < 2:
            return torch.ones(entry.shape, dtype=entry.dtype)
        return (torch.randn(entry.shape) / math.sqrt(entry.shape[-1])).to(entry.dtype)


@dataclass(frozen=True, eq=False)
class _Block:
    """What was measured of one kind of block. upto: by tap, the forward from the block's start to it; whole: to the
    end. short: a forward of a few tokens. inputs: by tap, what arrives there, [tokens, in]."""

    load: Spent
    upto: tuple[Spent, ...]
    whole: Spent
    short: Spent
    inputs: tuple[Tensor, ...]
    weights: dict[str, Tensor]
    nbytes: int


def probe(job: Job, *, keep_paused: bool, weights_here: bool, text: Spent) -> Measured:
    """Measure one block of each kind and add up the run. text: what reading and tokenizing took, or will."""
    start = now()
    chain, found = job.chain, Measured()
    chain.skeleton.reader = job.index if weights_here else Noise(job.index)
    found.add("text", text)
    timer = _Timer(job, keep_paused=keep_paused)
    for number in range(len(job.stages)):
        timer.block(found, number)
    timer.outside(found)
    found.took = now() - start
    return found


class _Timer:
    """Measures what it hasn't yet. writing: seconds a byte; its fixed part: three flushes of a file."""

    def __init__(self, job: Job, *, keep_paused: bool) -> None:
        self._job, self._keep_paused = job, keep_paused
        self._device = job.chain.skeleton.device
        self._calibration = [batch for batch in job.batches if not batch.held_out]
        self._held_out = [batch for batch in job.batches if batch.held_out]
        self._blocks: dict[Hashable, _Block] = {}
        self._stages: dict[Hashable, tuple[Spent, Spent, Spent, Spent]] = {}
        self._outside, self._hidden = self._embedded()
        self._flush, self._byte = writing(job.options.output)
        self._two = any("cross" in reads for reads in job.reads.values())
        self._reads = any(job.reads.values())
        self._reading = 0

    def block(self, found: Measured, number: int) -> None:
        """Add what one block costs."""
        job, stages = self._job, self._job.stages[number]
        block = self._measured(number)
        calibration, held = _tokens(self._calibration), _tokens(self._held_out)
        batch = self._calibration[0].input_ids.numel()
        found.add("analysis", block.load + 2 * block.short)
        found.add("forwards", self._forwards(block, calibration / batch, held / batch))
        found.add("weights", block.load)
        packed = Spent()
        for stage in stages:
            if not any(self._touched(site) for site in stage.sites):
                continue
            statistics, solved, pack, unpack = self._stage(block, stage)
            found.add("statistics", statistics * (calibration / batch))
            found.add("solving", solved)
            packed = packed + pack
            found.add("verification", unpack if job.options.verify else Spent())
        found.add("writing", packed + self._flush + self._byte * block.nbytes)
        if job.options.verify:
            found.add("verification", block.load + block.whole * (held / batch))

    def outside(self, found: Measured) -> None:
        """Add what embedding, head and the rest of the checkpoint cost."""
        chain, job = self._job.chain, self._job
        tokens = _tokens(job.batches) * (1 if self._reads else 0) + _tokens(self._held_out)
        batch = self._calibration[0].input_ids.numel()
        load, embed = self._outside
        found.add("analysis", load)
        found.add("forwards", load + embed * (tokens / batch))
        nbytes = sum(job.index.entry(key).nbytes for key in job.index) - sum(
            job.index.entry(key).nbytes
            for name, key in chain.skeleton.key_of.items()
            if name.startswith(chain.prefix + ".")
        )
        found.add("writing", self._flush + self._byte * max(0, nbytes))
        chain.load_tail()
        vocabulary = job.index.entry(chain.skeleton.key_of[_head(chain)]).shape[0]
        rows = max(1, min(LOGITS // vocabulary, batch))
        hidden = self._hidden.reshape(1, -1, self._hidden.shape[-1])[:, :rows].float()
        logits = often(lambda: chain.logits(hidden)[0].float().log_softmax(-1).topk(8), self._device)
        chain.release_outside()
        # The original's and the compressed model's for the summary, the latter's for the reference, and reloaded.
        passes = 3 + (1 if job.options.verify else 0)
        found.add("quality", load + logits * (passes * _tokens(self._held_out) / rows))
        if job.options.verify:
            found.add("verification", load)

    def _touched(self, site: Site) -> bool:
        job = self._job
        return site.name in job.reads if job.structure is not None else site.name in job.specs

    def _forwards(self, block: _Block, calibration: float, held: float) -> Spent:
        """All forwards of a block. calibration, held: batches."""
        found = block.whole * (2 * held)
        if not self._reads:
            return found
        one = block.whole if self._keep_paused else sum(block.upto, block.whole)
        other = block.whole if self._keep_paused else sum(block.upto[:-1], block.whole)
        return found + one * calibration + (other * calibration if self._two else Spent())

    def _embedded(self) -> tuple[tuple[Spent, Spent], Tensor]:
        chain, batch = self._job.chain, self._calibration[0]
        load, _ = once(lambda: chain.load_outside(check=check_finite), self._device)
        embed = often(lambda: chain.embed(batch), self._device)
        hidden = chain.embed(batch)
        chain.release_outside()
        return (load, embed), hidden

    def _measured(self, number: int) -> _Block:
        job, chain = self._job, self._job.chain
        module = chain.blocks[number]
        active = [stage for stage in job.stages[number] if any(self._touched(site) for site in stage.sites)]
        kind = (
            tuple((name, tuple(each.shape)) for name, each in module.named_parameters()),
            tuple(stage.tap for stage in active),
            str(chain.calls(self._calibration[0])[number].kwargs.get("attention_mask") is None),
        )
        if kind not in self._blocks:
            self._blocks[kind] = self._run_block(number, [stage.tap for stage in active])
        return self._blocks[kind]

    def _run_block(self, number: int, taps: list[str]) -> _Block:
        chain, batch = self._job.chain, self._calibration[0]
        load, weights = once(lambda: chain.skeleton.load(chain.name(number), check=check_finite), self._device)
        module, call = chain.blocks[number], chain.calls(batch)[number]

        def run() -> None:
            with torch.no_grad():
                call.run(module, self._hidden)

        whole = often(run, self._device)
        few = Batch(batch.input_ids[:1, :PROBE_TOKENS], None, held_out=False)
        short_call, start = chain.calls(few)[number], self._hidden[:1, :PROBE_TOKENS].contiguous()

        def run_short() -> None:
            with torch.no_grad():
                short_call.run(module, start)

        short = often(run_short, self._device)
        upto, inputs = [], []
        with pausing_at(module, taps):
            paused = PausedForward(module, call, self._hidden)
            begun = now(self._device)
            for _ in taps:
                arrived = batch.real(paused.advance())
                upto.append(now(self._device) - begun)
                inputs.append(arrived.clone())
            paused.close()
        chain.skeleton.release(chain.name(number))
        nbytes = sum(each.numel() * each.dtype.itemsize for each in weights.values())
        return _Block(load, tuple(upto), whole, short, tuple(inputs), weights, nbytes)

    def _stage(self, block: _Block, stage: Stage) -> tuple[Spent, Spent, Spent, Spent]:
        """Statistics of a batch, the solution, packing, and reading back of one stage."""
        job = self._job
        specs = tuple((site.out_features, site.in_features, job.specs.get(site.name)) for site in stage.sites)
        if specs not in self._stages:
            self._stages[specs] = self._run_stage(block, stage, block.inputs[self._taps(stage).index(stage.tap)])
        return self._stages[specs]

    def _taps(self, stage: Stage) -> list[str]:
        stages = self._job.stages[stage.sites[0].block]
        return [each.tap for each in stages if any(self._touched(site) for site in each.sites)]

    def _run_stage(self, block: _Block, stage: Stage, inputs: Tensor) -> tuple[Spent, Spent, Spent, Spent]:
        job = self._job
        reads = frozenset[str]().union(*(job.reads.get(site.name, ()) for site in stage.sites))
        cross = "cross" in reads
        statistics = Statistics(inputs.shape[1], cross=cross, device=self._device) if reads else None
        gathered = Spent()
        if statistics is not None:
            other = inputs + 0.01 * torch.randn_like(inputs) if cross else None
            gathered = often(lambda: statistics.add(inputs, other), self._device)
        solved, pack, unpack = Spent(), Spent(), Spent()
        groups: dict[tuple[SiteSpec, str], list[Site]] = {}
        for site in stage.sites:
            spec = job.specs.get(site.name)
            if spec is not None:
                groups.setdefault((spec, site.name if spec.rows_together else ""), []).append(site)
        for (spec, _), sites in groups.items():
            stacked = torch.cat([self._weight(block, site).to(self._device, torch.float32) for site in sites])
            took, weight = self._solved(stacked, statistics, spec)
            solved = solved + took
            share = stacked.shape[0] / len(weight.dequantize(torch.bfloat16))
            one, two = self._stored(weight, job.schemes[sites[0].name])
            pack, unpack = pack + one * share, unpack + two * share
        return gathered, solved, pack, unpack

    def _stored(self, weight: Solvable, scheme: Scheme | None) -> tuple[Spent, Spent]:
        """What it takes to store a solved weight and to go on with it, and to read it back."""
        dtype = self._job.chain.skeleton.dtype
        install, _ = once(lambda: weight.dequantize(dtype))
        pack, tensors = once(lambda: stored.tensors("x", stored.as_stored(weight, scheme)))
        unpack, _ = once(lambda: stored.whole(stored.read("x", tensors.__getitem__, scheme)).dequantize(dtype))
        return install + pack, unpack

    def _solved(self, stacked: Tensor, statistics: Statistics | None, spec: SiteSpec) -> tuple[Spent, Solvable]:
        rows = stacked.shape[0]
        few = max(64, SOLVED_WEIGHTS // stacked.shape[1] // 2)
        dtype = self._job.scale_dtype
        if spec.rows_together or rows <= 2 * few:
            took, whole = once(lambda: solve(stacked, statistics, spec, dtype), self._device)
            return took, whole.weight
        one, _ = once(lambda: solve(stacked[:few], statistics, spec, dtype), self._device)
        two, part = once(lambda: solve(stacked[: 2 * few], statistics, spec, dtype), self._device)
        return two + (two - one) * ((rows - 2 * few) / few), part.weight

    def _weight(self, block: _Block, site: Site) -> Tensor:
        found = block.weights.get(site.key)
        return self._job.chain.skeleton.reader.read(site.key) if found is None else found


def _tokens(batches: Sequence[Batch]) -> int:
    return sum(batch.input_ids.numel() for batch in batches)


def _head(chain: Any) -> str:
    """Name of the output layer's weight."""
    head = chain.skeleton.model.get_output_embeddings()
    return next(f"{name}.weight" for name, module in chain.skeleton.model.named_modules() if module is head)


def writing(folder: Path) -> tuple[Spent, Spent]:
    """(what each file of weights costs whatever its size, what each byte costs) where `folder` will be."""
    place = next(each for each in (folder.absolute(), *folder.absolute().parents) if each.is_dir())
    data = memoryview(os.urandom(1 << 16) * (WRITTEN >> 16))
    with tempfile.TemporaryFile(dir=place) as file:

        def write(piece: memoryview) -> None:
            hashlib.sha256(piece)
            file.write(piece)
            file.flush()
            os.fsync(file.fileno())

        flush, _ = once(lambda: write(data[:4096]))
        whole, _ = once(lambda: write(data))
    return flush * 4, (whole - flush) * (1 / WRITTEN)
