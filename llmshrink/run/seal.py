"""What was verified, to the byte: so that whoever passes a checkpoint on can tell whether it still is what was.

The sums of the weights are in the record (`shards`), as the run wrote them: nothing ever changes them. The seal,
`verify/verified.json`, is written once a checkpoint has read back as it was computed, and has the sum of every other
file that decides what the model does, the record's among them. The card and the times may change without it.

Which files those are the record says (`files`): what somebody puts beside them later is sealed by nobody.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmshrink_eval.bounded import read_json
from llmshrink_eval.listing import below, named

from llmshrink.checkpoint.beside import belongs
from llmshrink.checkpoint.index import INDEX_FILE
from llmshrink.paths import as_text
from llmshrink.run import disk
from llmshrink.run.journal import Part
from llmshrink.run.output import RECORD, WRITTEN_LATER
from llmshrink.run.recordfile import Seal
from llmshrink.run.report import VerifyReport
from llmshrink.run.verify import REFERENCE, device_of, read_record

SEAL = Path("verify") / "verified.json"
FREE = WRITTEN_LATER
"""What a seal says nothing of."""
READ_TOO = (
    *("config.json", INDEX_FILE, "adapter_config.json", "params.json"),
    *("hf_quant_config.json", "quant_config.json", "quantize_config.json"),
)
"""What transformers or vLLM reads of a folder where it is there, besides a model's side files, weights and Python: an
adapter is laid over the model, and Mistral's own params.json comes before config.json."""


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


@dataclass(frozen=True)
class Checked:
    """What checksums say of an output. Names are paths within it.

    sealed: whether there is a seal; without one the weights alone were compared. damaged: weights, the record, what a
    reload is held to, and a seal that can't be read, that are no longer what was written, or gone. changed: other files
    of which that is so. added: files that are no part of it, and that whoever loads it reads all the same.
    """

    sealed: bool
    damaged: tuple[str, ...]
    changed: tuple[str, ...]
    added: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether the weights that are loaded are those that were written."""
        return not self.damaged and not any(name.endswith(".safetensors") for name in self.added)


def checked(folder: Path) -> Checked:
    """Compare every file of an output with its record and its seal. Raises SourceError for no output."""
    record, seal = read_record(folder), read_seal(folder)
    known = known_files(record, seal)
    sealed = {} if seal is None else seal["files"]
    weights = record.get("shards", {})
    differ = {name for name, sha in {**sealed, **weights}.items() if _sum(folder / name) != sha}
    differ |= {name for name in known or () if not (folder / name).is_file()}
    if seal is None and os.path.lexists(folder / SEAL):
        differ.add(SEAL.as_posix())
    vital = {*weights, RECORD, REFERENCE.as_posix(), SEAL.as_posix()}
    return Checked(
        sealed=seal is not None,
        damaged=tuple(as_text(name) for name in sorted(differ & vital)),
        changed=tuple(as_text(name) for name in sorted(differ - vital)),
        added=tuple(as_text(name) for name in _added(folder, weights, known)),
    )


def _added(folder: Path, weights: Mapping[str, str], known: frozenset[str] | None) -> list[str]:
    """Files that are neither weights of the record nor known, and that transformers or vLLM would read."""
    others = set(files_of(folder)) - {RECORD, *FREE, *weights, *(known or ())}
    more = {name for name in others if weights and name.endswith(".safetensors") and "/" not in name}
    if known is not None:
        more |= {name for name in others if name.endswith(".py") or name in READ_TOO or belongs(name)}
    return sorted(more)


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
