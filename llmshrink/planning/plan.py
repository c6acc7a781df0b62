"""`plan`: from a model's name to what a recipe needs of this machine and yields, before anything is downloaded or done.

The job is the run's own, outlined from the headers of the weights: the same sites, specs, windows and placement of
activations. From there sizes are computed, memory too, and time is measured (`probe`).
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from llmshrink.checkpoint.index import CheckpointIndex
from llmshrink.checkpoint.source import Source, resolve
from llmshrink.planning.engines import engines
from llmshrink.planning.probe import Measured, probe
from llmshrink.planning.report import Plan
from llmshrink.planning.spent import now
from llmshrink.run.footprint import footprint
from llmshrink.run.job import Options, outline
from llmshrink.run.journal import partial_folder
from llmshrink.run.memory import give_back, lean_imports, resident
from llmshrink.run.quantize import Placement
from llmshrink.run.sizes import sizes_of


@dataclass(frozen=True, eq=False)
class Found:
    """A model as a plan sees it. download: bytes that must still come. here: whether its weights are on this disk."""

    source: Source
    index: CheckpointIndex
    download: int
    here: bool


def find(model: str, *, trust_remote_code: bool) -> Found:
    """The model's headers and small files, without its weights."""
    source = resolve(model, trust_remote_code=trust_remote_code)
    return Found(source, CheckpointIndex.open(source.folder), 0, True)


def plan(options: Options, *, measured: bool = True) -> Plan:
    """What a run of `options` needs and yields. measured: whether its time is probed. Raises as the run would."""
    found = find(options.model, trust_remote_code=options.trust_remote_code)
    begun = now()
    with lean_imports():
        job = outline(options, found.source, found.index, text_here=_text_here(options, found.source))
    text = now() - begun
    sizes = sizes_of(job)
    placement = Placement.choose(job, partial_folder(Path(os.path.abspath(options.output))))
    give_back()
    base = resident()
    memory = footprint(job, keep_paused=placement.keep_paused, in_files=placement.spill is not None)
    times: Measured | None = None
    if measured:
        times = probe(job, keep_paused=placement.keep_paused, weights_here=found.here, text=text)
    streams = 0 if placement.spill is None else memory.streams
    return Plan(
        model=found.source.name,
        recipe=job.recipe.name,
        download_bytes=found.download,
        peak_ram_bytes=base + memory.ram,
        peak_vram_bytes=memory.vram,
        disk_bytes=sizes.output + sizes.beside + streams,
        output_bytes=sizes.output,
        source_bytes=found.index.nbytes(),
        bits_per_weight=sizes.bits_per_weight,
        linear_bits_per_weight=sizes.linear_bits_per_weight,
        seconds=None if times is None else times.total.wall,
        cpu_seconds=None if times is None else times.total.cpu,
        parts={} if times is None else {name: spent.wall for name, spent in times.parts.items()},
        activations=_where(placement),
        engines=engines(job),
        notes=tuple(job.notes),
        faults=(),
        probe_seconds=0.0 if times is None else times.took.wall,
    )


def _where(placement: Placement) -> str:
    if placement.spill is not None:
        return "activations in files"
    return "activations in memory" + ("" if placement.keep_paused else ", every block run again for each stage")


def _text_here(options: Options, source: Source) -> bool:
    """Whether the calibration text can be read without a network."""
    spec = options.calibration
    if spec is None:
        return source.kind == "demo"
    return spec == "demo" or Path(spec).is_file()
