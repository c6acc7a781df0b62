"""The original's pass, kept on disk: what every compressed model is compared with, so that the original runs once.

Kept are not the log-probabilities ([positions, vocabulary]: 52 GB for 100k tokens of a 128k vocabulary in float32) but
what they are made of: the final hidden states, exact, in the dtype that the model computed in, and once the head that
makes logits of them (`head.Head`). Where a model has no such head its log-probabilities are kept in float16, and every
comparison states how much that can have changed its result (`rounding_bound`).

    header.json        what is kept and of which windows, with checksums of itself and of the head
    head.safetensors   weight, bias; in bfloat16 where that holds them exactly
    rows.bin           [all compared positions, width], windows one after the other, raw, in the machine's byte order
    done.jsonl         a line for each window whose rows are there, with their CRC-32

A window's line is written after its rows, and its rows are held to the checksum when they are read: an interrupted
pass goes on, and a damaged file is noticed.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmshrink_eval.bounded import read_json
from llmshrink_eval.errors import EvalError, EvalFailed
from llmshrink_eval.head import Head, Tail
from llmshrink_eval.protocol import Windows
from llmshrink_eval.records import CheckedLines
from llmshrink_eval.refused import save_tensors

VERSION = 2
HEAD_FILE = "head.safetensors"
READ_BYTES = 1 << 22
HALF_STEP = 2.0**-11
"""Largest relative error of rounding to float16 (11 bits of significand), from its smallest normal number on."""
HALF_TINY = 2.0**-25
"""Largest absolute error below that."""


@dataclass(frozen=True)
class Header:
    """kind: "hidden" or "logprobs". dtype: of the rows. width: of a row. windows: their fingerprint.

    head_crc32: of head.safetensors; 0 where there is none.
    """

    kind: str
    dtype: str
    width: int
    windows: str
    tail: Tail
    version: int = VERSION
    head_crc32: int = 0


class Baseline:
    """A folder with the original's rows. Make one with `create` or `open`."""

    def __init__(self, folder: Path, windows: Windows, header: Header, head: Head | None) -> None:
        self.header = header
        self._folder = folder
        self._head = head
        self._dtype: torch.dtype = getattr(torch, header.dtype)
        self._row_bytes = header.width * self._dtype.itemsize
        counts = windows.compared.sum(1)
        self._counts: list[int] = counts.tolist()
        self._starts: list[int] = (counts.cumsum(0) - counts).tolist()
        self._lines = CheckedLines(folder / "done.jsonl")
        self.done: dict[int, int] = {line["window"]: line["crc32"] for line in self._lines.read()}
        """window -> CRC-32 of its rows"""

    @property
    def exact(self) -> bool:
        """Whether logits come back as they were (to the processor's rounding), and not rounded to float16."""
        return self.header.kind == "hidden"

    @property
    def complete(self) -> bool:
        """Whether every window is there."""
        return len(self.done) == len(self._counts)

    @classmethod
    def create(cls, folder: Path, windows: Windows, *, head: Head | None, width: int, dtype: torch.dtype) -> Baseline:
        """Start one, or go on with the one that is there if it was started in the same way.

        head: what makes logits of the rows; None if the rows are log-probabilities, [vocabulary] in float16. width,
        dtype: of a row. Raises EvalError if the disk has no room for it.
        """
        kind = "logprobs" if head is None else "hidden"
        name = str(dtype).removeprefix("torch.")
        header = Header(kind, name, width, windows.fingerprint, Tail() if head is None else head.tail)
        rows = folder / "rows.bin"
        found = _read_header(folder)
        if found is not None and dataclasses.replace(found, head_crc32=0) == header and rows.is_file():
            return cls(folder, windows, found, head)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        size = int(windows.compared.sum()) * width * dtype.itemsize
        free = shutil.disk_usage(folder).free
        if size > free:
            raise EvalError(
                f"the original's pass takes {size / 1e9:.1f} GB at {folder}, where {free / 1e9:.1f} GB are free; ask"
                " for fewer tokens (--max-tokens) or another cache folder"
            )
        if head is not None:
            _write_head(folder / HEAD_FILE, head)
            header = dataclasses.replace(header, head_crc32=_crc32(folder / HEAD_FILE))
        with rows.open("wb") as file:
            file.truncate(size)
        unfinished = folder / "header.json.part"
        made = dataclasses.asdict(header)
        unfinished.write_text(json.dumps({**made, "crc32": _header_crc32(made)}))
        unfinished.replace(folder / "header.json")
        return cls(folder, windows, header, head)

    @classmethod
    def open(cls, folder: Path, windows: Windows, device: torch.device | str = "cpu") -> Baseline | None:
        """The one that is there, its head on `device`; None if there is none, or none of these windows."""
        header = _read_header(folder)
        if header is None or header.windows != windows.fingerprint or not (folder / "rows.bin").is_file():
            return None
        head = None
        if header.kind == "hidden":
            from safetensors.torch import load_file

            tensors = load_file(folder / HEAD_FILE)
            dtype = getattr(torch, header.dtype)
            bias = tensors.get("bias")
            head = Head(
                tensors["weight"].to(device, dtype), None if bias is None else bias.to(device, dtype), header.tail
            )
        return cls(folder, windows, header, head)

    def write(self, window: int, pieces: Iterable[Tensor]) -> None:
        """Keep a window's rows, [rows, width] in consecutive pieces, and then the line that says they are there."""
        checksum = 0
        offset = self._starts[window] * self._row_bytes
        with (self._folder / "rows.bin").open("r+b") as file:
            for piece in pieces:
                data = piece.detach().to("cpu", self._dtype).contiguous().view(torch.uint8).numpy().tobytes()
                checksum = zlib.crc32(data, checksum)
                offset += os.pwrite(file.fileno(), data, offset)
        assert offset == (self._starts[window] + self._counts[window]) * self._row_bytes
        self._lines.append([{"window": window, "crc32": checksum}])
        self.done[window] = checksum

    def check(self, window: int) -> None:
        """Raises EvalFailed if the window's rows aren't those that were written."""
        if not self.holds(window):
            raise EvalFailed(
                f"the original's pass, kept in {self._folder}, is damaged at window {window}; run again, and it is"
                " made anew"
            )

    def holds(self, window: int) -> bool:
        """Whether the window's rows are those that were written."""
        checksum, offset = 0, self._starts[window] * self._row_bytes
        end = offset + self._counts[window] * self._row_bytes
        with (self._folder / "rows.bin").open("rb") as file:
            while offset < end:
                data = os.pread(file.fileno(), min(READ_BYTES, end - offset), offset)
                if not data:
                    break
                checksum, offset = zlib.crc32(data, checksum), offset + len(data)
        return checksum == self.done.get(window)

    def logits(self, window: int, start: int, stop: int, device: torch.device | str = "cpu") -> Tensor:
        """The original's logits (or log-probabilities: the same distribution) at a window's rows start to stop.

        Returns float32 [stop - start, vocabulary] on `device`.
        """
        stop = min(stop, self._counts[window])
        size = (stop - start) * self._row_bytes
        with (self._folder / "rows.bin").open("rb") as file:
            data = bytearray(os.pread(file.fileno(), size, (self._starts[window] + start) * self._row_bytes))
        rows = torch.frombuffer(data, dtype=self._dtype).view(stop - start, self.header.width).to(device)
        return rows.float() if self._head is None else self._head(rows)


