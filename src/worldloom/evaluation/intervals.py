"""Confidence intervals of success rates."""

import math


def wilson_interval(successes: int, n: int) -> tuple[float, float]:
    """Return Wilson's score interval of a rate at 95%, within [0, 1]; without episodes it is (0, 1).

    Unlike the normal approximation, it keeps its coverage for rates near 0 and 1 (Wilson 1927; Brown, Cai and DasGupta
    2001).
    """
    if not 0 <= successes <= n:
        raise ValueError(f"expected successes between 0 and n = {n}; got {successes}")
    if n == 0:
        return 0.0, 1.0
    from scipy.stats import binomtest

    interval = binomtest(successes, n).proportion_ci(confidence_level=0.95, method="wilson")
    return float(interval.low), float(interval.high)


def above_floor(successes: int, n: int, floor_successes: int, floor_n: int) -> tuple[float, float, float] | None:
    """Return the share of the goals missed by a floor that a method reaches, and its 95% interval.

    With success rate p and the floor's rate f, the share is (p - f) / (1 - f): 0 for a method that is no better than
    the floor, 1 for one that reaches every goal, negative for one that is worse. None if the floor misses no goal.

    The share is one minus the ratio of the two failure rates. The interval combines their Wilson intervals as Donner
    and Zou, "Closed-form confidence intervals for functions of the normal mean and standard deviation" (2012), do for
    ratios. It treats both rates as independent, which is cautious for the same pairs.
    """
    if floor_successes == floor_n:
        return None
    missed, floor = 1 - successes / n, 1 - floor_successes / floor_n
    (low, high), (floor_low, floor_high) = (
        (1 - ends[1], 1 - ends[0])
        for ends in (wilson_interval(successes, n), wilson_interval(floor_successes, floor_n))
    )
    product = missed * floor

    def ratio(sign: int, end: float, floor_end: float) -> float:
        scale = floor_end * (2 * floor - floor_end)
        return (product + sign * math.sqrt(max(product**2 - end * (2 * missed - end) * scale, 0.0))) / scale

    return 1 - missed / floor, 1 - ratio(1, high, floor_low), 1 - ratio(-1, low, floor_high)
