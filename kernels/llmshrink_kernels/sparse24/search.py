"""The search for a weight's fastest plan: `llmshrink bench kernels --tune` on a CUDA device."""

from __future__ import annotations

import torch
from torch import Tensor

from llmshrink_kernels import stopwatch, tune
from llmshrink_kernels.sparse24 import dequantize, dispatch, launch, naive
from llmshrink_kernels.sparse24.prepack import PackedSparse, unpack
from llmshrink_kernels.tune import Clock, Plan
from llmshrink_kernels.wna16.dispatch import Limits, limits
from llmshrink_kernels.wna16.naive import allowed_error


def search(
    packed: PackedSparse,
    rows: int,
    dtype: torch.dtype,
    *,
    here: Limits | None = None,
    clock: Clock | None = None,
) -> list[tune.Trial]:
    """Try every candidate for `rows` rows of x, remember the fastest right one in the user's cache, return all.

    Every candidate's result is held to float64 before its time counts; it is timed on copies of the weight that the L2
    can't hold. here, clock: the device and the stopwatch, for others than the current CUDA device's. Raises
    RuntimeError when no candidate is right.
    """
    device = packed.words.device
    found = limits(device) if here is None else here
    x = torch.randn(rows, packed.in_features, device=device).to(dtype)
    weight = naive.dequantize(*unpack(packed), packed.group_size, packed.in_features)
    wanted, allowed = x.double() @ weight.T, allowed_error(x, weight, dtype)
    del weight

    count = stopwatch.copies(packed.nbytes, device) if device.type == "cuda" else 1
    weights = [packed, *(packed.copy() for _ in range(count - 1))]

    def run(plan: Plan, copy: int) -> Tensor:
        weight = weights[copy]
        return dequantize.matmul(x, weight) if isinstance(plan, str) else launch.matmul(x, weight, plan)

    def accept(y: Tensor) -> bool:
        return bool(((y.double() - wanted).abs() <= allowed).all())

    trials = tune.search(dispatch.candidates(packed, rows, found), run, accept, copies=count, clock=clock)
    tune.remember(dispatch.key(packed, rows, dtype, found.name), trials[0].plan)
    return trials
