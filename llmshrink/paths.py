"""Paths as people write them: with a ~, or by a link that stands for a folder."""

from __future__ import annotations

import os
from pathlib import Path

from llmshrink.errors import LlmshrinkError, OutputError, PathLike


def expanded(path: PathLike) -> Path:
    """The path, its ~ or ~user written out. Raises LlmshrinkError where no home folder of that user is known."""
    text = os.fspath(path)
    found = os.path.expanduser(text)
    if found == text and text.startswith("~") and not os.path.lexists(text):
        user = text[1:].partition(os.sep)[0]
        whose = f"of a user {user}" if user else "of this user (HOME isn't set)"
        raise LlmshrinkError(f"{text}: no home folder {whose} is known here; give the path in full")
    return Path(found)


def output_folder(path: PathLike) -> Path:
    """The folder that is written: where the path is a link, what it leads to, so that the link stays what it is.

    Raises OutputError for a link that leads nowhere but to itself, LlmshrinkError as `expanded` does.
    """
    folder = expanded(path)
    if not folder.is_symlink():
        return folder
    target = Path(os.path.realpath(folder))
    if target.is_symlink():
        raise OutputError(f"output {folder} is a link that leads to itself; choose another folder with -o")
    return target


def holds(folder: Path, path: Path) -> bool:
    """Whether `path` is `folder` or lies in it, however both are written."""
    if not folder.exists():
        return False
    path = Path(os.path.realpath(path))
    return any(place.exists() and place.samefile(folder) for place in (path, *path.parents))


def as_text(name: str) -> str:
    """A file's name as text that can be written: bytes that are no UTF-8 become the sign for what can't be read."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
