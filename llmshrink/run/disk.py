"""Every byte that a run writes goes through here: written, flushed to the medium, then renamed into place.

A name in the output folder therefore means a whole file. One small module also lets a test fail any single write,
fsync or rename of a run and look at what is left.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmshrink.errors import OutputError
from llmshrink.run.foreign import create

_SAFETENSORS_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip


NAME = 255
"""Bytes of a file's name, at most."""
NESTED = 100
"""Levels of a JSON file that is written here, at most."""


def write(fd: int, data: memoryview | bytes) -> None:
    """Write all of `data`."""
    view = memoryview(data)
    while len(view):
        view = view[os.write(fd, view) :]


def fsync(fd: int) -> None:
    """Flush a file or folder to the medium."""
    os.fsync(fd)


def replace(source: Path, target: Path) -> None:
    """Rename a file or folder over its final name, and make the rename itself durable."""
    os.replace(source, target)
    fsync_folder(target.parent)


def fsync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        fsync(fd)
    except OSError as error:
        _name(error, folder)
        raise
    finally:
        os.close(fd)


def write_file(path: Path, pieces: Iterable[memoryview | bytes], size: int) -> str:
    """Write a whole file of `size` bytes durably under its final name; returns its sha256 in hex.

    Raises OutputError when the medium is full; what was there under `path` before stays.
    """
    temporary = path.with_name(path.name + ".tmp")
    if len(os.fsencode(temporary.name)) > NAME:
        temporary = path.with_name(hashlib.sha256(os.fsencode(path.name)).hexdigest() + ".tmp")
    digest = hashlib.sha256()
    try:
        fd = create(temporary, os.O_WRONLY | os.O_TRUNC)
        try:
            for piece in pieces:
                write(fd, piece)
                digest.update(piece)
            fsync(fd)
        finally:
            os.close(fd)
        replace(temporary, path)
    except OSError as error:
        if _full(error):
            temporary.unlink(missing_ok=True)  # half a file would take the room that its second try needs
        raise_if_full(error, path, size)
        _name(error, temporary)
        raise
    return digest.hexdigest()


def raise_if_full(error: OSError, path: Path, needed: int) -> None:
    """Turn "no space left" for `needed` bytes into the line a user needs; other errors pass."""
    if _full(error):
        raise OutputError(
            f"no space left writing {path}: {needed:,} bytes needed, {shutil.disk_usage(path.parent).free:,} free; "
            "free some and run the same command again: it goes on from the last finished block"
        ) from error


def _name(error: OSError, path: Path) -> None:
    """Have an error say which file it is about: calls on descriptors leave it out."""
    if error.filename is None:
        error.filename = os.fspath(path)


def _full(error: OSError) -> bool:
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def write_text(path: Path, text: str) -> str:
    """Write a text file durably; returns its sha256."""
    data = text.encode()
    return write_file(path, [data], len(data))


def write_json(path: Path, value: Any) -> str:
    """Write a JSON file durably; returns its sha256."""
    return write_text(path, json_text(value))


def json_text(value: Any) -> str:
    """A JSON file as `write_json` writes it."""
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def unwritable(value: Any) -> str | None:
    """What of a value `json_text` couldn't write, by its place; None where it can write all of it."""
    return _fault("", value, 0)


def _fault(place: str, value: Any, level: int) -> str | None:
    if isinstance(value, float) and not math.isfinite(value):
        return f"{place} is {value}"
    if isinstance(value, str):
        return None if _is_text(value) else f"{place} has half of a character ({value!r})"
    if not isinstance(value, dict | list | tuple):
        return None
    if level > NESTED:
        return f"{place[:40]}... is nested more than {NESTED} deep"
    if not isinstance(value, dict):
        parts = [(f"{place}[{i}]", each) for i, each in enumerate(value)]
    elif all(map(_is_text, value)):
        parts = [(f"{place}.{key}".lstrip("."), each) for key, each in value.items()]
    else:
        return f"{place or 'it'} has a name with half of a character ({next(k for k in value if not _is_text(k))!r})"
    return next((fault for name, each in parts if (fault := _fault(name, each, level + 1))), None)


def _is_text(value: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in value)


def append_line(path: Path, line: str) -> None:
    """Append one line durably. A crash can leave half a line: readers ignore a last line without its newline."""
    data = (line + "\n").encode()
    try:
        fd = create(path, os.O_WRONLY | os.O_APPEND)
        try:
            write(fd, data)
            fsync(fd)
        finally:
            os.close(fd)
    except OSError as error:
        raise_if_full(error, path, len(data))
        _name(error, path)
        raise


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The tensor's bytes in row order, without a copy where it is contiguous on the CPU."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    if flat.numel() == 0:
        return memoryview(b"")
    return memoryview(flat.view(torch.uint8).numpy().data)


def can_hold(dtype: torch.dtype) -> bool:
    """Whether the files that are written here have a name for it."""
    return dtype in _SAFETENSORS_NAMES


def shard_header(tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> bytes:
    """The safetensors header of tensors laid out in the mapping's order, padded to 8 bytes."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (dtype, shape) in tensors.items():
        size = torch.Size(shape).numel() * dtype.itemsize
        header[name] = {
            "dtype": _SAFETENSORS_NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def shard_order(entries: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> list[str]:
    """Tensors as a file lays them out: widest dtype first, then by name, so that each starts at a multiple of its item
    size."""
    return sorted(entries, key=lambda name: (-entries[name][0].itemsize, name))


def shard_size(entries: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> int:
    """Bytes of the safetensors file that `write_shard` writes, its header included."""
    header = shard_header({name: entries[name] for name in shard_order(entries)})
    return len(header) + sum(torch.Size(shape).numel() * dtype.itemsize for dtype, shape in entries.values())


def write_shard(
    path: Path,
    entries: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    bytes_of: Callable[[str], Iterable[memoryview | bytes]],
) -> tuple[str, int]:
    """Write a safetensors file whose bytes come one tensor at a time; returns its sha256 and its size in bytes."""
    names, size = shard_order(entries), shard_size(entries)

    def pieces() -> Iterable[memoryview | bytes]:
        yield shard_header({name: entries[name] for name in names})
        for name in names:
            yield from bytes_of(name)

    return write_file(path, pieces(), size), size


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> tuple[str, int]:
    """Write tensors in memory as a safetensors file; returns its sha256 and its size in bytes."""
    entries = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    return write_shard(path, entries, lambda name: [tensor_bytes(tensors[name])])


def sha256_of(path: Path) -> str:
    """The sha256 of a file's content, in hex."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 22):
            digest.update(piece)
    return digest.hexdigest()
