"""Two models on the same items: intervals that cover what they promise, tests and counts that others find too."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import pytest
from llmshrink_eval import paired
from llmshrink_eval.errors import EvalError
from llmshrink_eval.paired import compare_items, intervals_of, mcnemar_exact
from llmshrink_eval.proportions import difference_interval, ratio_interval
from scipy import stats

TRIALS = 1000
Values = np.ndarray


def compared(before: Values, after: Values, **more: bool) -> paired.Paired:
    binary = more.pop("binary", True)
    return compare_items(list(before), list(after), ids=range(len(before)), seed=0, binary=binary, **more)


# What is promised: over 1,000 seeded trials an interval holds the known difference in 93 to 97 % of them.

FLIPS = [
    # items, share right before, share of the right that is lost, share of the wrong that is won
    (100, 0.6, 0.10, 0.10),
    (200, 0.5, 0.04, 0.00),
    (200, 0.5, 0.06, 0.00),
    (200, 0.7, 0.03, 0.02),
    (500, 0.5, 0.05, 0.00),
    (500, 0.8, 0.05, 0.05),
    (1000, 0.3, 0.10, 0.03),
    (1000, 0.9, 0.01, 0.02),
]


@pytest.mark.parametrize(("items", "level", "lose", "win"), FLIPS)
def test_intervals_of_right_or_wrong_items_cover_the_truth(items: int, level: float, lose: float, win: float) -> None:
    random = np.random.default_rng(7)
    known = -level * lose + (1 - level) * win
    ratio = (level + known) / level
    held = np.zeros(2)
    for _ in range(TRIALS):
        before = random.random(items) < level
        after = np.where(random.random(items) < np.where(before, lose, win), ~before, before)
        # Of resamples nothing but the bootstrap's own interval is made.
        found = intervals_of(before.astype(float), after.astype(float), seed=0, binary=True, resamples=10)
        low, high = found.ratio
        assert low is not None and high is not None
        held += (found.difference[0] <= known <= found.difference[1], low <= ratio <= high)
    assert (held >= 0.93 * TRIALS).all() and (held <= 0.97 * TRIALS).all(), held


def _normal(random: np.random.Generator, shape: tuple[int, int]) -> tuple[Values, float]:
    return random.normal(-0.02, 0.15, shape), -0.02


def _skewed(random: np.random.Generator, shape: tuple[int, int]) -> tuple[Values, float]:
    return -0.05 * random.lognormal(0, 0.8, shape), -0.05 * math.exp(0.32)


def _few(random: np.random.Generator, shape: tuple[int, int]) -> tuple[Values, float]:
    return np.where(random.random(shape) < 0.1, random.normal(-0.2, 0.3, shape), 0), -0.02


@pytest.mark.parametrize("changes", [_normal, _skewed, _few])
def test_intervals_of_measured_values_cover_the_truth(
    changes: Callable[[np.random.Generator, tuple[int, int]], tuple[Values, float]],
) -> None:
    random = np.random.default_rng(11)
    change, known = changes(random, (TRIALS, 200))
    before = random.normal(0.6, 0.2, change.shape)
    held = 0
    for trial, (first, moved) in enumerate(zip(before, change, strict=True)):
        low, high = intervals_of(first, first + moved, seed=trial, binary=False, resamples=500).difference
        held += low <= known <= high
    assert 0.93 * TRIALS <= held <= 0.97 * TRIALS


@pytest.mark.parametrize("items", [50, 200, 1000])
def test_where_hardly_anything_flips_no_fewer_than_93_in_100_are_covered(items: int) -> None:
    """Exact, over all outcomes: counts this small can't give 95 % sharp, and must err to the careful side."""
    for expected in (0.2, 0.5, 1.0, 2.0, 3.0):
        share = expected / items
        covered = 0.0
        for lost in range(items + 1 if items < 60 else 40):
            before = np.ones(items)
            after = np.where(np.arange(items) < lost, 0.0, 1.0)
            low, high = intervals_of(before, after, seed=0, binary=True, resamples=10).difference
            covered += float(stats.binom.pmf(lost, items, share)) * (low <= -share <= high)
        assert covered >= 0.93, (items, expected)


# Against others.


