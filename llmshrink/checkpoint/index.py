"""A checkpoint's keys: which file each tensor lies in, where, and its bytes on demand.

The tensors are read with `preadv` into memory of our own, never through `mmap`: mapped pages count as resident, and
a model that streams through a few hundred megabytes must not look (or be) as big as its checkpoint. Everything that
can be wrong with the files is found by `open`, before any work starts; a value that no method can work with (NaN,
Inf) is found by `check_finite`, as the tensor comes in.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
import re
import threading
import weakref
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from llmshrink_eval.listing import named
from llmshrink_eval.refused import refused
from torch import Tensor

from llmshrink.checkpoint.arrival import Arriving
from llmshrink.checkpoint.files import INDEX_FILE, SINGLE_FILE, read_weight_map
from llmshrink.checkpoint.header import Header, TensorEntry, read_header
from llmshrink.checkpoint.links import check_link
from llmshrink.errors import CheckpointError, SourceError

__all__ = ["INDEX_FILE", "SINGLE_FILE", "CheckpointIndex", "TensorEntry", "check_finite", "not_finite"]

CHUNK = 16 * 2**20
"""Bytes read, hashed or checked at a time."""

_OWN_PAGES = 2**20
_SAMPLE = 4096
COPY_AGAIN = "download or copy it again"
_BLOB_NAME = re.compile(r"[0-9a-f]{64}")


def _close(descriptors: dict[Path, int]) -> None:
    while descriptors:
        os.close(descriptors.popitem()[1])


class CheckpointIndex:
    """Every tensor of a folder's safetensors checkpoint, by key.

    Of several shards it is the index that says which tensors are the model's and where each lies, as in transformers:
    what else the shards hold is `left_out` (tensor -> why). `absent`: keys that the index names and no shard holds ->
    the file it names, which may be missing as a whole; only a model that needs one of them is refused. `reads` counts
    how often each key's bytes were read in full. Open files are closed by `close` (or `with`), or when nothing refers
    to it any more; a later read opens its own again.
    """

    def __init__(
        self,
        folder: Path,
        entries: Sequence[TensorEntry],
        left_out: Mapping[str, str] | None = None,
        absent: Mapping[str, str] | None = None,
        *,
        metadata: dict[str, str] | None = None,
        arriving: Arriving | None = None,
    ) -> None:
        self._arriving = arriving
        self.folder = folder
        self.metadata = metadata or {}
        self.left_out = dict(left_out or {})
        self.absent = dict(absent or {})
        self.reads: Counter[str] = Counter()
        self._entries = {entry.key: entry for entry in entries}
        self._descriptors: dict[Path, int] = {}
        weakref.finalize(self, _close, self._descriptors)
        self._opening = threading.RLock()

    @classmethod
    def open(cls, folder: str | os.PathLike[str], arriving: Arriving | None = None) -> Self:
        """Find and check the checkpoint in `folder`: `model.safetensors`, or the shards its index names.

        arriving: shards that aren't there yet; a read waits for the one that it needs. Raises SourceError when there
        are no safetensors, CheckpointError when all files are missing, or one is damaged or named outside the folder.
        """
        folder = Path(folder)
        single, index = folder / SINGLE_FILE, folder / INDEX_FILE
        check_link(index, folder)
        coming = arriving is not None and single in arriving
        if coming or single.exists() or (single.is_symlink() and not index.exists()):
            header = _header(folder, single, arriving)
            return cls(folder, header.entries, metadata=header.metadata, arriving=arriving)
        if not index.exists():
            raise _no_safetensors(folder)
        weight_map = read_weight_map(index)
        headers: dict[str, Header] = {}
        metadata: dict[str, str] = {}
        names = sorted(set(weight_map.values()))
        for name in names:
            file = folder / name
            if not file.exists() and (arriving is None or file not in arriving):
                continue
            headers[name] = _header(folder, file, arriving)
            metadata.update(headers[name].metadata)
        if not headers:
            raise CheckpointError(f"{folder / names[0]}: missing, though {INDEX_FILE} names it; {COPY_AGAIN}")
        return cls(folder, *_allowed(weight_map, headers), metadata=metadata, arriving=arriving)

    def __contains__(self, key: object) -> bool:
        return key in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the shards that reads have opened; a later read opens its shard again."""
        _close(self._descriptors)

    def keys(self) -> list[str]:
        """Every key, shard by shard in the order of the bytes."""
        return list(self._entries)

    def files(self) -> list[Path]:
        """Every shard, sorted by name."""
        return sorted({entry.file for entry in self._entries.values()})

    def nbytes(self) -> int:
        """Bytes of all tensors together."""
        return sum(entry.nbytes for entry in self._entries.values())

    @property
    def why_not(self) -> dict[str, str]:
        """Key that can't be read -> why, where the files say so."""
        unnamed = dict.fromkeys(self.left_out, f"a file holds it, but {INDEX_FILE} doesn't name it")
        lost = {key: f"its index says {name}, which {self._lacks(name)}" for key, name in self.absent.items()}
        return unnamed | lost

    def _lacks(self, name: str) -> str:
        return "doesn't hold it" if (self.folder / name).exists() else "is missing"

    def notes(self) -> list[str]:
        """What a user should know of tensors that aren't read, a line for each reason."""
        reasons: dict[str, list[str]] = {}
        for name, why in self.left_out.items():
            reasons.setdefault(why, []).append(name)
        if self.absent:
            reasons[f"named by {INDEX_FILE} and in no file"] = list(self.absent)
        return [
            f"{len(names)} tensor{'s' if len(names) > 1 else ''} left out, {why}: {', '.join(names[:2])}"
            f"{', ...' if len(names) > 2 else ''}"
            for why, names in reasons.items()
        ]

    def entry(self, key: str) -> TensorEntry:
        """Where `key` lies. Raises CheckpointError when the checkpoint has no such tensor."""
        try:
            return self._entries[key]
        except KeyError:
            why = self.why_not.get(key)
            said = "" if why is None else f": {why}; {COPY_AGAIN}"
            raise CheckpointError(f"{self.folder}: the checkpoint has no tensor {key}{said}") from None

    def read(self, key: str) -> Tensor:
        """The tensor in its stored dtype and shape, on the CPU, in fresh memory that the caller owns."""
        entry = self.entry(key)
        self.reads[key] += 1
        buffer = _fresh(entry.nbytes)
        view = buffer.numpy().data
        for start in range(0, entry.nbytes, CHUNK):
            self._fill(entry, view[start : start + CHUNK], start)
        return buffer.view(entry.dtype).reshape(entry.shape)

    def read_bytes(self, key: str) -> Iterator[memoryview]:
        """The tensor's bytes in pieces of at most 16 MiB; each piece is valid until the next is asked for."""
        entry = self.entry(key)
        self.reads[key] += 1
        buffer = memoryview(bytearray(min(CHUNK, entry.nbytes)))
        for start in range(0, entry.nbytes, CHUNK):
            piece = buffer[: min(CHUNK, entry.nbytes - start)]
            self._fill(entry, piece, start)
            yield piece

    def fingerprint(self) -> str:
        """A sha256 that tells two checkpoints apart without reading them whole.

        It covers each tensor's key, dtype and shape and the first and last 4 KiB of its bytes; it doesn't depend on
        how the tensors are spread over shards, nor on the folder's name.
        """
        digest = hashlib.sha256()
        for key in sorted(self._entries):
            entry = self._entries[key]
            digest.update(json.dumps([key, str(entry.dtype), entry.shape]).encode())
            for start in sorted({0, max(0, entry.nbytes - _SAMPLE)}):
                piece = memoryview(bytearray(min(_SAMPLE, entry.nbytes)))
                self._fill(entry, piece, start)
                digest.update(piece)
        return digest.hexdigest()

    def verify_blobs(self) -> int:
        """Compare each shard of a Hub snapshot with the sha256 that the Hub gave it; returns how many were compared.

        In the Hub's cache a snapshot's file is a link to a blob that is named by its content's sha256. Shards that
        aren't such links (a plain folder) have no promise to check and are not read; those that are still to come are
        compared when they do. Raises CheckpointError naming
        the blob that doesn't match.
        """
        checked = 0
        for file in self.files():
            if self._arriving is not None and file in self._arriving:
                continue
            blob = file.resolve()
            if not file.is_symlink() or blob.parent.name != "blobs" or not _BLOB_NAME.fullmatch(blob.name):
                continue
            with blob.open("rb") as stream:
                found = hashlib.file_digest(stream, "sha256").hexdigest()
            if found != blob.name:
                raise CheckpointError(
                    f"{file}: its content has sha256 {found[:12]}..., the Hub promised {blob.name[:12]}...; "
                    f"delete {blob} and run again to download it anew"
                )
            checked += 1
        return checked

    def _fill(self, entry: TensorEntry, into: memoryview, start: int) -> None:
        """Read len(into) bytes of the tensor from its byte `start` on."""
        descriptor = self._descriptors.get(entry.file)
        if descriptor is None and self._arriving is not None:
            self._arriving.wait(entry.file)
        try:
            if descriptor is None:
                with self._opening:  # a block may be read ahead, on a thread
                    descriptor = self._descriptors.get(entry.file)
                    if descriptor is None:
                        descriptor = self._open(entry.file)
            done = 0
            while done < len(into):
                count = os.preadv(descriptor, [into[done:]], entry.offset + start + done)
                if count == 0:
                    raise CheckpointError(f"{entry.file}: became shorter while {entry.key} was read; copy it again")
                done += count
        except OSError as error:
            raise CheckpointError(
                f"{entry.file}: {entry.key} can't be read: {refused(error, 'check the disk, or copy it again')}"
            ) from error

    def _open(self, file: Path) -> int:
        """A descriptor of a shard, kept until `close`."""
        descriptor = self._descriptors[file] = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
        return descriptor


