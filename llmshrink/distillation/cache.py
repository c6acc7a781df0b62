"""A teacher's word on disk: its k likeliest tokens at every position and the bucket of all others, for any student.

    FOLDER/manifest.json             what it was made from (the teacher's checksums too), and each file's checksum
    FOLDER/windows-00000.safetensors ids [windows, length, k], logprobs float16 likewise, tail float16 [windows, length]
    FOLDER/held_out.safetensors      the teacher's hidden states on the held-out windows, and its output layer

Ids are 2 bytes where the vocabulary allows, else 4 (`bytes_per_token`). Log-probabilities in float16 are off by at most
2^-11 of themselves, and p |log p| is at most 1/e: the divergence of a position is off by less than 2e-4 nats for it.
What the bucket leaves out is the divergence within it: its probability times the KL between the two models'
distributions inside it, exactly, as KL adds up along a tree. The cached loss is too small by that, the less the larger
k is.

A cache grows file by file; one that was interrupted goes on, and one of another teacher, text or temperature is
refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from llmshrink_eval.bounded import read_json
from llmshrink_eval.listing import named
from torch import Tensor

from llmshrink.calibration.activations import Batch
from llmshrink.calibration.tokens import TokenWindows
from llmshrink.checkpoint.preflight import check_room
from llmshrink.checkpoint.unchanged import Changed, Watched
from llmshrink.distillation.chunked import Tail, chunk_rows
from llmshrink.distillation.objective import TopK
from llmshrink.distillation.teacher import SplitModel
from llmshrink.errors import LlmshrinkError
from llmshrink.run import disk
from llmshrink.run.progress import Progress, size

MANIFEST = "manifest.json"
HELD_OUT = "held_out.safetensors"
LIKELIEST = 64
"""Tokens that are kept unless the user says otherwise."""
FILE_BYTES = 1 << 25
"""Of a file, about."""
NOTHING_READ: dict[str, Any] = {"files": {}, "sums": {}}
"""Of its teacher, says a cache of before it was noted."""

NARROW_IDS = 1 << 16
"""The largest vocabulary whose ids are 2 bytes."""
SAID: dict[str, str] = {
    "data": "text, window length or mask",
    "held_out": "held-out text",
    "temperature": "--temperature",
    "quant": "--teacher-quant",
    "likeliest": "--teacher-cache-tokens",
    "batch_size": "--batch-size",
}
"""Fields of a key -> what a user calls them, where that differs."""


def bytes_per_token(likeliest: int, vocabulary: int) -> int:
    """What one position takes on disk: `likeliest` ids and log-probabilities, and the bucket's."""
    return likeliest * (_id_dtype(vocabulary).itemsize + torch.float16.itemsize) + torch.float16.itemsize


def _id_dtype(vocabulary: int) -> torch.dtype:
    return torch.int16 if vocabulary <= NARROW_IDS else torch.int32


@dataclass(frozen=True)
class CacheKey:
    """What a cache depends on. teacher, data, held_out: fingerprints. quant: how narrow the teacher was in memory.

    batch_size: of the teacher's forwards.
    """

    teacher: str
    data: str
    held_out: str
    temperature: float
    quant: str | None
    likeliest: int
    batch_size: int

    def difference(self, other: dict[str, Any]) -> str | None:
        """The first field in which a manifest's key differs, None where none does."""
        return next((name for name, value in vars(self).items() if other.get(name) != value), None)


