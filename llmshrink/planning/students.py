"""The plan of a run that teaches: what the student's checkpoint takes, and what a step of the teaching does."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from llmshrink.checkpoint.beside import side_files
from llmshrink.distillation.job import Options, training_arithmetic
from llmshrink.distillation.smaller import SAMPLES, Smaller
from llmshrink.errors import LlmshrinkError, NoRoomError, SourceError
from llmshrink.planning import plan as compressing
from llmshrink.planning.distilling import teaching
from llmshrink.planning.engines import engines
from llmshrink.planning.found import Found, find, fitting
from llmshrink.planning.report import Plan
from llmshrink.recipe.steps import Distill
from llmshrink.run import disk
from llmshrink.run.asked import Options as RunOptions
from llmshrink.run.asked import pick_device
from llmshrink.run.inspect import inspect
from llmshrink.run.job import Job
from llmshrink.run.memory import resident
from llmshrink.run.output import check_output, partial_folder
from llmshrink.run.storage import format_of
from llmshrink.run.verify import read_record
from llmshrink.runtime.load import config_of


def plan(asked: Options, *, measured: bool = True) -> Plan:
    """What `distill` with these options needs and yields. Raises as it would."""
    output = Path(os.path.abspath(asked.output))
    if not partial_folder(output).exists():
        check_output(output, overwrite=asked.overwrite)
    if (asked.student is None) == (asked.student_from is None):
        raise LlmshrinkError("name a STUDENT, or give --student-from depth=N,width=N and none")
    if asked.student_from is not None:
        return fitting(_cut(asked, asked.student_from, measured=measured), asked.output)
    assert asked.student is not None
    found = find(asked.student, trust_remote_code=asked.trust_remote_code)
    teacher = find(asked.teacher, trust_remote_code=asked.trust_remote_code)
    made = replace(_as_it_is(found), download_bytes=found.download + teacher.download)
    here = found.here and teacher.here
    return fitting(with_teaching(made, asked, None, measured=measured and here, smaller=1.0), asked.output)


def _as_it_is(found: Found) -> Plan:
    """The plan of a checkpoint written anew in its own form."""
    source, index = found.source, found.index
    entries = [index.entry(key) for key in index]
    files = [
        disk.shard_size({each.key: (each.dtype, each.shape) for each in entries if each.file == file})
        for file in index.files()
    ]
    beside = sum(path.stat().st_size for path, _ in side_files(source.folder))
    notes: tuple[str, ...] = ()
    served = engines((), "compressed-tensors")
    bits = linear = 8 * index.nbytes() / max(1, sum(each.nbytes // each.dtype.itemsize for each in entries))
    try:
        known = inspect(source.folder)
    except SourceError:  # a plain checkpoint, of whoever's
        pass
    else:
        notes, bits, linear = known.notes, known.bits_per_weight, known.linear_bits_per_weight
        record = read_record(source.folder)
        served = engines([*notes, *record.get("cpu_notes", [])], format_of(record))
    return Plan(
        model=source.name,
        recipe="distill",
        download_bytes=found.download,
        peak_ram_bytes=resident(),
        peak_vram_bytes=0,
        disk_bytes=sum(files) + beside,
        output_bytes=sum(files),
        source_bytes=index.nbytes(),
        bits_per_weight=bits,
        linear_bits_per_weight=linear,
        seconds=None,
        cpu_seconds=None,
        parts={},
        activations="teacher and student whole in memory",
        arithmetic={},
        engines=served,
        notes=notes,
        faults=(),
        probe_seconds=0.0,
    )


def _cut(asked: Options, student_from: str, *, measured: bool) -> Plan:
    """The plan of a student that is cut from the teacher first: by depth, by width, or by one and then the other."""
    teacher = find(asked.teacher, trust_remote_code=asked.trust_remote_code)
    runs = Smaller.of(student_from).recipes(config_of(teacher.source, asked.trust_remote_code))
    windows = asked.steps * asked.batch_size * asked.accumulate
    options = [
        RunOptions(
            model=asked.teacher, output=asked.output, verb="prune", recipe=recipe, sets=(setting,),
            calibration=asked.data, samples=min(windows, SAMPLES), seq_len=asked.seq_len, bos=asked.bos,
            seed=asked.seed, device=asked.device, overwrite=asked.overwrite, trust_remote_code=asked.trust_remote_code,
        )
        for recipe, setting in runs
    ]  # fmt: skip
    plans = [compressing.plan(each, measured=measured) for each in options]
    made, share = plans[-1], 1.0
    for other in plans:
        share *= other.output_bytes / other.source_bytes
    for other in plans[:-1]:
        made = replace(
            made,
            seconds=None if made.seconds is None or other.seconds is None else made.seconds + other.seconds,
            cpu_seconds=None
            if made.cpu_seconds is None or other.cpu_seconds is None
            else made.cpu_seconds + other.cpu_seconds,
            disk_bytes=made.disk_bytes + other.disk_bytes,
        )
    bytes_after = round(made.source_bytes * share)
    made = replace(made, recipe="distill", output_bytes=bytes_after, disk_bytes=made.disk_bytes + bytes_after)
    asked = replace(asked, student=asked.teacher)
    return with_teaching(made, asked, None, measured=measured and teacher.here, smaller=share)


def taught(made: Plan, job: Job, step: Distill, *, measured: bool) -> Plan:
    """The plan of a recipe with its last step; until the output is there, the student stays beside it."""
    options = job.options
    asked = Options(
        teacher=options.model,
        student=options.model,
        output=options.output,
        recipe=job.recipe.name,
        data=options.calibration,
        seq_len=options.seq_len,
        bos=options.bos,
        device=options.device,
        seed=options.seed,
        trust_remote_code=options.trust_remote_code,
        **step.model_dump(),
    )
    smaller = made.output_bytes / made.source_bytes if job.structure is not None else 1.0
    return with_teaching(replace(made, disk_bytes=2 * made.disk_bytes), asked, job, measured=measured, smaller=smaller)


def with_teaching(made: Plan, asked: Options, job: Job | None, *, measured: bool, smaller: float) -> Plan:
    """The plan of making a student, or of none, with that of teaching it. job: that makes it; smaller: its share."""
    computed = training_arithmetic(asked.dtype, pick_device(asked.device))
    made = replace(made, arithmetic={**made.arithmetic, "teaching": computed})
    if not measured:
        return replace(made, seconds=None, cpu_seconds=None, notes=(*made.notes, "what teaching takes wasn't measured"))
    try:
        found = teaching(asked, job, smaller=smaller)
    except NoRoomError as error:
        return replace(made, seconds=None, cpu_seconds=None, faults=(*made.faults, str(error)))
    return replace(
        made.timed(found.measured),
        peak_ram_bytes=max(made.peak_ram_bytes, found.peak),
        disk_bytes=made.disk_bytes + found.disk,
        notes=tuple(dict.fromkeys([*made.notes, *found.notes])),
    )
