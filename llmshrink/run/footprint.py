"""What a run holds in memory at its fullest, from the facts that it decides by.

A run never holds the model: it holds a block, the activations of all batches, and what a method works with. So its peak
is what the process has before it starts, its libraries above all, and the largest of a few moments: the streams being
embedded, a stage's statistics being gathered with every batch waiting at a tap, a stage being solved, the head at the
end. What a waiting batch holds is counted on a few tokens (`model.held`), what a method holds is in `run.workspace`.

On a CUDA device the activations, a block's parameters and the methods are there, and a block as it is stored is in
memory.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from llmshrink.calibration.activations import Batch
from llmshrink.calibration.statistics import through_one
from llmshrink.checkpoint.header import TensorEntry
from llmshrink.methods import SiteSpec
from llmshrink.model.held import Held, held_by
from llmshrink.model.outline import Blank, kind_of
from llmshrink.model.sites import Stage, sites_of
from llmshrink.run.heldout import LOGITS
from llmshrink.run.job import PROBE_TOKENS, Job
from llmshrink.run.sizes import outside_keys
from llmshrink.run.workspace import narrowing, solving
from llmshrink.weights import Activations, round_inputs

LIBRARIES = 45_000_000
"""Bytes that the mathematical libraries take when the first large batch is computed: code, threads' buffers."""
FLOAT = 4
TRAINING = 30
"""Bytes of a weight while its block is tuned: its latent, that one's gradient and Adam's two moments, its code, what it
is multiplied as in float32 and in bfloat16, and the gradient of that."""
GRAPH = 3
"""How much of what a forward holds at its fullest, in float32, a step holds until its gradient is known."""
DECODING = 14
"""Bytes that a weight takes while it is brought back from a format: packed, as codes, in float32, and as it's used."""


@dataclass(frozen=True)
class Footprint:
    """Bytes beside what the process has before it starts: ram, and vram on a CUDA device. streams: of both, at rest."""

    ram: int
    vram: int
    streams: int


def footprint(job: Job, *, keep_paused: bool, in_files: bool) -> Footprint:
    """The most that a run of `job` adds to its process. keep_paused, in_files: where its activations are."""
    sizes = _Activations.of(job, keep_paused=keep_paused, in_files=in_files)
    moments = [*_at_the_ends(job, sizes), *_in_blocks(job, sizes)]
    if job.chain.skeleton.device.type == "cpu":
        return Footprint(LIBRARIES + max(here + there for here, there in moments), 0, sizes.streams)
    return Footprint(max(here for here, _ in moments), max(there for _, there in moments), sizes.streams)


@dataclass(frozen=True)
class _Activations:
    """calibration, held_out: tokens in all batches; batch: in one. at_rest: bytes of a token between blocks.

    two: whether calibration travels in both streams; any: whether it travels at all. tuned: whether what enters a block
    is kept until it is tuned.
    """

    calibration: int
    held_out: int
    batch: int
    at_rest: int
    itemsize: int
    two: bool
    any: bool
    tuned: bool
    keep_paused: bool
    in_files: bool

    @classmethod
    def of(cls, job: Job, *, keep_paused: bool, in_files: bool) -> _Activations:
        batches = [batch.input_ids.numel() for batch in job.batches]
        held_out = sum(batch.input_ids.numel() for batch in job.batches if batch.held_out)
        itemsize = job.chain.skeleton.dtype.itemsize
        width = job.chain.skeleton.model.config.get_text_config().hidden_size
        tuned = job.recipe.tune is not None
        return cls(
            calibration=sum(batches) - held_out,
            held_out=held_out,
            batch=max(batches),
            at_rest=width * itemsize,
            itemsize=itemsize,
            two=tuned or any("cross" in reads for reads in job.reads.values()),
            any=job.calibrates,
            tuned=tuned,
            keep_paused=keep_paused and job.structure is None,
            in_files=in_files,
        )

    @property
    def streams(self) -> int:
        """Bytes of both streams between two blocks."""
        return ((1 + self.two) * self.any * self.calibration + 2 * self.held_out) * self.at_rest + self.entering

    @property
    def entering(self) -> int:
        """Bytes of what enters a block, kept beside both streams."""
        return self.tuned * (self.calibration + self.held_out) * self.at_rest

    @property
    def resting(self) -> int:
        """The same, as far as they are in memory."""
        return 0 if self.in_files else self.streams


