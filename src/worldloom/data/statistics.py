"""Means and standard deviations of the data, for the normalisation of model inputs."""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float32, Int
from torch import Tensor

from worldloom.core.errors import DataError
from worldloom.core.seeds import numpy_generator
from worldloom.core.types import ActionSpec, ObservationSpec
from worldloom.data.frames import Frames, Pixels

_CHUNK = 64  # frames that are summed at once


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """Mean and standard deviation of each pixel and channel (0 to 255), vector value and action value.

    A constant value has a standard deviation of 0; apply a lower limit before you divide by a deviation.
    """

    pixel_mean: Float32[Tensor, "H W C"] | None
    pixel_std: Float32[Tensor, "H W C"] | None
    vector_mean: Float32[Tensor, "V"] | None
    vector_std: Float32[Tensor, "V"] | None
    action_mean: Float32[Tensor, "A"]
    action_std: Float32[Tensor, "A"]

    @classmethod
    def unit(cls, observation: ObservationSpec, action: ActionSpec) -> "Statistics":
        """Return means of 0 and deviations of 1, as placeholders for a model that loads its statistics later."""
        pixels, vector = observation.pixels, observation.vector
        return cls(
            pixel_mean=None if pixels is None else torch.zeros(pixels),
            pixel_std=None if pixels is None else torch.ones(pixels),
            vector_mean=torch.zeros(vector) if vector else None,
            vector_std=torch.ones(vector) if vector else None,
            action_mean=torch.zeros(action.size),
            action_std=torch.ones(action.size),
        )


def compute_statistics(
    cache: Frames, *, seed: int, max_frames: int = 4096, episodes: Int[np.ndarray, "T"] | None = None
) -> Statistics:
    """Compute the statistics of all episodes or of `episodes`.

    Pixel statistics use at most `max_frames` frames, sampled with `seed`.

    Raises:
        DataError: there are no episodes.
    """
    chosen = np.arange(len(cache.lengths)) if episodes is None else episodes
    if len(chosen) == 0:
        raise DataError("there are no episodes to compute statistics from; collect or select episodes")
    frames = np.concatenate([np.arange(cache.starts[e], cache.starts[e] + cache.lengths[e] + 1) for e in chosen])
    last = np.zeros(len(cache.actions), bool)
    last[cache.starts + cache.lengths] = True
    action_mean, action_std = _moments(cache.actions, frames[~last[frames]])
    pixel_mean = pixel_std = vector_mean = vector_std = None
    if cache.vector is not None:
        vector_mean, vector_std = _moments(cache.vector, frames)
    if cache.pixels is not None:
        count = min(max_frames, len(frames))
        sample = numpy_generator(seed, "statistics").choice(frames, size=count, replace=False)
        pixel_mean, pixel_std = _moments(cache.pixels, np.sort(sample))
    return Statistics(
        pixel_mean=pixel_mean,
        pixel_std=pixel_std,
        vector_mean=vector_mean,
        vector_std=vector_std,
        action_mean=action_mean,
        action_std=action_std,
    )


def _moments(
    values: np.ndarray | Pixels, rows: Int[np.ndarray, "R"]
) -> tuple[Float32[Tensor, "*shape"], Float32[Tensor, "*shape"]]:
    # The first row is subtracted first, because cancellation with a large mean would lose a small variance.
    origin = values[rows[0]].astype(np.float64)
    total, squares = np.zeros_like(origin), np.zeros_like(origin)
    for first in range(0, len(rows), _CHUNK):
        part = values[rows[first : first + _CHUNK]] - origin
        total += part.sum(axis=0)
        squares += np.square(part, out=part).sum(axis=0)
    mean = total / len(rows)
    std = np.sqrt(np.maximum(squares / len(rows) - mean**2, 0.0))
    return torch.from_numpy((origin + mean).astype(np.float32)), torch.from_numpy(std.astype(np.float32))
