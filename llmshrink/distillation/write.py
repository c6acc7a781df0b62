"""The student's files with other numbers in them: same names, same layout, same format."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from llmshrink.calibration.tokens import TokenWindows
from llmshrink.checkpoint.index import INDEX_FILE
from llmshrink.checkpoint.links import check_link
from llmshrink.distillation.curves import PICTURE, TABLE, Curves, section
from llmshrink.errors import SourceError
from llmshrink.paths import as_text
from llmshrink.run import disk
from llmshrink.run.card import write_card
from llmshrink.run.finish import RECIPE, copy_side_files
from llmshrink.run.heldout import Quality
from llmshrink.run.journal import Workspace
from llmshrink.run.output import RECORD
from llmshrink.run.rehearse import UNKNOWN
from llmshrink.run.report import SiteRow, rows_of
from llmshrink.run.seal import shard_sums
from llmshrink.run.shards import write_part
from llmshrink.run.verify import REFERENCE, read_record

if TYPE_CHECKING:
    from llmshrink.distillation.job import Job

WHOLE = 1 << 62
"""A limit on shards that none reaches: files stay as they are cut."""


def carry(job: Job, workspace: Workspace) -> None:
    """What of the student's folder stays as it is, beside its weights, which is the first that a run writes."""
    folder, source = workspace.checkpoint, job.student.source.folder
    trusted, besides = job.options.trust_remote_code, (workspace.folder, workspace.output)
    copy_side_files(source, folder, trust_remote_code=trusted, besides=besides)
    disk.write_file(folder / "config.json", [job.config_json], len(job.config_json))
    recipe = recipe_of(job)
    if recipe is not None:
        disk.write_text(folder / RECIPE, recipe)


def recipe_of(job: Job) -> str | None:
    """The recipe that the student was made by, as YAML, where there is one."""
    file = job.student.source.folder / RECIPE
    check_link(file, file.parent)
    return file.read_bytes().decode(errors="replace") if file.is_file() else None


def planned(job: Job) -> dict[str, Any]:
    """The record, as far as it is known before the training."""
    return _record(job, job.real, UNKNOWN, UNKNOWN, Curves((), ()))


def write(
    job: Job,
    training: TokenWindows,
    workspace: Workspace,
    before: Quality,
    quality: Quality,
    reference: dict[str, Tensor],
    curves: Curves,
) -> dict[str, Any]:
    """Everything of the new folder but what was carried over, in the workspace; returns its record."""
    folder, index = workspace.checkpoint, job.student.index
    changed = {key: tensor for _, tensors in job.student.changed() for key, tensor in tensors.items()}
    done = {part.name for part in workspace.parts}
    for file in index.files():
        if file.name in done:
            continue
        layout = {
            key: (index.entry(key).dtype, index.entry(key).shape) for key in index if index.entry(key).file == file
        }

        def bytes_of(key: str) -> Iterator[memoryview | bytes]:
            return iter([disk.tensor_bytes(changed[key])]) if key in changed else index.read_bytes(key)

        stem = file.stem.removeprefix("model-") if file.stem.startswith("model-") else "weights"
        workspace.finish_part(write_part(folder, file.name, stem, layout, bytes_of, limit=WHOLE, rows=[]))
    _write_index(job, workspace)
    (folder / REFERENCE).parent.mkdir(exist_ok=True)
    disk.write_tensors(folder / REFERENCE, reference)
    record = _record(job, training, before, quality, curves)
    record["shards"] = shard_sums(workspace.parts)
    disk.write_json(folder / RECORD, record)
    disk.write_text(folder / TABLE, curves.table(before))
    disk.write_text(folder / PICTURE, curves.picture(before))
    write_card(folder, f"\n{section(record)}")
    return record


def _write_index(job: Job, workspace: Workspace) -> None:
    entries = {name: shard for part in workspace.parts for name, shard in part.shards.items()}
    names = dict(zip((file.name for file in job.student.index.files()), entries, strict=True))
    where = {key: names[job.student.index.entry(key).file.name] for key in job.student.index}
    content = {"metadata": {"total_size": job.student.index.nbytes()}, "weight_map": dict(sorted(where.items()))}
    disk.write_json(workspace.checkpoint / INDEX_FILE, content)


def _record(job: Job, training: TokenWindows, before: Quality, quality: Quality, curves: Curves) -> dict[str, Any]:
    """The student's own record, or a new one, with what the training made of it."""
    options, student = job.options, job.student
    old = _old_record(job, training)
    identity = job.identity()
    rows = [replace(row, error=None) for row in rows_of(old["sites"])]
    # What a reload is computed in is float32, as the reference was.
    carried = {**old["identity"], **identity, "dtype": "torch.float32", "batch_size": options.batch_size}
    return {
        **old,
        "recipe": options.recipe or f"{old['recipe']}, distilled",
        "quality": asdict(quality),
        "identity": carried,
        "held_out": job.held_out.name,
        "sites": [asdict(row) for row in rows],
        "notes": [*old["notes"], *_new(old["notes"], [*student.index.notes(), *training.reading.notes(job.real.name)])],
        "distill": {
            "teacher": job.teacher_name,
            "revision": job.teacher_source.revision,
            "objective": asdict(job.objective),
            "hidden_weight": options.hidden_weight,
            "matched_blocks": job.matched_blocks if options.hidden_weight else None,
            "steps": options.steps,
            "step_windows": options.batch_size * options.accumulate,
            "data": training.name,
            "learned": _learned(training),
            "windows": list(training.input_ids.shape),
            **training.reading.to_dict(),
            "before": asdict(before),
            "curve": list(curves.points),
            "trained": sorted({name.rpartition(".")[2] for name, _ in student.trained()}),
        },
    }


def _new(old: Sequence[str], notes: Sequence[str]) -> list[str]:
    """A run whose last step teaches has read the same text before."""
    return [note for note in notes if note not in old]


def _learned(training: TokenWindows) -> str:
    """Which tokens of the windows the loss is of, in words."""
    count, of = int(training.labels.sum()), training.tokens
    if training.said is None:
        return f"the loss is of all {count:,} tokens with one before them"
    return f"the loss is of {count:,} of {of:,} tokens: the assistant's, and not what it is asked"


def _old_record(job: Job, training: TokenWindows) -> dict[str, Any]:
    student = job.student
    try:
        return read_record(student.source.folder)
    except SourceError:
        if student.schemes:
            raise
    source = student.source
    return {
        "format": 1,
        "model": source.name if source.kind != "folder" else as_text(source.folder.name),
        "revision": source.revision,
        "recipe": "as it was",
        "blocks": student.model.config.get_text_config().num_hidden_layers,
        "serve_tp": 1,
        "calibration": {
            "name": training.name,
            "windows": list(training.input_ids.shape),
            "tokens": training.tokens,
            **training.reading.to_dict(),
        },
        "bytes_before": student.index.nbytes(),
        "identity": {"format": "compressed-tensors"},
        "notes": [],
        "format_notes": {"compressed-tensors": [], "llmshrink": []},
        "other_linears": [],
        "sites": [asdict(row) for row in _rows(job)],
    }


def _rows(job: Job) -> Iterator[SiteRow]:
    for name, module in job.student.model.named_modules():
        key = job.student.key_of.get(f"{name}.weight")
        if isinstance(module, nn.Linear) and module.weight.requires_grad and key is not None:
            entry = job.student.index.entry(key)
            shape = (entry.shape[0], entry.shape[1])
            yield SiteRow(name, shape, None, None, None, entry.nbytes, None, None, None, ())
