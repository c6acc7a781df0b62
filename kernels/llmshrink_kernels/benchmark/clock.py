"""The device's ceilings, and the time of a contender: `stopwatch` says how, and why in that way."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from llmshrink_kernels import stopwatch
from llmshrink_kernels.benchmark.problem import Ceilings

COPIED = 1 << 30
PRODUCT = 8192


def graph_seconds(calls: Sequence[Callable[[Tensor], Tensor]], x: Tensor) -> float:
    """The median seconds of one of `calls`, each with its own copy of the weight, all captured in one CUDA graph."""
    return stopwatch.graph_seconds([functools.partial(call, x) for call in calls])


def ceilings(device: torch.device) -> Ceilings:
    """A copy of a gibibyte, read and written; and a bfloat16 product of 8192 by 8192 by 8192."""
    source = torch.empty(COPIED, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    bandwidth = 2 * COPIED / stopwatch.replayed(lambda: target.copy_(source))
    a = torch.randn(PRODUCT, PRODUCT, device=device, dtype=torch.bfloat16)
    return Ceilings(bandwidth, 2 * PRODUCT**3 / stopwatch.replayed(lambda: a @ a))
