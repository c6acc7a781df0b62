"""`gptq_block` against the eager loop that it replaces: one block of GPTQ's sweep over all rows of a layer.

The eager loop is `gptq_block/naive.py`, a column at a time in torch on the same device. Before a time counts the codes
are compared: two orders of float32 sums may part at a tie, in at most 1e-5 of the codes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from llmshrink_kernels.benchmark import clock
from llmshrink_kernels.gptq_block import naive, ops

BLOCK = 128
CANDIDATES = 14
BITS = 4
MOST_DIFFERENT = 1e-5


@dataclass(frozen=True)
class Solved:
    """One size of layer. microseconds, eager_microseconds: of a block. different: share of codes that differ."""

    operator: str
    rows: int
    columns: int
    candidates: int
    different: float
    microseconds: float | None
    eager_microseconds: float | None
    over_eager: float | None


def measure(
    rows: int, device: torch.device, replayed: Callable[[Callable[[], object]], float] = clock.replayed
) -> list[Solved]:
    """Both operators on a block of 128 columns of a layer with `rows` outputs."""
    generator = torch.Generator(device).manual_seed(0)
    weight = torch.randn(BLOCK, rows, device=device, generator=generator)
    unit = torch.randn(BLOCK, BLOCK, device=device, generator=generator).triu(1) / BLOCK**0.5
    importance = torch.rand(BLOCK, device=device, generator=generator) + 0.5
    base = weight.abs().amax(0) / ((1 << BITS - 1) - 1)
    factors = torch.linspace(0.6, 1.1, CANDIDATES, device=device)
    scale = factors[:, None] * base
    group = torch.zeros(BLOCK, dtype=torch.int64, device=device)
    sweep = (weight, unit, scale[:1], None, group)
    trial = (weight, unit, importance, scale, None)
    return [
        _held(
            "sweep_block",
            1,
            lambda: ops.sweep_block(*sweep, bits=BITS)[0],
            lambda: naive.sweep_block(*sweep, BITS)[0],
            replayed,
        ),
        _held(
            "trial_block",
            CANDIDATES,
            lambda: ops.trial_block(*trial, bits=BITS)[0],
            lambda: naive.trial_block(*trial, BITS)[0],
            replayed,
        ),
    ]


def _held(
    operator: str,
    candidates: int,
    fast: Callable[[], torch.Tensor],
    eager: Callable[[], torch.Tensor],
    replayed: Callable[[Callable[[], object]], float],
) -> Solved:
    codes = fast()
    different = (codes != eager()).double().mean().item()
    columns, rows = codes.shape
    if different > MOST_DIFFERENT:
        return Solved(operator, rows, columns, candidates, different, None, None, None)
    ours, theirs = replayed(fast), replayed(eager)
    return Solved(
        operator,
        rows,
        columns,
        candidates,
        different,
        round(ours * 1e6, 2),
        round(theirs * 1e6, 2),
        round(theirs / ours, 2),
    )
