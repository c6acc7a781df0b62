"""What a forward of a block keeps alive where it is paused: the activations that every waiting batch costs.

They are more than the tap's own input (an attention's queries, keys and values wait with its output) and depend on how
the model's code is written; so a few tokens are run through the block, and the tensors alive at each tap are counted.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llmshrink.model.blocks import Call
from llmshrink.model.paused import PausedForward, pause, pausing_at
from llmshrink.weights import before_cache


@dataclass(frozen=True)
class Held:
    """Bytes a token. taps: alive while a forward waits at each of them; most: at any moment of a forward.

    cache: how many taps come before keys and values are written, and what is alive while a forward waits there; None
    where none does.
    """

    taps: tuple[float, ...]
    most: float
    cache: tuple[int, float] | None = None


class _Alive(TorchDispatchMode):
    """While open, keeps count of the bytes of all storages that were made meanwhile and are still referred to."""

    def __init__(self, known: Sequence[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._known = {tensor.untyped_storage()._cdata for tensor in known}
        self._made: dict[int, tuple[StorageWeakRef, int]] = {}
        self.most = 0

    def count(self, tensor: Tensor) -> None:
        """Take a tensor that was made before."""
        storage = tensor.untyped_storage()
        if storage._cdata not in self._known:
            weak = StorageWeakRef(storage)
            self._made[storage._cdata] = (weak, storage.nbytes())

    @property
    def bytes(self) -> int:
        """Alive now."""
        self._made = {key: made for key, made in self._made.items() if not made[0].expired()}
        return sum(size for _, size in self._made.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.count(leaf)
        self.most = max(self.most, self.bytes)
        return result


def held_by(
    block: nn.Module, call: Call, hidden: Tensor, taps: Sequence[str], writes: tuple[str, int] | None = None
) -> Held:
    """Run `hidden`, [batch, tokens, dim], through a block with real parameters, and count. taps: in running order.

    writes: the module that writes to a cache, where a forward waits too, and how many taps come before.
    """
    tokens = hidden.shape[0] * hidden.shape[1]
    around = [leaf for leaf in tree_leaves((call.args, call.kwargs)) if isinstance(leaf, Tensor)]
    alive = _Alive([*block.parameters(), *block.buffers(), *around])
    alive.count(hidden)
    found = []
    with pausing_at(block, taps), _waiting_to_write(block, writes), alive:
        paused = PausedForward(block, call, hidden)
        del hidden
        for _ in range(len(taps) + (writes is not None)):
            paused.advance()
            found.append(alive.bytes / tokens)
        paused.advance()
    cache = None if writes is None else (writes[1], found.pop(writes[1]))
    return Held(tuple(found), alive.most / tokens, cache)


@contextmanager
def _waiting_to_write(block: nn.Module, writes: tuple[str, int] | None) -> Iterator[None]:
    def wait(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        pause(keys)
        return keys, values

    handle = None if writes is None else before_cache(block.get_submodule(writes[0]), wait)
    try:
        yield
    finally:
        if handle is not None:
            handle.remove()
