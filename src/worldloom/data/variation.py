"""The check that data vary. No useful model can be learned if nothing moves, or if all actions are equal."""

import numpy as np
from jaxtyping import Int

from worldloom.core.errors import DataError
from worldloom.data.frames import Frames, Pixels

_CHUNK = 64  # frames that are compared at once


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