class CachedTeacher:
    """A teacher that was asked before. Of its files only the rows of a batch are read."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        manifest = _read_manifest(folder)
        self._folder, self._device = folder, device
        self._windows = int(manifest["windows_a_file"])
        self._open: dict[int, Any] = {}

    def of(self, input_ids: Tensor, mask: Tensor | None, where: Tensor, window: Tensor) -> Callable[[slice], TopK]:
        """See `trainer.Says`: the rows of these windows at the positions `where`."""
        parts = [self._window(int(number)) for number in window.tolist()]
        # On the CPU autocast would find a common type for what is stacked, and knows none for float16.
        with torch.autocast("cpu", enabled=False):
            ids, logprobs, tail = (torch.stack([part[i] for part in parts]).to(self._device)[where] for i in range(3))

        def rows(part: slice) -> TopK:
            wide = ids[part].int() & 0xFFFF if ids.dtype == torch.int16 else ids[part]
            return TopK(wide.long(), logprobs[part].float(), tail[part].float())

        return rows

    def _window(self, number: int) -> tuple[Tensor, Tensor, Tensor]:
        from safetensors import safe_open

        file, row = divmod(number, self._windows)
        if file not in self._open:
            self._open[file] = safe_open(self._folder / _file(file), framework="pt")
        ids, logprobs, tail = (self._open[file].get_slice(name)[row] for name in ("ids", "logprobs", "tail"))
        return ids, logprobs, tail


class HeldOutTeacher:
    """A teacher's final hidden states on the held-out batches, in their order, and its output layer."""

    def __init__(self, hidden: Sequence[Tensor], weight: Tensor, bias: Tensor | None, tail: Tail) -> None:
        self._hidden, self._weight, self._bias, self._tail = list(hidden), weight, bias, tail
        self._next = 0

    @classmethod
    def open(cls, folder: Path, device: torch.device) -> HeldOutTeacher:
        """Of a cache's folder."""
        from safetensors.torch import load_file

        held = {name: tensor.to(device) for name, tensor in load_file(folder / HELD_OUT).items()}
        cap, factor = held["tail"].tolist()
        count = sum(name.startswith("hidden.") for name in held)
        hidden = [held[f"hidden.{number}"] for number in range(count)]
        return cls(hidden, held["weight"], held.get("bias"), Tail(cap if cap > 0 else None, factor))

    def rows(self, input_ids: Tensor, mask: Tensor | None, where: Tensor) -> Callable[[slice], Tensor]:
        """Logits of the next batch; batches are asked for in their order, all of them, again and again."""
        hidden = self._hidden[self._next][where]
        self._next = (self._next + 1) % len(self._hidden)

        def logits(rows: slice) -> Tensor:
            return self._tail(torch.nn.functional.linear(hidden[rows], self._weight, self._bias))

        return logits


def is_whole(folder: Path, key: CacheKey, teacher: Watched) -> bool:
    """Whether a folder holds all that `key` asks for, with the right checksums. teacher: the files of its weights.

    Raises LlmshrinkError when it holds something else: another teacher's, another text's, or no cache at all.
    """
    if not folder.exists() or not any(folder.iterdir()):
        return False
    manifest = _read_manifest(folder)
    differs = key.difference(manifest["key"])
    if differs is not None:
        raise LlmshrinkError(
            f"{folder}: holds a teacher's outputs for another {SAID.get(differs, differs)} "
            f"({manifest['key'].get(differs)}, here {getattr(key, differs)}); name another folder with --teacher-cache"
        )
    _hold(folder, manifest.get("read", NOTHING_READ), teacher)
    wanted = [_file(number) for number in range(manifest["files"])] + [HELD_OUT]
    for name in wanted:
        if name not in manifest["sha256"]:
            return False
        path = folder / name
        if not path.is_file() or disk.sha256_of(path) != manifest["sha256"][name]:
            raise LlmshrinkError(f"{path}: isn't what was written there: remove {folder} and let it be made again")
    return True


def go_on_from(folder: Path, noted: Path, teacher: Watched) -> None:
    """Hold a teacher to what `noted` says was read of it when what is in `folder` was made. Raises LlmshrinkError."""
    try:
        seen = read_json(noted)
        assert all(isinstance(seen[part], dict) for part in NOTHING_READ)
    except (OSError, ValueError, KeyError, TypeError, AssertionError) as error:
        raise LlmshrinkError(f"{noted}: is damaged; remove {folder} and let it be made again") from error
    _hold(folder, seen, teacher)


def _hold(folder: Path, seen: dict[str, Any], teacher: Watched) -> None:
    try:
        teacher.go_on_from(seen)
    except Changed as error:
        raise LlmshrinkError(
            f"{folder}: holds the outputs of a teacher that changed since: {error.file}: {error.what}; put back what "
            "was there, or name another folder with --teacher-cache"
        ) from error


