"""What the two kernels mean, one column at a time: the words of the maths, and the path where there is no GPU."""

from __future__ import annotations

import torch
from torch import Tensor


def sweep_block(
    weight: Tensor, unit: Tensor, scale: Tensor, zero: Tensor | None, group: Tensor, bits: int
) -> tuple[Tensor, Tensor]:
    """Quantize columns in order with given scales; shapes as in `ops.sweep_block`."""
    low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    left, codes = weight.clone(), torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    inverse = scale.reciprocal()
    for i, g in enumerate(group.tolist()):
        offset = torch.zeros_like(scale[g]) if zero is None else zero[g]
        code = (left[i] * inverse[g]).round() + offset
        codes[i] = code.clamp_(low, high)
        left[i] -= (code - offset) * scale[g]
        left[i + 1 :].addr_(unit[i, i + 1 :], left[i], alpha=-1.0)
    return codes, left


def trial_block(
    weight: Tensor, unit: Tensor, importance: Tensor, scale: Tensor, zero: Tensor | None, bits: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Sweep one group with every candidate and keep each row's best; shapes as in `ops.trial_block`."""
    best = torch.full(weight.shape[1:], torch.inf, device=weight.device)
    codes = torch.zeros(weight.shape, dtype=torch.int8, device=weight.device)
    errors, choice = torch.zeros_like(weight), torch.zeros_like(best, dtype=torch.int64)
    group = torch.zeros(weight.shape[0], dtype=torch.int64, device=weight.device)
    for c in range(scale.shape[0]):
        offset = None if zero is None else zero[c : c + 1]
        tried, left = sweep_block(weight, unit, scale[c : c + 1], offset, group, bits)
        damage = importance @ left.square()
        better = damage < best
        best = torch.where(better, damage, best)
        codes, errors = torch.where(better, tried, codes), torch.where(better, left, errors)
        choice = torch.where(better, c, choice)
    return codes, choice, errors
