"""PushT: what is drawn is where things are, and the same seed tells the same story."""

import sys

import gymnasium
import numpy as np
import pytest

import worldloom.envs  # noqa: F401 - registers the worlds
from worldloom.core.errors import EnvironmentFailure
from worldloom.core.types import ActionSpec, Observations
from worldloom.data import POLICIES
from worldloom.envs.pusht import PushTEnv
from worldloom.envs.spaces import make_vector_env

pytest.importorskip("gym_pusht")
pygame = pytest.importorskip("pygame")

ACTION = ActionSpec(low=(-1.0, -1.0), high=(1.0, 1.0))
DISC, BLOCK = (65, 105, 225), (119, 136, 153)


def centre_of(pixels: np.ndarray, colour: tuple[int, int, int]) -> np.ndarray:
    near = (np.abs(pixels.astype(int) - colour) <= 40).all(axis=2)
    return np.argwhere(near).mean(axis=0)[::-1] + 0.5


def play(policy: str, seeds: list[int], steps: int) -> dict[str, np.ndarray]:
    envs = make_vector_env("worldloom/PushT-v0", len(seeds))
    walker = POLICIES[policy](ACTION)
    walker.reset([np.random.default_rng(seed) for seed in seeds])
    pixels, infos = envs.reset(seed=seeds)
    record = {"pixels": [pixels], "agent": [infos["agent"]], "block": [infos["block"]], "angle": [infos["angle"]]}
    ended = False
    for _ in range(steps):
        pixels, _, terminated, truncated, infos = envs.step(walker.act(Observations.from_numpy(pixels, None)))
        ended |= bool(terminated.any() or truncated.any())
        record["pixels"].append(pixels)
        for name in ("agent", "block", "angle"):
            record[name].append(infos[name])
    envs.close()
    assert not ended
    return {name: np.stack(values) for name, values in record.items()}


def test_the_same_seeds_tell_the_same_story() -> None:
    first, second = play("near-object", [3, 4], 30), play("near-object", [3, 4], 30)
    for name, values in first.items():
        np.testing.assert_array_equal(values, second[name])
    assert not np.array_equal(first["block"][:, 0], first["block"][:, 1])


def test_the_picture_shows_where_things_are() -> None:
    record = play("near-object", [5, 6, 7], 50)
    for pixels, agents in zip(record["pixels"], record["agent"], strict=True):
        for picture, agent in zip(pixels, agents, strict=True):
            if (agent > 20).all() and (agent < 492).all():
                np.testing.assert_allclose(8 * centre_of(picture, DISC), agent, atol=8)
    # The block's reference point is not its centre, but moves with it.
    moved = np.linalg.norm(record["block"] - record["block"][0], axis=2)
    step, row = np.unravel_index(moved.argmax(), moved.shape)
    shown = 8 * (centre_of(record["pixels"][step, row], BLOCK) - centre_of(record["pixels"][0, row], BLOCK))
    assert moved[step, row] > 60
    assert np.linalg.norm(shown - (record["block"][step, row] - record["block"][0, row])) < 60


def test_the_disc_goes_where_the_action_points_and_keeps_its_velocity() -> None:
    env = gymnasium.make("worldloom/PushT-v0")
    for seed in range(20):
        env.reset(seed=seed)
        before = env.step(np.zeros(2, np.float32))[4]["agent"]
        if (before[0] < 350) and np.linalg.norm(before - env.step(np.zeros(2, np.float32))[4]["block"]) > 200:
            break
    pushed = env.step(np.array([1.0, 0.0], np.float32))[4]["agent"]
    coasted = env.step(np.zeros(2, np.float32))[4]["agent"]
    assert pushed[0] > before[0] + 10
    assert abs(pushed[1] - before[1]) < 1
    assert coasted[0] > pushed[0] + 5
    env.close()


def test_the_walk_near_the_object_moves_it_and_a_blind_walk_hardly_does() -> None:
    seeds = list(range(8))
    moved = {
        policy: np.linalg.norm(np.diff(play(policy, seeds, 60)["block"], axis=0), axis=2) > 0.5
        for policy in ("near-object", "directed-walk")
    }
    assert moved["near-object"].mean() > 0.2
    assert moved["near-object"].mean() > 1.5 * moved["directed-walk"].mean()


def test_the_walk_sees_nothing_but_pixels() -> None:
    blank = Observations.from_numpy(np.full((2, 64, 64, 3), 255, np.uint8), None)
    walker = POLICIES["near-object"](ACTION)
    walker.reset([np.random.default_rng(0), np.random.default_rng(1)])
    actions = np.stack([walker.act(blank) for _ in range(200)])
    assert np.isfinite(actions).all()
    assert np.abs(actions.mean(axis=0)).max() < 0.1  # with nothing in sight it only jitters


def test_a_picture_of_another_size() -> None:
    env = gymnasium.make("worldloom/PushT-v0", size=96)
    assert env.reset(seed=0)[0].shape == (96, 96, 3)
    env.close()
    with pytest.raises(EnvironmentFailure, match="must be 8 to 512"):
        gymnasium.make("worldloom/PushT-v0", size=4)


def test_the_frame_is_the_area_average_of_the_drawn_table() -> None:
    env = gymnasium.make("worldloom/PushT-v0").unwrapped
    frame = env.reset(seed=3)[0]
    assert isinstance(env, PushTEnv)
    table = pygame.surfarray.array3d(env._surface).transpose(1, 0, 2).astype(float)
    np.testing.assert_allclose(frame, table.reshape(64, 8, 64, 8, 3).mean(axis=(1, 3)), atol=0.5)
    env.close()


def test_without_its_physics_the_world_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gym_pusht.envs.pusht", None)
    with pytest.raises(EnvironmentFailure, match=r"pip install 'worldloom\[pusht\]'"):
        make_vector_env("worldloom/PushT-v0", 1)
