"""Weights of 8 bits whose products take inputs of 8 bits too: integers, or FP8 numbers, with one scale a row.

    w[o, i] = scale[o] * codes[o, i]

Codes are int8, or FP8 E4M3 (4 bits of exponent, 3 of mantissa, largest magnitude 448, no infinity; Micikevicius et al.
2022, arXiv 2209.05433). Both engines' products are of codes with codes: what is done to an input is `by_token`'s.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llmshrink.weights.grouped_int import GroupedInt

FP8 = torch.float8_e4m3fn
FP8_MOST = 448.0


@dataclass(frozen=True, eq=False)
class EightBit:
    """codes: int8 or float8_e4m3fn [out_features, in_features]. scale: [out_features, 1], as the checkpoint stores
    it."""

    codes: Tensor
    scale: Tensor

    def __post_init__(self) -> None:
        assert self.codes.dtype in (torch.int8, FP8), self.codes.dtype
        assert self.scale.shape == (self.codes.shape[0], 1), self.scale.shape

    @classmethod
    def of(cls, weight: GroupedInt) -> EightBit:
        """Symmetric integers of 8 bits with one group a row, as they are."""
        assert weight.bits == 8 and weight.zero_point is None, (weight.bits, "symmetric integers of 8 bits")
        assert weight.group_size == weight.shape[1], "one scale a row"
        return cls(weight.codes, weight.scale)

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        return self.codes.shape[0], self.codes.shape[1]

    def whole(self) -> EightBit | GroupedInt:
        """The inverse of `of`; FP8 numbers are what they are."""
        if self.codes.dtype == FP8:
            return self
        return GroupedInt(self.codes, self.scale, None, 8, self.shape[1])

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """[out_features, in_features]; the product is taken in float32 (float64 when that is asked for) and rounded
        once to `dtype`."""
        work = torch.float64 if dtype == torch.float64 else torch.float32
        return (self.codes.to(work) * self.scale.to(work)).to(dtype)

    def rows(self, start: int, stop: int) -> EightBit:
        """Output features start..stop, as views."""
        return EightBit(self.codes[start:stop], self.scale[start:stop])
