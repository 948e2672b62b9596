"""The interfaces through which training reads the frames of a dataset, whether decoded in advance or streamed."""

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float32, Int64

from worldloom.core.closing import Closing
from worldloom.core.errors import ConfigError
from worldloom.core.seeds import numpy_generator
from worldloom.data.spec import DatasetSpec


@runtime_checkable
class Pixels(Protocol):
    """Frames indexed by rows: an array, or a reader that fetches frames from storage on demand."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape (N, H, W, C)."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, rows: Any, /) -> Any:
        """Return the frames of `rows` (an integer, an integer array or a slice) as uint8 (*shape, H, W, C)."""
        ...


@runtime_checkable
class ReadsAhead(Pixels, Protocol):
    """Pixels that can prefetch frames in the background; `close` stops this."""

    def expect(self, spans: Int64[np.ndarray, "S 2"]) -> None:
        """Prefetch these spans of rows (first and last row of each), in this order."""
        ...

    def close(self) -> None:
        """Stop reading in the background; frames can no longer be read."""
        ...


@dataclass(frozen=True, kw_only=True, eq=False)
class Frames(Closing):
    """All frames of a dataset: N frames of E episodes, one after the other. `close` stops any background prefetching.

    For each episode, `starts` contains the row of the first frame, and `lengths` the number of actions (one fewer than
    frames). `pixels` are decoded in memory, mapped from a file, or read from storage on demand. The action in the last
    row of each episode is zero and never used.
    """

    spec: DatasetSpec
    fingerprint: str
    pixels: Pixels | None
    vector: Float32[np.ndarray, "N V"] | None
    actions: Float32[np.ndarray, "N A"]
    labels: dict[str, Float32[np.ndarray, "N _"]]
    starts: Int64[np.ndarray, "E"]
    lengths: Int64[np.ndarray, "E"]

    def close(self) -> None:
        """Stop reading in the background."""
        if isinstance(self.pixels, ReadsAhead):
            self.pixels.close()

    def rows(self, episode: int) -> slice:
        """Return the rows of an episode's frames."""
        first = int(self.starts[episode])
        return slice(first, first + int(self.lengths[episode]) + 1)

    def split(self, validation_fraction: float, seed: int) -> tuple[Int64[np.ndarray, "T"], Int64[np.ndarray, "V"]]:
        """Return the episodes for training and for validation; see `split_episodes`."""
        return split_episodes(len(self.lengths), validation_fraction, seed)


def split_episodes(
    episodes: int, validation_fraction: float, seed: int
) -> tuple[Int64[np.ndarray, "T"], Int64[np.ndarray, "V"]]:
    """Split the episodes at random; return the episodes for training and for validation, each in ascending order.

    Neither part is empty unless the fraction is 0 or there is only one episode, which is then used for training.

    Raises:
        ConfigError: the fraction is not in [0, 1).
    """
    if not 0 <= validation_fraction < 1:
        raise ConfigError(f"'validation_fraction' must be at least 0 and below 1; got {validation_fraction}")
    held_out = round(validation_fraction * episodes)
    if validation_fraction > 0:
        held_out = min(max(held_out, 1), episodes - 1)
    order = numpy_generator(seed, "split").permutation(episodes)
    return np.sort(order[held_out:]), np.sort(order[:held_out])
