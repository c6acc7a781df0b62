"""The run: prepare, then block after block, then finish; killed anywhere, the same command goes on from there."""

from __future__ import annotations

import hashlib
import shutil
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import Tensor

from llmshrink.calibration.activations import Stream
from llmshrink.checkpoint.preflight import check_room
from llmshrink.checkpoint.unchanged import Watched
from llmshrink.model.sites import sites_of
from llmshrink.recipe.read import to_yaml
from llmshrink.run import disk, heldout
from llmshrink.run.asked import Options, check_apart, dtype_name, stored_dtype
from llmshrink.run.depth import DepthWork
from llmshrink.run.finish import carry, finish, planned, reread, sums_beside
from llmshrink.run.fits import check_memory, on_one_disk
from llmshrink.run.footprint import Footprint, footprint
from llmshrink.run.foreign import refuse_foreign
from llmshrink.run.job import Job, prepare
from llmshrink.run.journal import ACTIVATIONS, Part, Workspace
from llmshrink.run.memory import free_memory, give_back, holding
from llmshrink.run.narrow import NarrowWork
from llmshrink.run.progress import Progress, duration
from llmshrink.run.ratios import RatioWork
from llmshrink.run.rehearse import rehearse
from llmshrink.run.report import QuantizeReport
from llmshrink.run.shards import Overlay, layout_of, open_shards, write_part
from llmshrink.run.sizes import OUTSIDE, outside_keys, sizes_of
from llmshrink.run.tune import BlockTuning
from llmshrink.run.walk import Walk
from llmshrink.run.work import SiteWork, Work


def quantize(options: Options, progress: Progress) -> QuantizeReport:
    """Carry out a whole run. Raises LlmshrinkError for what a user did; what is finished by then is kept."""
    started = time.perf_counter()
    check_apart(options.output, (("the model", options.model), ("--calibration", options.calibration)))
    with Workspace(options.output, overwrite=options.overwrite) as workspace, ExitStack() as stack:
        job = prepare(options)
        stack.callback(job.index.close)
        give_back()
        memory = check_fits(job, workspace.folder, already=workspace.finished_bytes())
        assert isinstance(job.index, Watched), "a plan's isn't run"
        job.index.check_unchanged()  # while it was analysed
        rehearse(planned(job), job.source.folder, to_yaml(job.recipe))
        beside = sums_beside(
            job.source.folder,
            trust_remote_code=options.trust_remote_code,
            besides=(workspace.folder, workspace.output),
        )
        parts = workspace.begin(job.identity(), {"model": job.index}, beside)
        if parts is None:
            return reread(job, seconds=time.perf_counter() - started)
        if job.arithmetic.dtype != dtype_name(stored_dtype(job.index)):
            progress.note(f"computed in {job.arithmetic.dtype}: {job.arithmetic.why}")
        for note in job.notes:
            progress.note(f"note: {note}")
        run = _Run(job, workspace, progress, started)
        try:
            with holding(memory.ram):
                return run.all()
        finally:
            run.clear_spill()


def check_fits(job: Job, folder: Path, *, already: int = 0) -> Footprint:
    """Raise LlmshrinkError when a run can't fit the memory or the disk that is here; else what it will take of memory.

    folder: the workspace.

    already: bytes of the output that an earlier process has written.
    """
    placement, sizes = Placement.choose(job, folder), sizes_of(job)
    in_files = placement.spill is not None
    memory = footprint(job, keep_paused=placement.keep_paused, in_files=in_files)
    check_memory(job, memory)
    needed = max(0, sizes.output + sizes.beside - already)
    if placement.spill is not None and on_one_disk(job.options.output, placement.spill):
        needed += memory.streams
    check_room(job.options.output, needed)
    return memory


