"""What a run must not write through or delete: links that somebody put in its place, and other users' files.

torch isn't imported: an evaluation whose figures are all known takes its lock without it.
"""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path

from llmshrink.errors import OutputError


def create(path: Path, flags: int) -> int:
    """Open a file of a run's own for writing, made if need be; never through a link that somebody put in its place."""
    return os.open(path, flags | os.O_CREAT | os.O_NOFOLLOW, 0o644)


def refuse_foreign(path: Path) -> None:
    """Raise OutputError where a path that a run writes to and deletes is a link, or another user's."""
    try:
        found = path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return
    if stat.S_ISLNK(found.st_mode):
        raise OutputError(
            f"{path} is a link to {os.readlink(path)}, where a run would write and delete; remove the link, or choose "
            "another folder with -o"
        )
    if found.st_uid != os.getuid() and found.st_uid != _owner_of_ours(path.parent):
        raise OutputError(
            f"{path} belongs to user {found.st_uid}, and this one is {os.getuid()}; finish that run as its user, or "
            "choose another folder with -o"
        )


def refuse_foreign_in(folder: Path) -> None:
    """The same for a folder that a run reads back what it wrote from, and for all in it."""
    refuse_foreign(folder)
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        refuse_foreign_in(path)


def _owner_of_ours(folder: Path) -> int | None:
    """The user that files made by this process belong to, in a folder: some network disks have another."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            return os.fstat(file.fileno()).st_uid
    except OSError:
        return None
