"""Time on a CUDA device, so that it is the kernel's: no launches, no cache that a real model wouldn't have.

A layer's weight is read once a token, after all the others, so it is never in the L2 cache when it is wanted. Copies of
it, together `BEYOND_L2` times that cache, take turns in one CUDA graph; the graph's time over their number is a call's,
without the host in it. The median of several replays is taken.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from llmshrink_kernels.benchmark.problem import Ceilings

BEYOND_L2 = 3
MOST_COPIES = 64
REPLAYS = 15
COPIED = 1 << 30
PRODUCT = 8192


def copies(weight_bytes: float, device: torch.device) -> int:
    """How many copies of a weight the L2 cache can't hold."""
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return min(MOST_COPIES, max(2, -(-BEYOND_L2 * cache // max(1, int(weight_bytes)))))


def graph_seconds(calls: Sequence[Callable[[Tensor], Tensor]], x: Tensor) -> float:
    """The median seconds of one of `calls`, each with its own copy of the weight, all captured in one CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call(x)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call(x)
    return replayed(graph.replay) / len(calls)


def replayed(replay: Callable[[], object]) -> float:
    """The median seconds of a call that is already warm, by events on the current stream."""
    for _ in range(3):
        replay()
    times: list[float] = []
    for _ in range(REPLAYS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1000)
    return statistics.median(times)


def ceilings(device: torch.device) -> Ceilings:
    """A copy of a gibibyte, read and written; and a bfloat16 product of 8192 by 8192 by 8192."""
    source = torch.empty(COPIED, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    bandwidth = 2 * COPIED / replayed(lambda: target.copy_(source))
    a = torch.randn(PRODUCT, PRODUCT, device=device, dtype=torch.bfloat16)
    return Ceilings(bandwidth, 2 * PRODUCT**3 / replayed(lambda: a @ a))
