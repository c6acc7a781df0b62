"""What engines make of keys and values that are cached in FP8: rounded once, when they are written to the cache.

    q = fp8(x / s),  x' = q * s,  s = 2 max |x| / 448 for all keys of a layer, and another s for its values

Keys are those that attention compares with: after their norm and their rotation. FP8 E4M3 has steps relative to what
is rounded, so a larger scale costs nothing until the smallest numbers matter, 14 binary orders below the largest; and
a smaller one cuts off what exceeds 448. So the scale leaves room for text that is louder than the calibration's: on the
Llama of the README's figures the KL of FP8 alone is .00163 at 1, 2 and 16 times max |x| / 448, and .0098 at half of it;
the scales of least squared error give .00160, which can't be told from it.
Everybody reads back what was written, the prompt's own tokens too. This is vLLM's arithmetic: quotient and product are
taken in float32 and rounded once. Whoever computes with a checkpoint that has such scales must round keys and values
too, or computes another model than the one that is served. The CPU build of vLLM 0.32 alone cuts off towards zero, on
which nobody can be calibrated that other engines serve too: see `cut_off`.

transformers' models hand their cache to each attention as `past_key_values` (None where nothing is kept), and write to
it by `update`, which gives back all that is to be attended to. So what stands before that cache sees exactly what is
cached, whatever an architecture does before, and whichever way attention is computed after.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from llmshrink.weights.eight_bit import FP8, FP8_MOST

ARGUMENT = "past_key_values"
"""By which a module of transformers is handed the cache."""
HEADROOM = 2.0
"""How many times as large as what was seen the largest number that isn't cut off is."""
SMALLEST = 1e-5
"""Of a scale, so that a layer of zeros has one."""
Through = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Keys and values, each [batch, heads, tokens, width of a head] -> what is written in their place."""


@dataclass(frozen=True, eq=False)
class CacheScales:
    """One layer's. keys, values: [1], as the checkpoint stores them, above 0."""

    keys: Tensor
    values: Tensor

    @classmethod
    def of(cls, most: Tensor, dtype: torch.dtype) -> CacheScales:
        """most: float32 [2], the largest magnitude of keys and of values. dtype: of a stored scale."""
        keys, values = (HEADROOM * most.double() / FP8_MOST).clamp(min=SMALLEST).to(dtype).split(1)
        return cls(keys, values)

    def to(self, device: torch.device) -> CacheScales:
        """The same on a device."""
        return CacheScales(self.keys.to(device), self.values.to(device))

    def through(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """What is read back of keys and values that are written."""
        return cached(keys, self.keys), cached(values, self.values)

    def cut(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """The same by `cut_off`."""
        return cut_off(keys, self.keys), cut_off(values, self.values)


def cached(x: Tensor, scale: Tensor) -> Tensor:
    """`x` as it is read back from a cache of FP8, in its own dtype; its gradient is that of `x` unrounded.

    x: any shape. scale: [1].
    """
    step = scale.to(device=x.device, dtype=torch.float32)
    codes = (x.detach().to(torch.float32) / step).clamp_(-FP8_MOST, FP8_MOST).to(FP8)
    read = (codes.to(torch.float32) * step).to(x.dtype)
    # This way round what is added is exactly zero.
    return read + (x - x.detach()) if x.requires_grad else read


def cut_off(x: Tensor, scale: Tensor) -> Tensor:
    """`cached` as vLLM's CPU build has it (0.32): rounded towards zero instead of to the nearest."""
    step = scale.to(device=x.device, dtype=torch.float32)
    quotient = (x.to(torch.float32) / step).clamp_(-FP8_MOST, FP8_MOST)
    codes = quotient.to(FP8)
    # Without its sign a code's number grows with its magnitude, so that one less is the next one towards zero.
    over = codes.to(torch.float32).abs() > quotient.abs()
    codes = (codes.view(torch.uint8) - over.to(torch.uint8)).view(FP8)
    return (codes.to(torch.float32) * step).to(x.dtype)


class _Before:
    """Stands before a model's cache: what is written goes through `through` first. inner: the cache, or None."""

    def __init__(self, inner: Any, through: Through) -> None:
        self._inner, self._through = inner, through

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        keys, values = self._through(keys, values)
        if self._inner is None:
            return keys, values
        every: tuple[Tensor, Tensor] = self._inner.update(keys, values, *args, **kwargs)
        return every

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


def before_cache(attention: nn.Module, through: Through) -> RemovableHandle:
    """From now on what `attention` writes to its cache, or would write if there were one, goes through `through`."""

    def stand(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, {**kwargs, ARGUMENT: _Before(kwargs.get(ARGUMENT), through)}

    return attention.register_forward_pre_hook(stand, with_kwargs=True)


def round_cache(attention: nn.Module, scales: CacheScales, *, cut: bool = False) -> RemovableHandle:
    """From now on `attention` computes with keys and values as they are read back from a cache of FP8.

    cut: as `cut_off` has it.
    """
    return before_cache(attention, scales.cut if cut else scales.through)
