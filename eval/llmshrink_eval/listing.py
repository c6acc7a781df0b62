"""What lies in a folder, none left out in silence: pathlib's own patterns pass over folders that can't be read."""

from __future__ import annotations

import os
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path


def named(folder: Path, *patterns: str) -> list[Path]:
    """What lies in a folder itself under names that fit one of the patterns, sorted; nothing where there is no folder.

    Raises OSError where the system doesn't tell.
    """
    return [path for path in _listed(folder) if any(fnmatchcase(path.name, pattern) for pattern in patterns)]


def below(folder: Path) -> Iterator[Path]:
    """All that lies in a folder at any depth, a folder before what is in it; no link to a folder is followed.

    Raises OSError where the system doesn't tell.
    """
    for path in _listed(folder):
        yield path
        if path.is_dir() and not path.is_symlink():
            yield from below(path)


def _listed(folder: Path) -> list[Path]:
    try:
        return sorted(folder / name for name in os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return []
