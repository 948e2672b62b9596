"""Turned frames are the same pictures in other positions."""

import numpy as np
import pytest

from worldloom.data import TurnedPixels

FRAMES = np.random.default_rng(0).integers(0, 256, (60, 8, 8, 3), dtype=np.uint8)


def positions(frame: np.ndarray) -> list[bytes]:
    """The eight positions of a frame: four quarter turns, each with and without mirroring."""
    return [
        np.rot90(view, turns).tobytes() for turns in range(4) for view in (frame, np.ascontiguousarray(frame[:, ::-1]))
    ]


def test_each_frame_is_shown_in_one_of_its_seven_other_positions() -> None:
    turned = TurnedPixels(FRAMES, seed=3)
    found = [positions(frame).index(view.tobytes()) for frame, view in zip(FRAMES, turned[:], strict=True)]
    assert set(found) == set(range(1, 8))


@pytest.mark.parametrize("rows", [7, np.array([5, 2, 2]), slice(3, 9), np.array([], int)])
def test_the_position_depends_only_on_the_seed_and_the_row(rows: int | np.ndarray | slice) -> None:
    before, every = FRAMES.copy(), TurnedPixels(FRAMES, seed=3)[:]
    turned = TurnedPixels(FRAMES, seed=3)
    assert (turned.shape, len(turned)) == (FRAMES.shape, 60)
    assert np.array_equal(turned[rows], every[rows])
    assert np.array_equal(FRAMES, before)
    assert not np.array_equal(TurnedPixels(FRAMES, seed=4)[:], every)
