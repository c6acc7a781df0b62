"""Integers in groups: the format that every engine serves.

A row of the weight is cut into groups of `group_size` consecutive inputs; each group has one scale and, when
asymmetric, one integer zero-point:

    w[o, i] = scale[o, i // g] * (codes[o, i] - zero_point[o, i // g])

Codes are signed, in [-2**(bits-1), 2**(bits-1) - 1], and so are zero-points; how they are packed into words is the
business of `formats`. A scale may be negative: the range has one code more below zero than above it, and a negative
scale gives that code to the heavier tail. A scale is never smaller than 1e-5 in magnitude, so that its reciprocal is
finite in every dtype that a kernel might use.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

SMALLEST_SCALE = 1e-5


def code_range(bits: int) -> tuple[int, int]:
    """The smallest and the largest code of `bits` bits."""
    return -(1 << (bits - 1)), (1 << (bits - 1)) - 1


@dataclass(frozen=True, eq=False)
class GroupedInt:
    """Codes, scales and zero-points of one weight.

    codes: int8 [out_features, in_features]. scale: [out_features, in_features / group_size] in the dtype in which the
    checkpoint stores it. zero_point: int8, the shape of scale, or None when symmetric. group_size: a real number of
    inputs (one group a row is in_features).
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    bits: int
    group_size: int

    def __post_init__(self) -> None:
        out_features, in_features = self.codes.shape
        assert self.codes.dtype == torch.int8, self.codes.dtype
        assert in_features % self.group_size == 0, (in_features, self.group_size)
        assert self.scale.shape == (out_features, in_features // self.group_size), self.scale.shape
        assert self.zero_point is None or (
            self.zero_point.dtype == torch.int8 and self.zero_point.shape == self.scale.shape
        ), self.zero_point

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        return self.codes.shape[0], self.codes.shape[1]

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight that engines compute with: [out_features, in_features].

        The product is taken in float32 (float64 when that is asked for) and rounded once to `dtype`.
        """
        work = torch.float64 if dtype == torch.float64 else torch.float32
        out_features, groups = self.scale.shape
        values = self.codes.to(work).view(out_features, groups, self.group_size)
        if self.zero_point is not None:
            values -= self.zero_point.to(work).unsqueeze(-1)
        values *= self.scale.to(work).unsqueeze(-1)
        return values.view(self.codes.shape).to(dtype)

    def rows(self, start: int, stop: int) -> GroupedInt:
        """Output features start..stop, as views: how sites that were solved as one matrix part again."""
        zero_point = None if self.zero_point is None else self.zero_point[start:stop]
        return GroupedInt(self.codes[start:stop], self.scale[start:stop], zero_point, self.bits, self.group_size)
