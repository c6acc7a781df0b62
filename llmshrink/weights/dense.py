"""A weight that is stored as it is: what a site that stays 16-bit is made of."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Dense:
    """weight: [out_features, in_features], in the checkpoint's dtype."""

    weight: Tensor

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight in `dtype`: [out_features, in_features]; shares memory when nothing has to be rounded."""
        return self.weight.to(dtype)

    def rows(self, start: int, stop: int) -> Dense:
        """Output features start..stop, as a view."""
        return Dense(self.weight[start:stop])