@dataclass
class _Run:
    """One run in its workspace. seconds: wall time of each solved site, for timing.json."""

    job: Job
    workspace: Workspace
    progress: Progress
    started: float

    def __post_init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.spill: Path | None = None

    def all(self) -> QuantizeReport:
        job, chain = self.job, self.job.chain
        work = work_of(job, self.workspace.checkpoint)
        carry(job, self.workspace)
        if not self.workspace.parts:
            self._copy_outside(work)
        # From here on embedding and head come from the output: nothing of the source is read more than twice.
        with open_shards(self.workspace.checkpoint, self.workspace.parts[0].shards) as outside:
            chain.skeleton.reader = Overlay(outside, job.index)
            return self._blocks(work)

    def _blocks(self, work: Work) -> QuantizeReport:
        """Every block, then what becomes of them."""
        job, chain = self.job, self.job.chain
        if isinstance(work, DepthWork | RatioWork):
            self._analyse(work)
        finished = [part for part in self.workspace.parts if part.of_block]
        kept = len(finished)
        self.progress.begin(len(chain.blocks), kept)
        walk = self._streams()
        if walk.tune is not None and kept < len(chain.blocks):
            self.progress.note(f"note: {self._tuning(walk, len(chain.blocks) - kept)}")
        for number, part in enumerate(finished):
            work.replay(walk, number, part)
            self.progress.block(number, "kept")
        for number in range(kept, len(chain.blocks)):
            self._solve(work, walk, number)
        quality, reference = self._held_out(walk)
        return finish(
            job, work, self.workspace, quality, reference,
            kept=kept, started=self.started, seconds=self.seconds, progress=self.progress,
        )  # fmt: skip

    def _tuning(self, walk: Walk, blocks: int) -> str:
        """How much longer than without it the blocks to come will take."""
        assert isinstance(walk.tune, BlockTuning)
        step, _ = walk.tune.step_seconds(walk, 0, sites_of(self.job.stages[0]))
        steps = walk.tune.steps
        return f"tuning takes about {duration(step * steps * blocks)} more: {steps} steps for each of {blocks} blocks"

    def clear_spill(self) -> None:
        """Remove the activations that were kept in files."""
        if self.spill is not None:
            shutil.rmtree(self.spill, ignore_errors=True)

    def _analyse(self, work: DepthWork | RatioWork) -> None:
        """What the whole original decides: from the journal, or else found and written there, as the second part."""
        if len(self.workspace.parts) == 1:
            self.progress.note("a pass over the original comes first")
            placement = Placement.choose(self.job, self.workspace.folder)
            self.spill = spill_folder(self.job, self.workspace.folder)
            self.workspace.finish_part(Part("analysis", {}, [work.analyse(placement.spill, self.spill)]))
            self.clear_spill()
        work.settle(self.workspace.parts[1].rows[0])
        self.progress.note(work.summary)

    def _copy_outside(self, work: Work) -> None:
        """Everything that isn't in a block, byte for byte, as the first part."""
        index = self.job.index
        layout = {key: (index.entry(key).dtype, index.entry(key).shape) for key in outside_keys(self.job, work.inside)}
        part = write_part(
            self.workspace.checkpoint, OUTSIDE, OUTSIDE, layout, index.read_bytes,
            limit=self.job.options.max_shard_size, rows=[],
        )  # fmt: skip
        self.workspace.finish_part(part)

    def _streams(self) -> Walk:
        """Both streams at the first block's door: the embedded batches."""
        job = self.job
        placement = Placement.choose(job, self.workspace.folder)
        self.spill = placement.spill
        walk = Walk(
            chain=job.chain,
            batches=job.batches,
            original=Stream(placement.spill and placement.spill / "original"),
            compressed=Stream(placement.spill and placement.spill / "compressed"),
            specs=job.specs,
            reads=job.reads,
            scale_dtype=job.scale_dtype,
            keep_paused=placement.keep_paused and job.structure is None,
            tune=block_tuning(job, placement.spill),
            caches=job.caches,
            smoothing=job.smoothing,
        )
        job.chain.load_outside()
        for i, batch in enumerate(job.batches):
            if not walk.carries(batch, original=False):
                continue
            hidden = job.chain.embed(batch)
            walk.compressed.put(i, hidden)
            if walk.carries(batch, original=True):
                walk.original.put(i, hidden)
        job.chain.release_outside()
        return walk

    def _solve(self, work: Work, walk: Walk, number: int) -> None:
        block = work.solve(walk, number)
        self.seconds |= block.seconds
        part = write_part(
            self.workspace.checkpoint, f"block {number}", f"block-{number:05}", layout_of(block.tensors),
            lambda name: [disk.tensor_bytes(block.tensors[name])],
            limit=self.job.options.max_shard_size, rows=[asdict(row) for row in block.rows],
        )  # fmt: skip
        self.workspace.finish_part(part)
        self.progress.block(number, block.state)

    def _held_out(self, walk: Walk) -> tuple[heldout.Quality, dict[str, Tensor]]:
        give_back()
        chain = self.job.chain
        numbers = [i for i, batch in enumerate(walk.batches) if batch.held_out]
        # The tail is computed in float32, so that bfloat16 logits don't drown a small divergence.
        chain.load_tail()
        found = heldout.summarize(
            [walk.batches[i] for i in numbers],
            [walk.original.get(i) for i in numbers],
            [walk.compressed.get(i) for i in numbers],
            chain.logits,
        )
        chain.release_outside()
        return found


