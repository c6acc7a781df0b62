"""The header of a safetensors shard, read and checked before a byte of weight is.

A shard is `<u64 little-endian: n><n bytes of JSON><data>`. The JSON maps each tensor's key to its dtype, shape and
`data_offsets` [begin, end), counted from the first byte of the data; `__metadata__` may hold strings. What must hold
(https://github.com/huggingface/safetensors, "Format"): the tensors tile the data without a gap or an overlap, each
takes exactly shape x dtype bytes, and the file ends where the last one does. A file from the network can claim
anything, so each of these is checked here, once, and everything behind this module may trust an entry.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeGuard

import torch
from llmshrink_eval.bounded import Unreadable, parse_json, shown
from llmshrink_eval.refused import UNREAD, refused

from llmshrink.checkpoint.files import is_lfs_pointer
from llmshrink.errors import CheckpointError

DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
}

HEADER_LIMIT = 100_000_000
"""Bytes; the safetensors library's own limit."""
MOST_DIMENSIONS = 64
"""Of a tensor's shape, as in torch: the product of a million sizes would take minutes."""


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies: `nbytes` bytes at `offset` (from the file's start) of `file`, row-major."""

    key: str
    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Header:
    """One shard's tensors in the order of their bytes, and its `__metadata__`."""

    entries: tuple[TensorEntry, ...]
    metadata: dict[str, str]


def read_header(file: Path) -> Header:
    """Read and check the header of `file`.

    Raises CheckpointError (naming the file and what is wrong) when it can't be read, is truncated, or its header
    breaks any rule of the format.
    """
    try:
        with file.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            start = stream.read(8)
            length = int.from_bytes(start, "little")
            start += stream.read(length if length <= HEADER_LIMIT else 64)
    except OSError as error:
        raise CheckpointError(f"{file}: can't be read: {refused(error, UNREAD)}") from error
    return parse_header(file, start, size)


def parse_header(file: Path, start: bytes, size: int) -> Header:
    """The header of `file`, which has `size` bytes, from `start`, its first bytes as far as the header goes or further.

    Raises CheckpointError as read_header does.
    """
    if is_lfs_pointer(start):
        raise CheckpointError(
            f"{file}: a Git LFS pointer, which stands for the file; run `git lfs pull` in {file.parent}, and then this "
            "again"
        )
    length = int.from_bytes(start[:8], "little")
    if len(start) < 8 or length > HEADER_LIMIT or 8 + length > size:
        raise _broken(file, f"the header claims {length:,} bytes and the file has {size:,}")
    described = _parse(file, start[8 : 8 + length])
    raw_metadata = described.pop("__metadata__", None)
    metadata = {str(k): str(v) for k, v in raw_metadata.items()} if isinstance(raw_metadata, dict) else {}
    entries = sorted(
        (_entry(file, key, value, 8 + length) for key, value in described.items()),
        key=lambda entry: (entry.offset, entry.nbytes),
    )
    _check_tiling(file, entries, 8 + length, size)
    return Header(tuple(entries), metadata)


def _parse(file: Path, text: bytes) -> dict[str, object]:
    def unique(pairs: Iterable[tuple[str, object]]) -> dict[str, object]:
        found: dict[str, object] = {}
        for key, value in pairs:
            if key in found:
                raise _broken(file, f"the header names {key!r} twice")
            found[key] = value
        return found

    try:
        described = parse_json(text, hook=unique)
    except Unreadable as error:
        raise _broken(file, f"the header {error}") from error
    if not isinstance(described, dict):
        raise _broken(file, "the header isn't a JSON object")
    return described


def _entry(file: Path, key: str, value: object, data_start: int) -> TensorEntry:
    if not isinstance(value, dict):
        raise _broken(file, f"{key}: not described by an object")
    dtype = DTYPES.get(str(value.get("dtype")))
    if dtype is None:
        raise _broken(file, f"{key}: unknown dtype {shown(value.get('dtype'))}")
    shape, span = value.get("shape"), value.get("data_offsets")
    if not _counts(shape):
        raise _broken(file, f"{key}: shape {shown(shape)} isn't a list of sizes")
    if len(shape) > MOST_DIMENSIONS:
        raise _broken(file, f"{key}: a shape of {len(shape):,} dimensions, and a tensor has {MOST_DIMENSIONS} at most")
    if not _counts(span) or len(span) != 2 or span[0] > span[1]:
        raise _broken(file, f"{key}: data_offsets {shown(span)} aren't a begin and an end")
    nbytes = math.prod(shape) * dtype.itemsize
    if span[1] - span[0] != nbytes:
        claimed = span[1] - span[0]
        raise _broken(
            file, f"{key}: {value['dtype']} {shown(shape)} takes {shown(nbytes)} bytes, not the {claimed:,} it claims"
        )
    return TensorEntry(key, file, dtype, tuple(shape), data_start + span[0], nbytes)


def _counts(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**63 for item in value)


def _check_tiling(file: Path, entries: list[TensorEntry], data_start: int, size: int) -> None:
    end = data_start
    for entry in entries:
        if entry.offset < end:
            raise _broken(file, f"{entry.key}: overlaps the tensor before it")
        if entry.offset > end:
            raise _broken(file, f"{entry.key}: {entry.offset - end:,} bytes before it belong to no tensor")
        end = entry.offset + entry.nbytes
    if size < end:
        raise CheckpointError(
            f"{file}: truncated: its header promises {end:,} bytes and the file has {size:,}; download or copy it again"
        )
    if size > end:
        raise _broken(file, f"{size - end:,} bytes after the last tensor belong to no tensor")


def _broken(file: Path, what: str) -> CheckpointError:
    return CheckpointError(f"{file}: broken safetensors header: {what}; download or copy the file again")
