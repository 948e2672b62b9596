"""The frames of a dataset as training reads them, decoded or streamed."""

from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float32, Int64

from worldloom.core.closing import Closing
from worldloom.core.errors import ConfigError
from worldloom.core.seeds import numpy_generator
from worldloom.data.spec import DatasetSpec


@runtime_checkable
class Pixels(Protocol):
    """Frames indexed by rows: an array, or a reader that gets them from storage on demand."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Frames, height, width, channels."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, rows: Any, /) -> Any:
        """Return the frames of these rows (an integer, an array of any shape or a slice), uint8, (*shape, H, W, C)."""
        ...


@runtime_checkable
class ReadsAhead(Protocol):
    """Pixels that can prefetch frames."""

    def expect(self, spans: Int64[np.ndarray, "S 2"]) -> None:
        """Prefetch these rows (first and last of each span), the first span first."""
        ...


@runtime_checkable
class Frames(Protocol):
    """All frames of a dataset: `FrameCache` holds them decoded, `StreamedFrames` reads them from storage."""

    @property
    def spec(self) -> DatasetSpec:
        """What an episode holds."""
        ...

    @property
    def fingerprint(self) -> str:
        """A digest of the data."""
        ...

    @property
    def pixels(self) -> Pixels | None:
        """N frames, or None."""
        ...

    @property
    def vector(self) -> Float32[np.ndarray, "N V"] | None:
        """A row for each frame, or None."""
        ...

    @property
    def actions(self) -> Float32[np.ndarray, "N A"]:
        """A row for each frame; zero in the last of an episode."""
        ...

    @property
    def labels(self) -> dict[str, Float32[np.ndarray, "N _"]]:
        """Named vectors, a row for each frame."""
        ...

    @property
    def starts(self) -> Int64[np.ndarray, "E"]:
        """The first frame of each episode."""
        ...

    @property
    def lengths(self) -> Int64[np.ndarray, "E"]:
        """The number of actions of each episode."""
        ...

    def close(self) -> None:
        """Stop reading in the background, if there is any."""
        ...

    def rows(self, episode: int) -> slice:
        """Return the rows of an episode's frames."""
        ...

    def split(self, validation_fraction: float, seed: int) -> tuple[Int64[np.ndarray, "T"], Int64[np.ndarray, "V"]]:
        """Return the episodes for training and for validation."""
        ...


class EpisodeFrames(Closing):
    """The part of `Frames` that follows from `starts` and `lengths`."""

    starts: Int64[np.ndarray, "E"]
    lengths: Int64[np.ndarray, "E"]

    def rows(self, episode: int) -> slice:
        """Return the rows of an episode's frames."""
        first = int(self.starts[episode])
        return slice(first, first + int(self.lengths[episode]) + 1)

    def split(self, validation_fraction: float, seed: int) -> tuple[Int64[np.ndarray, "T"], Int64[np.ndarray, "V"]]:
        """Return the episodes for training and for validation: see `split_episodes`."""
        return split_episodes(len(self.lengths), validation_fraction, seed)


def split_episodes(
    episodes: int, validation_fraction: float, seed: int
) -> tuple[Int64[np.ndarray, "T"], Int64[np.ndarray, "V"]]:
    """Return the episodes for training and for validation, drawn by `seed`, each in ascending order.

    Both have episodes unless the fraction is 0 or there is only one episode, which is then for training.

    Raises:
        ConfigError: the fraction is not in [0, 1).
    """
    if not 0 <= validation_fraction < 1:
        raise ConfigError(f"the validation fraction must be at least 0 and below 1; got {validation_fraction}")
    held_out = round(validation_fraction * episodes)
    if validation_fraction > 0:
        held_out = min(max(held_out, 1), episodes - 1)
    order = numpy_generator(seed, "split").permutation(episodes)
    return np.sort(order[held_out:]), np.sort(order[:held_out])
