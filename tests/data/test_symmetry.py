"""Turned frames are the same pictures in other positions, and their actions lead to the same places in them."""

import itertools

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from worldloom.core.errors import ConfigError
from worldloom.core.types import ActionSpec, Observations, ObservationSpec, Windows
from worldloom.data import DatasetSpec, SquareSymmetry, TurnedPixels, turn_pictures

FRAMES = np.random.default_rng(0).integers(0, 256, (60, 8, 8, 3), dtype=np.uint8)
PLANE = SquareSymmetry(vectors=((0, 1),))
EVERY = np.arange(8)


def positions_of(frame: np.ndarray) -> list[bytes]:
    """The eight positions of a frame: four quarter turns, each with and without mirroring."""
    return [
        np.rot90(view, turns).tobytes() for turns in range(4) for view in (frame, np.ascontiguousarray(frame[:, ::-1]))
    ]


def dot(right: int, down: int) -> np.ndarray:
    """A picture with one bright pixel, from the middle."""
    picture = np.zeros((9, 9, 1), np.uint8)
    picture[4 + down, 4 + right] = 255
    return picture


def spec(pixels: tuple[int, int, int] | None = (8, 8, 3), vector: int = 0, actions: int = 2) -> DatasetSpec:
    bounds = (-1.0,) * actions, (1.0,) * actions
    return DatasetSpec(
        observation=ObservationSpec(pixels=pixels, vector=vector),
        action=ActionSpec(low=bounds[0], high=bounds[1]),
        labels={},
    )


def test_the_positions_of_a_picture_are_its_quarter_turns_and_mirrorings() -> None:
    turned = turn_pictures(np.repeat(FRAMES[:1], 8, axis=0), EVERY)
    assert sorted(view.tobytes() for view in turned) == sorted(positions_of(FRAMES[0]))
    assert turned[0].tobytes() == FRAMES[0].tobytes()


@pytest.mark.parametrize(("right", "down"), list(itertools.product((-2, 0, 3), (-1, 0, 4))))
def test_a_vector_turns_as_the_pixel_to_which_it_points(right: int, down: int) -> None:
    vectors = PLANE.turn_actions(np.array([[right, down]] * 8, np.float32), EVERY)
    turned = turn_pictures(np.stack([dot(right, down)] * 8), EVERY)
    for vector, picture in zip(vectors.astype(int), turned, strict=True):
        assert picture.tobytes() == dot(*vector).tobytes()


def test_a_spin_changes_its_sign_in_a_mirror_only() -> None:
    def area(triangle: np.ndarray) -> float:
        """Twice the area, positive if the corners go round one way, and negative if the other way."""
        (a, b), (c, d) = triangle[1] - triangle[0], triangle[2] - triangle[0]
        return float(a * d - b * c)

    corners = np.array([[0, 0], [2, 0], [0, 1]], np.float32)
    turned = PLANE.turn_actions(np.stack([corners] * 8), EVERY)
    spins = SquareSymmetry(spins=(1,)).turn_actions(np.array([[5, 1]] * 8, np.float32), EVERY)
    assert [area(each) / 2 for each in turned] == spins[:, 1].tolist()
    assert set(spins[:, 0]) == {5}


@pytest.mark.parametrize("rows", [7, np.array([5, 2, 2]), np.array([[1, 2], [3, 4]]), slice(3, 9), np.array([], int)])
def test_pictures_are_turned_as_they_are_read(rows: int | np.ndarray | slice) -> None:
    before, chosen = FRAMES.copy(), np.random.default_rng(1).integers(0, 8, 60)
    turned = TurnedPixels(FRAMES, chosen)
    assert (turned.shape, len(turned)) == (FRAMES.shape, 60)
    assert np.array_equal(turned[rows], turn_pictures(FRAMES, chosen)[rows])
    assert np.array_equal(FRAMES, before)


def test_a_window_turns_as_a_whole() -> None:
    pixels, actions = FRAMES.reshape(12, 5, 8, 8, 3), np.random.default_rng(2).normal(size=(12, 4, 3, 2))
    windows = Windows(
        observations=Observations(pixels=torch.from_numpy(pixels)), actions=torch.tensor(actions).float().flatten(2)
    )
    chosen = np.arange(12) % 8
    turned = PLANE.turn_windows(windows, chosen, action_size=2)
    assert turned.observations.pixels is not None
    assert np.array_equal(turned.observations.pixels.numpy(), turn_pictures(pixels, chosen))
    for row, position in enumerate(chosen):
        alone = PLANE.turn_actions(actions[row].reshape(-1, 2).astype(np.float32), np.full(12, position))
        assert np.array_equal(turned.actions[row].numpy(), alone.reshape(4, 6))


@pytest.mark.parametrize(
    ("given", "why"),
    [
        (spec(pixels=(8, 6, 3)), r"square pictures only; got pixels \(8, 6, 3\)"),
        (spec(vector=2), "a vector of 2 values"),
        (spec(pixels=None, vector=2), "pixels None"),
        (spec(actions=1), "component 1 of the action, but actions have 1 values"),
    ],
)
def test_a_dataset_that_the_symmetry_does_not_fit_is_refused(given: DatasetSpec, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        PLANE.check(given)
    PLANE.check(spec())


@pytest.mark.parametrize("wrong", [{"vectors": ((0, 0),)}, {"vectors": ((0, 1),), "spins": (1,)}, {"spins": (-1,)}])
def test_a_component_is_named_once(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError, match="named once"):
        SquareSymmetry.model_validate(wrong)
