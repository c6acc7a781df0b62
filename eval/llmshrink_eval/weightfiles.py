"""A checkpoint's safetensors files, and what their headers say: nothing here reads a weight.

A file is `<u64 little-endian: n><n bytes of JSON><data>`; the JSON maps each tensor's key to its dtype, shape and
`data_offsets` [begin, end), counted from the first byte of the data (https://github.com/huggingface/safetensors,
"Format"). A file from the network can claim anything, so every size is held to the file's before it is believed.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TypeGuard

from llmshrink_eval.bounded import Unreadable, parse_json, read_json, shown
from llmshrink_eval.errors import EvalError
from llmshrink_eval.refused import UNREAD, refused

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
HEADER_LIMIT = 100_000_000
"""Bytes; the safetensors library's own limit."""
MOST_DIMENSIONS = 64
"""Of a tensor's shape, as in torch: the product of a million sizes would take minutes."""

ITEM_BITS = {
    **dict.fromkeys(("F4",), 4),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
}
"""Bits of one element, by the format's names of its types."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as the header describes it."""

    key: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int


def weight_files(folder: Path) -> tuple[Path, ...]:
    """The safetensors of the checkpoint in `folder`, by name: the single file, or those that its index names and that
    are there. Whether the model needs what is in none of them is found where it is loaded (`whole`).

    Raises EvalError when there are none, or when the index names a path outside the folder.
    """
    single, index = folder / SINGLE_FILE, folder / INDEX_FILE
    if single.is_file():
        return (single,)
    if not index.is_file():
        raise EvalError(f"{folder}: no {SINGLE_FILE} and no {INDEX_FILE}; name a folder that holds a model")
    files = tuple(folder / name for name in sorted(set(weight_map_of(index).values())))
    there = tuple(file for file in files if file.is_file())
    if not there:
        raise EvalError(f"{files[0]}: missing, though {INDEX_FILE} names it; download or copy it again")
    return there


@dataclass(frozen=True)
class Strays:
    """What the shards of a folder hold beside what the index means. doubled: key -> the file that the index names, of
    those that another of its files has too. unindexed: keys that it doesn't name."""

    doubled: dict[str, Path]
    unindexed: frozenset[str]


def strays(folder: Path) -> Strays:
    """Of a checkpoint in several files; a single one has none. Raises EvalError as `weight_files` and headers do."""
    index = folder / INDEX_FILE
    if (folder / SINGLE_FILE).is_file() or not index.is_file():
        return Strays({}, frozenset())
    weight_map = weight_map_of(index)
    held = {file.name: [tensor.key for tensor in read_header(file)] for file in weight_files(folder)}
    counts = Counter(key for keys in held.values() for key in keys)
    doubled = {key: folder / weight_map[key] for key, count in counts.items() if count > 1 and key in weight_map}
    return Strays(doubled, frozenset(counts.keys() - weight_map.keys()))


def read_header(file: Path) -> tuple[StoredTensor, ...]:
    """The tensors of one file, in the order of its header.

    Raises EvalError, naming the file and what is wrong, when it can't be read or its header breaks the format.
    """
    try:
        with file.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            start = stream.read(8)
            length = int.from_bytes(start, "little")
            if start == b"version ":  # of a Git LFS pointer
                raise EvalError(
                    f"{file}: a Git LFS pointer, which stands for the file; run `git lfs pull` in {file.parent}, and "
                    "then this again"
                )
            if len(start) < 8 or length > HEADER_LIMIT or 8 + length > size:
                raise _broken(file, f"it claims {length:,} bytes and the file has {size:,}")
            text = stream.read(length)
        described = parse_json(text)
    except OSError as error:
        raise EvalError(f"{file}: can't be read: {refused(error, UNREAD)}") from error
    except Unreadable as error:
        raise _broken(file, f"it {error}") from error
    if not isinstance(described, dict):
        raise _broken(file, "it isn't a JSON object")
    room = size - 8 - length
    return tuple(_tensor(file, key, value, room) for key, value in described.items() if key != "__metadata__")


def _tensor(file: Path, key: str, value: object, room: int) -> StoredTensor:
    if not isinstance(value, dict):
        raise _broken(file, f"{key} isn't described by an object")
    dtype, shape, span = value.get("dtype"), value.get("shape"), value.get("data_offsets")
    bits = ITEM_BITS.get(dtype) if isinstance(dtype, str) else None
    if bits is None:
        raise _broken(file, f"{key} has the unknown dtype {shown(dtype)}")
    if not _sizes(shape):
        raise _broken(file, f"{key} has the shape {shown(shape)}, which isn't a list of sizes")
    if len(shape) > MOST_DIMENSIONS:
        raise _broken(file, f"{key} has {len(shape):,} dimensions, and a tensor has {MOST_DIMENSIONS} at most")
    if not _sizes(span) or len(span) != 2 or not span[0] <= span[1] <= room:
        raise _broken(file, f"{key} lies at {shown(span)}, which isn't within the {room:,} bytes of data")
    nbytes = math.prod(shape) * bits // 8
    if span[1] - span[0] != nbytes:
        claimed = span[1] - span[0]
        raise _broken(file, f"{key}, {dtype} {shown(shape)}, takes {shown(nbytes)} bytes and claims {claimed:,}")
    return StoredTensor(key, str(dtype), tuple(shape), nbytes)


def _sizes(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**63 for item in value)


def weight_map_of(index: Path) -> dict[str, str]:
    """Key -> the name of its file, as an index file has it. Raises EvalError for one that can't be read or that leaves
    the folder."""
    try:
        weight_map = read_json(index)["weight_map"]
        if not isinstance(weight_map, dict) or not weight_map:
            raise TypeError
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise EvalError(f"{index}: broken index: no weight_map to read; download or copy it again") from error
    for key, name in weight_map.items():
        if not isinstance(name, str) or not _stays_inside(name):
            raise EvalError(
                f"{index}: {key:.200} is said to lie in {shown(name)}, outside the model's folder: "
                "refused; an index names files beside it"
            )
    return weight_map


def _stays_inside(name: str) -> bool:
    """Whether a shard's name is a relative path without a step up; links inside the folder are the user's own."""
    posix, windows = PurePosixPath(name), PureWindowsPath(name)
    if not name or "\0" in name or posix.is_absolute() or windows.drive or windows.root:
        return False
    return ".." not in windows.parts and ".." not in posix.parts


def _broken(file: Path, what: str) -> EvalError:
    return EvalError(f"{file}: broken safetensors header: {what}; download or copy the file again")
