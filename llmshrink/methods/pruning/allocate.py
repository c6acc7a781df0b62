"""One ratio for each weight, so that a share of all weights goes and what that costs in sum is least.

Given for each weight what it costs to prune it, measured at a few ratios (an error that grows with the ratio, and is
comparable between weights), the costs between are taken to grow exponentially. From the smallest ratio everywhere, the
weight whose next step costs least for each weight removed goes on a step, until the share is met: for curves that bend
upwards, which these are, no other division into such steps costs less.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence

STEP = 0.005
SMALLEST = 1e-12
"""A cost of nothing at all has no logarithm."""


def allocate(
    costs: Mapping[str, Sequence[float]], ratios: Sequence[float], sizes: Mapping[str, int], share: float
) -> dict[str, float]:
    """The ratio of each weight, within the first and the last of `ratios`, by name in the order of `costs`.

    costs: of each weight at each of `ratios`, which ascend. sizes: how many numbers each holds. share: of all numbers
    together, between those two; met exactly.
    """
    assert ratios[0] <= share <= ratios[-1] and len(ratios) > 1, (ratios, share)
    found = dict.fromkeys(costs, ratios[0])
    left = (share - ratios[0]) * sum(sizes[name] for name in costs)

    def next_step(name: str) -> tuple[float, float]:
        """(what a number removed costs in the next step, the ratio after it)."""
        here = found[name]
        there = min(here + STEP, ratios[-1])
        rise = _cost(costs[name], ratios, there) - _cost(costs[name], ratios, here)
        return rise / ((there - here) * sizes[name]), there

    names = list(costs)
    heap = [(next_step(name)[0], number) for number, name in enumerate(names)]
    heapq.heapify(heap)
    while left > 0 and heap:
        _, number = heapq.heappop(heap)
        name = names[number]
        taken = min((next_step(name)[1] - found[name]) * sizes[name], left)
        found[name] += taken / sizes[name]
        left -= taken
        if found[name] < ratios[-1] - STEP / 1000:
            heapq.heappush(heap, (next_step(name)[0], number))
    return found


def _cost(costs: Sequence[float], ratios: Sequence[float], ratio: float) -> float:
    """Between two measured ratios, the exponential through both."""
    last = next((i for i in range(1, len(ratios)) if ratio <= ratios[i]), len(ratios) - 1)
    low, high = (math.log(max(costs[i], SMALLEST)) for i in (last - 1, last))
    part = (ratio - ratios[last - 1]) / (ratios[last] - ratios[last - 1])
    return math.exp(low + (high - low) * part)
