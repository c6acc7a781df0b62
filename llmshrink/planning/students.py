"""The plan of a run that teaches: what the student's checkpoint takes, and what a step of the teaching does."""

from __future__ import annotations

from dataclasses import replace

from llmshrink.distillation.job import Options
from llmshrink.errors import NoRoomError
from llmshrink.planning.distilling import teaching
from llmshrink.planning.report import Plan
from llmshrink.recipe.steps import Distill
from llmshrink.run.job import Job


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
        device=options.device,
        seed=options.seed,
        trust_remote_code=options.trust_remote_code,
        **step.model_dump(),
    )
    smaller = made.output_bytes / made.source_bytes if job.structure is not None else 1.0
    return with_teaching(replace(made, disk_bytes=2 * made.disk_bytes), asked, job, measured=measured, smaller=smaller)


def with_teaching(made: Plan, asked: Options, job: Job | None, *, measured: bool, smaller: float) -> Plan:
    """The plan of making a student, or of none, with that of teaching it. job: that makes it; smaller: its share."""
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
    )
