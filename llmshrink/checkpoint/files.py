"""The files of a checkpoint by name, and what can be told of them without torch."""

from __future__ import annotations

from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from llmshrink_eval import configfile
from llmshrink_eval.bounded import read_json, shown
from llmshrink_eval.errors import EvalError

from llmshrink.errors import CheckpointError, SourceError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


def is_lfs_pointer(start: bytes) -> bool:
    """Whether a file that begins so is what Git LFS puts in the place of a large one that wasn't fetched."""
    return start.startswith(b"version https://git-lfs")


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a model's folder, its fields held to what they can be, whoever reads it.

    Raises SourceError, in one line, where there is none, it can't be read, or a field isn't what one of its name is.
    """
    try:
        return configfile.read_config(folder)
    except EvalError as error:
        raise SourceError(str(error)) from error


def read_weight_map(index: Path) -> dict[str, str]:
    """Key -> shard, as an index file has it. Raises CheckpointError for one that can't be read or leaves the folder."""
    try:
        described = read_json(index)
        weight_map = described["weight_map"]
        if not isinstance(weight_map, dict) or not weight_map:
            raise TypeError
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{index}: broken index: no weight_map to read; download or copy it again") from error
    for key, name in weight_map.items():
        if not isinstance(name, str) or not _stays_inside(name):
            raise CheckpointError(
                f"{index}: {key:.200} is said to lie in {shown(name)}, outside the model's folder: refused; "
                "an index names files beside it"
            )
    return weight_map


def _stays_inside(name: str) -> bool:
    """Whether a shard's name is a relative path without a step up; links inside the folder are the user's own."""
    posix, windows = PurePosixPath(name), PureWindowsPath(name)
    if not name or "\0" in name or posix.is_absolute() or windows.drive or windows.root:
        return False
    return ".." not in windows.parts and ".." not in posix.parts
