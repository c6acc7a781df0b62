"""`distill`: from a teacher and a student to a checkpoint in the student's own format.

Everything a user can do wrong is found before the first step. The Trainer works in `OUT.partial/training` and goes on
from its last checkpoint there; what comes out is written as the student's files with other numbers in them, verified
from disk, and given its name.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from llmshrink.calibration.activations import Batch, batches_of
from llmshrink.calibration.text import load_documents
from llmshrink.calibration.tokens import TokenWindows, build_windows, tokenizer_hash
from llmshrink.checkpoint.index import CheckpointIndex
from llmshrink.checkpoint.preflight import check_room, load_tokenizer, model_limit
from llmshrink.checkpoint.source import Source, resolve
from llmshrink.distillation.judge import judge, reference
from llmshrink.distillation.objective import Divergence, Objective
from llmshrink.distillation.report import DistillReport
from llmshrink.distillation.student import Student, Train, open_student
from llmshrink.distillation.teacher import LiveTeacher, SplitModel
from llmshrink.distillation.train import train
from llmshrink.distillation.write import write
from llmshrink.errors import LlmshrinkError, SourceError
from llmshrink.run.finish import serve_line, weight_bytes
from llmshrink.run.job import check_vocabulary, here, pick_device
from llmshrink.run.journal import TRAINING, Workspace
from llmshrink.run.progress import Progress, peak_memory
from llmshrink.run.verify import verify_reload
from llmshrink.runtime.load import config_of, load

HELD_OUT_TOKENS = 8192
DEFAULT_LENGTH = 1024


@dataclass(frozen=True)
class Options:
    """What a user asked for; the names are those of `llmshrink.distill`."""

    teacher: str
    student: str
    output: Path
    data: str | None = None
    steps: int = 400
    batch_size: int = 8
    accumulate: int = 1
    seq_len: int | None = None
    alpha: float = 0.0
    temperature: float = 1.0
    divergence: Divergence = "forward_kl"
    beta: float = 0.5
    train: Train | None = None
    lr: float | None = None
    scale_lr: float = 1e-2
    optim: str = "adamw_torch"
    warmup: int = 20
    eval_steps: int | None = None
    device: str | None = None
    dtype: str | None = None
    seed: int = 0
    overwrite: bool = False
    trust_remote_code: bool = False
    gradient_checkpointing: bool = False


@dataclass(frozen=True, eq=False)
class Job:
    """Everything named, checked and read; nothing written."""

    options: Options
    objective: Objective
    teacher_source: Source
    student: Student
    split: SplitModel
    teacher: SplitModel
    training: TokenWindows
    held_out: TokenWindows
    batches: list[Batch]
    device: torch.device
    dtype: torch.dtype

    def identity(self) -> dict[str, Any]:
        """Everything that the result depends on, in words that a person can compare."""
        asked = {
            name: value
            for name, value in asdict(self.options).items()
            if name not in ("output", "overwrite", "teacher", "student", "data", "device")
        }
        return {
            "distill": {**asked, "dtype": str(self.dtype)},
            "teacher": _fingerprint(self.teacher_source),
            "student": self.student.index.fingerprint(),
            "data": self.training.fingerprint,
            "held_out": self.held_out.fingerprint,
            **here(self.device),
        }


def distill(options: Options, progress: Progress) -> DistillReport:
    """Carry out the options. Raises LlmshrinkError for what can't be done; a run that was killed goes on."""
    started = time.perf_counter()
    job = prepare(options)
    with Workspace(options.output, overwrite=options.overwrite) as workspace:
        check_room(options.output, max(0, weight_bytes(job.student.source.folder) - workspace.finished_bytes()))
        parts = workspace.begin(job.identity())
        if parts is None:
            raise LlmshrinkError(f"{options.output}: this very run was finished before; remove it to run it again")
        before = judge(job.split, LiveTeacher(job.teacher), job.batches)
        progress.note(f"before      KL {before.kl_mean:.5f} on {before.tokens} held-out tokens")
        curve = train(job, workspace.folder / TRAINING, progress)
        job.student.settle()
        quality = judge(job.split, LiveTeacher(job.teacher), job.batches)
        record = write(job, workspace, before, quality, reference(job.split, job.batches), curve)
        verification = verify_reload(workspace.checkpoint)
        report = DistillReport(
            output=options.output,
            teacher=job.teacher_source.name,
            student=job.student.source.name,
            before=before,
            quality=quality,
            held_out=job.held_out.name,
            steps=options.steps,
            tokens=options.steps * options.batch_size * options.accumulate * job.training.input_ids.shape[1],
            curve=tuple(curve),
            seconds=time.perf_counter() - started,
            peak_memory=peak_memory(),
            notes=tuple(record["notes"]),
            serve=serve_line(options.output, record),
            verification=verification,
        )
        if report.ok:
            workspace.publish()
    return report


