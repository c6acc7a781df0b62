"""95 % intervals of the difference and of the ratio of two shares of right answers, to the very same items.

Of n items `both` are right before and after, `lost` only before, `won` only after. The score interval holds every
difference d, and every ratio r, that these counts don't speak against: that for which

    |won - lost - n d|             <= z sqrt(n (2 q + d (1 - d))),   q = P(lost) as likely as can be under d
    |both + won - r (both + lost)| <= z sqrt(n r (p + q)),           p, q = P(won), P(lost), likewise under r

where z = 1.96 is a normal distribution's; each q is the positive root of the quadratic equation that the largest
likelihood under the condition comes to. Tango 1998 (Statistics in Medicine 17) for the difference; Nam and Blackwelder
2002 (21) for the ratio. At d = 0 and at r = 1 both are McNemar's test, so the two intervals never contradict each
other on whether anything changed. Neither has a chance in it, and either is as good where few items changed as where
many did, for which a bootstrap has to have something to resample: see the coverage in `paired`.

Where nothing changed at all, see `paired`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

Z = 1.959963984540054
STEPS = 60
"""Halvings: to the last digit of a float64."""


def difference_interval(lost: int, won: int, size: int) -> tuple[float, float]:
    """Low and high of P(right after) - P(right before), with lost + won >= 1 of `size` items."""

    def excess(difference: float) -> float:
        """Above 0 where the difference is refused."""
        if abs(difference) >= 1:
            return 0.0 if won - lost == size * difference else math.inf
        q = _lost_under(difference, lost, won, size)
        variance = size * max(0.0, 2 * q + difference * (1 - difference))
        return abs(won - lost - size * difference) - Z * math.sqrt(variance)

    seen = (won - lost) / size
    return _edge(excess, seen, -1.0), _edge(excess, seen, 1.0)


def ratio_interval(both: int, lost: int, won: int, size: int) -> tuple[float | None, float | None]:
    """Low and high of P(right after) / P(right before); (None, None) where nothing was right before."""
    before, after = both + lost, both + won
    if before == 0:
        return None, None

    def excess(ratio: float) -> float:
        if ratio <= 0:
            return 0.0 if after == 0 else math.inf
        p, q = _changed_under(ratio, both, lost, won, size)
        return abs(after - ratio * before) - Z * math.sqrt(size * ratio * max(0.0, p + q))

    seen = after / before
    beyond = max(1.0, 2 * seen)
    while excess(beyond) <= 0:
        beyond *= 2
    return _edge(excess, seen, 0.0), _edge(excess, seen, beyond)


def _lost_under(difference: float, lost: int, won: int, size: int) -> float:
    """The likeliest P(lost) where P(won) = P(lost) + difference."""
    slope = (2 * size - won + lost) * difference - won - lost
    square = slope * slope + 8 * size * lost * difference * (1 - difference)
    return (math.sqrt(max(0.0, square)) - slope) / (4 * size)


def _changed_under(ratio: float, both: int, lost: int, won: int, size: int) -> tuple[float, float]:
    """The likeliest P(won) and P(lost) where P(right after) = ratio P(right before)."""
    before, after, right = both + lost, both + won, both + lost + won
    root = math.sqrt((after - ratio * ratio * before) ** 2 + 4 * ratio * ratio * won * lost)
    p = (ratio * ratio * (before + 2 * won) - after + root) / (2 * ratio * (ratio + 1)) / size
    return p, ratio * p - (ratio - 1) * right / size


def _edge(excess: Callable[[float], float], inside: float, outside: float) -> float:
    """Where `excess` turns positive between a value that is held and one that may not be."""
    if excess(outside) <= 0:
        return outside
    for _ in range(STEPS):
        middle = (inside + outside) / 2
        inside, outside = (middle, outside) if excess(middle) <= 0 else (inside, middle)
    return inside