def rounding_bound(stored: Tensor, compressed: Tensor) -> Tensor:
    """How far float16 can have moved KL(original || compressed), in nats: float64 [rows].

    stored: the original's log-probabilities as they came back from float16, compressed: the other model's logits, both
    [rows, vocabulary]. The true log-probability is l_i = s_i + e_i, where s is `stored` normalized again (by z = log
    sum exp) and |e_i| <= d_i = 2^-11 |stored_i| + 2^-25 + |z|. With p = exp(s) and q the other model,

        |KL(true) - KL(stored)| = |sum p_i ((e^e_i - 1)(s_i - log q_i) + e^e_i e_i)|
                               <= sum p_i ((e^d_i - 1)|s_i - log q_i| + d_i^2 e^d_i)

    as sum p_i e^e_i = 1 makes the second term's first order vanish.
    """
    raw = stored.double()
    z = raw.logsumexp(-1, keepdim=True)
    s = raw - z
    delta = HALF_STEP * raw.abs() + HALF_TINY + z.abs()
    difference = (s - compressed.double().log_softmax(-1)).abs()
    bound = s.exp() * (delta.expm1() * difference + delta.square() * delta.exp())
    return torch.where(s.isneginf(), 0.0, bound).sum(-1)


def intact(folder: Path, windows: Windows) -> bool:
    """Whether a whole pass over these windows lies there, as it was written. Reads all of it."""
    kept = Baseline.open(folder, windows)
    return kept is not None and kept.complete and all(kept.holds(window) for window in range(len(windows)))


def _read_header(folder: Path) -> Header | None:
    """None where there is none, or it or the head isn't what was written."""
    try:
        made: dict[str, Any] = read_json(folder / "header.json")
        if made.pop("crc32") != _header_crc32(made) or made["version"] != VERSION:
            return None
        header = Header(**{**made, "tail": Tail(**made["tail"])})
        whole = header.kind != "hidden" or _crc32(folder / HEAD_FILE) == header.head_crc32
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return header if whole else None


def _header_crc32(made: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(made, sort_keys=True).encode())


def _crc32(path: Path) -> int:
    checksum = 0
    with path.open("rb") as file:
        while data := file.read(READ_BYTES):
            checksum = zlib.crc32(data, checksum)
    return checksum


def _write_head(path: Path, head: Head) -> None:
    tensors = {"weight": head.weight} if head.bias is None else {"weight": head.weight, "bias": head.bias}
    if all(bool((tensor.bfloat16().to(tensor.dtype) == tensor).all()) for tensor in tensors.values()):
        tensors = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    unfinished = path.with_name(path.name + ".part")
    save_tensors({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, unfinished)
    unfinished.replace(path)
