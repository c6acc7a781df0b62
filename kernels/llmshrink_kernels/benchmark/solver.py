"""`gptq_block` against the eager loop that it replaces: one block of GPTQ's sweep over all rows of a layer.

The eager loop is `gptq_block/naive.py`, a column at a time in torch on the same device. Before a time counts the two
are compared. Two orders of float32 sums may round a tie differently, and what follows in that row is then another
solution, no worse and no better: so few rows may differ, and the error over all must be the same.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from llmshrink_kernels import stopwatch
from llmshrink_kernels.gptq_block import naive, ops

BLOCK = 128
CANDIDATES = 14
BITS = 4
MOST_DIFFERENT = 1e-3
"""Of the rows. A tie is met in some 1e-6 of roundings, and a row of a block has 128."""
SAME_ERROR = 1e-3
"""How far the errors of both, summed over the layer, may be apart, as a share."""


@dataclass(frozen=True)
class Solved:
    """One size of layer. microseconds, eager_microseconds: of a block; None where the results don't agree.

    different: share of rows in which a code differs. error_ratio: of the kernel's squared error to the eager loop's.
    """

    operator: str
    rows: int
    columns: int
    candidates: int
    different: float
    error_ratio: float
    microseconds: float | None
    eager_microseconds: float | None
    over_eager: float | None


def measure(
    rows: int, device: torch.device, replayed: Callable[[Callable[[], object]], float] = stopwatch.replayed
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
            lambda: ops.sweep_block(*sweep, bits=BITS),
            lambda: naive.sweep_block(*sweep, BITS),
            replayed,
        ),
        _held(
            "trial_block",
            CANDIDATES,
            lambda: ops.trial_block(*trial, bits=BITS)[::3],
            lambda: naive.trial_block(*trial, BITS)[::2],
            replayed,
        ),
    ]


def _held(
    operator: str,
    candidates: int,
    fast: Callable[[], tuple[torch.Tensor, ...]],
    eager: Callable[[], tuple[torch.Tensor, ...]],
    replayed: Callable[[Callable[[], object]], float],
) -> Solved:
    (codes, errors), (other, left) = fast(), eager()
    different = (codes != other).any(0).double().mean().item()
    ratio = (errors.double().square().sum() / left.double().square().sum()).item()
    columns, rows = codes.shape
    if different > MOST_DIFFERENT or abs(ratio - 1) > SAME_ERROR:
        return Solved(operator, rows, columns, candidates, different, ratio, None, None, None)
    ours, theirs = replayed(fast), replayed(eager)
    return Solved(
        operator,
        rows,
        columns,
        candidates,
        different,
        ratio,
        round(ours * 1e6, 2),
        round(theirs * 1e6, 2),
        round(theirs / ours, 2),
    )
