"""Links in a model's folder: which are followed, for every file of it that is read and could come into an output.

A folder comes from anywhere, and a link in it leads wherever this user can read. So what is read is the file itself, or
what lies in a store of contents that the folder is of: a Hub cache's blobs, Git LFS's or git-annex's objects. A link to
another file of the folder is followed where that one's name would be taken too: a `merges.txt` that leads to `id_rsa`
isn't.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from llmshrink.errors import CheckpointError
from llmshrink.paths import as_text

STORES = ((".git", "annex", "objects"), (".git", "lfs", "objects"))
"""Folders of a clone in which a link finds its content, by checksum."""


def real(path: Path) -> Path:
    """Where a path leads; of links that lead to each other, one of them, where `Path.resolve` raises."""
    return Path(os.path.realpath(path))


def check_link(path: Path, folder: Path, taken: Callable[[str], bool] = lambda name: False) -> None:
    """Raise CheckpointError where a file of a model's folder, by a link or in one, is another that isn't followed.

    taken: whether a name, a path within the folder, is one that could lie there in this file's place.
    """
    target, root = real(path), real(folder)
    if target == root / path.relative_to(folder) or _in_own_cache(target, root):
        return
    if not target.is_relative_to(root):
        where = ", out of the model's folder"
    else:
        inside = target.relative_to(root)
        if taken(inside.as_posix()) or any(inside.parts[: len(store)] == store for store in STORES):
            return
        where = ", whose name is no model's"
    raise CheckpointError(
        f"{as_text(str(path))} is a link to {as_text(str(target))}{where}: "
        "put a copy of the file in its place if it is the model's, else remove the link"
    )


def _in_own_cache(target: Path, root: Path) -> bool:
    """Whether a file is one of the blobs of the repository that a folder is a snapshot of, in the Hub's cache."""
    return root.parent.name == "snapshots" and target.parent == root.parents[1] / "blobs"
