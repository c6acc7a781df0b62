"""The search for a weight's fastest plan: `llmshrink bench kernels --tune` on a CUDA device."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from llmshrink_kernels import tune
from llmshrink_kernels.sparse24 import dequantize, dispatch, launch, naive
from llmshrink_kernels.sparse24.prepack import PackedSparse, unpack
from llmshrink_kernels.tune import Plan
from llmshrink_kernels.wna16.dispatch import Limits, limits
from llmshrink_kernels.wna16.naive import allowed_error


def search(
    packed: PackedSparse,
    rows: int,
    dtype: torch.dtype,
    *,
    here: Limits | None = None,
    clock: Callable[[Callable[[], object]], float] | None = None,
) -> list[tune.Trial]:
    """Try every candidate for `rows` rows of x, remember the fastest right one in the user's cache, return all.

    Every candidate's result is held to float64 before its time counts. here, clock: the device and the stopwatch, for
    others than the current CUDA device's. Raises RuntimeError when no candidate is right.
    """
    found = limits(packed.words.device) if here is None else here
    x = torch.randn(rows, packed.in_features, device=packed.words.device).to(dtype)
    weight = naive.dequantize(*unpack(packed), packed.group_size, packed.in_features)
    wanted, allowed = x.double() @ weight.T, allowed_error(x, weight, dtype)
    del weight

    def run(plan: Plan) -> Tensor:
        return dequantize.matmul(x, packed) if isinstance(plan, str) else launch.matmul(x, packed, plan)

    def accept(y: Tensor) -> bool:
        return bool(((y.double() - wanted).abs() <= allowed).all())

    trials = tune.search(dispatch.candidates(packed, rows, found), run, accept, clock)
    tune.remember(dispatch.key(packed, rows, dtype, found.name), trials[0].plan)
    return trials
