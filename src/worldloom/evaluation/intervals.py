"""Intervals of success rates."""

import math

Z_95 = 1.959963984540054


def wilson_interval(successes: int, n: int, z: float = Z_95) -> tuple[float, float]:
    """Return Wilson's score interval of a rate, within [0, 1]; without an episode nothing is known: (0, 1).

    Unlike the normal approximation it holds its level near 0 and 1 (Wilson 1927; Brown, Cai and DasGupta 2001).
    """
    if not 0 <= successes <= n:
        raise ValueError(f"successes must lie between 0 and n = {n}; got {successes}")
    if n == 0:
        return 0.0, 1.0
    rate, extra = successes / n, z * z / n
    centre = (rate + extra / 2) / (1 + extra)
    half = z / (1 + extra) * math.sqrt(rate * (1 - rate) / n + extra / (4 * n))
    # At the ends the formula gives 0 and 1 exactly, but for rounding.
    return (
        0.0 if successes == 0 else max(0.0, centre - half),
        1.0 if successes == n else min(1.0, centre + half),
    )
