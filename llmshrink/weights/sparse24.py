"""2:4: of every four consecutive inputs two are kept, and where they stood; numbers or integers in groups.

    w[o, i] = scale[o, i // g] * values[o, j]    where j is the kept value that stood at input i; 0 where none did

In 16 bits the values are the weights themselves and there is no scale. A group that holds fewer than two weights that
aren't zero keeps zeros at its lowest free positions, so that a weight has exactly one form (llmshrink_kernels.sparse24
.canonical). Integers are symmetric: a zero-point would make something else of the zeros that aren't stored. A weight
of -0.0 comes back as 0.0.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from llmshrink_kernels.sparse24 import compress, expand
from torch import Tensor

from llmshrink.weights.dense import Dense
from llmshrink.weights.grouped_int import GroupedInt

VALUE_DTYPES = (torch.bfloat16, torch.float16)
"""Of 16-bit values: what kernels multiply."""


@dataclass(frozen=True, eq=False)
class Sparse24:
    """Kept values and their positions, of one weight.

    values: int8 [out_features, in_features / 2] with 4 and 8 bits, bf16 or fp16 with 16. positions: uint8, the shape of
    values, 0 to 3 and rising within a group. scale: [out_features, in_features / group_size] as the checkpoint stores
    it, group_size a real number of inputs; both None with 16 bits.
    """

    values: Tensor
    positions: Tensor
    scale: Tensor | None
    bits: int
    group_size: int | None

    def __post_init__(self) -> None:
        out_features, in_features = self.shape
        assert in_features % 4 == 0 and self.positions.shape == self.values.shape, (self.shape, self.positions.shape)
        assert self.positions.dtype == torch.uint8, self.positions.dtype
        assert self.values.dtype in (VALUE_DTYPES if self.bits == 16 else (torch.int8,)), self.values.dtype
        assert (self.scale is None) == (self.group_size is None) == (self.bits == 16), (self.bits, self.group_size)
        if self.scale is not None and self.group_size is not None:
            assert in_features % self.group_size == 0, (in_features, self.group_size)
            assert self.scale.shape == (out_features, in_features // self.group_size), self.scale.shape

    @classmethod
    def of(cls, weight: Dense | GroupedInt) -> Sparse24:
        """A weight that is 2:4, taken apart. Raises ValueError naming the row and the inputs that break the pattern."""
        if isinstance(weight, Dense):
            values, positions = compress(weight.weight)
            return cls(values, positions, None, 16, None)
        assert weight.zero_point is None, "asymmetric integers have no zeros to leave out"
        values, positions = compress(weight.codes)
        return cls(values, positions, weight.scale, weight.bits, weight.group_size)

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        return self.values.shape[0], 2 * self.values.shape[1]

    def whole(self) -> Dense | GroupedInt:
        """The inverse of `of`: the same weight with its zeros."""
        whole = expand(self.values, self.positions, self.shape[1])
        if self.scale is None or self.group_size is None:
            return Dense(whole)
        return GroupedInt(whole, self.scale, None, self.bits, self.group_size)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight that is computed with, [out_features, in_features]: `GroupedInt`'s, or `Dense`'s, to the bit."""
        return self.whole().dequantize(dtype)

    def rows(self, start: int, stop: int) -> Sparse24:
        """Output features start..stop, as views."""
        scale = None if self.scale is None else self.scale[start:stop]
        return Sparse24(self.values[start:stop], self.positions[start:stop], scale, self.bits, self.group_size)