def _header(folder: Path, file: Path, arriving: Arriving | None) -> Header:
    if arriving is not None and file in arriving:
        return arriving.header(file)
    check_link(file, folder, lambda name: name.endswith(".safetensors"))
    return read_header(file)


def _fresh(nbytes: int) -> Tensor:
    """uint8 [nbytes]; large ones in pages of their own.

    The heap would take them in and split what they leave behind for small objects, so that the next block's weights,
    no longer fitting there, touched new memory: a walk over a model would end with all of it resident.
    """
    if nbytes < _OWN_PAGES:
        return torch.empty(nbytes, dtype=torch.uint8)
    pages = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(pages, dtype=torch.uint8)


def check_finite(key: str, tensor: Tensor) -> None:
    """Raise CheckpointError naming `key` if `tensor` holds a NaN or an Inf; integers always pass."""
    said = not_finite(key, tensor)
    if said is not None:
        raise CheckpointError(
            f"{said}: the weights are damaged, and no method can work with them; download or export the model again"
        )


def not_finite(key: str, tensor: Tensor) -> str | None:
    """The first NaN or Inf of `tensor` in words, with its place; None where there is none."""
    if not (tensor.dtype.is_floating_point or tensor.dtype.is_complex) or tensor.numel() == 0:
        return None
    flat = (torch.view_as_real(tensor) if tensor.dtype.is_complex else tensor).reshape(-1)
    for start in range(0, flat.numel(), CHUNK):
        # amin/amax carry a NaN through, so two numbers answer for the whole piece without a mask of its size.
        piece = flat[start : start + CHUNK]
        low, high = (piece.float() if piece.dtype.itemsize == 1 else piece).aminmax()
        if not (math.isfinite(low.item()) and math.isfinite(high.item())):
            found = piece.float().isfinite().logical_not_().nonzero()
            first = start + int(found[0])
            more = f" (and {len(found) - 1:,} more near it)" if len(found) > 1 else ""
            return f"{key}: {flat[first].item()} at {_position(first, tensor)}{more}"
    return None