def make(
    folder: Path,
    key: CacheKey,
    split: SplitModel,
    windows: TokenWindows,
    held_out: Sequence[Batch],
    progress: Progress,
    *,
    read: Watched,
) -> None:
    """Ask the teacher about all windows and write it down, or what of it isn't there yet.

    read: the files that the teacher was read from.
    key: of an absent, empty or unfinished cache (see `is_whole`). Each file appears whole, the manifest after it.
    Raises OutputError where the disk has no room for it.
    """
    length = windows.input_ids.shape[1]
    each, tokens = bytes_per_token(key.likeliest, split.weight.shape[0]), windows.input_ids.numel()
    there = sum(path.stat().st_size for path in named(folder, "windows-*.safetensors"))
    check_room(folder, max(0, tokens * each - there), "the teacher's outputs")
    progress.note(f"teacher     {tokens:,} tokens, {each:,} bytes of each to keep: {size(tokens * each)} in {folder}")
    folder.mkdir(parents=True, exist_ok=True)
    a_file = max(key.batch_size, FILE_BYTES // each // length // key.batch_size * key.batch_size)
    count = -(-len(windows.input_ids) // a_file)
    manifest: dict[str, Any] = {"key": vars(key), "windows_a_file": a_file, "files": count, "sha256": {}}
    manifest["read"] = read.seen()
    if (folder / MANIFEST).is_file():
        manifest = _read_manifest(folder)
        a_file, count = manifest["windows_a_file"], manifest["files"]
    else:  # before any file: a folder that was left after the first would be nobody's
        disk.write_json(folder / MANIFEST, manifest)
    for number in range(count):
        if _file(number) not in manifest["sha256"]:
            part = slice(number * a_file, (number + 1) * a_file)
            tensors = _ask(split, windows.input_ids[part], windows.mask[part], key)
            _add(folder, _file(number), tensors, manifest)
            progress.note(f"teacher     {min(part.stop, len(windows.input_ids))}/{len(windows.input_ids)} windows kept")
    if HELD_OUT not in manifest["sha256"]:
        _add(folder, HELD_OUT, _held_out(split, held_out), manifest)


def _add(folder: Path, name: str, tensors: dict[str, Tensor], manifest: dict[str, Any]) -> None:
    disk.write_tensors(folder / name, tensors)
    manifest["sha256"][name] = disk.sha256_of(folder / name)
    disk.write_json(folder / MANIFEST, manifest)


def _ask(split: SplitModel, ids: Tensor, mask: Tensor, key: CacheKey) -> dict[str, Tensor]:
    device = split.weight.device
    kept: list[list[Tensor]] = []
    narrow = _id_dtype(split.weight.shape[0])
    for start in range(0, len(ids), key.batch_size):
        part = slice(start, start + key.batch_size)
        padded = None if bool(mask[part].all()) else mask[part].to(device)
        with torch.no_grad():
            hidden = split.hidden(ids[part].to(device), padded)
        head = split.head(hidden.dtype)
        flat = hidden.reshape(-1, hidden.shape[-1])
        shape = hidden.shape[:2]
        found = []
        for rows in _chunks(flat, split):
            said = TopK.of(head(rows), key.likeliest, key.temperature)
            found.append((said.ids.to(narrow).cpu(), said.logprobs.half().cpu(), said.tail.half().cpu()))
        columns = [torch.cat(column) for column in zip(*found, strict=True)]
        kept.append([column.view(*shape, *column.shape[1:]) for column in columns])
    ids_, logprobs, tail = (torch.cat([each[i] for each in kept]) for i in range(3))
    return {"ids": ids_, "logprobs": logprobs, "tail": tail}


def _chunks(flat: Tensor, split: SplitModel) -> Iterator[Tensor]:
    rows = chunk_rows(split.weight.shape[0], flat.device)
    return (flat[start : start + rows] for start in range(0, len(flat), rows))


def _held_out(split: SplitModel, batches: Sequence[Batch]) -> dict[str, Tensor]:
    device = split.weight.device
    held = {"weight": split.weight.detach().float(), "tail": torch.tensor([split.tail.cap or 0.0, split.tail.factor])}
    if split.bias is not None:
        held["bias"] = split.bias.detach().float()
    for number, batch in enumerate(batches):
        mask = None if batch.mask is None else batch.mask.to(device)
        with torch.no_grad():
            held[f"hidden.{number}"] = split.hidden(batch.input_ids.to(device), mask).float()
    return held


def _file(number: int) -> str:
    return f"windows-{number:05}.safetensors"


def _read_manifest(folder: Path) -> dict[str, Any]:
    try:
        manifest: dict[str, Any] = read_json(folder / MANIFEST)
        assert isinstance(manifest["key"], dict)
        assert isinstance(manifest["sha256"], dict)
        assert all(isinstance(manifest.get("read", NOTHING_READ)[part], dict) for part in NOTHING_READ)
        assert manifest["windows_a_file"] > 0
        assert manifest["files"] > 0
    except (OSError, ValueError, KeyError, TypeError, AssertionError) as error:
        raise LlmshrinkError(
            f"{folder}: isn't a teacher's cache ({MANIFEST} is missing or damaged); name another folder with "
            "--teacher-cache, or remove it"
        ) from error
    return manifest
