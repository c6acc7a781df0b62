"""What bitsandbytes makes of a weight: NF4 in blocks, or 8-bit integers by row.

NF4 (Dettmers et al. 2023, arXiv 2305.14314): the weight is read row after row as one line of numbers and cut into
blocks of 64; each block is divided by its largest magnitude, and every number becomes the nearest of sixteen levels,
which are quantiles of the normal distribution:

    w[i] = NF4[code[i]] * absmax[i // 64]

Blocks know nothing of rows, so a row alone has no meaning where 64 doesn't divide its length; the library's CPU kernels
(0.50) believe otherwise and read such weights wrongly, so that none are made. With double quantization
the absmax of 256 blocks are themselves 8-bit codes of a table: absmax[b] = table[code[b]] * scale[b // 256] + offset.

LLM.int8 (Dettmers et al. 2022, arXiv 2208.07339): w[o, i] = code[o, i] * absmax[o] / 127.

Both are what the library's kernels dequantize to, to the bit, in plain torch: reading a checkpoint doesn't need it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 64
NESTED_BLOCK = 256
NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
INVERSE_127 = 0.007874015718698502
"""1 / 127 as the library multiplies by it."""


@dataclass(frozen=True, eq=False)
class Nested:
    """absmax in 8 bits. scale: float32 [ceil(blocks / 256)]. table: float32 [256]. offset: of all."""

    scale: Tensor
    table: Tensor
    offset: float


@dataclass(frozen=True, eq=False)
class NormalFloat4:
    """packed: uint8 [ceil(out * in / 2), 1], two codes a byte, the earlier one in the high half.

    absmax: [ceil(out * in / 64)], float32, or uint8 where `nested` says what its codes mean. shape: (out_features,
    in_features). dtype: of the weight that it was, to which the library rounds what it dequantizes.
    """

    packed: Tensor
    absmax: Tensor
    nested: Nested | None
    shape: tuple[int, int]
    dtype: torch.dtype

    def __post_init__(self) -> None:
        count = self.shape[0] * self.shape[1]
        assert self.packed.dtype == torch.uint8 and self.packed.shape == (-(-count // 2), 1), self.packed.shape
        assert self.absmax.dtype == (torch.float32 if self.nested is None else torch.uint8), self.absmax.dtype
        assert self.absmax.shape == (-(-count // BLOCK),), self.absmax.shape

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """[out_features, in_features] in `dtype`, rounded to the original's dtype first, as the library does."""
        count = self.shape[0] * self.shape[1]
        bytes_ = self.packed.view(-1)
        codes = torch.stack((bytes_ >> 4, bytes_ & 15), 1).view(-1)[:count].int()
        values = torch.tensor(NF4, device=codes.device)[codes]
        values *= self._absmax().repeat_interleave(BLOCK)[:count]
        return values.view(self.shape).to(self.dtype).to(dtype)

    def rows(self, start: int, stop: int) -> NormalFloat4:
        """All output features: blocks don't end where rows do."""
        assert (start, stop) == (0, self.shape[0]), (start, stop, self.shape)
        return self

    def _absmax(self) -> Tensor:
        if self.nested is None:
            return self.absmax
        scale = self.nested.scale.repeat_interleave(NESTED_BLOCK)[: len(self.absmax)]
        return self.nested.table[self.absmax.int()] * scale + self.nested.offset


@dataclass(frozen=True, eq=False)
class RowInt8:
    """codes: int8 [out_features, in_features]. absmax: float32 [out_features], the largest magnitude of each row."""

    codes: Tensor
    absmax: Tensor

    def __post_init__(self) -> None:
        assert self.codes.dtype == torch.int8 and self.absmax.dtype == torch.float32, (self.codes, self.absmax)
        assert self.absmax.shape == self.codes.shape[:1], self.absmax.shape

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        return self.codes.shape[0], self.codes.shape[1]

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """[out_features, in_features]; the product is taken in float32 and rounded once to `dtype`."""
        return (self.codes * self.absmax.unsqueeze(1) * INVERSE_127).to(dtype)

    def rows(self, start: int, stop: int) -> RowInt8:
        """Output features start..stop, as views."""
        return RowInt8(self.codes[start:stop], self.absmax[start:stop])
