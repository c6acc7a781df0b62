"""The end of a run: index, config, record, card; then verified from disk; then given its name.

What of it is known before the first block is written or tried there: side files (`carry`), record and card (`planned`).
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from llmshrink_eval.bounded import parse_json, read_json
from llmshrink_eval.listing import named
from torch import Tensor

from llmshrink.checkpoint.beside import LeftBehind, belongs, left_behind, side_files
from llmshrink.checkpoint.index import INDEX_FILE, CheckpointIndex
from llmshrink.paths import as_text
from llmshrink.recipe.read import to_yaml
from llmshrink.run import disk
from llmshrink.run.card import complete
from llmshrink.run.heldout import Quality
from llmshrink.run.job import Job
from llmshrink.run.journal import Part, Workspace
from llmshrink.run.output import RECORD, is_ours
from llmshrink.run.progress import Progress, peak_memory
from llmshrink.run.rehearse import UNKNOWN
from llmshrink.run.report import QuantizeReport, SiteRow, cache_of, fallen_notes, rows_of, summary_of
from llmshrink.run.seal import SEAL, shard_sums, weight_bytes
from llmshrink.run.shards import open_shards
from llmshrink.run.storage import format_of
from llmshrink.run.verify import REFERENCE, verify_reload
from llmshrink.run.work import OFFSETS, Work
from llmshrink.serving.launch import installed, serve_command

TIMING = "timing.json"
ENGINES = ("vllm-cpu", "vllm-cuda")
RECIPE = "recipe.yaml"
CURVES = ("distillation.csv", "distillation.svg")
OWN = (RECIPE, *CURVES, REFERENCE.as_posix())
"""What a run leaves beside the weights that is a part of its output, the record, seal, card and times apart."""


def finish(
    job: Job,
    work: Work,
    workspace: Workspace,
    quality: Quality,
    reference: Mapping[str, Tensor],
    *,
    kept: int,
    started: float,
    seconds: Mapping[str, float],
    progress: Progress,
) -> QuantizeReport:
    """Complete the checkpoint in the workspace, verify it from disk, and publish it; returns the closing summary.

    A checkpoint that doesn't verify isn't published: it stays in the workspace, and the report says so.
    """
    folder = workspace.checkpoint
    rows = [row for part in workspace.parts if part.of_block for row in rows_of(part.rows)]
    _write_index(job, work, workspace)
    trusted, besides = job.options.trust_remote_code, (workspace.folder, workspace.output)
    config = parse_json(job.config_json)
    if config.get("quantization_config") == {}:  # which transformers and vLLM take for a method without a name
        del config["quantization_config"]
    disk.write_json(folder / "config.json", work.config(config))
    disk.write_text(folder / RECIPE, to_yaml(job.recipe))
    (folder / REFERENCE).parent.mkdir(exist_ok=True)
    disk.write_tensors(folder / REFERENCE, reference)
    record = _record(
        job, quality, rows, structure=work.structure, caches=_cache_scales(job, workspace), shards=workspace.parts
    )
    disk.write_json(folder / RECORD, record)
    verification = verify_reload(folder) if job.options.verify else None
    report = QuantizeReport(
        output=job.options.output,
        model=job.source.name,
        recipe=job.recipe.name,
        bytes_before=job.index.nbytes(),
        bytes_after=weight_bytes(folder),
        quality=quality,
        held_out=job.held_out.name,
        structure=summary_of(record),
        kv_cache=cache_of(record),
        sites=tuple(rows),
        notes=tuple(record["notes"]),
        blocks=len(job.stages),
        blocks_kept=kept,
        seconds=time.perf_counter() - started,
        peak_memory=peak_memory(),
        serve=serve_line(job.options.output, record),
        verification=verification,
        left_behind=left_out_of(job.source.folder, job.index, trust_remote_code=trusted, besides=besides),
    )
    timing = {"seconds": report.seconds, "peak_memory": report.peak_memory, "blocks_kept": kept, "sites": dict(seconds)}
    disk.write_json(folder / TIMING, timing)
    if not report.ok:
        progress.note(f"not published: {folder} doesn't read back as it was computed; check the disk and run again")
        return report
    complete(folder, verification)
    disk.fsync_folder(folder)
    workspace.publish()
    return report


def planned(job: Job) -> dict[str, Any]:
    """The record, as far as it is known before the work."""
    rows = [
        SiteRow(site.name, (site.out_features, site.in_features), None, None, None, 0, None, None, note, ())
        for site in job.sites
        for note in [job.assigned[site.name].note]
    ]
    return _record(job, UNKNOWN, rows, structure=None, caches=None, shards=())


def carry(job: Job, workspace: Workspace) -> None:
    """The source's side files into the output, which is the first that a run writes."""
    copy_side_files(
        job.source.folder,
        workspace.checkpoint,
        trust_remote_code=job.options.trust_remote_code,
        besides=(workspace.folder, workspace.output),
    )


