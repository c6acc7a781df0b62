"""Paths as people write them: with a ~, by a link that stands for a folder, in any letters."""

from __future__ import annotations

import codecs
import os
import sys
from pathlib import Path

from llmshrink.errors import LlmshrinkError, OutputError, PathLike


def expanded(path: PathLike) -> Path:
    """The path, its ~ or ~user written out. Raises LlmshrinkError where no home folder of that user is known, and as
    `check_spelling` does."""
    text = os.fspath(path)
    check_spelling(text)
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
    check_spelling(folder.absolute())
    if not folder.is_symlink():
        return folder
    target = Path(os.path.realpath(folder))
    if target.is_symlink():
        raise OutputError(f"output {folder} is a link that leads to itself; choose another folder with -o")
    return target


def check_spelling(path: PathLike) -> None:
    """Raise LlmshrinkError for a path with a NUL byte, and for other letters than ASCII where Python's own names of
    files aren't UTF-8.

    What a shell's locale makes of such a name, or a program's own text, can't be opened there, or not by the libraries
    that read tokenizers. A command line begins anew in UTF-8 instead (`cli.surroundings`); a program can't.
    """
    if "\0" in os.fspath(path):
        raise LlmshrinkError(f"{os.fspath(path)!r}: no file's name has a NUL byte; correct it")
    encoding = sys.getfilesystemencoding()
    if os.fspath(path).isascii() or codecs.lookup(encoding).name == "utf-8":
        return
    raise LlmshrinkError(
        f"{as_text(os.fspath(path))}: this Python's names of files are {encoding}, for the locale isn't UTF-8: set "
        "PYTHONUTF8=1 (or LC_ALL=C.UTF-8) before Python starts, or give a path in ASCII"
    )


def holds(folder: Path, path: Path) -> bool:
    """Whether `path` is `folder` or lies in it, however both are written."""
    if not folder.exists():
        return False
    path = Path(os.path.realpath(path))
    return any(place.exists() and place.samefile(folder) for place in (path, *path.parents))


def as_text(name: str) -> str:
    """A file's name as text that can be written: bytes that are no UTF-8 become the sign for what can't be read."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
