"""What lies in an output of ours and no run of llmshrink left there, so that `--overwrite` may not delete it.

Neither the record nor the seal is believed alone: somebody may have edited them, or what they name.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from llmshrink_eval.bounded import read_json

from llmshrink.checkpoint.beside import WANTED, belongs
from llmshrink.paths import as_text
from llmshrink.run import disk
from llmshrink.run.finish import published
from llmshrink.run.output import RECORD, WRITTEN_LATER, compiled, of_nobody, workspace_in
from llmshrink.run.seal import read_seal
from llmshrink.run.work import OFFSETS

CHANGED = " (changed since it was made)"


def strangers(folder: Path) -> list[str]:
    """Each such thing as a path within `folder`, one of ours that was edited with `CHANGED` behind it; a folder of such
    things with a slash.

    Ours are the record and what is written beside it (`WRITTEN_LATER`); weights that the record names; and of the other
    files that it names those whose sum is the seal's, or that the seal doesn't know and a run publishes. A record of
    before it named files: what belongs to a model by its name is taken for ours.
    """
    sealed = (read_seal(folder) or {}).get("files", {})
    known, named = _known(folder, sealed)
    edited = {name for name in sealed if name in known and not _is(folder / name, sealed[name])}
    paths = (*known, *(() if named else WANTED))
    folders = {parent.as_posix() for name in paths for parent in PurePosixPath(name).parents}
    found = []
    waiting = [folder]
    while waiting:
        for path in sorted(waiting.pop().iterdir()):
            name = path.relative_to(folder).as_posix()
            if of_nobody(path) or compiled(path) or (path.parent == folder and workspace_in(path)):
                continue
            if path.is_dir() and not path.is_symlink():
                if name in folders or path.name == "__pycache__":
                    waiting.append(path)
                else:
                    found.append(f"{name}/")
            elif name in edited:
                found.append(f"{name}{CHANGED}")
            elif name not in known and (named or not _of_old(path, name)):
                found.append(name)
    return sorted(map(as_text, found))


def _known(folder: Path, sealed: Mapping[str, str]) -> tuple[set[str], bool]:
    """The names of what may be ours, and whether the record tells them; a damaged record names nothing."""
    known = {RECORD, *WRITTEN_LATER}
    try:
        record: dict[str, Any] = read_json(folder / RECORD)
        weights = {name for name in record.get("shards", {}) if PurePosixPath(name).suffix == ".safetensors"}
        files = record.get("files")
        ours = {name for name in files or () if name in sealed or _left(name)}
    except (OSError, ValueError, AttributeError, TypeError):
        return known, True
    return known | weights | ours | (sealed.keys() if files is None else set()), files is not None


def _left(name: str) -> bool:
    """Whether a run leaves a file of this name, beside the weights."""
    return published(name) or PurePosixPath(name).parts[:1] == (OFFSETS,)


def _of_old(path: Path, name: str) -> bool:
    """Whether a file may be of a run that didn't say in its record which files are its own."""
    return belongs(name) or path.suffix in (".safetensors", ".yaml", ".json")


def _is(path: Path, known: str) -> bool:
    return not path.is_file() or disk.sha256_of(path) == known
