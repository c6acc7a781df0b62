"""What was verified, to the byte: so that whoever passes a checkpoint on can tell whether it still is what was.

The sums of the weights are in the record (`shards`), as the run wrote them: nothing ever changes them. The seal,
`verify/verified.json`, is written once a checkpoint has read back as it was computed, and has the sum of every other
file that decides what the model does, the record's among them. The card and the times may change without it.

Which files those are the record says (`files`): what somebody puts beside them later is sealed by nobody.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from llmshrink_eval.bounded import read_json
from llmshrink_eval.listing import below, named

from llmshrink.run import disk
from llmshrink.run.journal import Part
from llmshrink.run.output import RECORD, WRITTEN_LATER
from llmshrink.run.recordfile import Seal
from llmshrink.run.report import VerifyReport
from llmshrink.run.verify import REFERENCE, device_of, read_record

SEAL = Path("verify") / "verified.json"
FREE = WRITTEN_LATER
"""What a seal says nothing of."""


def shard_sums(parts: Iterable[Part]) -> dict[str, str]:
    """File -> sha256 of finished parts, by name."""
    return dict(sorted((name, shard["sha256"]) for part in parts for name, shard in part.shards.items()))


def note_files(folder: Path) -> None:
    """Have the record of a checkpoint that is complete name its files; one that was carried over keeps its own."""
    record = read_record(folder)
    if "files" not in record:
        apart = {RECORD, *FREE, *record.get("shards", {})}
        disk.write_json(folder / RECORD, {**record, "files": [path for path in files_of(folder) if path not in apart]})


def known_files(record: Mapping[str, Any], seal: Mapping[str, Any] | None) -> frozenset[str] | None:
    """The files that a seal is about, besides the record: as the record names them, or a seal of before it did.

    None where neither says.
    """
    names = record.get("files", None if seal is None else seal["files"])
    return None if names is None else frozenset(names) - {RECORD}


def seal_of(folder: Path, report: VerifyReport, known: Iterable[str]) -> dict[str, Any]:
    """That the record and the `known` files of `folder` are what `report`, which is ok, was made of."""
    from llmshrink.run.job import here

    assert report.ok, report
    record = read_record(folder)
    files = sorted(path for path in {RECORD, *known} if (folder / path).is_file())
    device = device_of(record)
    return {
        "by": report.engine,
        "against": report.against,
        "tolerance": report.tolerance,
        "positions": report.positions,
        "with": here(device),
        "files": {path: disk.sha256_of(folder / path) for path in files},
    }


def write_seal(folder: Path, seal: Mapping[str, Any]) -> None:
    """Write what `seal_of` says."""
    disk.write_json(folder / SEAL, seal)


def read_seal(folder: Path) -> dict[str, Any] | None:
    """The seal, or None where there is none, or none that makes sense. Raises OSError where the system doesn't tell."""
    try:
        seal: dict[str, Any] = read_json(folder / SEAL)
        Seal.model_validate(seal)
        return seal
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError):
        return None


def checked(folder: Path) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What is no longer as the record and the seal have it, by checksum, or is gone: weights, the record and what a
    reload is held to first, then other files. Without a seal, the weights alone. Raises SourceError for no output."""
    record, seal = read_record(folder), read_seal(folder)
    sealed = {} if seal is None else seal["files"]
    weights = record.get("shards", {})
    differ = sorted(name for name, known in {**sealed, **weights}.items() if _sum(folder / name) != known)
    vital = {*weights, RECORD, REFERENCE.as_posix()}
    return tuple(name for name in differ if name in vital), tuple(name for name in differ if name not in vital)


def _sum(path: Path) -> str | None:
    return disk.sha256_of(path) if path.is_file() else None


def files_of(folder: Path) -> list[str]:
    """Every file of a checkpoint as a path with slashes, sorted; what is hidden isn't part of one."""
    found = []
    for path in below(folder):
        relative = path.relative_to(folder)
        if path.is_file() and not any(part.startswith(".") or part == "__pycache__" for part in relative.parts):
            found.append(relative.as_posix())
    return sorted(found)


def weight_bytes(folder: Path) -> int:
    """Bytes of all files of weights."""
    return sum(path.stat().st_size for path in named(folder, "*.safetensors"))
