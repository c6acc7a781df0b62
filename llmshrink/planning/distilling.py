"""What teaching a student needs: one step of it is made, by the run's own modules, and measured.

The student and the teacher are read as the run reads them, so what the step holds in memory is what the run will. A
student that has yet to be made is stood in for by the original in the form that it will have: as many zeros, or codes
and scales of the same groups. One that will be smaller costs that much less.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from llmshrink.distillation.job import Job, Options, prepare
from llmshrink.distillation.judge import judge
from llmshrink.distillation.student import choose
from llmshrink.distillation.teacher import LiveTeacher
from llmshrink.distillation.train import EVALUATIONS
from llmshrink.distillation.trainer import Distiller, Windows
from llmshrink.methods import QuantizeSpec, SiteSpec, solver
from llmshrink.methods.learned import ScaledLinear
from llmshrink.planning.probe import writing
from llmshrink.planning.spent import Measured, Spent, now, once
from llmshrink.run import job as compressing
from llmshrink.run.progress import Silent, peak_memory
from llmshrink.weights import GroupedInt

FLOAT = 4
ADAM = 2
"""Numbers that the optimizer keeps of each parameter."""
CHECKPOINTS = 3
"""Of the Trainer, on disk at once: the best, the last, and the one that is being written."""
STEPS = 2
"""Measured, after one that isn't."""


@dataclass(frozen=True)
class Teaching:
    """peak: bytes of memory of the whole process; disk: of the Trainer's checkpoints; weights: of the student.
    notes: of how the text was read."""

    measured: Measured
    peak: int
    disk: int
    weights: int
    notes: tuple[str, ...] = ()


def teaching(options: Options, made: compressing.Job | None = None, *, smaller: float = 1.0) -> Teaching:
    """Measure a step. made: the job that makes the student, where it isn't there yet; `options.student` is then any.

    smaller: how much of the original's weights it will have.
    """
    begun = now()
    found = Measured()
    options = replace(options, student_from=None)
    reading, job = once(lambda: prepare(replace(options, train=None if made else options.train), Silent()))
    if made is not None:
        _as_made(job, made, options.train)
    loading, teacher = once(lambda: job.teacher)
    found.add("reading", reading + loading)
    says, exact = LiveTeacher(teacher, job.dtype), LiveTeacher(teacher)
    step, trained = _step(job, says)
    evaluation = _evaluation(job, exact)
    every = options.eval_steps or max(1, -(-options.steps // EVALUATIONS))
    evaluations = -(-options.steps // every)
    flush, byte = writing(options.output)
    # A step of the student's is three forwards' work, and the teacher's one.
    found.add("teaching", step * (options.steps * (1 + 3 * smaller) / 4))
    found.add("judging", evaluation * ((evaluations + 2.5) * (1 + smaller) / 2))
    found.add("checkpoints", (flush + byte * (FLOAT * (1 + ADAM) * trained)) * evaluations)
    found.add("writing", flush * 8 + byte * job.student.index.nbytes())
    found.add("verification", evaluation * 0.5)
    found.took = now() - begun
    trained = round(trained * smaller)
    peak = peak_memory() + FLOAT * trained
    weights = sum(each.numel() for each in job.teacher.model.parameters())
    notes = tuple(job.real.reading.notes(job.real.name))
    return Teaching(found, peak, CHECKPOINTS * FLOAT * (1 + ADAM) * trained, weights, notes)


def _step(job: Job, says: LiveTeacher) -> tuple[Spent, int]:
    """A step of the optimizer, and how many numbers learn."""
    options = job.options
    module = Distiller(job.split, says, job.objective, job.dtype)
    module.train()
    if options.gradient_checkpointing:
        job.student.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    parameters = [each for each in module.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=0.0, weight_decay=0.0)
    windows = Windows(job.real)
    rows = [windows[number % len(windows)] for number in range(options.batch_size)]
    batch = {name: torch.stack([row[name] for row in rows]).to(job.device) for name in rows[0]}

    def step() -> None:
        for _ in range(options.accumulate):
            with torch.autocast(job.device.type, dtype=torch.bfloat16, enabled=job.dtype == torch.bfloat16):
                loss = module(**batch)["loss"]
            loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    step()

    def steps() -> None:
        for _ in range(STEPS):
            step()

    took, _ = once(steps, job.device)
    return took * (1 / STEPS), sum(each.numel() for each in parameters)


def _evaluation(job: Job, exact: LiveTeacher) -> Spent:
    """The student against the teacher on all held-out windows, from a batch of them."""
    few = job.batches[:1]
    labels = job.held_out.labels[: len(few[0].input_ids)]
    took, _ = once(lambda: judge(job.split, exact, few, labels), job.device)
    return took * (len(job.held_out.input_ids) / len(few[0].input_ids))


def _as_made(job: Job, made: compressing.Job, train: str | None) -> None:
    """Give the student, which is the original, the form that the first steps of a recipe will."""
    model, quantized = job.student.model, False
    for site in made.sites:
        spec = made.specs.get(site.name)
        if spec is None:
            continue
        linear: Any = model.get_submodule(site.name)
        if spec.prune is not None:
            with torch.no_grad():
                linear.weight[:, :: max(2, round(1 / max(1e-6, spec.prune.pattern.ratio)))] = 0.0
        if spec.quantize is not None:
            quantized = True
            weight = _rounded(linear.weight.detach(), spec)
            scaled = ScaledLinear(weight, linear.bias, latent=train == "weights", sparse=spec.prune is not None)
            model.set_submodule(site.name, scaled.to(job.device))
    choose(job.student, quantized=quantized)


def _rounded(weight: torch.Tensor, spec: SiteSpec) -> GroupedInt:
    assert spec.quantize is not None
    plain = QuantizeSpec(
        "rtn", spec.quantize.bits, spec.quantize.group_size, spec.quantize.symmetric, "minmax", corrected=0.0
    )
    found = solver("rtn").solve(weight, None, plain, torch.bfloat16).weight
    assert isinstance(found, GroupedInt)
    return found