def _at_the_ends(job: Job, sizes: _Activations) -> Iterator[tuple[int, int]]:
    """(in memory as stored, on the device) while the model is read first, while batches are embedded, at the head, and
    while the result is read back."""
    chain, index = job.chain, job.index
    dtype = chain.skeleton.dtype
    outside = [index.entry(key) for key in outside_keys(job)]
    stored = sum(entry.nbytes for entry in outside)
    here, there = _read(stored, sum(entry.nbytes // entry.dtype.itemsize for entry in outside), job, dtype)
    block = max(sum(site.out_features * site.in_features for site in sites_of(stages)) for stages in job.stages)
    of_block = _read(block * job.scale_dtype.itemsize, block, job, dtype)
    vocabulary = max((entry.shape[0] for entry in outside if len(entry.shape) == 2), default=0)
    yield here + of_block[0], there + of_block[1] + 3 * PROBE_TOKENS * vocabulary * FLOAT
    if job.smoothing:  # what can be smoothed is tried in float32
        yield FLOAT * max(site.out_features * site.in_features for site in job.sites), FLOAT * block
    # Both streams begin as one.
    tokens = sizes.calibration * sizes.any + sizes.held_out
    yield here, there + (sizes.batch if sizes.in_files else tokens) * sizes.at_rest
    if job.options.verify:
        largest = max((site.out_features * site.in_features for site in job.sites), default=0)
        yield of_block[0] + DECODING * largest, of_block[1] + here
    head = chain.skeleton.model.get_output_embeddings().weight
    rows = head.shape[0] * head.shape[1]
    held_out = 2 * sizes.held_out * sizes.at_rest
    logits = min(LOGITS, sizes.held_out * head.shape[0])
    yield rows * index.entry(_key_of_head(job)).dtype.itemsize, rows * FLOAT + 5 * logits * FLOAT + held_out


def _key_of_head(job: Job) -> str:
    model = job.chain.skeleton.model
    head = model.get_output_embeddings()
    return job.chain.skeleton.key_of[next(f"{name}.weight" for name, each in model.named_modules() if each is head)]


def _sizes(entries: Sequence[TensorEntry], job: Job) -> tuple[int, int]:
    """The same of these tensors of the checkpoint, in the dtype that is computed in."""
    elements = sum(entry.nbytes // entry.dtype.itemsize for entry in entries)
    return _read(sum(entry.nbytes for entry in entries), elements, job, job.chain.skeleton.dtype)


def _read(stored: int, elements: int, job: Job, dtype: torch.dtype) -> tuple[int, int]:
    """(as stored, as parameters) of tensors that a skeleton has loaded; one memory for both where nothing is cast."""
    device = job.chain.skeleton.device
    parameters = elements * dtype.itemsize
    if device.type == "cpu" and stored == parameters:
        return stored, 0
    return stored, parameters


def _in_blocks(job: Job, sizes: _Activations) -> Iterator[tuple[int, int]]:
    """The same for every moment of every kind of block."""
    specs: Mapping[str, Hashable] = job.specs if job.structure is None else job.structure.narrow
    seen: set[Hashable] = set()
    for number, stages in enumerate(job.stages):
        active = [stage for stage in stages if any(site.name in specs for site in stage.sites)]
        asked = tuple((site.local, specs.get(site.name)) for site in sites_of(active))
        kind = (kind_of(job.chain.blocks[number]), asked, number == 0)
        if kind not in seen:
            seen.add(kind)
            yield from _in_block(job, sizes, number, active)


def _touched(job: Job, name: str) -> bool:
    return name in (job.specs if job.structure is None else job.structure.narrow)


def _in_block(job: Job, sizes: _Activations, number: int, active: Sequence[Stage]) -> Iterator[tuple[int, int]]:
    plain = _held(job, number, active, {})
    kinds = _rounded(job, active)
    rounding = _held(job, number, active, kinds) if kinds else plain
    keys = {key for name, key in job.chain.skeleton.key_of.items() if name.startswith(f"{job.chain.name(number)}.")}
    entries = [job.index.entry(key) for key in keys]
    here, there = _sizes(entries, job)
    if job.chain.skeleton.ahead is not None:
        coming = sum(entry.nbytes for entry in entries)  # the next block, on its way
        here, there = here + coming, there + coming
    smoothing = [stage for stage in active if stage.sites[0].name in job.smoothing]
    # What was smoothed is kept beside the original; before it is known, the block isn't rounded yet.
    changed = [job.index.entry(site.key) for stage in smoothing for site in stage.sites]
    copies = _sizes(changed, job)
    here, there = here + copies[0], there + copies[1]
    forward = int(max(rounding.most, plain.most) * sizes.batch)
    yield here, there + sizes.resting + forward
    solved = 0
    for stage, waiting in zip(active, _waiting(active, (rounding, plain), sizes, number, job.reads), strict=True):
        inputs = stage.sites[0].in_features
        reads = frozenset[str]().union(*(job.reads.get(site.name, ()) for site in stage.sites))
        crossing = [site.out_features for site in stage.sites if "cross" in job.reads.get(site.name, ())]
        cross, through = bool(crossing), through_one(crossing, inputs)
        crossed = cross * FLOAT * (crossing[0] if through else inputs) * inputs
        # W itself is kept beside W D.
        statistics = FLOAT * inputs * inputs + crossed * (1 + through) if reads else 0
        differing = cross * (3 + (stage in smoothing))
        adding = sizes.batch * inputs * (FLOAT + differing * sizes.itemsize) if reads else 0
        adding += crossed  # the batch's product, before it's added
        yield here, there + solved + waiting + statistics + max(adding, forward)
        yield here, there + solved + waiting + statistics + _workspace(job, stage, cross)
        weights = sum(site.out_features * site.in_features for site in stage.sites if _touched(job, site.name))
        # What the compressed block computes with, and the solution as it will be stored.
        solved += weights * (sizes.itemsize + 1 if job.structure is None else 2 * sizes.itemsize)
        if sizes.tuned:
            solved += weights * FLOAT  # what rounding left
    if job.recipe.tune is not None:
        weights = sum(s.out_features * s.in_features for stage in active for s in stage.sites if _touched(job, s.name))
        tokens = job.recipe.tune.windows * job.calibration.input_ids.shape[1]
        step = int(plain.most * FLOAT / sizes.itemsize * GRAPH * tokens)
        yield here, there + sizes.resting + solved + TRAINING * weights + step


def _rounded(job: Job, active: Sequence[Stage]) -> dict[str, Activations]:
    """By path inside the block, what linears round their inputs to."""
    specs = job.specs
    asked = {site.local: specs[site.name].activations for site in sites_of(active) if site.name in specs}
    return {local: kind for local, kind in asked.items() if kind is not None}


def _workspace(job: Job, stage: Stage, cross: bool) -> int:
    inputs = stage.sites[0].in_features
    if job.structure is not None:
        return max(
            narrowing(job.structure.narrow[site.name], site.out_features, inputs)
            for site in stage.sites
            if site.name in job.structure.narrow
        )
    rows: dict[tuple[SiteSpec, str], int] = {}
    for site in stage.sites:
        if site.name in job.specs:
            spec = job.specs[site.name]
            group = (spec, site.name if spec.rows_together else "")
            rows[group] = rows.get(group, 0) + site.out_features
    return max(solving(spec, count, inputs, cross) for (spec, _), count in rows.items())


def _waiting(
    active: Sequence[Stage],
    held: tuple[Held, Held],
    sizes: _Activations,
    number: int,
    reads: Mapping[str, frozenset[str]],
) -> list[int]:
    """Bytes of all batches of both streams while each stage is gathered and solved, at its fullest.

    held: by the compressed block, which may round what linears are given, and by the original.

    As `transform.gather` goes: each batch of the compressed model from the tap before to this one; of the original to
    this one, and on to the next where that isn't wider, or to the block's end after the last that is read. The
    compressed model's wait before they write to a cache of FP8 too.
    """
    if not sizes.keep_paused or not sizes.any:
        return [sizes.resting] * len(active)
    (own, plain), found, rest = held, [], sizes.at_rest
    widths = [stage.sites[0].in_features for stage in active]
    read = [any("cross" in reads.get(site.name, ()) for site in stage.sites) for stage in active]
    last = max((position for position, crosses in enumerate(read) if crosses), default=-1)
    compressed, original = float(rest), rest if number else 0.0  # the streams begin as one
    for position in range(len(active)):
        before = compressed + sizes.two * original
        compressed = own.taps[position]
        if position >= last:
            original = rest
        elif widths[position + 1] > widths[position]:
            original = plain.taps[position]
        elif position + 1 == last:
            original = rest + widths[position + 1] * sizes.itemsize
        else:
            original = plain.taps[position + 1]
        most = max(before, compressed + sizes.two * original)
        if own.cache is not None and own.cache[0] in (position, position + 1):
            most = max(most, own.cache[1] + sizes.two * plain.taps[position])
        found.append(int(most * sizes.calibration) + 2 * sizes.held_out * rest + sizes.entering)
    return found


def _held(job: Job, number: int, active: Sequence[Stage], rounded: Mapping[str, Activations]) -> Held:
    """What a forward of a block holds, counted on zeros. rounded: as `_rounded` has it."""
    chain = job.chain
    skeleton = chain.skeleton
    call = chain.calls(Batch(torch.zeros(1, PROBE_TOKENS, dtype=torch.int64), None, held_out=False))[number]
    width = skeleton.model.config.get_text_config().hidden_size
    reader, skeleton.reader = skeleton.reader, Blank(job.index)
    block = chain.blocks[number]
    handles = [round_inputs(block.get_submodule(local), kind) for local, kind in rounded.items()]
    try:
        skeleton.load(chain.name(number))
        hidden = torch.zeros(1, PROBE_TOKENS, width, dtype=skeleton.dtype, device=skeleton.device)
        cache = job.caches[number] if job.caches else None
        writes = None if cache is None else (cache.local, cache.place(job.stages[number], active))
        return held_by(block, call, hidden, [stage.tap for stage in active], writes)
    finally:
        for handle in handles:
            handle.remove()
        skeleton.release(chain.name(number))
        skeleton.reader = reader
