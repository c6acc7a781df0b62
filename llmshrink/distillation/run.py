"""`distill`: from a teacher and a student to a checkpoint in the student's own format.

The Trainer works in `OUT.partial/training` and goes on from its last checkpoint there; what comes out is written as the
student's files with other numbers in them, verified from disk, and given its name.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from llmshrink.calibration.tokens import TokenWindows
from llmshrink.checkpoint.preflight import check_room
from llmshrink.distillation import cache
from llmshrink.distillation.generated import generate_windows, together
from llmshrink.distillation.job import Job, Options, prepare
from llmshrink.distillation.judge import judge, reference
from llmshrink.distillation.made import remove
from llmshrink.distillation.report import DistillReport
from llmshrink.distillation.teacher import LiveTeacher, TeacherRows
from llmshrink.distillation.train import train
from llmshrink.distillation.trainer import Says
from llmshrink.distillation.write import carry, planned, recipe_of, write
from llmshrink.run import disk
from llmshrink.run.card import complete
from llmshrink.run.finish import left_out_of, serve_line, sums_beside
from llmshrink.run.foreign import refuse_foreign_in
from llmshrink.run.heldout import Quality
from llmshrink.run.journal import JOURNAL, TRAINING, Workspace
from llmshrink.run.output import partial_folder
from llmshrink.run.progress import Progress, Silent, peak_memory
from llmshrink.run.rehearse import rehearse
from llmshrink.run.seal import weight_bytes
from llmshrink.run.verify import read_record, verify_reload


def distill(options: Options, progress: Progress) -> DistillReport | None:
    """Carry out the options. Raises LlmshrinkError for what can't be done; a run that was killed goes on.

    Of several processes (`processes.py`) the first does everything that is written, and has the report; the others
    train with it, and return None.
    """
    job = prepare(options, progress)
    if not job.processes.first:
        _train_along(job)
        return None
    started = time.perf_counter()
    with Workspace(options.output, overwrite=options.overwrite) as workspace:
        check_room(options.output, max(0, weight_bytes(job.student.source.folder) - workspace.finished_bytes()))
        rehearse(planned(job), job.student.source.folder, recipe_of(job))
        beside = sums_beside(
            job.student.source.folder,
            trust_remote_code=options.trust_remote_code,
            besides=(workspace.folder, workspace.output),
        )
        sources = {"teacher": job.teacher_index, "student": job.student.index}
        parts = workspace.begin(job.identity(), sources, beside)
        if parts is None:
            job.processes.wait(job.device)
            if options.student is None:
                remove(options.output)
            return _report(job, options.output, read_record(options.output), started)
        refuse_foreign_in(workspace.folder / TRAINING)
        carry(job, workspace)
        for note in job.real.reading.notes(job.real.name):
            progress.note(f"note: {note}")
        training = _windows(job, workspace.folder / TRAINING, progress)
        says, exact = _teachers(job, training, progress)
        workspace.note_sources()
        job.processes.wait(job.device)
        before = judge(job.split, exact, job.batches, job.held_out.labels)
        progress.note(f"before      KL {before.kl_mean:.5f} on {before.tokens} held-out tokens")
        curves = train(job, training, says, exact, workspace.folder / TRAINING, progress)
        helped = min(point["kl"] for point in curves.points) < before.kl_mean
        if not helped:
            job.student.restore()
            progress.note("no step came nearer to the teacher: the student stays as it was; give a lower --lr")
        job.student.settle()
        quality = judge(job.split, exact, job.batches, job.held_out.labels)
        record = write(job, training, workspace, before, quality, reference(job.split, job.batches), curves)
        report = _report(job, workspace.checkpoint, record, started)
        if report.ok:
            complete(workspace.checkpoint, report.verification)
            workspace.publish()
            if options.student is None:
                remove(options.output)
    job.student.index.close()
    return report


def _report(job: Job, folder: Path, record: dict[str, Any], started: float) -> DistillReport:
    """The summary of a finished checkpoint: this process's, or one that was published just before it died."""
    options, made = job.options, record["distill"]
    return DistillReport(
        output=options.output,
        teacher=job.teacher_name,
        student=job.student_name,
        before=Quality(**made["before"]),
        quality=Quality(**record["quality"]),
        held_out=job.held_out.name,
        steps=options.steps,
        tokens=options.steps * options.batch_size * options.accumulate * made["windows"][1],
        curve=tuple(made["curve"]),
        seconds=time.perf_counter() - started,
        peak_memory=peak_memory(),
        notes=tuple(record["notes"]),
        serve=serve_line(options.output, record),
        verification=verify_reload(folder),
        left_behind=left_out_of(
            job.student.source.folder,
            job.student.index,
            trust_remote_code=options.trust_remote_code,
            besides=(partial_folder(options.output), options.output),
        ),
    )


def _train_along(job: Job) -> None:
    """The part of a process that isn't the first: from when the windows and the teacher's outputs are there.

    Nothing, where the first found that the run was published: its journal is gone then, and else stays until all have
    trained.
    """
    job.processes.wait(job.device)
    partial = partial_folder(Path(os.path.abspath(job.options.output)))
    if not (partial / JOURNAL).exists():
        return
    folder = partial / TRAINING
    refuse_foreign_in(folder)
    training = _windows(job, folder, Silent())
    says, exact = _teachers(job, training, Silent())
    train(job, training, says, exact, folder, Silent())


def _windows(job: Job, folder: Path, progress: Progress) -> TokenWindows:
    """The real text's windows, with the teacher's own after them where they are asked for."""
    options = job.options
    if not options.generated_tokens:
        return job.real
    # Beside the teacher's outputs where those are kept, so that the next student finds both.
    folder = (options.teacher_cache or folder) / "generated"
    noted = folder / f"teacher-{job.teacher_fingerprint[:16]}.json"
    if noted.is_file():
        cache.go_on_from(folder, noted, job.teacher_index)

    def teacher() -> Any:
        model = job.teacher.model
        if not noted.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            disk.write_json(noted, job.teacher_index.seen())
        return model

    generated = generate_windows(
        teacher,
        job.real,
        options.generated_tokens,
        teacher=f"{job.teacher_fingerprint} {options.teacher_quant}",
        folder=folder,
        seed=options.seed,
        progress=progress,
    )
    return together(job.real, generated)


def _teachers(job: Job, training: TokenWindows, progress: Progress) -> tuple[Says, TeacherRows]:
    """The teacher of the training, and the exact one that the student is judged by."""
    folder = job.options.teacher_cache
    if folder is None:
        return LiveTeacher(job.teacher, job.dtype), LiveTeacher(job.teacher)
    key = job.cache_key(training)
    if not cache.is_whole(folder / "outputs", key, job.teacher_index):
        cache.make(folder / "outputs", key, job.teacher, training, job.batches, progress, read=job.teacher_index)
    return cache.CachedTeacher(folder / "outputs", job.device), cache.HeldOutTeacher.open(
        folder / "outputs", job.device
    )