def work_of(job: Job, checkpoint: Path) -> Work:
    """What a job does to each block."""
    if job.structure is None:
        by_error = any(spec.prune is not None and spec.prune.by_error for spec in job.specs.values())
        return (RatioWork if by_error else SiteWork)(job, checkpoint)
    if job.structure.depth is not None:
        return DepthWork(job, job.structure)
    return NarrowWork(job, job.structure, checkpoint)


def block_tuning(job: Job, spill: Path | None) -> BlockTuning | None:
    """How blocks are trained after their sites are solved, if the recipe says so. spill: as in `Placement`."""
    asked = job.recipe.tune
    if asked is None:
        return None
    return BlockTuning(**asked.model_dump(), seed=job.options.seed, entry=Stream(spill and spill / "entry"))


@dataclass(frozen=True)
class Placement:
    """Where activations live. spill: a folder for the streams, None for memory."""

    spill: Path | None
    keep_paused: bool

    @classmethod
    def choose(cls, job: Job, folder: Path) -> Placement:
        """By what is free: paused forwards in memory, else only the streams in memory, else the streams in files."""
        config = job.chain.skeleton.model.config.get_text_config()
        tokens = sum(batch.input_ids.numel() for batch in job.batches)
        both = 2 * tokens * config.hidden_size * job.chain.skeleton.dtype.itemsize
        # What enters a block is kept until it is tuned.
        entering = both // 2 if job.recipe.tune is not None else 0
        streams = both + entering
        # A forward paused before its widest linear holds the residual, the norm's output and that linear's input.
        widest = max((site.in_features for site in job.sites), default=config.hidden_size)
        paused = both * (2 * config.hidden_size + 2 * widest) // config.hidden_size + entering
        device = job.chain.skeleton.device
        budget = free_memory(device) // 3
        if paused <= budget:
            return cls(None, True)
        if streams <= budget:
            return cls(None, False)
        check_room(job.options.work_dir or folder, streams, "the activations, which don't fit into memory")
        return cls(spill_folder(job, folder), False)


def spill_folder(job: Job, folder: Path) -> Path:
    """Where activations go that don't fit into memory. folder: the workspace's."""
    if job.options.work_dir is None:
        return folder / ACTIVATIONS
    # A folder of its own: other runs may spill into the same work-dir at the same time.
    spill = job.options.work_dir / f"llmshrink-{hashlib.sha256(str(folder).encode()).hexdigest()[:16]}"
    refuse_foreign(spill)
    return spill
