"""The folder that a run writes: which of its files are ours, when it may be replaced, where the work goes meanwhile.

A run works beside OUT and renames the result, so that OUT appears whole. Where OUT is a mount point (a container's
volume), or the folder that it is in can't be written, nothing beside it can be renamed there: then the work is in a
hidden folder inside OUT, on the same medium, and its files are moved one by one in the end (`Workspace.publish`).
"""

from __future__ import annotations

import os
from pathlib import Path, PurePosixPath

from llmshrink_eval.bounded import read_json

from llmshrink.checkpoint.beside import WANTED, belongs
from llmshrink.errors import OutputError
from llmshrink.paths import as_text

RECORD = "llmshrink.json"
WRITTEN_LATER = ("README.md", "timing.json", "verify/verified.json")
"""Of an output, beside its weights and the files that its record names: card, times, seal."""
OF_NOBODY = ("__pycache__", ".DS_Store", "lost+found")
"""What systems leave in folders by themselves."""
HIDDEN = ".llmshrink"
"""How the names of folders begin in which runs work inside OUT, where they can't beside it."""
SHOWN = 4


def is_ours(folder: Path) -> bool:
    """Whether `folder` was written by llmshrink: only such a folder is ever replaced."""
    return (folder / RECORD).is_file()


def strangers(folder: Path) -> list[str]:
    """What lies in an output of ours and no run of llmshrink left there, a folder of such things with a slash.

    Ours are the files that its record names, the record, and what is written beside it (`WRITTEN_LATER`). A record of
    before it named files: what belongs to a model by its name is taken for ours.
    """
    try:
        record = read_json(folder / RECORD)
        named = record.get("files")
        known = {RECORD, *WRITTEN_LATER, *record.get("shards", {}), *(named or ())}
    except (OSError, ValueError, AttributeError, TypeError):  # a damaged record names nothing
        named, known = [], {RECORD, *WRITTEN_LATER}
    paths = (*known, *(WANTED if named is None else ()))
    folders = {parent.as_posix() for name in paths for parent in PurePosixPath(name).parents}
    found = []
    waiting = [folder]
    while waiting:
        for path in sorted(waiting.pop().iterdir()):
            name = path.relative_to(folder).as_posix()
            if path.is_dir() and not path.is_symlink():
                if name in folders:
                    waiting.append(path)
                elif path.name not in OF_NOBODY and not name.startswith(f"{HIDDEN}."):
                    found.append(f"{name}/")
            elif name not in known and path.name not in OF_NOBODY:
                if named is None and (belongs(name) or path.suffix in (".safetensors", ".yaml", ".json")):
                    continue
                found.append(name)
    return sorted(map(as_text, found))


def in_place(output: Path) -> bool:
    """Whether a folder can't be renamed over `output`: it is where a medium is mounted, or lies in a folder that can't
    be written."""
    return output.is_dir() and (os.path.ismount(output) or not os.access(output.parent, os.W_OK))


def beside(output: Path, ending: str) -> Path:
    """A run's own folder, of OUT's name with this ending, whatever OUT is called (`.` has no name)."""
    output = Path(os.path.abspath(output))
    if not output.name:
        return output
    return output / f"{HIDDEN}{ending}" if in_place(output) else output.with_name(output.name + ending)


def partial_folder(output: Path) -> Path:
    """Where a run into `output` works until it is done."""
    return beside(output, ".partial")


def entries(output: Path) -> list[str]:
    """What is in a folder, but for what runs work in and what systems leave."""
    return sorted(
        path.name
        for path in output.iterdir()
        if path.name not in OF_NOBODY and not (path.name.startswith(f"{HIDDEN}.") and path.is_dir())
    )


def check_output(output: Path, *, overwrite: bool) -> None:
    """Raises OutputError unless `output` may be written: absent, empty, or ours and `overwrite` asked for."""
    if not output.exists() and not output.is_symlink():
        return
    if not output.is_dir():
        raise OutputError(f"output {output} is a file; name a folder that doesn't exist yet with -o")
    if not entries(output):
        return
    if not is_ours(output):
        raise OutputError(f"output {output} exists and wasn't written by llmshrink; choose another folder with -o")
    if not overwrite:
        raise OutputError(f"output {output} exists; replace it with --overwrite or choose another folder with -o")
    others = strangers(output)
    if others:
        more = f" and {len(others) - SHOWN} more" if len(others) > SHOWN else ""
        raise OutputError(
            f"output {output} holds {', '.join(others[:SHOWN])}{more}, which no run of llmshrink wrote and --overwrite "
            "would delete; move what you want to keep elsewhere and remove the rest, or choose another folder with -o"
        )
