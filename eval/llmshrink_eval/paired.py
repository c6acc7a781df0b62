"""Two models on the same items: how much did the score move, and how sure is that?

Both models answered the same questions, so what counts are the differences item by item; how hard the items are drops
out. Three answers are given.

**The interval**, 95 %, of the difference, and of the recovery, compressed / original.

Measured values (F1, a share of words): a percentile bootstrap over items (Efron 1979), the pair of an item kept
together, smoothed: beside the n items stand two imagined ones, one that changed as much to the worse as any item
changed, one as much to the better. Without them a bootstrap can only repeat what it saw, and compression changes few
items.

Right-or-wrong items: the score interval of paired shares (`proportions`). Flips are few, and resamples can't be more
varied than a handful of them: the same bootstrap's interval (the imagined items weigh half, a percentile that falls
among equal means is taken where half of them lie on either side) is given too, and nothing is claimed by it. Coverage
of nominal 95 % intervals of the difference (of right-or-wrong items exact, summed over all outcomes; the others in
1,000 trials):

    items                                    plain bootstrap    smoothed bootstrap    score
    200, 2 % lost, none won                  0.903              0.980                 0.933
    200, 3 % lost, none won                  0.933              0.933                 0.944
    200, 1.5 % lost, 0.5 % won               0.944              0.961                 0.952
    500, 2.5 % lost, none won                0.917              0.917                 0.957
    500, 4 % lost, 1 % won                   0.955              0.953                 0.950
    1000, 3 % lost, 2 % won                  0.951              0.951                 0.950
    200, normal differences                  0.944              0.947
    200, log-normal differences              0.929              0.950
    200, 5 % changed by a normal amount      0.901              0.948

Where fewer than about three flips are to be expected, no interval that is made of counts can cover in exactly 95 % of
trials; the score interval then covers in more (0.985 at 100 items of which 2 % are lost), never in less than 93. BCa
and studentised bootstraps were measured as well: no better on skewed differences, and wild where few items changed.

Where all items changed alike (in most cases: not at all) the interval is the exact one (Clopper and Pearson 1934):
with 97.5 % confidence at most a share 1 - 0.025^(1/n) of all items behaves otherwise, and those by no more than the
range of an item's value. After 200 items without a flip, the interval is ±0.018.

**McNemar's exact test** (1947) asks whether lost and won items could be tosses of a coin. It is slower to speak than
the interval where few items flipped: of 200 items 4 lost and none won have p = 0.125, and an interval just below 0.

**The counts**: which items were lost and which won.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from llmshrink_eval.errors import EvalError
from llmshrink_eval.proportions import difference_interval, ratio_interval
from llmshrink_eval.results import Paired

RESAMPLES = 4000
TAIL = 0.025
CHUNK = 1 << 22
"""Values gathered at a time: 32 MB."""

Values = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Intervals:
    """95 % intervals: (low, high) of mean(compressed - original), and of mean(compressed) / mean(original); None where
    the ratio has no bound, since the original's mean may be zero or less. bootstrap: of the difference, by resamples
    alone."""

    difference: tuple[float, float]
    ratio: tuple[float | None, float | None]
    bootstrap: tuple[float, float]


def compare_items(
    original: Sequence[float],
    compressed: Sequence[float],
    *,
    ids: Sequence[int],
    seed: int,
    binary: bool,
    higher_is_better: bool = True,
) -> Paired:
    """Hold a model to the original, item by item.

    original, compressed: the metric's value of each item, the same items in the same order. ids: their document ids.
    binary: every value is 0 or 1; only then are there McNemar's test and flipped items, otherwise lost and won count
    the items that got worse and better. Where lower is better, recovery is original / compressed, so that 1 is always
    "as good as before" and more is better; the difference keeps its sign. recovery is None where the original's mean
    is not positive. Raises EvalError when there are no items or not as many on both sides.
    """
    before, after = np.asarray(original, np.float64), np.asarray(compressed, np.float64)
    if not len(before) == len(after) == len(ids):
        raise EvalError(
            f"{len(before)} items of the original against {len(after)}, with {len(ids)} ids: not the same items"
        )
    if not len(before):
        raise EvalError("no items to compare")
    change = after - before if higher_is_better else before - after
    lost, won = np.flatnonzero(change < 0), np.flatnonzero(change > 0)
    intervals = intervals_of(before, after, seed=seed, binary=binary)
    recovery, recovery_low, recovery_high = _recovery(
        float(before.mean()), float(after.mean()), intervals.ratio, higher_is_better
    )
    return Paired(
        difference=float((after - before).mean()),
        low=intervals.difference[0],
        high=intervals.difference[1],
        bootstrap_low=intervals.bootstrap[0],
        bootstrap_high=intervals.bootstrap[1],
        mcnemar_p=mcnemar_exact(len(lost), len(won)) if binary else None,
        lost=len(lost),
        won=len(won),
        flipped=tuple(int(ids[index]) for index in (*lost, *won)) if binary else (),
        recovery=recovery,
        recovery_low=recovery_low,
        recovery_high=recovery_high,
    )


def mcnemar_exact(lost: int, won: int) -> float:
    """Two-sided p that a fair coin tossed lost + won times falls at least as one-sidedly; 1 if nothing flipped."""
    tosses = lost + won
    tail = sum(math.comb(tosses, heads) for heads in range(min(lost, won) + 1))
    return min(1.0, float(2 * tail / 2**tosses))


def intervals_of(
    original: Values, compressed: Values, *, seed: int, binary: bool, resamples: int = RESAMPLES
) -> Intervals:
    """95 % intervals of the difference and of the ratio of the means.

    original, compressed: float64 [n], n >= 1. binary: all are 0 or 1; then only `bootstrap` is made of resamples. The
    same seed gives the same intervals.
    """
    change = compressed - original
    centre = float(np.median(change))
    reach = float(np.abs(change - centre).max())
    if reach == 0:
        return _exact(original, compressed)
    level = float(original.mean())
    imagined = np.array([[level, level + centre - reach], [level, level + centre + reach]])
    pairs = np.concatenate([np.stack([original, compressed], axis=1), imagined])  # [n + 2, 2]
    rng = np.random.default_rng(seed)
    means = (_counted if binary else _gathered)(pairs, len(change), resamples, rng)
    resampled = _percentiles(means[:, 1] - means[:, 0])
    if binary:
        both, lost, won = (int(which.sum()) for which in (original * compressed, change < 0, change > 0))
        return Intervals(
            difference=difference_interval(lost, won, len(change)),
            ratio=ratio_interval(both, lost, won, len(change)),
            bootstrap=(max(resampled[0], -1.0), min(resampled[1], 1.0)),
        )
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = np.where(means[:, 0] > 0, means[:, 1] / means[:, 0], np.inf)
    low, high = _percentiles(ratios)
    return Intervals(resampled, (_finite(low), _finite(high)), resampled)


def _exact(original: Values, compressed: Values) -> Intervals:
    """Where every item changed by the same amount: what a share of others, yet unseen, could do."""
    change, level = float(compressed[0] - original[0]), float(original.mean())
    seen = np.concatenate([original, compressed])
    reach = max(1.0, float(seen.max() - seen.min()))
    share = 1 - TAIL ** (1 / len(original))
    low, high = change - share * (reach + change), change + share * (reach - change)
    if level <= 0:
        return Intervals((low, high), (None, None), (low, high))
    return Intervals((low, high), (max(0.0, 1 + low / level), 1 + high / level), (low, high))


def _counted(pairs: Values, size: int, resamples: int, rng: np.random.Generator) -> Values:
    """Means of resamples of few distinct pairs, by how often each is drawn; the imagined two weigh half: a whole item
    that is lost is as much as one can be.

    Returns [resamples, 2].
    """
    weights = np.ones(len(pairs))
    weights[-2:] = 0.5
    distinct, where = np.unique(pairs, axis=0, return_inverse=True)
    shares = np.bincount(where.reshape(-1), weights) / weights.sum()
    drawn = rng.multinomial(size, shares, size=resamples)
    return np.asarray(drawn @ distinct / size, np.float64)


def _gathered(pairs: Values, size: int, resamples: int, rng: np.random.Generator) -> Values:
    """Means of resamples of any pairs. [resamples, 2]"""
    means = np.empty((resamples, 2))
    columns = np.ascontiguousarray(pairs.T)
    step = max(1, CHUNK // size)
    for start in range(0, resamples, step):
        drawn = rng.integers(0, len(pairs), (min(step, resamples - start), size), dtype=np.int32)
        for side in (0, 1):
            means[start : start + step, side] = columns[side].take(drawn).mean(axis=1)
    return means


def _percentiles(values: Values) -> tuple[float, float]:
    """The two ends of the middle 95 %; of equal values, half count as below."""
    distinct, counts = np.unique(np.round(values, 12), return_counts=True)
    below = (np.cumsum(counts) - counts / 2) / len(values)
    return float(distinct[below >= TAIL][0]), float(distinct[below <= 1 - TAIL][-1])


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _recovery(
    before: float, after: float, ratio: tuple[float | None, float | None], higher_is_better: bool
) -> tuple[float | None, float | None, float | None]:
    """recovery, low, high."""
    if before <= 0:
        return None, None, None
    if higher_is_better:
        return after / before, *ratio
    inverse = [1 / bound if bound is not None and bound > 0 else None for bound in (after / before, ratio[1], ratio[0])]
    return inverse[0], inverse[1], inverse[2]
