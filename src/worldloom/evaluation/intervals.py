"""Confidence intervals of success rates."""


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