def prepare(options: Options) -> Job:
    """Resolve and check everything. Raises LlmshrinkError subclasses; writes nothing."""
    objective = _objective(options)
    teacher_source = resolve(options.teacher, trust_remote_code=options.trust_remote_code)
    source = resolve(options.student, trust_remote_code=options.trust_remote_code)
    config, teacher_config = (config_of(each, options.trust_remote_code) for each in (source, teacher_source))
    tokenizer, other = (load_tokenizer(each, options.trust_remote_code) for each in (source, teacher_source))
    sizes = [each.get_text_config().vocab_size for each in (config, teacher_config)]
    if tokenizer_hash(tokenizer) != tokenizer_hash(other) or sizes[0] != sizes[1]:
        raise SourceError(
            f"{source.name} ({sizes[0]} tokens) and {teacher_source.name} ({sizes[1]}) have other tokenizers, so one's "
            "probabilities say nothing of the other's tokens; distill from the model that the student was made from"
        )
    limits = [limit for limit in (model_limit(config), model_limit(teacher_config)) if limit is not None]
    seq_len = _length(options.seq_len, min(limits, default=None))
    documents = load_documents(options.data, source_kind=source.kind)
    training, held_out = build_windows(
        documents,
        tokenizer,
        samples=options.steps * options.batch_size * options.accumulate,
        seq_len=seq_len,
        held_out=max(1, HELD_OUT_TOKENS // seq_len),
        seed=options.seed,
        fewer=True,
    )
    check_vocabulary(training, sizes[0], source)
    device = pick_device(options.device)
    student = open_student(source, train=options.train, device=device, config=config)
    return Job(
        options=options,
        objective=objective,
        teacher_source=teacher_source,
        student=student,
        split=SplitModel(student.model, source.name),
        teacher=SplitModel(_load_teacher(teacher_source, options, device), teacher_source.name),
        training=training,
        held_out=held_out,
        batches=batches_of(held_out, options.batch_size, held_out=True),
        device=device,
        dtype=_compute_dtype(options.dtype, device),
    )


def _objective(options: Options) -> Objective:
    for name, value, least in (
        ("steps", options.steps, 1),
        ("batch-size", options.batch_size, 1),
        ("accumulate", options.accumulate, 1),
        ("warmup", options.warmup, 0),
        ("seed", options.seed, 0),
    ):
        if value < least:
            raise LlmshrinkError(f"--{name} {value}: must be at least {least}")
    for name, rate in (("lr", options.lr), ("scale-lr", options.scale_lr)):
        if rate is not None and not 0.0 < rate < 1.0:
            raise LlmshrinkError(f"--{name} {rate}: must be above 0 and below 1")
    try:
        return Objective(options.alpha, options.temperature, options.divergence, options.beta)
    except ValueError as error:
        raise LlmshrinkError(f"--{error}") from error


def _length(seq_len: int | None, limit: int | None) -> int:
    """Tokens in a window: as asked for, else DEFAULT_LENGTH or the shorter of both models' limits."""
    length = min(DEFAULT_LENGTH, limit or DEFAULT_LENGTH) if seq_len is None else seq_len
    if length < 2:
        raise LlmshrinkError(f"--seq-len {length}: must be at least 2")
    if limit is not None and length > limit:
        raise LlmshrinkError(f"--seq-len {length}: teacher and student allow {limit} positions; give at most that")
    return length


def _compute_dtype(name: str | None, device: torch.device) -> torch.dtype:
    """What forwards and backwards compute in, weights and their optimizer being float32."""
    if name is None or name == "auto":
        fast = device.type == "cuda" or "avx512_bf16" in _cpu_flags()
        return torch.bfloat16 if fast else torch.float32
    if name not in ("float32", "bfloat16"):
        raise LlmshrinkError(f"--dtype {name}: choose float32 or bfloat16, or auto")
    return torch.float32 if name == "float32" else torch.bfloat16


def _cpu_flags() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.read_text() if cpuinfo.is_file() else ""


def _load_teacher(source: Source, options: Options, device: torch.device) -> Any:
    dtype = "float32" if device.type == "cpu" else None
    return load(source, device=options.device, dtype=dtype, trust_remote_code=options.trust_remote_code)


def _fingerprint(source: Source) -> str:
    with CheckpointIndex.open(source.folder) as index:
        return index.fingerprint()
