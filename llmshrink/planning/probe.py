"""How long a run will take here: each kind of work is done once on one block, and multiplied by how often it comes.

Measured are the run's own functions on the run's own shapes: batches through a block and their statistics, a site's
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
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from llmshrink.calibration.activations import Batch, Stream
from llmshrink.calibration.statistics import Statistics
from llmshrink.checkpoint.index import CheckpointIndex, check_finite
from llmshrink.formats import stored
from llmshrink.formats.stored import Scheme
from llmshrink.methods import SiteSpec, narrow, solve
from llmshrink.model.outline import kind_of
from llmshrink.model.paused import pausing_at
from llmshrink.model.sites import Site, Stage, sites_of
from llmshrink.planning.spent import Measured, Spent, now, often, once
from llmshrink.run.depth import LOSS_TOKENS
from llmshrink.run.heldout import LOGITS, TOP
from llmshrink.run.job import PROBE_TOKENS, Job
from llmshrink.run.quantize import block_tuning
from llmshrink.run.sizes import outside_keys
from llmshrink.run.transform import gather
from llmshrink.run.walk import Forwards, Walk, shared_twin
from llmshrink.weights import Solvable

MOST_BATCHES = 8
WALKED = 0.3
"""As many batches as take about so many seconds in a forward, two to eight, go through the run's own loop."""
SOLVED_WEIGHTS = 1 << 23
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
    """What was measured of one kind of block.

    load: its weights from disk. whole, short: a forward of a batch, and of the few tokens of the analysis. gathered: of
    a batch, its way to the last tap in the streams that it travels in, with all statistics; to_end: from there. solved,
    packed, unpacked: of all sites. angle: of a batch. tuned: a step of its training. nbytes: of its weights.
    """

    load: Spent
    whole: Spent
    short: Spent
    gathered: Spent
    to_end: Spent
    solved: Spent
    packed: Spent
    unpacked: Spent
    angle: Spent
    tuned: Spent
    nbytes: int


def probe(job: Job, *, keep_paused: bool, weights_here: bool, text: Spent) -> Measured:
    """Measure one block of each kind and add up the run. text: what reading and tokenizing took, or will."""
    start = now()
    found = Measured()
    job.chain.skeleton.reader = job.index if weights_here else Noise(job.index)
    found.add("text", text)
    timer = _Timer(job, keep_paused=keep_paused and job.structure is None)
    for number in range(len(job.stages)):
        timer.block(found, number)
    timer.outside(found)
    found.took = now() - start
    return found


