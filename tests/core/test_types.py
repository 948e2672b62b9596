from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from worldloom.core.errors import DataError, PlanningError
from worldloom.core.seeds import derive_seed
from worldloom.core.types import ActionBounds, ActionSpec, Episode, ModelSpec, ObservationSpec

ACTIONS = np.zeros((3, 2), np.float32)
FRAMES = np.zeros((4, 5, 6, 3), np.uint8)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"pixels": FRAMES[:3]}, "pixels has 3 frames for 3 actions; expected 4 frames"),
        ({"pixels": FRAMES.astype(np.float32)}, "must be uint8"),
        ({"vector": np.full((4, 1), np.nan, np.float32)}, "not finite at step 0"),
        ({"pixels": FRAMES, "actions": ACTIONS.astype(np.float64)}, "must be float32"),
        ({"pixels": FRAMES, "labels": {"x": np.zeros((3, 1), np.float32)}}, "label 'x' has 3 frames"),
        ({}, "neither pixels nor vectors"),
        ({"pixels": FRAMES[:1], "actions": ACTIONS[:0]}, "at least one action"),
    ],
)
def test_an_episode_that_does_not_fit_is_refused(parts: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(DataError, match=message):
        Episode(**{"actions": ACTIONS, **parts})


@pytest.mark.parametrize(
    ("low", "high"),
    [
        ((0.0,), (0.0,)),
        ((-np.inf,), (0.0,)),
        ((), ()),
        ((0.0,), (1.0, 1.0)),
        ((-1e300,), (1e300,)),
        ((1.0,), (1.0 + 1e-12,)),
    ],
)
def test_action_bounds_are_finite_and_ordered(low: tuple[float, ...], high: tuple[float, ...]) -> None:
    with pytest.raises(DataError, match="bounds"):
        ActionSpec(low=low, high=high)


def test_an_action_has_a_largest_size() -> None:
    with pytest.raises(DataError, match="an action has 65,537 values; at most 65,536 are supported"):
        ActionSpec(low=(0.0,) * 65_537, high=(1.0,) * 65_537)


@pytest.mark.parametrize("parts", [{"vector": -1}, {"pixels": (8, 0, 3)}])
def test_an_observation_has_a_shape(parts: dict[str, Any]) -> None:
    with pytest.raises(DataError, match="expected pixels of shape"):
        ObservationSpec(**parts)


def test_block_bounds_repeat_the_action_bounds() -> None:
    spec = ModelSpec(
        observation=ObservationSpec(vector=1),
        action=ActionSpec(low=(-1.0, 0.0), high=(1.0, 2.0)),
        block=2,
        context=1,
        latent_dim=3,
    )
    bounds = ActionBounds.of(spec)
    assert bounds.low.tolist() == [-1, 0, -1, 0]
    assert bounds.clamp(torch.full((5, 4), 9.0))[0].tolist() == [1, 2, 1, 2]
    with pytest.raises(PlanningError, match="low < high"):
        ActionBounds(low=bounds.high, high=bounds.low)


@given(st.integers(0, 2**40), st.integers(0, 1000), st.integers(0, 1000))
def test_seeds_depend_on_their_names_alone(root: int, first: int, second: int) -> None:
    assert derive_seed(root, "episode", first) == derive_seed(root, "episode", first)
    assert (derive_seed(root, "a", first) == derive_seed(root, "a", second)) == (first == second)
    assert derive_seed(root, "a", first) != derive_seed(root, "b", first)
