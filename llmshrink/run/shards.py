"""Parts to shards: how a finished part's tensors are spread over files, and how they are read back.

Everything outside the blocks is one part, each block one more. A part becomes one safetensors file, or several where
it would pass the shard limit; names sort in the order of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmshrink.checkpoint.header import read_header
from llmshrink.checkpoint.index import CheckpointIndex
from llmshrink.run import disk
from llmshrink.run.journal import Part

Layout = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]


def write_part(
    folder: Path,
    name: str,
    stem: str,
    layout: Layout,
    bytes_of: Callable[[str], Iterable[memoryview | bytes]],
    *,
    limit: int,
    rows: list[dict[str, Any]],
) -> Part:
    """Write a part's tensors under `folder` and describe it. limit: bytes a shard (a larger tensor gets its own)."""
    shards: dict[str, dict[str, Any]] = {}
    for number, names in enumerate(split(layout, limit)):
        file = file_name(stem, number)
        sha256, size = disk.write_shard(folder / file, {n: layout[n] for n in names}, bytes_of)
        shards[file] = {"sha256": sha256, "bytes": size}
    return Part(name, shards, rows)


def file_name(stem: str, number: int) -> str:
    """Of the `number`-th file of a part."""
    return f"model-{stem}{f'-{number + 1:05}' if number else ''}.safetensors"


def split(layout: Layout, limit: int) -> list[list[str]]:
    """The names of a part's tensors, by file. limit: bytes a file (a larger tensor gets its own)."""
    groups: list[list[str]] = []
    used = 0
    for name, (dtype, shape) in layout.items():
        size = torch.Size(shape).numel() * dtype.itemsize
        if not groups or (used + size > limit and groups[-1]):
            groups.append([])
            used = 0
        groups[-1].append(name)
        used += size
    return groups


def layout_of(tensors: Mapping[str, Tensor]) -> Layout:
    """Name -> (dtype, shape) of tensors in memory."""
    return {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}


def open_shards(folder: Path, files: Iterable[str]) -> CheckpointIndex:
    """An index over finished shards, before there is an index file."""
    entries = [entry for file in files for entry in read_header(folder / file).entries]
    return CheckpointIndex(folder, entries)


class Overlay:
    """A reader that takes what the finished shards hold from there, and the rest from the source."""

    def __init__(self, first: CheckpointIndex, then: CheckpointIndex) -> None:
        self._first, self._then = first, then

    def keys(self) -> list[str]:
        return self._then.keys()

    def read(self, key: str) -> Tensor:
        return self._first.read(key) if key in self._first else self._then.read(key)
