"""A random order of windows in which data larger than the cache is read only once per pass."""

from functools import lru_cache

import numpy as np
from jaxtyping import Int64

from worldloom.core.errors import ConfigError
from worldloom.core.seeds import numpy_generator

_PARTS = 16  # segments in the pool, and turns that a segment stays in it


class SlidingPool:
    """An endless random order of windows, in which windows sampled close in time are close in storage.

    Windows are split into segments of consecutive windows; the order of the segments changes with each pass. The pool
    contains 16 segments, about `pool` windows. The order consists of turns: at every turn, one segment enters the pool
    and one leaves it, so a segment stays for 16 turns. In each of them, it contributes a sixteenth of its windows,
    sampled without replacement; the windows of a turn are shuffled. Each window therefore appears at most once per
    pass. If the windows cannot be split into equal segments, each pass leaves out a different remainder. Every draw is
    uniform over windows.

    The order has no state: it depends only on `seed` and the position.

    Raises:
        ConfigError: `windows` or `pool` is below 1.
    """

    def __init__(self, windows: int, pool: int, *, seed: int) -> None:
        if min(windows, pool) < 1:
            raise ConfigError(f"'windows' and 'pool' must be at least 1; got {windows} windows and a pool of {pool}")
        self.windows, self._seed = windows, seed
        # A pool that contains all data still has as many segments as parts, if there are enough windows.
        self.segments = min(windows, max(_PARTS, -(-windows * _PARTS // pool)))
        self.size = windows // self.segments  # windows per segment, and draws per turn
        self._edges = self.size * np.arange(_PARTS + 1) // _PARTS
        self._pass = lru_cache(maxsize=3)(self._draw_pass)
        self._turn = lru_cache(maxsize=2)(self._draw_turn)

    def draws(self, first: int, count: int) -> Int64[np.ndarray, "count"]:
        """Return the windows at the positions `first` to `first` + `count` - 1 of the order."""
        turns = range(first // self.size, (first + count - 1) // self.size + 1)
        there = [self._turn(turn) for turn in turns]
        offset = first % self.size
        return np.concatenate([np.zeros(0, np.int64), *there])[offset : offset + count]

    def turn(self, position: int) -> int:
        """Return the turn that contains a position of the order."""
        return position // self.size

    def segment(self, turn: int) -> Int64[np.ndarray, "size"]:
        """Return the windows that enter the pool at this turn, in storage order.

        Window numbers wrap around after the last window. Turns before 0 fill the pool for the first draw.
        """
        number, index = divmod(turn, self.segments)
        offset, order = self._pass(number)
        return (offset + self.size * int(order[index]) + np.arange(self.size)) % self.windows

    def pool(self, turn: int) -> list[int]:
        """Return, for the segments in the pool at `turn`, the turns at which they entered the pool, oldest first."""
        return list(range(turn - _PARTS + 1, turn + 1))

    def coming(self, turn: int, draws: int) -> Int64[np.ndarray, "_"]:
        """Return the windows to cache at `turn`: the pool, and the windows that enter it in the next `draws` draws.

        At least two entering segments are included, so that storage has one turn to fetch a segment.
        """
        last = turn + max(2, -(-draws // self.size))
        return np.concatenate([self.segment(came) for came in range(self.pool(turn)[0], last + 1)])

    def _draw_pass(self, number: int) -> tuple[int, Int64[np.ndarray, "segments"]]:
        generator = numpy_generator(self._seed, "pool", "pass", number)
        # The offset varies, so that each pass has different segments and leaves out different windows.
        return int(generator.integers(self.windows)), generator.permutation(self.segments)

    def _draw_turn(self, turn: int) -> Int64[np.ndarray, "size"]:
        parts = []
        for age, came in enumerate(reversed(self.pool(turn))):
            order = numpy_generator(self._seed, "pool", "segment", came).permutation(self.size)
            parts.append(self.segment(came)[order[self._edges[age] : self._edges[age + 1]]])
        return numpy_generator(self._seed, "pool", "turn", turn).permutation(np.concatenate(parts))
