"""What is remembered of the data at a tap: a token count, the Hessian H and the cross term D.

    H = X~^T X~ / T        D = (X - X~)^T X~ / T

X~ are the inputs after the compressed prefix, X the original model's, T the number of tokens. Both are kept as running
means, so that what `hessian` hands over is the accumulator itself: for 5632 inputs a copy would be 127 MB. Means of
two sets merge with their token counts as weights, which is how batches and processes combine.

H is symmetric: only the tiles on and above the diagonal are computed, and the rest is mirrored when H is read. It is
accumulated in float32 (float64 on request): its small eigenvalues decide where GPTQ sends its errors, and bfloat16
products would drown them. D only says how far to move the target; where the streams are bfloat16 its products are
too, at more than twice the speed, accumulated in float32 across batches.

Where a single weight W of few outputs reads D, as down_proj does, W D is gathered in its place, by `(X - X~) W^T`: all
that is read of D is that, it takes outputs / inputs of the memory, and 2 outputs / inputs of the products.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from llmshrink_kernels.products import accumulate_, columns_of, times_transposed
from torch import Tensor


def tile_of(in_features: int) -> int:
    """The side of a tile: a twelfth of the width, so that 13/24 of a full product is computed, but no sliver."""
    return max(64, (in_features // 12 + 63) // 64 * 64)


def through_one(outputs: Sequence[int], in_features: int) -> bool:
    """Whether W D takes the place of D. outputs: of each weight at the tap that reads it."""
    return len(outputs) == 1 and 2 * outputs[0] <= in_features


class Statistics:
    """Running means of one tap. in_features: its width; cross: whether D is wanted; dtype: float32 or float64.

    through: float32 [out, in], a weight W; with it W D is what `cross` gathers.
    """

    def __init__(
        self,
        in_features: int,
        *,
        cross: bool = False,
        through: Tensor | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        assert dtype in (torch.float32, torch.float64), dtype
        assert cross or through is None, "W D is a cross term"
        self.tokens = 0
        self._hessian = torch.zeros(in_features, in_features, dtype=dtype, device=device)
        rows = in_features if through is None else through.shape[0]
        self._cross = torch.zeros(rows, in_features, dtype=dtype, device=device) if cross else None
        self._through = through
        self._mirrored = True

    def add(self, compressed: Tensor, original: Tensor | None = None) -> None:
        """Count a batch of tokens (padding already taken out).

        compressed: X~, [tokens, in_features], any float dtype. original: X, the same shape and dtype, needed exactly
        when `cross` was asked for.
        """
        assert (original is None) == (self._cross is None), "X is given exactly when the cross term is wanted"
        if compressed.shape[0] == 0:
            return
        total = self.tokens + compressed.shape[0]
        keep, new = self.tokens / total, 1.0 / total
        inputs = compressed.to(self._hessian.dtype)
        with torch.no_grad():
            columns = columns_of(inputs)
            size = tile_of(inputs.shape[1])
            for start in range(0, inputs.shape[1], size):
                tile = self._hessian[start : start + size, start:]
                accumulate_(tile, columns[start : start + size], columns[start:], keep=keep, new=new)
            if self._cross is not None and original is not None:
                drift = original - compressed
                if self._through is not None:
                    drift = times_transposed(drift, self._through.to(drift.dtype))
                if compressed.dtype == torch.bfloat16 and self._cross.dtype == torch.float32:
                    self._cross.mul_(keep).add_(drift.T @ compressed, alpha=new)
                else:
                    accumulate_(self._cross, columns_of(drift.to(inputs.dtype)), columns, keep=keep, new=new)
        self.tokens = total
        self._mirrored = False

    @property
    def hessian(self) -> Tensor:
        """H, [in_features, in_features], undamped. It is the accumulator, not a copy: don't write to it."""
        if not self._mirrored:
            size = tile_of(self._hessian.shape[0])
            for start in range(0, self._hessian.shape[0], size):
                stop = start + size
                diagonal = self._hessian[start:stop, start:stop]
                # A tile on the diagonal was computed whole, but its two halves may differ in the last bit.
                diagonal.copy_(torch.triu(diagonal) + torch.triu(diagonal, 1).T)
                self._hessian[stop:, start:stop].copy_(self._hessian[start:stop, stop:].T)
            self._mirrored = True
        return self._hessian

    @property
    def cross(self) -> Tensor | None:
        """D, [in_features, in_features], or None with one stream or where W D is kept. The accumulator, not a copy."""
        return self._cross if self._through is None else None

    @property
    def drift(self) -> Tensor | None:
        """W D, [out, in_features], of the weight that it was asked for. The accumulator, not a copy."""
        return None if self._through is None else self._cross


def merge(a: Statistics, b: Statistics) -> Statistics:
    """The statistics of both sets of tokens together, as if one had seen them all; a and b stay as they are."""
    assert (a._cross is None) == (b._cross is None), "both or neither hold the cross term"
    assert a.hessian.shape == b.hessian.shape, (a.hessian.shape, b.hessian.shape)
    total = a.tokens + b.tokens
    merged = Statistics(
        a.hessian.shape[0],
        cross=a._cross is not None,
        through=a._through,
        dtype=a.hessian.dtype,
        device=a.hessian.device,
    )
    if total == 0:
        return merged
    share = b.tokens / total
    torch.lerp(a.hessian, b.hessian.to(a.hessian), share, out=merged._hessian)
    if a._cross is not None and b._cross is not None and merged._cross is not None:
        torch.lerp(a._cross, b._cross.to(a._cross), share, out=merged._cross)
    merged.tokens = total
    return merged


class Loudest:
    """The largest magnitude of each channel at one tap. most: float32 [in_features], 0 before anything is added."""

    def __init__(self, in_features: int, *, device: torch.device | str = "cpu") -> None:
        self.most = torch.zeros(in_features, dtype=torch.float32, device=device)

    def add(self, inputs: Tensor) -> None:
        """Count a batch of tokens (padding already taken out): [tokens, in_features], any float dtype."""
        if inputs.shape[0]:
            low, high = inputs.amin(0), inputs.amax(0)
            self.most = torch.maximum(self.most, torch.maximum(high, -low).to(torch.float32))


def louder(a: Loudest, b: Loudest) -> Loudest:
    """The statistics of both sets of tokens together; a and b stay as they are."""
    both = Loudest(a.most.shape[0], device=a.most.device)
    both.most = torch.maximum(a.most, b.most.to(a.most))
    return both
