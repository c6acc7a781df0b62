"""The end of a run, tried before its work: what can't be written then is known now.

A run takes hours, and writes its config.json, its record and its card last. What they say is somebody's: fields of a
config, names of tensors, of files, of a licence. So the config is tried as it will be written, and record and card are
made with what isn't known yet left at nothing. Side files are copied at the start, not tried.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmshrink_eval.bounded import parse_json

from llmshrink.checkpoint.links import check_link
from llmshrink.errors import CheckpointError, SourceError
from llmshrink.run import disk
from llmshrink.run.card import Subject, compose
from llmshrink.run.heldout import Quality
from llmshrink.run.inspect import InspectReport
from llmshrink.run.licence import licence_of
from llmshrink.run.original import original_of
from llmshrink.run.output import RECORD
from llmshrink.run.report import cache_of, rows_of, summary_of

UNKNOWN = Quality(tokens=0, ppl_before=0.0, ppl_after=0.0, kl_mean=0.0, kl_stderr=0.0, top1_agreement=0.0)
"""What a run will find of its result."""


def config_bytes(folder: Path) -> bytes:
    """config.json, which an output's is made of. Raises SourceError where that couldn't be written as JSON,
    CheckpointError where it is a link that isn't followed."""
    file = folder / "config.json"
    check_link(file, folder)
    try:
        data = file.read_bytes()
        fault = disk.unwritable(parse_json(data))
    except (OSError, ValueError) as error:
        raise SourceError(f"{file}: can't be read as JSON; download or copy it again") from error
    if fault is not None:
        raise SourceError(f"{file}: {fault}, which no JSON file can say; correct it, or download it again")
    return data


def rehearse(record: Mapping[str, Any], source: Path, recipe: str | None) -> None:
    """Make record and card of what is known.

    record: as it will be, as far as that is known. source: the original's folder. recipe: recipe.yaml as it will be.
    Raises SourceError or CheckpointError for what the end would fail of.
    """
    fault = disk.unwritable({**record, "recipe.yaml": recipe})
    if fault is not None:
        raise SourceError(f"{source}: the result's {RECORD} couldn't be written: {fault}; rename what has that name")
    rows = tuple(rows_of(record["sites"]))
    made = InspectReport(
        folder=source,
        model=record["model"],
        recipe=record["recipe"],
        structure=summary_of(record),
        kv_cache=cache_of(record),
        sites=rows,
        weights=1,
        bytes=1,
        linear_bits_per_weight=1.0,
        bits_per_weight=1.0,
        quality=record["quality"],
        notes=tuple(record["notes"]),
    )
    try:
        compose(Subject(dict(record), made, licence_of(source), recipe, 1, original_of(source))).encode()
    except CheckpointError as error:
        raise CheckpointError(f"{source}: {error}") from error
