import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from worldloom.core.errors import ConfigError
from worldloom.core.types import ActionSpec, Observations
from worldloom.data import POLICIES
from worldloom.data.policies import scale_to_bounds

NOTHING = Observations.from_numpy(None, np.zeros((1, 1), np.float32))
BOX = ActionSpec(low=(-1.0, -1.0), high=(1.0, 1.0))
DISCRETE = ActionSpec(low=(0.0,) * 4, high=(1.0,) * 4, discrete=True)


def run(name: str, action: ActionSpec, steps: int, seeds: list[int], **options: float) -> np.ndarray:
    """Actions (steps, episodes, A)."""
    policy = POLICIES[name](action, **options)
    policy.reset([np.random.default_rng(seed) for seed in seeds])
    return np.stack([policy.act(NOTHING) for _ in range(steps)])


bounds = st.tuples(st.floats(-10, 10), st.floats(0.01, 10)).map(lambda pair: (pair[0], pair[0] + pair[1]))


@settings(max_examples=40)
@given(st.sampled_from(["directed-walk", "uniform"]), st.lists(bounds, min_size=1, max_size=5), st.integers(0, 99))
def test_actions_are_within_any_bounds(name: str, pairs: list[tuple[float, float]], seed: int) -> None:
    action = ActionSpec(low=tuple(low for low, _ in pairs), high=tuple(high for _, high in pairs))
    actions = run(name, action, 30, [seed, seed + 1])
    slack = 1e-5 * (np.array(action.high) - action.low)
    assert actions.dtype == np.float32
    assert (actions >= action.low - slack).all()
    assert (actions <= action.high + slack).all()


@pytest.mark.parametrize("name", ["directed-walk", "uniform"])
@pytest.mark.parametrize("action", [BOX, DISCRETE])
def test_an_episode_does_not_depend_on_those_beside_it(name: str, action: ActionSpec) -> None:
    together, alone = run(name, action, 50, [1, 2, 3]), run(name, action, 50, [2])
    assert np.array_equal(together[:, 1], alone[:, 0])
    assert not np.array_equal(together[:, 0], together[:, 1])


def test_a_directed_walk_keeps_its_heading_and_changes_its_speed() -> None:
    actions = run("directed-walk", BOX, 400, list(range(50)))
    speed = np.linalg.norm(actions, axis=-1)
    assert speed.min() >= 0.4 - 1e-5
    assert speed.max() <= 1.0 + 1e-5
    assert speed.std() > 0.1
    heading = np.arctan2(actions[..., 1], actions[..., 0])
    turn = np.abs((np.diff(heading, axis=0) + np.pi) % (2 * np.pi) - np.pi)
    # Median of |normal(0, 0.3)| is 0.20; a new heading turns by more than a radian in two of three cases.
    assert 0.18 < np.median(turn) < 0.24
    assert 0.02 < (turn > 1.2).mean() < 0.05
    # It goes far: a walk of steps without memory would be at about sqrt(20) of mean speed.
    distance = np.linalg.norm(actions[:20].sum(axis=0), axis=-1)
    assert distance.mean() > 2 * np.sqrt(20) * 0.7


@pytest.mark.parametrize("size", [1, 2, 3, 6])
def test_all_directions_are_taken_in_any_dimension(size: int) -> None:
    action = ActionSpec(low=(-1.0,) * size, high=(1.0,) * size)
    actions = run("directed-walk", action, 50, list(range(200))).reshape(-1, size)
    norms = np.linalg.norm(actions, axis=1)
    assert norms.min() >= 0.4 - 1e-5
    assert norms.max() <= 1.0 + 1e-5
    assert np.abs(actions.mean(axis=0)).max() < 0.1
    np.testing.assert_allclose(np.corrcoef(actions.T) if size > 1 else 1.0, np.eye(size), atol=0.15)


def test_no_noise_and_no_turns_is_a_straight_line() -> None:
    actions = run("directed-walk", BOX, 20, [0], heading_noise=0.0, turn_probability=0.0, min_speed=0.5, max_speed=0.5)
    assert np.ptp(actions, axis=0).max() < 1e-6


def test_discrete_choices_are_sticky_or_not() -> None:
    sticky, free = (run(name, DISCRETE, 500, [0, 1]) for name in ("directed-walk", "uniform"))
    for actions in (sticky, free):
        assert set(np.unique(actions)) == {0.0, 1.0}
        assert (actions.sum(axis=-1) == 1).all()
        assert actions.any(axis=(0, 1)).all()
    same = [(actions[1:] == actions[:-1]).all(axis=-1).mean() for actions in (sticky, free)]
    assert same[0] > 0.9
    assert 0.15 < same[1] < 0.35


def test_rest_stays_rest_under_asymmetric_bounds() -> None:
    action = ActionSpec(low=(-1.0, 2.0), high=(5.0, 4.0))
    unit = np.array([[0.0, 0.0], [1.0, 1.0], [-1.0, -1.0]])
    assert scale_to_bounds(unit, action).tolist() == [[0.0, 3.0], [5.0, 4.0], [-1.0, 2.0]]


def test_options_are_checked() -> None:
    with pytest.raises(ConfigError, match="did you mean 'heading_noise'"):
        POLICIES["directed-walk"](BOX, heading_nose=1)
    with pytest.raises(ConfigError, match="turn_probability"):
        POLICIES["directed-walk"](BOX, turn_probability=2)
    with pytest.raises(ConfigError, match="min_speed"):
        POLICIES["directed-walk"](BOX, min_speed=0.9, max_speed=0.5)
    with pytest.raises(ConfigError, match="unknown key"):
        POLICIES["uniform"](BOX, min_speed=1)