def _position(flat: int, tensor: Tensor) -> str:
    index = []
    for size in reversed(tensor.shape):
        flat, at = divmod(flat, size)
        index.append(at)
    return str(index[::-1])


def _allowed(
    weight_map: Mapping[str, str], headers: Mapping[str, Header]
) -> tuple[list[TensorEntry], dict[str, str], dict[str, str]]:
    """(the tensors that the index names, those left out -> why, keys that lie nowhere -> the file that should hold it).

    A tensor that the index looks for in another of its files, where it isn't, is taken from the one that has it.
    """
    holders: dict[str, list[str]] = {}
    for name, header in headers.items():
        for entry in header.entries:
            holders.setdefault(entry.key, []).append(name)
    entries, left_out = [], {}
    for name, header in headers.items():
        for entry in header.entries:
            said, held = weight_map.get(entry.key), holders[entry.key]
            if said == name or (said is not None and said not in held and held[0] == name):
                entries.append(entry)
            elif said is None:
                left_out[entry.key if len(held) == 1 else f"{entry.key} in {name}"] = f"unknown to {INDEX_FILE}"
            else:
                left_out[f"{entry.key} in {name}"] = f"also in another file, which {INDEX_FILE} names"
    absent = {key: name for key, name in weight_map.items() if key not in holders}
    return entries, left_out, absent


def _no_safetensors(folder: Path) -> SourceError:
    pickles = [file.name for file in named(folder, "*.bin", "*.pt", "*.pth")]
    if pickles:
        return SourceError(
            f"{folder}: only pickle weights ({pickles[0]}), which are never loaded because a pickle can run code; "
            "convert them once, where you trust them: "
            'python -c "from transformers import AutoModelForCausalLM as M; '
            f"M.from_pretrained('{folder}', dtype='auto').save_pretrained('{folder}-safetensors')\""
            " (and copy the tokenizer's files)"
        )
    others = [file.name for file in named(folder, "*.safetensors")]
    found = f" (found {', '.join(others[:3])}, which no index names)" if others else ""
    return SourceError(f"{folder}: no {SINGLE_FILE} and no {INDEX_FILE}{found}; name a folder that holds a model")
