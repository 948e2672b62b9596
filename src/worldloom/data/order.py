"""An order of windows that reads data beyond the cache once a pass."""

from functools import lru_cache

import numpy as np
from jaxtyping import Int64

from worldloom.core.errors import ConfigError
from worldloom.core.seeds import numpy_generator

_PARTS = 16  # segments in the pool


class SlidingPool:
    """An endless order of window numbers, in which what is drawn at about the same time is stored together.

    Windows are cut into segments of neighbours, taken in another order each pass. The pool holds 16 segments, about
    `pool` windows: at every turn one comes in and one leaves. A segment gives a sixteenth of its windows, drawn
    without replacement, in each of the 16 turns that it stays, and a turn's windows are shuffled. So each window
    comes at most once a pass; fewer than one per segment are left out, other ones each pass. Any draw is equally
    likely to be any window.

    The order is a function of `seed` and of the position in it alone: no state is kept.

    Raises:
        ConfigError: there is no window, or `pool` is below 1.
    """

    def __init__(self, windows: int, pool: int, *, seed: int) -> None:
        if min(windows, pool) < 1:
            raise ConfigError(f"a pool needs windows; got {windows} windows and a pool of {pool}. Give both at least 1")
        self.windows, self._seed = windows, seed
        # A pool that holds all data still has as many segments as it has parts, where there are as many windows.
        self.segments = min(windows, max(_PARTS, -(-windows * _PARTS // pool)))
        self.size = windows // self.segments  # windows of a segment, and draws of a turn
        self._edges = self.size * np.arange(_PARTS + 1) // _PARTS
        self._pass = lru_cache(maxsize=3)(self._draw_pass)
        self._turn = lru_cache(maxsize=2)(self._draw_turn)

    def draws(self, first: int, count: int) -> Int64[np.ndarray, "count"]:
        """Return the windows number `first` to `first` + `count` - 1 of the order."""
        turns = range(first // self.size, (first + count - 1) // self.size + 1)
        there = [self._turn(turn) for turn in turns]
        offset = first % self.size
        return np.concatenate([np.zeros(0, np.int64), *there])[offset : offset + count]

    def turn(self, position: int) -> int:
        """Return the turn in which this draw lies."""
        return position // self.size

    def segment(self, turn: int) -> Int64[np.ndarray, "size"]:
        """Return the windows that come into the pool at this turn, in the order in which they are stored.

        The numbers run on from the last window to the first. A turn before 0 fills the pool that the first draw finds.
        """
        number, index = divmod(turn, self.segments)
        offset, order = self._pass(number)
        return (offset + self.size * int(order[index]) + np.arange(self.size)) % self.windows

    def pool(self, turn: int) -> list[int]:
        """Return the turns at which what is in the pool at `turn` came in, the oldest first."""
        return list(range(turn - _PARTS + 1, turn + 1))

    def coming(self, turn: int, draws: int) -> Int64[np.ndarray, "_"]:
        """Return the windows to have at hand at `turn`: the pool's, and what comes in before the next `draws` are over.

        At least two segments come in, so that storage has a turn's time to bring one.
        """
        last = turn + max(2, -(-draws // self.size))
        return np.concatenate([self.segment(came) for came in range(self.pool(turn)[0], last + 1)])

    def _draw_pass(self, number: int) -> tuple[int, Int64[np.ndarray, "segments"]]:
        generator = numpy_generator(self._seed, "pool", "pass", number)
        # Where the cutting begins differs, so that other windows are left out and other ones are neighbours.
        return int(generator.integers(self.windows)), generator.permutation(self.segments)

    def _draw_turn(self, turn: int) -> Int64[np.ndarray, "size"]:
        parts = []
        for age, came in enumerate(reversed(self.pool(turn))):
            order = numpy_generator(self._seed, "pool", "segment", came).permutation(self.size)
            parts.append(self.segment(came)[order[self._edges[age] : self._edges[age + 1]]])
        return numpy_generator(self._seed, "pool", "turn", turn).permutation(np.concatenate(parts))
