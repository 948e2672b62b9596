"""Training windows, gathered from the frames of a dataset."""

import logging

import numpy as np
import torch
from jaxtyping import Bool, Int, Int64

from worldloom.core.errors import ConfigError, DataError
from worldloom.core.types import Observations, Windows
from worldloom.data.frames import Frames, ReadsAhead

_log = logging.getLogger(__name__)


class WindowSampler:
    """A sampler of windows of `context` + `horizon` frames, `block` steps apart, from all episodes or from `episodes`.

    A window is identified by its current frame, the last frame of its context. If a window starts before its episode,
    the episode's first frame is repeated, with zero actions. A model with history can thus recognise the start.
    All windows are equally likely; episodes that are too short for a window are left out.

    Raises:
        DataError: no episode is long enough for a window, or one of `episodes` does not exist.
        ConfigError: `context`, `horizon` or `block` is below 1.
    """

    def __init__(
        self, cache: Frames, *, context: int, horizon: int, block: int, episodes: np.ndarray | None = None
    ) -> None:
        if min(context, horizon, block) < 1:
            raise ConfigError(
                f"'context', 'horizon' and 'block' must be at least 1; got {context}, {horizon} and {block}"
            )
        starts, lengths = cache.starts, cache.lengths
        chosen = np.arange(len(lengths)) if episodes is None else np.asarray(episodes, np.int64)
        if ((chosen < 0) | (chosen >= len(lengths))).any():
            raise DataError(f"'episodes' must be within 0 to {len(lengths) - 1}; got {chosen.min()} to {chosen.max()}")
        counts = np.maximum(lengths[chosen] - block * horizon + 1, 0)
        if not counts.any():
            if not len(chosen):
                raise DataError(
                    f"there are no episodes; expected at least one with {block * horizon} steps (horizon {horizon}, "
                    f"block {block}). Collect episodes"
                )
            raise DataError(
                f"no episode is long enough: a window of horizon {horizon} and block {block} needs {block * horizon} "
                f"steps, but episodes have {lengths[chosen].min()} to {lengths[chosen].max()}. Shorten the horizon or "
                f"the block, or collect longer episodes"
            )
        if not counts.all():
            _log.info("%d of %d episodes are too short for a window", int((counts == 0).sum()), len(chosen))
        self._cache = cache
        self._starts, self._ends, self._counts = starts[chosen], np.cumsum(counts), counts
        self._frames = block * np.arange(1 - context, horizon + 1)
        self._actions = self._frames[:-1, None] + np.arange(block)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def sample(self, batch: int, generator: np.random.Generator) -> Windows:
        """Return `batch` windows, sampled uniformly with replacement."""
        return self.at(generator.integers(len(self), size=batch))

    def at(self, windows: Int[np.ndarray, "B"]) -> Windows:
        """Return the windows with these numbers; windows are numbered from 0, by episode and then by time."""
        frames, actions, real = self._rows(windows)
        taken = self._cache.actions[actions]
        taken[~real] = 0.0
        pixels, vector = self._cache.pixels, self._cache.vector
        return Windows(
            observations=Observations(
                pixels=None if pixels is None else torch.from_numpy(pixels[frames]),
                vector=None if vector is None else torch.from_numpy(vector[frames]),
            ),
            actions=torch.from_numpy(taken.reshape(*taken.shape[:2], -1)),
            labels={name: torch.from_numpy(column[frames]) for name, column in self._cache.labels.items()},
        )

    def expect(self, windows: Int[np.ndarray, "B"]) -> None:
        """Prefetch the frames of the windows that will be requested next, in this order."""
        if isinstance(self._cache.pixels, ReadsAhead):
            self._cache.pixels.expect(self._spans(windows))

    def _rows(
        self, windows: Int[np.ndarray, "B"]
    ) -> tuple[Int64[np.ndarray, "B N"], Int64[np.ndarray, "B M K"], Bool[np.ndarray, "B M K"]]:
        """Return the rows of the frames, the rows of the actions, and a mask of the actions inside the episode."""
        episode = np.searchsorted(self._ends, windows, side="right")
        current = windows - (self._ends - self._counts)[episode]
        start = self._starts[episode]
        frames = np.maximum(current[:, None] + self._frames, 0) + start[:, None]
        steps = current[:, None, None] + self._actions
        return frames, np.maximum(steps, 0) + start[:, None, None], steps >= 0

    def _spans(self, windows: Int[np.ndarray, "B"]) -> Int64[np.ndarray, "S 2"]:
        """Return spans (first and last row) of the frames of these windows, one per run of windows in an episode."""
        episode = np.searchsorted(self._ends, windows, side="right")
        current = windows - (self._ends - self._counts)[episode]
        begins = np.flatnonzero(np.append(True, (np.diff(windows) != 1) | (np.diff(episode) != 0)))[: len(windows)]
        ends = np.append(begins[1:], len(windows)) - 1
        first = np.maximum(current[begins] + self._frames[0], 0)
        within = np.stack([first, current[ends] + self._frames[-1]], axis=1)
        spans: Int64[np.ndarray, "S 2"] = self._starts[episode[begins], None] + within
        return spans
