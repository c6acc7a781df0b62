"""The two streams: what flows between the blocks of the original and of the compressed model, batch by batch.

These activations are the memory that grows with the calibration set (512 x 2048 tokens at width 4096 are 8.6 GB in
bfloat16, for each stream). They live in memory, or in files that are read and written a batch at a time; the numbers
are the same.
"""

from __future__ import annotations

import errno
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from llmshrink.calibration.tokens import TokenWindows
from llmshrink.errors import OutputError


@dataclass(frozen=True)
class Batch:
    """input_ids: int64 [batch, tokens]. mask: bool, the same shape, or None when nothing is padded."""

    input_ids: Tensor
    mask: Tensor | None
    held_out: bool

    def real(self, activations: Tensor) -> Tensor:
        """[batch, tokens, dim] -> [real tokens, dim]: padding never counts."""
        if self.mask is None:
            return activations.reshape(-1, activations.shape[-1])
        return activations[self.mask.to(activations.device)]


def batches_of(windows: TokenWindows, batch_size: int, *, held_out: bool) -> list[Batch]:
    """Cut windows into batches of at most `batch_size` windows, in order."""
    found = []
    for start in range(0, windows.input_ids.shape[0], batch_size):
        mask = windows.mask[start : start + batch_size]
        ids = windows.input_ids[start : start + batch_size]
        found.append(Batch(ids, None if bool(mask.all()) else mask, held_out))
    return found


class Stream:
    """Hidden states by batch number. folder: where they are spilled to, or None to keep them in memory."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._held: dict[int, Tensor] = {}
        self._layout: dict[int, tuple[torch.Size, torch.dtype, torch.device]] = {}
        if folder is not None:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # what was read, in another form

    def put(self, number: int, hidden: Tensor) -> None:
        """Store [batch, tokens, dim] under a batch number, over what was there."""
        if self._folder is None:
            self._held[number] = hidden
            return
        self._layout[number] = (hidden.shape, hidden.dtype, hidden.device)
        data = hidden.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
        path = self._folder / str(number)
        try:
            with open(path, "wb") as file:
                file.write(data)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                error.filename = error.filename or str(path)
                raise
            raise OutputError(
                f"no space left writing {path}: {len(data):,} bytes needed, "
                f"{shutil.disk_usage(self._folder).free:,} free; free some, or name a folder on another disk with "
                "--work-dir, and run the same command again: it goes on from the last finished block"
            ) from error

    def get(self, number: int) -> Tensor:
        """The stored tensor; it stays stored."""
        if self._folder is None:
            return self._held[number]
        shape, dtype, device = self._layout[number]
        buffer = torch.empty(shape.numel() * dtype.itemsize, dtype=torch.uint8)
        with open(self._folder / str(number), "rb") as file:
            read = file.readinto(buffer.numpy().data)
        assert read == buffer.numel(), (read, buffer.numel())
        return buffer.view(dtype).reshape(shape).to(device)

    def take(self, number: int) -> Tensor:
        """The stored tensor, given up: in memory, nothing of it stays behind."""
        hidden = self.get(number)
        self.drop(number)
        return hidden

    def drop(self, number: int) -> None:
        self._held.pop(number, None)
        if self._layout.pop(number, None) is not None and self._folder is not None:
            os.unlink(self._folder / str(number))
