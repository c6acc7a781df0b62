"""The folder that a run writes: which of its files are ours, when it may be replaced, where the work goes meanwhile.

A run works beside OUT and renames the result, so that OUT appears whole. Where OUT is a mount point (a container's
volume), or the folder that it is in can't be written, nothing beside it can be renamed there: then the work is in a
hidden folder inside OUT, on the same medium, and its files are moved one by one in the end (`Workspace.publish`).
"""

from __future__ import annotations

import os
from pathlib import Path

from llmshrink.errors import OutputError

RECORD = "llmshrink.json"
WRITTEN_LATER = ("README.md", "timing.json", "verify/verified.json")
"""Of an output, beside its weights and the files that its record names: card, times, seal."""
HIDDEN = ".llmshrink"
"""How the names of folders begin in which runs work inside OUT, where they can't beside it."""
WORKSPACES = tuple(f"{HIDDEN}{ending}" for ending in (".partial", ".student", ".student.partial"))
"""All of them."""
SHOWN = 4


def is_ours(folder: Path) -> bool:
    """Whether `folder` was written by llmshrink: only such a folder is ever replaced."""
    return (folder / RECORD).is_file()


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


def of_nobody(path: Path) -> bool:
    """Whether systems leave such a thing in folders by themselves, so that it may go without a word: Finder's file,
    Python's folder with nothing but compiled modules, a file system's with nothing in it (or that stays, where the
    folder is its root)."""
    if path.is_symlink():
        return False
    if path.name == ".DS_Store":
        return path.is_file()
    if path.name == "__pycache__":
        return path.is_dir() and all(compiled(each) for each in path.iterdir())
    if path.name == "lost+found" and path.is_dir():
        return in_place(path.parent) or (os.access(path, os.R_OK) and not any(path.iterdir()))
    return False


def compiled(path: Path) -> bool:
    """Whether a file is what Python makes of a module by itself."""
    return path.parent.name == "__pycache__" and path.suffix == ".pyc" and path.is_file() and not path.is_symlink()


def workspace_in(path: Path) -> bool:
    """Whether this is a folder inside an output in which a run worked."""
    return path.name in WORKSPACES and path.is_dir() and not path.is_symlink()


def entries(output: Path) -> list[str]:
    """What is in a folder, but for what runs work in and what systems leave."""
    return sorted(path.name for path in output.iterdir() if not of_nobody(path) and not workspace_in(path))


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
    # What tells them knows all that a run leaves, and so needs this module.
    from llmshrink.run.strangers import strangers

    others = strangers(output)
    if others:
        more = f" and {len(others) - SHOWN} more" if len(others) > SHOWN else ""
        raise OutputError(
            f"output {output} holds {', '.join(others[:SHOWN])}{more}, which no run of llmshrink wrote and --overwrite "
            "would delete; move what you want to keep elsewhere and remove the rest, or choose another folder with -o"
        )
