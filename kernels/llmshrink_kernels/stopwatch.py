"""Time on a CUDA device, so that it is the kernel's: no launches, no cache that a real model wouldn't have.

A layer's weight is read once a token, after all the others, so it is never in the L2 cache when it is wanted. Copies of
it, together `BEYOND_L2` times that cache, take turns in one CUDA graph; the graph's time over their number is a call's,
without the host in it. The median of several replays is taken. The benchmark and the search for configurations share
this; what is measured one way is compared with nothing that was measured another.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

import torch

from llmshrink_kernels.device import notice

BEYOND_L2 = 3
MOST_COPIES = 64
REPLAYS = 15

Call = Callable[[], object]


def copies(weight_bytes: float, device: torch.device) -> int:
    """How many copies of a weight the L2 cache can't hold."""
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return min(MOST_COPIES, max(2, -(-BEYOND_L2 * cache // max(1, int(weight_bytes)))))


def captured(calls: Sequence[Call]) -> Call:
    """All `calls`, one after another, as one CUDA graph: what is returned replays it. Each was run once before."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph.replay


def replayed(replay: Call) -> float:
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


def graph_seconds(
    calls: Sequence[Call],
    *,
    capture: Callable[[Sequence[Call]], Call] = captured,
    median: Callable[[Call], float] = replayed,
) -> float:
    """The median seconds of one of `calls`, each with its own copy of the weight, all in one CUDA graph.

    capture, median: how a graph is made and timed. Raises what the capture raises.
    """
    return median(capture(calls)) / len(calls)


def seconds(
    calls: Sequence[Call],
    *,
    capture: Callable[[Sequence[Call]], Call] = captured,
    median: Callable[[Call], float] = replayed,
) -> float:
    """As `graph_seconds`; calls that no graph can hold are timed one after another instead, and one notice says so.

    Such a time has the host's launches in it and can only be too long, so that it may lose a search, and not win one.
    """
    try:
        replay = capture(calls)
    except RuntimeError as error:
        notice(
            f"llmshrink kernels: no CUDA graph holds these calls ({' '.join(str(error).split())[:120]}); they are timed"
            " with their launches"
        )

        def replay() -> None:
            for call in calls:
                call()

    return median(replay) / len(calls)