def reread(job: Job, *, seconds: float) -> QuantizeReport:
    """The summary of an output that an earlier process published just before it died."""
    output = job.options.output
    record = read_json(output / RECORD)
    timing = read_json(output / TIMING)
    rows = rows_of(record["sites"])
    return QuantizeReport(
        output=output,
        model=record["model"],
        recipe=record["recipe"],
        bytes_before=record["bytes_before"],
        bytes_after=weight_bytes(output),
        quality=Quality(**record["quality"]),
        held_out=record["held_out"],
        structure=summary_of(record),
        kv_cache=cache_of(record),
        sites=tuple(rows),
        notes=tuple(record["notes"]),
        blocks=record["blocks"],
        blocks_kept=record["blocks"],
        seconds=seconds,
        peak_memory=timing["peak_memory"],
        serve=serve_line(output, record),
        verification=verify_reload(output),
        left_behind=left_out_of(
            job.source.folder, job.index, trust_remote_code=job.options.trust_remote_code, besides=(output,)
        ),
    )


def serve_line(output: Path, record: Mapping[str, Any]) -> str:
    """The line that serves an output with the vLLM at hand, or that this vLLM doesn't.

    A vLLM that this Python has is one that has llmshrink's plugin too.
    """
    engine, tp, place = installed(), record["serve_tp"], shlex.quote(str(output))
    refusing = {kind for kind in ENGINES for note in record["notes"] if note.startswith(f"{kind} won't")}
    if format_of(record) == "bitsandbytes":
        return "with transformers and bitsandbytes; no vLLM serves this checkpoint by itself, see the notes"
    if len(refusing) == len(ENGINES):
        return "no vLLM serves this checkpoint as it is, see the notes"
    if engine is None:
        line = f"{serve_command(output, tp=tp)}  (no vLLM is installed here"
        return f"{line}; llmshrink has to be beside it)" if format_of(record) == "llmshrink" else f"{line})"
    if ("vllm-cpu" if engine.cpu else "vllm-cuda") in refusing:
        return (
            f"not with the {engine.distribution} {engine.version} at hand, see the note; elsewhere vllm serve {place}"
        )
    ranks = f" --tensor-parallel-size {tp}" if tp > 1 else ""
    return f"llmshrink serve {place}{ranks}  (which runs {serve_command(output, tp=tp)})"


def _write_index(job: Job, work: Work, workspace: Workspace) -> None:
    """model.safetensors.index.json, and the proof that no tensor of the source was lost."""
    files = [name for part in workspace.parts for name in part.shards]
    with open_shards(workspace.checkpoint, files) as written:
        where = {key: written.entry(key).file.name for key in written}
        total = written.nbytes()
    ledger = work.ledger()
    ledger.dropped |= job.index.left_out
    ledger.check(job.index.keys(), where)
    disk.write_json(
        workspace.checkpoint / INDEX_FILE,
        {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))},
    )


