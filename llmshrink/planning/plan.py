"""`plan`: from a model's name to what a recipe needs of this machine and yields, before anything is downloaded or done.

The job is the run's own, outlined from the headers of the weights: the same sites, specs, windows and placement of
activations. From there sizes are computed, memory too, and time is measured (`probe`).
"""

from __future__ import annotations

import os
from importlib import import_module
from pathlib import Path

from llmshrink.errors import RecipeError
from llmshrink.planning.engines import engines
from llmshrink.planning.found import find, fitting, text_here
from llmshrink.planning.probe import probe
from llmshrink.planning.report import Plan
from llmshrink.planning.spent import now
from llmshrink.recipe.read import load_recipe
from llmshrink.run.arithmetic import Arithmetic, automatic_training
from llmshrink.run.asked import Options, check_apart
from llmshrink.run.finish import left_out_of
from llmshrink.run.fits import memory_faults
from llmshrink.run.footprint import footprint
from llmshrink.run.job import Job, outline
from llmshrink.run.memory import give_back, resident
from llmshrink.run.output import check_output, partial_folder
from llmshrink.run.quantize import Placement
from llmshrink.run.sizes import sizes_of


def plan(options: Options, *, measured: bool = True) -> Plan:
    """What a run of `options` needs and yields. measured: whether its time is probed. Raises as the run would."""
    recipe = load_recipe(options.recipe, flags=options.flags or {}, sets=options.sets)
    if len(recipe.steps) == 1 and recipe.distill is not None:
        raise RecipeError(
            [f"{recipe.name}: it only distills: llmshrink distill TEACHER STUDENT --recipe {recipe.name} --dry-run"]
        )
    if recipe.distill is not None:  # it brings transformers' Trainer, which such a run holds from its start
        from llmshrink.planning.students import taught
    check_apart(options.output, (("the model", options.model), ("--calibration", options.calibration)))
    partial = partial_folder(Path(os.path.abspath(options.output)))
    if not partial.exists():
        check_output(Path(os.path.abspath(options.output)), overwrite=options.overwrite)
    found = find(options.model, trust_remote_code=options.trust_remote_code)
    begun = now()
    job = outline(options, found.source, found.index, text_here=text_here(options.calibration, found.source))
    text = now() - begun
    sizes, placement = sizes_of(job), Placement.choose(job, partial)
    if job.format == "bitsandbytes":  # which the first weight brings
        import_module("bitsandbytes")
    give_back()
    before = resident()
    memory = footprint(job, keep_paused=placement.keep_paused, in_files=placement.spill is not None)
    faults = memory_faults(job, memory)
    left = left_out_of(
        job.source.folder, found.index, trust_remote_code=options.trust_remote_code, besides=(options.output, partial)
    )
    times = None
    if measured:
        times = probe(job, keep_paused=placement.keep_paused, weights_here=found.here, text=text)
    made = Plan(
        model=found.source.name,
        recipe=job.recipe.name,
        download_bytes=found.download,
        peak_ram_bytes=before + memory.ram,
        peak_vram_bytes=memory.vram,
        disk_bytes=sizes.output + sizes.beside + (0 if placement.spill is None else memory.streams),
        output_bytes=sizes.output,
        source_bytes=found.index.nbytes(),
        bits_per_weight=sizes.bits_per_weight,
        linear_bits_per_weight=sizes.linear_bits_per_weight,
        seconds=None,
        cpu_seconds=None,
        parts={},
        activations=_where(placement),
        arithmetic=_arithmetic(job),
        engines=engines([*job.notes, *job.cpu_notes], job.format),
        notes=(*job.notes, *unknown(job, found.download), *left.lines()),
        faults=tuple(faults),
        probe_seconds=0.0,
    )
    made = made if times is None else made.timed(times)
    if recipe.distill is not None:
        made = taught(made, job, recipe.distill, measured=measured and found.here)
    found.index.close()
    return fitting(made, options.output)


def unknown(job: Job, download: int) -> list[str]:
    """What the plan doesn't know."""
    found = []
    if download:
        found.append("how long the download takes depends on the network: it isn't in the time")
    if any(spec.prune is not None and spec.prune.by_error for spec in job.specs.values()):
        found.append("the pass that finds ratios by error isn't in the time")
    return found


def _arithmetic(job: Job) -> dict[str, Arithmetic]:
    found = {"model": job.arithmetic}
    if job.recipe.tune is not None:
        found["tuning"] = automatic_training(job.chain.skeleton.device.type)
    return found


def _where(placement: Placement) -> str:
    if placement.spill is not None:
        return "activations in files"
    return "activations in memory" + ("" if placement.keep_paused else ", every block run again for each stage")
