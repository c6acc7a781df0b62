"""What was verified, to the byte: so that whoever passes a checkpoint on can tell whether it still is what was.

The sums of the weights are in the record (`shards`), as the run wrote them: nothing ever changes them. The seal,
`verify/verified.json`, is written once a checkpoint has read back as it was computed, and has the sum of every other
file that decides what the model does, the record's among them. The card and the times may change without it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from llmshrink.run import disk
from llmshrink.run.journal import Part
from llmshrink.run.report import VerifyReport
from llmshrink.run.verify import read_record

SEAL = Path("verify") / "verified.json"
FREE = ("README.md", "timing.json", str(SEAL))
"""What a seal says nothing of."""


def shard_sums(parts: Iterable[Part]) -> dict[str, str]:
    """File -> sha256 of finished parts, by name."""
    return dict(sorted((name, shard["sha256"]) for part in parts for name, shard in part.shards.items()))


def write_seal(folder: Path, report: VerifyReport) -> None:
    """Say that `folder` is what `report`, which is ok, was made of."""
    from llmshrink.run.job import here, pick_device

    assert report.ok, report
    record = read_record(folder)
    files = [path for path in files_of(folder) if path not in FREE and path not in record.get("shards", {})]
    device = pick_device("cpu" if record["identity"]["device"] == "cpu" else None)
    disk.write_json(
        folder / SEAL,
        {
            "by": report.engine,
            "against": report.against,
            "tolerance": report.tolerance,
            "positions": report.positions,
            "with": here(device),
            "files": {path: disk.sha256_of(folder / path) for path in files},
        },
    )


def read_seal(folder: Path) -> dict[str, Any] | None:
    """The seal, or None where there is none that can be read."""
    try:
        seal = json.loads((folder / SEAL).read_text())
        return seal if isinstance(seal["files"], dict) and isinstance(seal["with"], dict) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def files_of(folder: Path) -> list[str]:
    """Every file of a checkpoint as a path with slashes, sorted; what is hidden isn't part of one."""
    found = []
    for path in folder.rglob("*"):
        relative = path.relative_to(folder)
        if path.is_file() and not any(part.startswith(".") or part == "__pycache__" for part in relative.parts):
            found.append(relative.as_posix())
    return sorted(found)
