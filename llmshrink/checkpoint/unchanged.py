"""A checkpoint that must stay what it is while a run reads it, hours and restarts apart.

What was read first is held by its CRC-32, which is taken of the bytes as they pass: nothing is read for it alone. A
second reading, in this process or in one that goes on (the journal keeps what was `seen`), must have the same.

Size, times and inode of a file are a hint: they differ for a folder that was copied, mounted anew or touched as they do
for one that was written to. So where they changed what was read of the file is read again and compared, and only other
bytes are refused. Where they didn't, the file is taken to be the same. A CRC finds accidents, not a forger.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from llmshrink_eval.listing import named
from torch import Tensor

from llmshrink.checkpoint.arrival import Arriving
from llmshrink.checkpoint.header import TensorEntry, read_header
from llmshrink.checkpoint.index import CheckpointIndex
from llmshrink.errors import CheckpointError

State = tuple[int, int, int, int, int]
"""Size in bytes, times of the last change of content and of metadata in nanoseconds, device, inode."""


class Changed(CheckpointError):
    """A source isn't what was read of it. file: which; what: of it, in words."""

    def __init__(self, file: Path, what: str) -> None:
        self.file, self.what = file, what
        super().__init__(
            f"{file}: changed since this run first read it: {what}; put back what was there and run the same command "
            "again, which goes on, or start anew with --overwrite"
        )


def state_of(file: Path | int) -> State:
    """Of a file by its path, links followed, or by its descriptor. Raises OSError."""
    found = os.stat(file)
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_dev, found.st_ino


class Watched(CheckpointIndex):
    """An index whose every read is held to the first one. sums: CRC-32 by key, of what was read in full."""

    def __init__(self, folder: Path, entries: Sequence[TensorEntry], *more: Any, **named: Any) -> None:
        super().__init__(folder, entries, *more, **named)
        self.sums: dict[str, int] = {}
        self._states: dict[Path, State] = {}

    @classmethod
    def open(cls, folder: str | os.PathLike[str], arriving: Arriving | None = None) -> Self:
        """As CheckpointIndex.open does."""
        # Before the headers are read: what is written after that looks another.
        states = {file: state_of(file) for file in named(Path(folder), "*.safetensors") if file.is_file()}
        index = super().open(folder, arriving)
        index._states = {file: states[file] for file in index.files() if file in states}
        return index

    def read(self, key: str) -> Tensor:
        """As CheckpointIndex.read does. Raises Changed where the tensor was another before."""
        tensor = super().read(key)
        flat = tensor.reshape(-1).view(torch.uint8)
        self._hold(self.entry(key), zlib.crc32(flat.numpy().data if len(flat) else b""))
        return tensor

    def read_bytes(self, key: str) -> Iterator[memoryview]:
        """As CheckpointIndex.read_bytes does. Raises Changed before the last piece of a tensor that was another."""
        entry = self.entry(key)
        found, left = 0, entry.nbytes
        for piece in super().read_bytes(key):
            found, left = zlib.crc32(piece, found), left - len(piece)
            if not left:
                self._hold(entry, found)
            yield piece

    def digest(self) -> str:
        """A sha256 of the sums of all tensors. Each must have been read."""
        assert self.sums.keys() == set(self), "not read yet"
        return hashlib.sha256(json.dumps(sorted(self.sums.items())).encode()).hexdigest()

    def seen(self) -> dict[str, Any]:
        """What a later process needs to tell whether this still is the checkpoint that was read, for JSON."""
        files = {file.relative_to(self.folder).as_posix(): list(state) for file, state in self._states.items()}
        return {"folder": os.path.realpath(self.folder), "files": files, "sums": dict(self.sums)}

    def go_on_from(self, seen: Mapping[str, Any]) -> None:
        """Hold this checkpoint to what an earlier process has `seen` of it.

        What wasn't read yet is read where its file looks another. Raises Changed naming the first tensor that
        has other bytes or is gone.
        """
        for key, known in seen["sums"].items():
            if key not in self:
                raise Changed(self.folder, f"{key} is gone")
            entry = self.entry(key)
            before = seen["files"].get(entry.file.relative_to(self.folder).as_posix())
            if key not in self.sums and (before is None or self._states.get(entry.file) != tuple(before)):
                self._sum(entry)
            self._hold(entry, known)

    def sum_rest(self) -> None:
        """Read what wasn't read yet, for its sum: where it is somebody else who reads the files."""
        for key in self:
            if key not in self.sums:
                self._sum(self.entry(key))

    def check_unchanged(self) -> None:
        """Look at every file, and read again what was read of one that looks another.

        Raises Changed.
        """
        for file in self.files():
            if file not in self._states:
                continue  # nothing was read of it
            try:
                same = state_of(file) == self._states[file]
            except (FileNotFoundError, NotADirectoryError) as error:
                raise Changed(file, "it is gone") from error
            if not same:
                self._compare(file)

    def _open(self, file: Path) -> int:
        descriptor = super()._open(file)
        if self._states.setdefault(file, state_of(descriptor)) == state_of(descriptor):
            return descriptor
        self._compare(file)
        return self._descriptors[file] if file in self._descriptors else super()._open(file)

    def _compare(self, file: Path) -> None:
        """Hold a file that looks another to what was read of it; then it is as good as the one before."""
        before, same = self._states[file], False
        self._close_one(file)  # it may be of what had this name before
        try:
            state = self._states[file] = state_of(file)
            entries = {entry.key: entry for entry in read_header(file).entries}
            for entry in [entry for entry in map(self.entry, self) if entry.file == file]:
                if entries.get(entry.key) != entry:
                    raise Changed(file, f"{entry.key} is gone, or lies elsewhere in it")
                if entry.key in self.sums:
                    self._sum(entry)
            if state_of(file) != state:
                raise Changed(file, "it is being written")
            same = True
        finally:
            if not same:
                self._states[file] = before
                self._close_one(file)

    def _close_one(self, file: Path) -> None:
        descriptor = self._descriptors.pop(file, None)
        if descriptor is not None:
            os.close(descriptor)

    def _sum(self, entry: TensorEntry) -> None:
        for _ in self.read_bytes(entry.key):
            pass

    def _hold(self, entry: TensorEntry, found: int) -> None:
        if self.sums.setdefault(entry.key, found) != found:
            raise Changed(entry.file, f"{entry.key} has other bytes")
