import functools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from worldloom.evaluation import above_floor, wilson_interval

COUNTS = st.integers(1, 5000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [  # scipy.stats.binomtest(successes, n).proportion_ci(method="wilson")
        (0, 10, 0.0, 0.277533),
        (1, 10, 0.017876, 0.404150),
        (5, 10, 0.236593, 0.763407),
        (97, 100, 0.915481, 0.989745),
        (100, 100, 0.963007, 1.0),
    ],
)
def test_known_values(successes: int, n: int, low: float, high: float) -> None:
    assert wilson_interval(successes, n) == pytest.approx((low, high), abs=2e-6)


@given(COUNTS)
def test_the_interval_holds_the_rate_and_lies_within_zero_and_one(counts: tuple[int, int]) -> None:
    successes, n = counts
    low, high = wilson_interval(successes, n)
    assert 0 <= low <= successes / n <= high <= 1
    assert low < high


@given(COUNTS)
def test_its_ends_are_the_rates_that_the_score_test_just_allows(counts: tuple[int, int]) -> None:
    successes, n = counts
    for end in wilson_interval(successes, n):
        if 0 < end < 1:
            score = abs(successes / n - end) / math.sqrt(end * (1 - end) / n)
            assert score == pytest.approx(1.959964, abs=1e-4)


@given(COUNTS)
def test_failures_mirror_successes(counts: tuple[int, int]) -> None:
    successes, n = counts
    low, high = wilson_interval(successes, n)
    assert wilson_interval(n - successes, n) == pytest.approx((1 - high, 1 - low), abs=1e-12)


@given(COUNTS)
def test_more_episodes_at_the_same_rate_narrow_it(counts: tuple[int, int]) -> None:
    successes, n = counts
    low, high = wilson_interval(successes, n)
    tighter_low, tighter_high = wilson_interval(4 * successes, 4 * n)
    assert tighter_high - tighter_low < high - low


def test_no_episode_tells_nothing() -> None:
    assert wilson_interval(0, 0) == (0.0, 1.0)


@pytest.mark.parametrize(("successes", "n"), [(-1, 5), (6, 5)])
def test_impossible_counts_are_refused(successes: int, n: int) -> None:
    with pytest.raises(ValueError, match="between 0 and n"):
        wilson_interval(successes, n)


PAIRS = st.tuples(COUNTS, COUNTS).filter(lambda pair: pair[1][0] < pair[1][1])


@given(PAIRS)
def test_the_share_above_a_floor_lies_within_its_interval(pair: tuple[tuple[int, int], tuple[int, int]]) -> None:
    (successes, n), (floor, m) = pair
    found = above_floor(successes, n, floor, m)
    assert found is not None
    share, low, high = found
    p, f = successes / n, floor / m
    assert share == pytest.approx((p - f) / (1 - f), abs=1e-9)
    assert low <= share + 1e-9
    assert share <= high + 1e-9
    assert high <= 1 + 1e-9


def test_a_floor_of_zero_changes_little_and_one_that_reaches_all_tells_nothing() -> None:
    share, low, high = above_floor(80, 100, 0, 100) or (0.0, 0.0, 0.0)
    assert share == 0.8
    assert low == pytest.approx(wilson_interval(80, 100)[0], abs=0.02)
    assert high == pytest.approx(wilson_interval(80, 100)[1], abs=0.01)
    assert above_floor(80, 100, 50, 50) is None
    assert above_floor(100, 100, 49, 100) is not None


@pytest.mark.parametrize(("p", "f"), [(0.5, 0.16), (0.74, 0.49), (0.95, 0.05), (0.1, 0.1)])
def test_the_interval_above_a_floor_covers_the_true_share_19_times_in_20(p: float, f: float) -> None:
    rng, n = np.random.default_rng(0), 100
    found = functools.cache(above_floor)
    draws = list(zip(rng.binomial(n, p, 1500).tolist(), rng.binomial(n, f, 1500).tolist(), strict=True))
    covered = 0
    for successes, floor in draws:
        interval = found(successes, n, floor, n)
        covered += interval is not None and interval[1] <= (p - f) / (1 - f) <= interval[2]
    assert 0.93 <= covered / len(draws) <= 0.98