def copy_side_files(
    source: Path, target: Path, *, trust_remote_code: bool = False, besides: Sequence[Path] = ()
) -> None:
    """Copy everything that `side_files` names."""
    for path, name in side_files(source, trust_remote_code=trust_remote_code, besides=besides):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        disk.write_file(target / name, pieces(path), path.stat().st_size)


def sums_beside(source: Path, *, trust_remote_code: bool = False, besides: Sequence[Path] = ()) -> dict[str, str]:
    """Name in an output -> sha256 of everything that `copy_side_files` copies."""
    found = side_files(source, trust_remote_code=trust_remote_code, besides=besides)
    return {name: disk.sha256_of(path) for path, name in found}


def left_out_of(
    source: Path, index: CheckpointIndex, *, trust_remote_code: bool = False, besides: Sequence[Path] = ()
) -> LeftBehind:
    """What of a source's folder a run doesn't carry over; what runs of ours left there is no news."""
    known = {file.name for file in index.files()}
    known |= {path.name for path in named(source, "*") if (path / RECORD).exists()}
    if is_ours(source):
        known |= {RECORD, TIMING, OFFSETS, *(name.partition("/")[0] for name in (*OWN, str(SEAL)))}
    return left_behind(source, trust_remote_code=trust_remote_code, besides=besides, known=known)


def published(name: str) -> bool:
    """Whether a file of an output, beside its weights, record, seal, card and times, is one that goes to the Hub."""
    return belongs(name) or name in (*OWN, "config.json", INDEX_FILE) or ("/" not in name and name.endswith(".py"))


def pieces(path: Path) -> Iterator[bytes]:
    """A file's bytes, 4 MiB at a time."""
    with open(path, "rb") as file:
        while piece := file.read(1 << 22):
            yield piece


def _record(
    job: Job,
    quality: Quality,
    rows: list[SiteRow],
    *,
    structure: dict[str, Any] | None,
    caches: dict[str, list[float]] | None,
    shards: Sequence[Part],
) -> dict[str, Any]:
    identity = job.identity()
    notes = fallen_notes(rows) + job.notes
    widest = max((site.in_features for site in job.sites), default=0)
    if job.structure is None and job.calibration.tokens < widest and any(job.reads.values()):
        notes.append(
            f"{job.calibration.tokens} calibration tokens for inputs of up to {widest}: their Hessian is singular, and "
            "only damping makes it solvable; give more --samples"
        )
    return {
        "format": 1,
        "model": job.source.name if job.source.kind != "folder" else as_text(job.source.folder.name),
        "revision": job.source.revision,
        "recipe": job.recipe.name,
        "blocks": len(job.stages),
        "serve_tp": job.options.serve_tp,
        "calibration": {
            "name": job.calibration.name,
            "windows": list(job.calibration.input_ids.shape),
            "tokens": job.calibration.tokens,
            **job.calibration.reading.to_dict(),
        },
        "held_out": job.held_out.name,
        "quality": asdict(quality),
        "bytes_before": job.index.nbytes(),
        "identity": identity,
        "notes": notes,
        "format_notes": job.format_notes,
        "cpu_notes": job.cpu_notes,
        "other_linears": job.other_linears,
        "structure": structure,
        "kv_cache": caches,
        "left_out": {**job.index.left_out, **dict.fromkeys(job.index.absent, "in no file")},
        "shards": shard_sums(shards),
        "sites": [asdict(row) for row in rows],
    }


def _cache_scales(job: Job, workspace: Workspace) -> dict[str, list[float]] | None:
    """The scales of keys and of values by attention, as they are written; None where they aren't rounded."""
    if not job.caches:
        return None
    with open_shards(workspace.checkpoint, [name for part in workspace.parts for name in part.shards]) as written:
        return {cache.key: [float(written.read(key)) for key in cache.scales] for cache in job.caches}