def test_the_score_intervals_edges_are_where_the_test_turns() -> None:
    """The likeliest shares under each condition by search, not by formula."""
    random = np.random.default_rng(3)
    for both, lost, won, neither in random.integers(1, 30, (12, 4)).tolist():
        size, right = both + lost + won + neither, (both + lost + won) / (both + lost + won + neither)
        for edge in difference_interval(lost, won, size):
            cells = partial(_after_a_difference, edge)
            q = _likeliest((lost, won, both + neither), cells, max(0, -edge), (1 - edge) / 2)
            error = math.sqrt(size * (2 * q + edge - edge * edge))
            assert abs(won - lost - size * edge) == pytest.approx(1.959964 * error, rel=1e-4)
        for bound in ratio_interval(both, lost, won, size):
            assert bound is not None
            cells = partial(_after_a_ratio, bound, right)
            p = _likeliest((won, lost, both), cells, max(0, (bound - 1) * right / bound), bound * right / (1 + bound))
            error = math.sqrt(size * bound * sum(cells(p)[:2]))
            assert abs(both + won - bound * (both + lost)) == pytest.approx(1.959964 * error, rel=1e-4)


def _after_a_difference(difference: float, q: float) -> tuple[float, ...]:
    """P(lost), P(won) and P(neither), for P(lost) = q."""
    return q, q + difference, 1 - 2 * q - difference


def _after_a_ratio(ratio: float, right: float, p: float) -> tuple[float, ...]:
    """P(won), P(lost) and P(right both times), for P(won) = p, where a share `right` is right at least once."""
    q = ratio * p - (ratio - 1) * right
    return p, q, right - p - q


def _likeliest(counts: Sequence[int], cells: Callable[[float], Sequence[float]], low: float, high: float) -> float:
    from scipy.optimize import minimize_scalar

    def unlikely(share: float) -> float:
        return -sum(count * math.log(max(p, 1e-300)) for count, p in zip(counts, cells(share), strict=True))

    found = minimize_scalar(unlikely, bounds=(low, high), method="bounded", options={"xatol": 1e-13})
    return float(found.x)


def test_difference_and_recovery_never_contradict_each_other_on_whether_anything_changed() -> None:
    random = np.random.default_rng(5)
    for both, lost, won, neither in random.integers(0, 25, (400, 4)).tolist():
        size = both + lost + won + neither
        if both + lost == 0 or lost + won == 0:
            continue
        low, high = difference_interval(lost, won, size)
        least, most = ratio_interval(both, lost, won, size)
        assert least is not None and most is not None
        assert (low > 0, high < 0) == (least > 1, most < 1)
        assert -1 <= low <= (won - lost) / size <= high <= 1
        assert 0 <= least <= (both + won) / (both + lost) <= most


@pytest.mark.parametrize("binary", [True, False])
def test_the_bootstrap_is_that_of_a_plain_loop(binary: bool) -> None:
    """Resample after resample of whole pairs, the two imagined items among them, and the percentiles of the means."""
    random = np.random.default_rng(13)
    before = (random.random(80) < 0.6).astype(float) if binary else random.normal(0.6, 0.2, 80)
    after = np.where(random.random(80) < 0.2, 1 - before, before) if binary else before + random.normal(-0.1, 0.2, 80)
    change = after - before
    reach = np.abs(change - np.median(change)).max()
    pool = [*zip(before, after, strict=True)] * 2
    for sign in (-1, 1):  # half an item each way for right or wrong, else a whole one
        imagined = (before.mean(), before.mean() + np.median(change) + sign * reach)
        pool += [imagined] * (1 if binary else 2)
    moved, ratios = [], []
    for _ in range(6000):
        drawn = np.array([pool[index] for index in random.integers(0, len(pool), 80)]).mean(axis=0)
        moved.append(drawn[1] - drawn[0])
        ratios.append(drawn[1] / drawn[0])
    found = intervals_of(before, after, seed=0, binary=binary, resamples=40000)
    # Means of right-or-wrong items are multiples of 1 / 80: the last one within may be either of two.
    near = 1 / 80 + 1e-9 if binary else 0.2 * float(np.std(moved))
    assert found.bootstrap == pytest.approx([float(end) for end in np.quantile(moved, [0.025, 0.975])], abs=near)
    if not binary:
        assert found.difference == found.bootstrap
        assert found.ratio == pytest.approx(
            [float(end) for end in np.quantile(ratios, [0.025, 0.975])], abs=0.2 * float(np.std(ratios))
        )


