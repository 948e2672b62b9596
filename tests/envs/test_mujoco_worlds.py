"""Reacher and the point maze on MuJoCo: seeds decide, pictures show, infos tell."""

import builtins
import sys
from importlib.util import find_spec

import gymnasium
import numpy as np
import pytest

import worldloom.envs  # noqa: F401 - registers the worlds
from worldloom.core.errors import EnvironmentFailure
from worldloom.data import collect
from worldloom.envs import rendering
from worldloom.envs.spaces import make_vector_env

if find_spec("mujoco") is None:  # importing it here would settle what draws before the library does
    pytest.skip("MuJoCo is not installed", allow_module_level=True)
try:
    rendering.choose_gl()
except EnvironmentFailure as failure:
    pytest.skip(str(failure), allow_module_level=True)

WORLDS = {"worldloom/Reacher-v0": "joints", "worldloom/PointMaze-v0": "position"}


def play(env_id: str, seed: int, steps: int = 25) -> tuple[np.ndarray, np.ndarray]:
    env = gymnasium.make(env_id)
    pixels, info = env.reset(seed=seed)
    pictures, states = [pixels], [info[WORLDS[env_id]]]
    generator = np.random.default_rng(seed)
    for _ in range(steps):
        pixels, _, terminated, truncated, info = env.step(generator.uniform(-1, 1, 2).astype(np.float32))
        assert not terminated
        assert not truncated
        pictures.append(pixels)
        states.append(info[WORLDS[env_id]])
    env.close()
    return np.stack(pictures), np.stack(states)


@pytest.mark.parametrize("env_id", WORLDS)
def test_the_same_seed_tells_the_same_story(env_id: str) -> None:
    (pictures, states), (again, states_again) = play(env_id, 3), play(env_id, 3)
    np.testing.assert_array_equal(pictures, again)
    np.testing.assert_array_equal(states, states_again)
    assert not np.array_equal(states, play(env_id, 4)[1])
    assert np.ptp(states, axis=0).min() > 0.01
    assert (pictures[0] != pictures[-1]).any()


@pytest.mark.parametrize("env_id", WORLDS)
def test_copies_that_share_a_renderer_do_not_mix(env_id: str) -> None:
    envs = make_vector_env(env_id, 3)
    pixels, _ = envs.reset(seed=[5, 6, 5])
    np.testing.assert_array_equal(pixels[0], pixels[2])
    assert (pixels[0] != pixels[1]).any()
    for seed, picture in zip((5, 6), pixels, strict=False):
        np.testing.assert_array_equal(picture, play(env_id, seed, 0)[0][0])
    envs.close()


def test_the_fingertip_is_where_the_arm_is_drawn() -> None:
    env = gymnasium.make("worldloom/Reacher-v0")
    for seed in range(8):
        pixels, info = env.reset(seed=seed)
        # Metres to pixels: the camera looks straight down from 0.54 m with a field of view of 45 degrees.
        scale = 32 / (0.54 * np.tan(np.pi / 8))
        column, row = 32 + scale * info["fingertip"][0], 32 - scale * info["fingertip"][1]
        brightness = pixels.astype(int).sum(axis=2)
        around = brightness[max(0, int(row) - 2) : int(row) + 3, max(0, int(column) - 2) : int(column) + 3]
        assert around.min() < 0.6 * np.median(brightness)
    env.close()


def test_the_point_is_red_and_where_it_is_said_to_be_and_walls_stop_it() -> None:
    env = gymnasium.make("worldloom/PointMaze-v0", layout="umaze")
    generator = np.random.default_rng(0)
    places = []
    for seed in range(6):
        pixels, info = env.reset(seed=seed)
        for _ in range(30):
            red = np.argwhere((pixels[..., 0] > 200) & (pixels[..., 1] < 120))
            row, column = red.mean(axis=0) + 0.5
            scale = 64 / (2 * 1.15 * 5 * np.tan(np.pi / 8))
            drawn = np.array([(column - 32) / scale, (32 - row) / scale])
            np.testing.assert_allclose(drawn, info["position"], atol=0.25)
            places.append(info["position"])
            pixels, *_, info = env.step(generator.choice([-1.0, 1.0], 2).astype(np.float32))
    x, y = np.array(places).T
    assert np.abs([x, y]).max() < 1.5  # outer walls
    assert not ((x < 0.4) & (np.abs(y) < 0.4)).any()  # the wall in the middle of the U
    env.close()


def test_odd_arguments_are_named() -> None:
    for env_id, arguments, message in [
        ("worldloom/PointMaze-v0", {"layout": "huge"}, "expected one of open, umaze, medium"),
        ("worldloom/Reacher-v0", {"torque": 2.0}, "must be above 0"),
        ("worldloom/Reacher-v0", {"size": 2}, "8 to 480"),
    ]:
        with pytest.raises(EnvironmentFailure, match=message):
            gymnasium.make(env_id, **arguments)


def test_a_dataset_of_the_arm(tmp_path) -> None:
    dataset = collect(tmp_path / "data", env_id="worldloom/Reacher-v0", episodes=3, steps=5, num_envs=2, seed=0)
    assert dataset.spec.labels == {"fingertip": 2, "joints": 2}
    assert dataset.frames == 18


def test_a_choice_of_the_users_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MUJOCO_GL", "osmesa")
    assert rendering.choose_gl() == "osmesa"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="other systems draw without a choice")
def test_without_opengl_or_mujoco_the_world_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MUJOCO_GL", raising=False)
    monkeypatch.setattr("ctypes.util.find_library", lambda name: None)
    with pytest.raises(EnvironmentFailure, match=r"apt-get install .*conda-forge"):
        rendering.choose_gl()
    monkeypatch.setenv("MUJOCO_GL", "egl")
    real = builtins.__import__

    def lacking(name: str, *args: object, **kwargs: object) -> object:
        if name == "mujoco":
            raise ImportError("No module named 'mujoco'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", lacking)
    with pytest.raises(EnvironmentFailure, match=r"pip install 'worldloom\[mujoco\]'"):
        rendering.load_mujoco()
