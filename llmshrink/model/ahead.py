"""What a device is to get next, read and copied there while it computes.

One thread reads a block's tensors and, on a CUDA device, sends them from pinned memory on a stream of its own; whoever
loads the block waits for what isn't there yet. The numbers are those of reading when asked. It costs one block more, in
memory and on the device, which is why a run on the CPU, whose reading has nothing to run beside, does without.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class _Sent:
    """A tensor as stored, its copy on the device in the same dtype, and, on CUDA, when that one has arrived."""

    stored: Tensor
    copy: Tensor
    arrived: Any


class Ahead:
    """At most one block's tensors on their way to `device`."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._coming: dict[str, Future[_Sent]] = {}

    def expect(self, keys: Sequence[str], read: Callable[[str], Tensor]) -> None:
        """Begin to read `keys`, in their order; what was expected before and never taken is let go."""
        coming: dict[str, Future[_Sent]] = {key: Future() for key in keys}
        self._coming = coming

        def work() -> None:
            for key, future in tuple(coming.items()):  # it is taken from meanwhile
                if self._coming is not coming:
                    return
                try:
                    future.set_result(self._send(read(key)))
                except BaseException as error:  # it belongs to whoever asks for the tensor
                    future.set_exception(error)

        # A daemon: a process that is told to stop doesn't wait for a disk, or for a shard that is being downloaded.
        threading.Thread(target=work, name="llmshrink-ahead", daemon=True).start()

    def take(self, key: str) -> tuple[Tensor, Tensor] | None:
        """(as stored, on the device) of a tensor that was expected, or None; raises what reading it raised."""
        future = self._coming.pop(key, None)
        if future is None:
            return None
        sent = future.result()
        if sent.arrived is not None:
            current = torch.cuda.current_stream(self._device)
            current.wait_event(sent.arrived)
            # Its memory belongs to the copying stream; without this it could be used again under a kernel's hands.
            sent.copy.record_stream(current)
        return sent.stored, sent.copy

    def _send(self, tensor: Tensor) -> _Sent:
        if self._stream is None:
            return _Sent(tensor, tensor.to(self._device), None)
        with ExitStack() as stack:
            stack.enter_context(torch.cuda.device(self._device))
            stack.enter_context(torch.cuda.stream(self._stream))
            pinned = tensor.pin_memory()
            copy = pinned.to(self._device, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record(self._stream)
        return _Sent(pinned, copy, arrived)
