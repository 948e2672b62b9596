"""Checks before training for useless data: nothing moves, all actions are equal, or a value is absurd."""

import numpy as np
from jaxtyping import Int

from worldloom.core.errors import DataError
from worldloom.data.frames import Frames, Pixels
from worldloom.data.statistics import Statistics

_CHUNK = 64  # frames that are compared at once
_FARTHEST, _LARGEST = 1e9, 1e18  # standard deviations from the mean; a value whose square overflows in float32


def require_variation(
    frames: Frames, episodes: Int[np.ndarray, "T"], *, pixels: bool = True, vector: bool = True
) -> None:
    """Check that, in these episodes, actions differ and at least one observed value changes.

    `pixels` and `vector` say which parts of the observation the model uses. Pixels are read until the first change, so
    the check is fast for data that vary.

    Raises:
        DataError: all actions are equal, no part that is used changes within any episode, or all pixels are equal.
    """
    inside = np.zeros(len(frames.actions), bool)  # rows with an action that leads to a next row
    for episode in episodes:
        rows = frames.rows(int(episode))
        inside[rows.start : rows.stop - 1] = True
    count = f"{int(inside.sum()):,}"
    actions = frames.actions[inside]
    if not len(actions) or (actions == actions[0]).all():
        raise DataError(
            f"all {count} actions are equal, {_short(actions[:1])}, so their effect cannot be learned. "
            f"Check the action columns, and record different actions"
        )
    seen: dict[str, bool] = {}  # the parts that are used, and whether they move
    if vector and frames.vector is not None:
        before, after = frames.vector[:-1][inside[:-1]], frames.vector[1:][inside[:-1]]
        seen[f"the vector ({_columns(frames)})"] = bool((before != after).any())
    if pixels and frames.pixels is not None:
        seen["the pixels"] = _moves(frames.pixels, [frames.rows(int(episode)) for episode in episodes])
    if not any(seen.values()):
        raise DataError(
            f"nothing that is observed ever moves: within each of {len(episodes)} episodes, no frame differs from the "
            f"first in {' or '.join(seen)}, although {count} actions are taken. Check that the right columns were "
            f"selected, and that the sensors were connected"
        )
    if seen.get("the pixels") is False and _constant(frames.pixels, episodes, frames):
        raise DataError(
            f"all pixels are constant: every frame of {len(episodes)} episodes is the same picture. Check the camera, "
            f"or leave the pixels out (worldloom data convert --camera none)"
        )


def require_plausible(frames: Frames, statistics: Statistics) -> None:
    """Check that no value of the vector, in any episode, is so extreme that a model's numbers would not stay finite.

    Raises:
        DataError: a value is beyond 1e18, or more than a billion standard deviations from the mean in `statistics`.
    """
    if frames.vector is None or statistics.vector_mean is None or statistics.vector_std is None:
        return
    mean, std = (each.numpy().astype(np.float64) for each in (statistics.vector_mean, statistics.vector_std))
    scale = np.maximum(std, 1e-6 * np.maximum(1.0, np.abs(mean)))  # a constant column may change in another episode
    lowest, highest = frames.vector.min(axis=0), frames.vector.max(axis=0)
    for number in range(len(mean)):
        low, high = float(lowest[number]), float(highest[number])
        value = low if mean[number] - low > high - mean[number] else high
        if abs(value) > _LARGEST or abs(value - mean[number]) > _FARTHEST * scale[number]:
            row = int(np.flatnonzero(frames.vector[:, number] == np.float32(value))[0])
            episode = int(np.searchsorted(frames.starts, row, side="right")) - 1
            raise DataError(
                f"{_column(frames, number)} is {value:.4g} at step {row - int(frames.starts[episode])} of episode "
                f"{episode}; the mean is {mean[number]:.4g}, the standard deviation {std[number]:.4g}. A sensor has "
                f"failed there, or a missing value is stored as a number. Correct the value, or leave out the episode "
                f"or the column"
            )


def _column(frames: Frames, number: int) -> str:
    """Return a name for a value of the vector."""
    columns = frames.spec.environment.get("vector")
    names = [
        str(column[0]) if column[1] == 1 else f"{column[0]}[{index}]"
        for column in (columns if isinstance(columns, list) else [])
        if isinstance(column, list) and len(column) == 2 and isinstance(column[1], int)
        for index in range(column[1])
    ]
    return names[number] if len(names) == frames.spec.observation.vector else f"value {number} of the vector"


def _moves(pixels: Pixels, episodes: list[slice]) -> bool:
    """Return whether a frame of any episode differs from the first frame of the same episode."""
    for rows in episodes:
        first = pixels[rows.start]
        for begin in range(rows.start + 1, rows.stop, _CHUNK):
            if (pixels[begin : min(begin + _CHUNK, rows.stop)] != first).any():
                return True
    return False


def _constant(pixels: Pixels | None, episodes: Int[np.ndarray, "T"], frames: Frames) -> bool:
    """Return whether the first frames of all episodes are the same."""
    assert pixels is not None
    first = pixels[frames.rows(int(episodes[0])).start]
    return not any((pixels[frames.rows(int(episode)).start] != first).any() for episode in episodes)


def _columns(frames: Frames) -> str:
    """Return the names of the vector's columns, if the dataset knows them."""
    columns = frames.spec.environment.get("vector")
    names = [str(column[0]) for column in columns] if isinstance(columns, list) and all(columns) else []
    return ", ".join(names) or f"{frames.spec.observation.vector} values"


def _short(values: np.ndarray) -> str:
    shown = ", ".join(f"{value:.4g}" for value in values.reshape(-1)[:8])
    return f"({shown}{', ...' if values.size > 8 else ''})"
