"""The interfaces through which training reads the frames of a dataset, decoded in advance or streamed."""

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
        """Return the frames of an integer, an integer array of any shape or a slice, as uint8 (*shape, H, W, C)."""
        ...


@runtime_checkable
class ReadsAhead(Protocol):
    """Pixels that can prefetch frames."""

    def expect(self, spans: Int64[np.ndarray, "S 2"]) -> None:
        """Prefetch these spans of rows (first and last row of each), in this order."""
        ...


@runtime_checkable
class Frames(Protocol):
    """All frames of a dataset. `FrameCache` decodes them in advance; `StreamedFrames` reads them from storage."""

    @property
    def spec(self) -> DatasetSpec:
        """The specification of the dataset's episodes."""
        ...

    @property
    def fingerprint(self) -> str:
        """A digest of the data."""
        ...

    @property
    def pixels(self) -> Pixels | None:
        """The N frames, or None if the dataset has no pixels."""
        ...

    @property
    def vector(self) -> Float32[np.ndarray, "N V"] | None:
        """One vector per frame, or None if the dataset has no vectors."""
        ...

    @property
    def actions(self) -> Float32[np.ndarray, "N A"]:
        """One action per frame; zero for the last frame of an episode."""
        ...

    @property
    def labels(self) -> dict[str, Float32[np.ndarray, "N _"]]:
        """The label columns by name, with one row per frame."""
        ...

    @property
    def starts(self) -> Int64[np.ndarray, "E"]:
        """The row of each episode's first frame."""
        ...

    @property
    def lengths(self) -> Int64[np.ndarray, "E"]:
        """The number of actions of each episode."""
        ...

    def close(self) -> None:
        """Stop reading in the background."""
        ...

    def rows(self, episode: int) -> slice:
        """Return the rows of an episode's frames."""
        ...

    def split(self, validation_fraction: float, seed: int) -> tuple[Int64[np.ndarray, "T"], Int64[np.ndarray, "V"]]:
        """Return the episodes for training and for validation."""
        ...


class EpisodeFrames(Closing):
    """Base class that implements the methods of `Frames` that need only `starts` and `lengths`."""

    starts: Int64[np.ndarray, "E"]
    lengths: Int64[np.ndarray, "E"]

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
    """Split the episodes at random, from `seed`, and return those for training and for validation in ascending order.

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