class _Timer:
    """Measures what it hasn't yet, and adds it up."""

    def __init__(self, job: Job, *, keep_paused: bool) -> None:
        self._job, self._keep_paused = job, keep_paused
        self._device = job.chain.skeleton.device
        self._calibration = [batch for batch in job.batches if not batch.held_out]
        self._held_out = [batch for batch in job.batches if batch.held_out]
        self._a_batch = self._calibration[0].input_ids.numel()
        self._blocks: dict[Hashable, _Block] = {}
        self._load, self._embed, self._hidden = self._embedded()
        self._flush, self._byte = writing(job.options.output)

    def block(self, found: Measured, number: int) -> None:
        """Add what one block costs."""
        job, block = self._job, self._measured(number)
        batches, held = _tokens(self._calibration) / self._a_batch, _tokens(self._held_out) / self._a_batch
        found.add("analysis", block.load + 2 * block.short)
        if job.structure is not None and job.structure.depth is not None:
            found.add("choosing", block.load + self._choosing(block, batches))
        found.add("calibration", block.load + (block.gathered + block.to_end) * batches + block.whole * (2 * held))
        if any(stage.sites[0].name in job.smoothing for stage in job.stages[number]):
            found.add("calibration", block.whole * batches)
        found.add("solving", block.solved)
        if job.recipe.tune is not None:
            # A step without its gradient is a third of it; the block's result passes once more.
            held_out = block.tuned * (2 * held * self._a_batch / (3 * self._step_tokens))
            found.add("tuning", block.tuned * job.recipe.tune.steps + block.whole * (batches + held) + held_out)
        found.add("writing", block.packed + self._flush + self._byte * block.nbytes)
        if job.options.verify:
            found.add("verification", block.load + block.unpacked + block.whole * held)

    def outside(self, found: Measured) -> None:
        """Add what embedding, head and the rest of the checkpoint cost."""
        chain, job = self._job.chain, self._job
        tokens = _tokens(job.batches) if job.calibrates else _tokens(self._held_out)
        found.add("analysis", self._load)
        found.add("calibration", self._load + self._embed * (tokens / self._a_batch))
        keys = set(outside_keys(job))
        found.add("writing", self._flush + self._byte * sum(job.index.entry(key).nbytes for key in keys))
        chain.load_tail()
        head = chain.skeleton.model.get_output_embeddings().weight
        rows = max(1, min(LOGITS // head.shape[0], self._a_batch))
        hidden = self._hidden.reshape(1, -1, self._hidden.shape[-1])[:, :rows].float()
        logits = often(lambda: chain.logits(hidden)[0].float().log_softmax(-1).topk(TOP), self._device)
        chain.release_outside()
        # The original's and the compressed model's for the summary, the latter's for the reference, and reloaded.
        passes = 4 if job.options.verify else 3
        found.add("quality", self._load + logits * (passes * _tokens(self._held_out) / rows))
        if job.options.verify:
            found.add("verification", self._load)

    def _choosing(self, block: _Block, batches: float) -> Spent:
        """Of the pass that decides which blocks go, a block's share."""
        structure = self._job.structure
        assert structure is not None and structure.depth is not None
        if structure.depth.by == "angular":
            return (block.whole + block.angle) * batches
        few = min(LOSS_TOKENS, _tokens(self._calibration)) / self._a_batch
        return block.whole * (few * (structure.blocks.before + 1) / 2)

    def _embedded(self) -> tuple[Spent, Spent, Tensor]:
        chain, batch = self._job.chain, self._calibration[0]
        load, _ = once(lambda: chain.load_outside(check=check_finite), self._device)
        embed = often(lambda: chain.embed(batch), self._device)
        hidden = chain.embed(batch)
        chain.release_outside()
        return load, embed, hidden

    def _measured(self, number: int) -> _Block:
        job = self._job
        names = job.specs if job.structure is None else job.structure.narrow
        active = [stage for stage in job.stages[number] if any(site.name in names for site in stage.sites)]
        asked = tuple((site.local, names.get(site.name)) for stage in active for site in stage.sites)
        kind = (kind_of(job.chain.blocks[number]), asked)
        if kind not in self._blocks:
            self._blocks[kind] = self._run(number, active)
        return self._blocks[kind]

    def _run(self, number: int, active: list[Stage]) -> _Block:
        chain, batch, device = self._job.chain, self._calibration[0], self._device
        load, weights = once(lambda: chain.skeleton.load(chain.name(number), check=check_finite), device)
        few = Batch(batch.input_ids[:1, :PROBE_TOKENS], None, held_out=False)
        short = often(self._forward(number, few, self._hidden[:1, :PROBE_TOKENS].contiguous()), device)
        whole = often(self._forward(number, batch, self._hidden), device)
        angle = often(lambda: _angle(self._hidden), device)
        gathered, to_end, statistics = self._gathered(number, active, weights, whole)
        solved = packed = unpacked = Spent()
        for stage, each in zip(active, statistics, strict=True):
            took = self._solve(stage, each, weights)
            solved, packed, unpacked = solved + took[0], packed + took[1], unpacked + took[2]
        chain.skeleton.release(chain.name(number))
        tuned = self._tuned(number, active)
        nbytes = sum(each.numel() * each.dtype.itemsize for each in weights.values())
        return _Block(load, whole, short, gathered, to_end, solved, packed, unpacked, angle, tuned, nbytes)

    @property
    def _step_tokens(self) -> int:
        asked = self._job.recipe.tune
        return 0 if asked is None else asked.windows * self._job.calibration.input_ids.shape[1]

    def _tuned(self, number: int, active: list[Stage]) -> Spent:
        """A step of a block's tuning, as the run itself measures it."""
        job = self._job
        tuning = block_tuning(job, None)
        if tuning is None:
            return Spent()
        walk = Walk(
            chain=job.chain,
            batches=self._calibration[:1],
            original=Stream(None),
            compressed=Stream(None),
            specs=job.specs,
            reads=job.reads,
            scale_dtype=job.scale_dtype,
            keep_paused=False,
        )
        walk.compressed.put(0, self._hidden)
        return Spent(*tuning.step_seconds(walk, number, sites_of(active)))

    def _forward(self, number: int, batch: Batch, hidden: Tensor) -> Callable[[], object]:
        module, call = self._job.chain.blocks[number], self._job.chain.calls(batch)[number]

        def run() -> None:
            with torch.no_grad():
                call.run(module, hidden)

        return run

    def _gathered(
        self, number: int, active: list[Stage], weights: Mapping[str, Tensor], whole: Spent
    ) -> tuple[Spent, Spent, list[Statistics | None]]:
        """A few batches through the run's own loop: (to the taps, from there to the end) of one; what was gathered."""
        job, chain = self._job, self._job.chain
        if not job.calibrates:
            return Spent(), Spent(), [None for _ in active]
        count = min(len(self._calibration), max(2, min(MOST_BATCHES, int(WALKED / max(whole.wall, 1e-6)))))
        walk = Walk(
            chain=chain,
            batches=self._calibration[:count],
            original=Stream(None),
            compressed=Stream(None),
            specs=job.specs,
            reads=job.reads,
            scale_dtype=job.scale_dtype,
            keep_paused=self._keep_paused,
        )
        for i in range(count):
            for stream in (walk.original, walk.compressed):
                stream.put(i, self._hidden.clone())
        block, found, spent = chain.blocks[number], [], Spent()
        twin = shared_twin(block)
        taps = [stage.tap for stage in active]
        with pausing_at(block, taps), pausing_at(twin, taps):
            forwards = Forwards(walk, number, block, twin)
            for position in range(len(active)):
                took, statistics = once(partial(gather, walk, active, forwards, position, weights), self._device)
                spent = spent + took
                found.append(statistics)
            to_end, _ = once(forwards.finish_all, self._device)
        return spent * (1 / count), to_end * (1 / count), found

    def _solve(
        self, stage: Stage, statistics: Statistics | None, weights: Mapping[str, Tensor]
    ) -> tuple[Spent, Spent, Spent]:
        """The solution of one stage, storing it, and reading it back."""
        job = self._job
        solved = packed = unpacked = Spent()
        if job.structure is not None:
            for site in stage.sites:
                if site.name in job.structure.narrow and statistics is not None:
                    weight, spec = weights[site.key].to(self._device), job.structure.narrow[site.name]
                    took, _ = once(partial(narrow, weight, statistics, spec, weight.dtype), self._device)
                    solved = solved + took
            return solved, packed, unpacked
        groups: dict[tuple[SiteSpec, str], list[Site]] = {}
        for site in stage.sites:
            asked = job.specs.get(site.name)
            if asked is not None:
                groups.setdefault((asked, site.name if asked.rows_together else ""), []).append(site)
        for (each, _), sites in groups.items():
            stacked = torch.cat([weights[site.key].to(self._device, torch.float32) for site in sites])
            took, result = self._solved(stacked, statistics, each)
            share = stacked.shape[0] / len(result.dequantize(torch.bfloat16))
            one, two = self._stored(result, job.schemes[sites[0].name])
            solved, packed, unpacked = solved + took, packed + one * share, unpacked + two * share
        return solved, packed, unpacked

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
        if statistics is None:
            took, part = once(lambda: solve(stacked[: 2 * few], None, spec, dtype), self._device)
            return took * (rows / (2 * few)), part.weight
        one, _ = once(lambda: solve(stacked[:few], statistics, spec, dtype), self._device)
        two, part = once(lambda: solve(stacked[: 2 * few], statistics, spec, dtype), self._device)
        return two + (two - one) * ((rows - 2 * few) / few), part.weight


def _tokens(batches: Sequence[Batch]) -> int:
    return sum(batch.input_ids.numel() for batch in batches)


def _angle(hidden: Tensor) -> float:
    """What is asked of a block's input and output where blocks are chosen by their angle."""
    one = hidden.reshape(-1, hidden.shape[-1]).float()
    return float(torch.nn.functional.cosine_similarity(one, one, dim=-1).clamp(-1.0, 1.0).acos().double().sum())


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
