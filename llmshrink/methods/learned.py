"""A quantized weight that learns, as a linear layer: its scales, and (where it is asked for) its codes.

What a code is rounded from, its latent, is a parameter in units of the code, and the rounding passes gradients straight
through (Bengio et al. 2013, arXiv 1308.3432), for codes inside their range. Used to tune a block against the original's
(`run.tune`) and to teach a whole student (`distillation`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from llmshrink.weights import GroupedInt
from llmshrink.weights.grouped_int import SMALLEST_SCALE, code_range

INSIDE = 0.499
"""How far a latent may be from the code that it rounds to."""


def offsets(residual: Tensor, scale: Tensor) -> Tensor:
    """How far from its code a weight was, in units of the code, as far as it then still rounds to it.

    residual: float32 [out_features, in_features], as in `Solved`. scale: [out_features, groups].
    """
    groups = residual.view(*scale.shape, -1) / scale.float().unsqueeze(-1)
    return groups.view(residual.shape).clamp(-INSIDE, INSIDE)


class _Rounded(torch.autograd.Function):
    """Latents, rounded; gradients pass straight through. kept: which codes aren't zero, and no others; or None."""

    @staticmethod
    def forward(ctx: Any, latent: Tensor, kept: Tensor | None) -> Tensor:
        ctx.kept = kept
        codes = latent.round()
        if kept is None:
            return codes
        # What is kept stays kept: a code of zero would be another pattern.
        return torch.where(codes == 0, torch.where(latent < 0, -1.0, 1.0), codes) * kept

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient if ctx.kept is None else gradient * ctx.kept, None


class ScaledLinear(nn.Module):
    """x -> x (scale * (codes - zero_point))^T + bias, the scale a parameter: what is stored, times `gain`.

    gain: float32 [out_features, groups], 1 at the start, so that one learning rate suits scales of every size.
    latent: what the codes are rounded from, in units of a code; None where they are frozen. The scale is rounded to its
    stored dtype as it will be, so that training sees the model that is written. sparse: codes that are zero stay so,
    and no other becomes zero.
    """

    codes: Tensor
    base: Tensor
    zero_point: Tensor | None
    kept: Tensor | None

    def __init__(self, weight: GroupedInt, bias: nn.Parameter | None, *, latent: bool, sparse: bool) -> None:
        super().__init__()
        self.bits, self.group_size, self.scale_dtype = weight.bits, weight.group_size, weight.scale.dtype
        self.register_buffer("codes", weight.codes)
        self.register_buffer("base", weight.scale.float())
        self.register_buffer("zero_point", weight.zero_point)
        self.register_buffer("kept", weight.codes != 0 if sparse else None)
        self.gain = nn.Parameter(torch.ones_like(self.base))
        self.latent = nn.Parameter(weight.codes.float()) if latent else None
        self.bias = bias

    def start_from(self, residual: Tensor) -> None:
        """Put the latents where the weights were before they were rounded, as far as they still round to the codes.

        residual: float32 [out_features, in_features], as in `Solved`. Raises ValueError where there are no latents.
        """
        if self.latent is None:
            raise ValueError("codes that are frozen have no latents to put anywhere")
        self.offset(offsets(residual, self.base))

    def offset(self, offset: Tensor) -> None:
        """Put the latents so far from the codes. offset: as `offsets` gives it, any float dtype."""
        assert self.latent is not None, "codes that are frozen"
        with torch.no_grad():
            self.latent.copy_(self.codes + offset.float().clamp(-INSIDE, INSIDE))

    def residual(self) -> Tensor:
        """What rounding the latents leaves now, as in `Solved`: float32 [out_features, in_features]."""
        assert self.latent is not None, "codes that are frozen"
        with torch.no_grad():
            left = (self.latent - self._rounded()).view(*self.base.shape, self.group_size)
            return (left * self._scale().unsqueeze(-1)).view(self.codes.shape)

    @property
    def weight(self) -> Tensor:
        """float32 [out_features, in_features], with its gradient."""
        out_features, groups = self.base.shape
        values = self._rounded().view(out_features, groups, self.group_size)
        if self.zero_point is not None:
            values = values - self.zero_point.float().unsqueeze(-1)
        return (values * self._scale().unsqueeze(-1)).view(self.codes.shape)

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., in_features] -> [..., out_features]."""
        return nn.functional.linear(x, self.weight.to(x.dtype), self.bias)

    def stored(self) -> GroupedInt:
        """The weight as it is written: the codes, and the scale in its stored dtype."""
        with torch.no_grad():
            codes = self._rounded().to(torch.int8)
            scale = self._scale().to(self.scale_dtype)
        return GroupedInt(codes, scale, self.zero_point, self.bits, self.group_size)

    def freeze(self) -> None:
        """Put what `stored` gives in the place of what was trained; nothing of it has a gradient any more."""
        weight = self.stored()
        self.codes, self.base = weight.codes, weight.scale.float()
        self.gain = nn.Parameter(torch.ones_like(self.base), requires_grad=False)
        self.latent = None

    def _scale(self) -> Tensor:
        scale = self.base * self.gain
        # A scale keeps its sign and stays above the smallest that engines can divide by.
        sign = torch.where(self.base < 0, -1.0, 1.0)
        scale = sign * (sign * scale).clamp(min=SMALLEST_SCALE)
        return scale + (scale.to(self.scale_dtype).float() - scale).detach()

    def _rounded(self) -> Tensor:
        if self.latent is None:
            return self.codes.float()
        inside = self.latent.clamp(*code_range(self.bits))
        return _Rounded.apply(inside, self.kept)  # type: ignore[no-untyped-call,no-any-return]
