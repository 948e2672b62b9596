import gymnasium
import numpy as np
import pytest
from gymnasium import spaces

from worldloom.core.errors import DataError, EnvironmentFailure
from worldloom.envs.spaces import ActionAdapter, ObservationAdapter, make_vector_env
from worldloom.envs.vector_world import VectorWorld

IMAGE = spaces.Box(0, 255, (4, 6, 3), np.uint8)
VECTOR = spaces.Box(-1, 1, (2,), np.float64)


def test_an_image_and_vectors_are_told_apart_in_sorted_order() -> None:
    space = spaces.Dict({"z": VECTOR, "camera": IMAGE, "a": spaces.Discrete(3, start=1)})
    adapter = ObservationAdapter(space)
    batch = {
        "z": np.array([[0.5, 0.25]]),
        "camera": np.full((1, 4, 6, 3), 7, np.uint8),
        "a": np.array([2]),
    }
    observations = adapter(batch)
    assert adapter.spec.pixels == (4, 6, 3)
    assert adapter.spec.vector == 5
    assert observations.vector is not None
    assert observations.vector.tolist() == [[0.0, 1.0, 0.0, 0.5, 0.25]]
    assert observations.axes == (1,)


def test_two_images_are_refused() -> None:
    with pytest.raises(EnvironmentFailure, match="2 images"):
        ObservationAdapter(spaces.Dict({"a": IMAGE, "b": IMAGE}))


def test_a_value_that_is_not_finite_is_named() -> None:
    with pytest.raises(EnvironmentFailure, match="episode 3: .*not finite"):
        ObservationAdapter(VECTOR)(np.array([[0.0, np.nan]]), where="episode 3: ")


def test_a_frame_of_another_shape_is_named() -> None:
    with pytest.raises(EnvironmentFailure, match="must be uint8 of shape"):
        ObservationAdapter(IMAGE)(np.zeros((1, 5, 6, 3), np.uint8))


@pytest.mark.parametrize("action", [[2.0, 0.0], [np.nan, 0.0], [0.0, -4.0]])
def test_actions_out_of_bounds_are_refused(action: list[float]) -> None:
    adapter = ActionAdapter(spaces.Box(np.array([-1, -3], np.float32), np.array([1, 5], np.float32)))
    with pytest.raises(DataError, match="out of bounds or not finite"):
        adapter(np.array([action], np.float32))
    assert adapter(np.array([[1.0, 5.0]], np.float32)).tolist() == [[1.0, 5.0]]


def test_discrete_actions_are_scores() -> None:
    adapter = ActionAdapter(spaces.Discrete(3, start=5))
    assert adapter.spec.size == 3
    assert adapter(np.array([[0.1, 0.9, 0.3]], np.float32)).tolist() == [6]


def test_unbounded_actions_are_refused() -> None:
    with pytest.raises(DataError, match="must be finite"):
        ActionAdapter(spaces.Box(-np.inf, np.inf, (1,), np.float32))


class Telling(gymnasium.Env):
    """Tells numbers, a text, and a number that only the copy of seed 0 has."""

    observation_space, action_space = VECTOR, VECTOR

    def reset(self, *, seed=None, options=None):
        infos = {"position": np.zeros(2), "text": "a", "flag": True, **({"partial": 1.0} if seed == 0 else {})}
        return np.zeros(2), infos


def test_labels_are_the_numeric_columns_that_all_environments_have() -> None:
    gymnasium.register("tests/Telling-v0", entry_point=Telling)
    with VectorWorld("tests/Telling-v0", 2) as world:
        labels = world.labels(world.reset([0, 1], lambda row: ""))
    assert sorted(labels) == ["flag", "position"]
    assert labels["flag"].shape == (2, 1)


def test_an_unknown_environment_says_what_to_do() -> None:
    with pytest.raises(EnvironmentFailure, match="--import MODULE"):
        make_vector_env("nowhere/Nothing-v0", 1)
