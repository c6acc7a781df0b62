"""The training itself: a Trainer over the windows, from the start or from its last checkpoint, to the best student."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from llmshrink_eval.bounded import read_json
from llmshrink_eval.listing import below, named

from llmshrink.calibration.tokens import TokenWindows
from llmshrink.checkpoint.preflight import check_room
from llmshrink.distillation import state
from llmshrink.distillation.curves import Curves
from llmshrink.distillation.judge import judge
from llmshrink.distillation.match import HiddenMatch
from llmshrink.distillation.quiet import quiet
from llmshrink.distillation.teacher import TeacherRows
from llmshrink.run.progress import Progress, duration, peak_memory

if TYPE_CHECKING:
    from transformers import TrainingArguments

    from llmshrink.distillation.job import Job
    from llmshrink.distillation.trainer import Says

EVALUATIONS = 8
"""Of the student on the held-out windows in a run, and checkpoints of it, unless the user says otherwise."""
PLAIN_LR = 0.77
"""Learning rate of weights times the width of the hidden states: 3e-3 at 256, which was measured, 1.9e-4 at 4096."""
LINE_SECONDS = 10.0
CHECKPOINTS = "the training's checkpoints"


def train(job: Job, training: TokenWindows, says: Says, exact: TeacherRows, folder: Path, progress: Progress) -> Curves:
    """Train the job's student in place; returns the loss of each step and the student at each evaluation.

    training: what is learned from; says: the teacher there; exact: the teacher on the held-out windows. folder: of the
    Trainer's checkpoints. The parameters at the end are those of the evaluation with the lowest KL.
    """
    from llmshrink.distillation.trainer import Distiller, DistillTrainer, Held, Rates, Told, Windows

    options = job.options
    width = job.split.weight.shape[1]
    rate = options.lr if options.lr is not None else PLAIN_LR / width
    # The Trainer moves its module to its own device and counts its parameters; the teacher is none of them.
    match = None
    if options.hidden_weight:
        match = HiddenMatch(
            job.split.model, job.teacher.model, job.matched_blocks, options.hidden_weight, seed=options.seed
        )
    module = Distiller(job.split, says, job.objective, job.dtype, match)
    arguments = _arguments(job, folder, rate)
    if options.gradient_checkpointing:
        job.student.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

    def judged() -> dict[str, float]:
        found = judge(job.split, exact, job.batches, job.held_out.labels)
        return {"kl": found.kl_mean, "perplexity": found.ppl_after}

    told = _Lines(progress, options.steps, options.batch_size * options.accumulate * training.input_ids.shape[1])
    data = Windows(training)
    with quiet():
        trainer = DistillTrainer(
            module,
            arguments,
            Rates(rate, options.scale_lr, min(rate, options.scale_lr)),
            judged,
            train_dataset=data,
            eval_dataset=data,
            callbacks=[Told(told), Held(job.student.hold)],
        )
        for callback in [
            each for each in trainer.callback_handler.callbacks if type(each).__name__ == "PrinterCallback"
        ]:
            trainer.remove_callback(callback)
        last = last_whole(folder, job.processes.count)
        if last is not None:
            progress.note(f"resumed     at step {last.name.rpartition('-')[2]} of {options.steps}")
        _check_room(module, folder, options.optim)
        trainer.train(resume_from_checkpoint=None if last is None else str(last))
    return Curves.of(trainer.state.log_history)


def _arguments(job: Job, folder: Path, rate: float) -> TrainingArguments:
    """What the Trainer is told: no weight decay, the best of the evaluations kept, nothing reported elsewhere."""
    from transformers import TrainingArguments

    options = job.options
    every = options.eval_steps or max(1, -(-options.steps // EVALUATIONS))
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=options.steps,
        per_device_train_batch_size=job.processes.share(options.batch_size),
        gradient_accumulation_steps=options.accumulate,
        learning_rate=rate,
        lr_scheduler_type="linear",
        warmup_steps=min(options.warmup, options.steps // 2),
        weight_decay=0.0,
        adam_beta1=0.9,
        adam_beta2=0.95,
        max_grad_norm=1.0,
        optim=options.optim,
        bf16=job.dtype == torch.bfloat16,
        use_cpu=job.device.type == "cpu",
        seed=options.seed,
        data_seed=options.seed,
        eval_strategy="steps",
        eval_steps=every,
        save_strategy="steps",
        save_steps=every,
        save_total_limit=1,
        load_best_model_at_end=True,
        metric_for_best_model="kl",
        greater_is_better=False,
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        label_names=["labels"],
        dataloader_pin_memory=job.device.type == "cuda",
        ddp_find_unused_parameters=False,
    )


def _check_room(module: torch.nn.Module, folder: Path, optim: str) -> None:
    """Raise OutputError when a training's checkpoints don't fit.

    A checkpoint has what is trained, and, under Adam, two moments of it. There are three at once: the best, the last,
    and the one that is being written.
    """
    trained = sum(each.numel() * each.element_size() for each in module.parameters() if each.requires_grad)
    one = trained * (3 if optim.startswith("adamw_torch") else 1)
    there = sum(path.stat().st_size for path in below(folder) if path.is_file())
    check_room(folder, max(0, 3 * one - there), CHECKPOINTS)


def last_whole(folder: Path, processes: int) -> Path | None:
    """The Trainer's last checkpoint that was finished: it is sealed then, and each process has written its part."""
    names = [state.MODEL, state.OPTIMIZER, state.SCHEDULE, *map(state.random_numbers, range(processes))]
    whole = {}
    for checkpoint in named(folder, "checkpoint-*"):
        if not state.sealed(checkpoint):
            continue
        step = int(read_json(checkpoint / state.ACCOUNT)["global_step"])
        if checkpoint.name == f"checkpoint-{step}" and all(state.is_there(checkpoint, name) for name in names):
            whole[step] = checkpoint
    return whole[max(whole)] if whole else None


class _Lines:
    """What the Trainer logs, as lines: every few seconds the loss, at each evaluation the KL."""

    def __init__(self, progress: Progress, steps: int, tokens: int) -> None:
        self._progress, self._steps, self._tokens = progress, steps, tokens
        self._first: int | None = None
        self._started = self._said = time.monotonic()

    def __call__(self, step: int, values: dict[str, float]) -> None:
        now = time.monotonic()
        if self._first is None:
            self._first, self._started = step - 1, now
        if "eval_kl" in values:
            self._progress.note(f"step {step}/{self._steps}  KL {values['eval_kl']:.5f} held-out")
        elif "loss" in values and step > self._first + 1 and now - self._said >= LINE_SECONDS:
            self._said = now
            pace = (now - self._started) / (step - self._first - 1)
            self._progress.note(
                f"step {step}/{self._steps}  loss {values['loss']:.4f}  {self._tokens / pace:,.0f} tokens/s  "
                f"memory {peak_memory() / 1e9:.2f} GB  left {duration(pace * (self._steps - step))}"
            )