@pytest.mark.parametrize(("lost", "won"), [(0, 0), (1, 0), (4, 0), (0, 9), (3, 3), (12, 5), (40, 41), (300, 220)])
def test_mcnemars_exact_test_is_the_binomial_test_of_a_fair_coin(lost: int, won: int) -> None:
    expected = 1.0 if lost + won == 0 else stats.binomtest(lost, lost + won, 0.5).pvalue
    assert mcnemar_exact(lost, won) == pytest.approx(expected, rel=1e-12)


def test_mcnemars_exact_test_by_hand() -> None:
    assert mcnemar_exact(5, 0) == 2 / 32
    assert mcnemar_exact(1, 5) == 2 * (1 + 6) / 64


# What is there to say, item by item.


def test_items_that_flipped_are_named_lost_ones_first() -> None:
    found = compare_items([1, 0, 1, 1, 0], [1, 1, 0, 0, 0], ids=[10, 11, 12, 13, 14], seed=0, binary=True)
    assert (found.lost, found.won, found.flipped) == (2, 1, (12, 13, 11))
    assert found.difference == pytest.approx(-0.2) and found.recovery == pytest.approx(2 / 3)
    assert found.mcnemar_p == 1.0


def test_equal_values_are_neither_lost_nor_won_and_measured_ones_name_no_item() -> None:
    found = compared(np.array([0.5, 0.25, 0.75]), np.array([0.5, 0.5, 0.5]), binary=False)
    assert (found.lost, found.won, found.flipped, found.mcnemar_p) == (1, 1, (), None)
    assert found.low <= 0 <= found.high


def test_where_lower_is_better_a_rise_is_a_loss_and_recovery_turns_over() -> None:
    before, after = np.array([2.0, 3.0, 4.0, 3.0]), np.array([2.0, 4.0, 4.5, 3.5])
    found = compared(before, after, binary=False, higher_is_better=False)
    assert (found.lost, found.won) == (3, 0)
    assert found.difference == 0.5 and found.recovery == pytest.approx(3 / 3.5)
    assert found.recovery_low is not None and found.recovery_high is not None
    assert found.recovery_low <= found.recovery <= found.recovery_high


@pytest.mark.parametrize("items", [1, 20, 200])
def test_items_that_are_all_the_same_leave_the_exact_bound(items: int) -> None:
    found = compared(np.ones(items), np.ones(items))
    bound = stats.binomtest(0, items).proportion_ci(0.95, "exact").high  # Clopper and Pearson
    assert (found.low, found.high) == pytest.approx((-bound, bound), rel=1e-9)
    assert (found.bootstrap_low, found.bootstrap_high) == (found.low, found.high)
    assert (found.difference, found.recovery, found.mcnemar_p, found.flipped) == (0.0, 1.0, 1.0, ())


def test_one_item_says_hardly_anything() -> None:
    lost = compared(np.ones(1), np.zeros(1))
    assert lost.difference == -1.0 and lost.mcnemar_p == 1.0 and lost.low == -1.0
    assert lost.high > 0.5


def test_a_model_that_never_was_right_has_no_recovery() -> None:
    found = compared(np.zeros(30), np.concatenate([np.ones(3), np.zeros(27)]))
    assert (found.recovery, found.recovery_low, found.recovery_high) == (None, None, None)
    assert found.won == 3 and found.low <= 0.1 <= found.high


def test_the_same_seed_gives_the_same_interval_and_another_one_nearly() -> None:
    random = np.random.default_rng(1)
    before = random.normal(0.5, 0.2, 100)
    after = before + random.normal(0, 0.1, 100)
    first, again, other = (intervals_of(before, after, seed=seed, binary=False) for seed in (1, 1, 2))
    assert first == again and first != other
    assert first.difference == pytest.approx(other.difference, abs=0.003)


def test_no_items_and_other_items_are_refused() -> None:
    with pytest.raises(EvalError, match="no items to compare"):
        compare_items([], [], ids=[], seed=0, binary=True)
    with pytest.raises(EvalError, match=r"2 items of the original against 1, with 2 ids: not the same items"):
        compare_items([1, 0], [1], ids=[0, 1], seed=0, binary=True)
