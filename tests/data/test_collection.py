import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
from data_samples import PushWorld, register
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from worldloom.core.errors import ConfigError, DataError, EnvironmentFailure, StorageError
from worldloom.core.picture_layout import PictureOptions
from worldloom.core.progress import ProgressTask
from worldloom.core.types import ActionSpec, Observations
from worldloom.data import POLICIES, EpisodeDataset, collect, episode_seed, policy_generator, validate
from worldloom.envs import vector_world

ENV = register()
ARGUMENTS: dict[str, Any] = {"env_id": ENV, "episodes": 5, "steps": 7, "seed": 3, "num_envs": 2}


def test_frames_actions_and_labels_belong_together(tmp_path: Path) -> None:
    dataset = collect(tmp_path / "d", **ARGUMENTS)
    assert dataset.lengths.tolist() == [7] * 5
    assert dataset.spec.labels == {"place": 2, "time": 1}  # not the text, the map, nor what resets do not give
    assert dataset.spec.action == ActionSpec(low=(-1.0, -3.0), high=(1.0, 5.0))
    for number in range(5):
        episode = dataset.episode(number)
        assert episode.pixels is not None
        assert episode.vector is not None
        assert episode.pixels[:, 0, 0, 1].tolist() == list(range(8))
        assert episode.labels["time"].ravel().tolist() == list(range(8))
        np.testing.assert_allclose(np.diff(episode.vector, axis=0), 0.1 * episode.actions, atol=1e-5)
        np.testing.assert_allclose(episode.labels["place"], 2 * episode.vector, rtol=1e-6)
        world = PushWorld()
        observation, _ = world.reset(seed=episode_seed(3, number))
        assert np.array_equal(observation["state"], episode.vector[0])
        assert episode.metadata["seed"] == episode_seed(3, number)
    assert validate(tmp_path / "d") == []


@pytest.mark.parametrize("length", [0, 3])
def test_the_content_depends_on_neither_batch_size_nor_breaks(tmp_path: Path, length: int) -> None:
    arguments = ARGUMENTS | {"env_kwargs": {"length": length}}
    whole = collect(tmp_path / "whole", **arguments)
    assert collect(tmp_path / "single", **arguments | {"num_envs": 1}).fingerprint() == whole.fingerprint()
    collect(tmp_path / "parts", **arguments | {"episodes": 2})
    assert len(EpisodeDataset.open(tmp_path / "parts")) == 2
    completed = collect(tmp_path / "parts", **arguments | {"num_envs": 4})
    assert completed.fingerprint() == whole.fingerprint()
    assert collect(tmp_path / "parts", **arguments).version == completed.version
    assert collect(tmp_path / "other", **arguments | {"seed": 4}).fingerprint() != whole.fingerprint()


def test_of_more_episodes_than_are_asked_for_none_is_taken_away_and_that_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    collect(tmp_path / "logs", **ARGUMENTS)
    caplog.clear()
    assert len(collect(tmp_path / "logs", **ARGUMENTS)) == 5
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(collect(tmp_path / "logs", **ARGUMENTS | {"episodes": 3})) == 5
    assert "has 5 episodes, more than the requested 3" in caplog.text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 4}, "seed was 3, is 4"),
        ({"policy": "uniform"}, "policy was 'directed-walk', is 'uniform'"),
        ({"policy_options": {"min_speed": 0.1}}, "policy_options"),
        ({"env_kwargs": {"length": 2}}, "kwargs"),
        ({"steps": 8}, "steps was 7, is 8"),
        ({"env_id": "CartPole-v1"}, "id was .*, is 'CartPole-v1'"),
    ],
)
def test_other_arguments_are_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    collect(tmp_path / "d", **ARGUMENTS | {"episodes": 1})
    with pytest.raises(DataError, match=message):
        collect(tmp_path / "d", **ARGUMENTS | change)


@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_the_last_frame_is_the_episodes_own_in_every_autoreset_mode(
    tmp_path: Path, mode: AutoresetMode, monkeypatch: pytest.MonkeyPatch
) -> None:
    def make(env_id: str, num_envs: int, *, native: bool, **kwargs: Any) -> SyncVectorEnv:
        return SyncVectorEnv([lambda: PushWorld(**kwargs)] * num_envs, autoreset_mode=mode)

    monkeypatch.setattr(vector_world, "make_vector_env", make)
    dataset = collect(tmp_path / "d", **ARGUMENTS | {"env_kwargs": {"length": 3}, "episodes": 6, "num_envs": 3})
    assert len(set(dataset.lengths.tolist())) > 1
    assert set(dataset.lengths.tolist()) <= {3, 4, 5}
    for number in range(6):
        episode = dataset.episode(number)
        steps = list(range(dataset.lengths[number] + 1))
        assert episode.pixels is not None
        assert episode.vector is not None
        assert episode.pixels[:, 0, 0, 1].tolist() == steps
        assert episode.labels["time"].ravel().tolist() == steps
        np.testing.assert_allclose(np.diff(episode.vector, axis=0), 0.1 * episode.actions, atol=1e-5)
        assert episode.metadata["terminated"]
        assert "truncated_by" not in episode.metadata


def test_named_labels_are_kept_and_missing_ones_named(tmp_path: Path) -> None:
    dataset = collect(tmp_path / "d", **ARGUMENTS, labels=["map", "time"])
    assert dataset.spec.labels == {"map": 900, "time": 1}
    with pytest.raises(DataError, match=r"label 'tine' is not one of .* did you mean 'time'"):
        collect(tmp_path / "e", **ARGUMENTS, labels=["tine"])
    with pytest.raises(DataError, match="label 'only_on_step' is not one of"):
        collect(tmp_path / "e", **ARGUMENTS, labels=["only_on_step"])


def test_an_info_that_is_not_in_every_frame_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    dataset = collect(tmp_path / "d", **ARGUMENTS, env_kwargs={"forget": 3})
    assert dataset.spec.labels == {"time": 1}
    on_step, place = (record.getMessage() for record in caplog.records if record.levelno == logging.WARNING)
    assert on_step.startswith("episodes 0 to 1, step 1: info 'only_on_step' is missing on reset")
    assert place.startswith("episodes 0 to 1, step 3: info 'place' is missing")


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"fail": 4}, r"episode 2, step 4: environment 'test_data/Push-v0' raised RuntimeError: the motor is on fire"),
        ({"bad": 4}, r"episode 2, step 4: the observation vector is not finite"),
    ],
)
def test_what_came_before_a_failure_is_kept(tmp_path: Path, kwargs: dict[str, Any], message: str) -> None:
    # Under seed 0 the environment of episode 2 draws 0.16, and the others draw more than 0.5.
    arguments = ARGUMENTS | {"seed": 0, "env_kwargs": {"share": 0.3, **kwargs}}
    with pytest.raises(EnvironmentFailure, match=f"{message}.*run the same command again") as failure:
        collect(tmp_path / "d", **arguments)
    if "fail" in kwargs:
        assert isinstance(failure.value.__cause__, RuntimeError)
    dataset = EpisodeDataset.open(tmp_path / "d")
    assert dataset.lengths.tolist() == [7, 7, 3, 3]
    assert [metadata.get("truncated_by") for metadata in dataset.metadata()] == [
        None,
        None,
        *["EnvironmentFailure"] * 2,
    ]
    assert validate(tmp_path / "d") == []
    assert len(collect(tmp_path / "d", **arguments)) == 5


def test_a_failure_on_reset_saves_nothing_and_names_the_environment(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentFailure, match=r"episode 0, step 0: .* raised ZeroDivisionError"):
        collect(tmp_path / "d", **ARGUMENTS | {"env_kwargs": {"length": 3, "share": 1}, "env_id": register_broken()})
    assert not (tmp_path / "d").exists()


def register_broken() -> str:
    class Broken(PushWorld):
        def reset(self, **kwargs: Any) -> Any:
            return 1 // 0

    if "test_data/Broken-v0" not in gymnasium.registry:
        gymnasium.register("test_data/Broken-v0", entry_point=Broken)
    return "test_data/Broken-v0"


class _Interrupting:
    """A progress whose task gets Ctrl-C after some frames."""

    def __init__(self, after: int) -> None:
        self.left = after

    @contextmanager
    def task(self, description: str, total: int, unit: str = "it") -> Iterator[ProgressTask]:
        yield self

    def advance(self, amount: int = 1, **figures: float) -> None:
        self.left -= amount
        if self.left <= 0:
            raise KeyboardInterrupt


def test_an_interrupt_keeps_what_is_recorded(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        collect(tmp_path / "d", **ARGUMENTS, progress=_Interrupting(16 + 8))
    dataset = EpisodeDataset.open(tmp_path / "d")
    assert dataset.lengths.tolist() == [7, 7, 3, 3]
    assert [metadata.get("truncated_by") for metadata in dataset.metadata()] == [None, None, *["KeyboardInterrupt"] * 2]
    assert len(collect(tmp_path / "d", **ARGUMENTS)) == 5
    assert validate(tmp_path / "d") == []


class _Wild:
    """A policy that goes out of bounds in its third step."""

    def __init__(self, action: ActionSpec) -> None:
        self.size = action.size

    def reset(self, generators: list[np.random.Generator]) -> None:
        self.count, self.step = len(generators), 0

    def act(self, observations: Observations) -> np.ndarray:
        assert observations.axes == (self.count,)
        self.step += 1
        return np.full((self.count, self.size), 0.5 if self.step < 3 else 6.0, np.float32)


if "test-wild" not in POLICIES:
    POLICIES.register("test-wild")(_Wild)


def test_a_policy_out_of_bounds_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"policy 'test-wild', episodes 0 to 1, step 3: action .* is out of bounds"):
        collect(tmp_path / "d", **ARGUMENTS, policy="test-wild")


class _Raising(_Wild):
    def act(self, observations: Observations) -> np.ndarray:
        raise RuntimeError("no battery")


if "test-raising" not in POLICIES:
    POLICIES.register("test-raising")(_Raising)


def test_a_policy_that_raises_is_named(tmp_path: Path) -> None:
    message = r"policy 'test-raising', episodes 0 to 1, step 1: raised RuntimeError: no battery. Repair the policy"
    with pytest.raises(DataError, match=message):
        collect(tmp_path / "d", **ARGUMENTS, policy="test-raising")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"policy": "directed-wlak"}, "did you mean 'directed-walk'"),
        ({"policy_options": {"min_sped": 1}}, "did you mean 'min_speed'"),
        ({"episodes": 0}, "at least 1"),
    ],
)
def test_wrong_arguments_say_what_is_right(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        collect(tmp_path / "d", **ARGUMENTS | change)


def test_discrete_actions_of_a_world_of_gymnasiums_own(tmp_path: Path) -> None:
    dataset = collect(tmp_path / "d", env_id="CartPole-v1", episodes=3, steps=200, num_envs=3, seed=0, policy="uniform")
    assert dataset.spec.observation.vector == 4
    assert (dataset.lengths < 200).all()  # it fell, and what came after the fall is not there
    for number in range(3):
        episode = dataset.episode(number)
        assert set(map(tuple, episode.actions.tolist())) == {(0.0, 1.0), (1.0, 0.0)}
        world = gymnasium.make("CartPole-v1")
        frames = [world.reset(seed=episode_seed(0, number))[0]]
        frames += [world.step(int(action.argmax()))[0] for action in episode.actions]
        np.testing.assert_allclose(np.stack(frames), episode.vector, atol=1e-6)


def test_policies_can_be_replayed_from_the_root_seed(tmp_path: Path) -> None:
    dataset = collect(tmp_path / "d", **ARGUMENTS)
    policy = POLICIES["directed-walk"](dataset.spec.action)
    policy.reset([policy_generator(3, 4)])
    nothing = Observations.from_numpy(None, np.zeros((1, 2), np.float32))
    replayed = np.concatenate([policy.act(nothing) for _ in range(7)])
    assert np.array_equal(replayed, dataset.episode(4).actions)


def test_a_write_that_fails_leaves_no_gap_and_the_rest_is_completed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    append, calls = EpisodeDataset.append, []

    def failing(self: EpisodeDataset, episodes: Any) -> None:
        calls.append(len(episodes))
        if len(calls) == 2:
            raise StorageError("the disk is full")
        append(self, episodes)

    monkeypatch.setattr(EpisodeDataset, "append", failing)
    with pytest.raises(StorageError, match="the disk is full"):
        collect(tmp_path / "d", **ARGUMENTS | {"num_envs": 1})
    monkeypatch.undo()
    assert len(EpisodeDataset.open(tmp_path / "d")) == 1
    completed = collect(tmp_path / "d", **ARGUMENTS)
    assert completed.fingerprint() == collect(tmp_path / "whole", **ARGUMENTS).fingerprint()


class DepthWorld(PushWorld):
    """Shows its state as a depth in millimetres, stored as 16-bit pictures."""

    observation_space = gymnasium.spaces.Box(0, 65535, (32, 40), np.uint16)

    def reset(self, *, seed=None, options=None):
        observation, info = super().reset(seed=seed)
        return self._depth(observation), info

    def step(self, action):
        observation, *rest = super().step(action)
        return self._depth(observation), *rest

    def _depth(self, observation: Any) -> np.ndarray:
        return np.full((32, 40), 1000 + 100 * observation["state"][0], np.uint16)


def test_pictures_that_are_not_bytes_are_collected_in_the_stated_range_or_refused(tmp_path: Path) -> None:
    gymnasium.register("tests/Depth-v0", entry_point=DepthWorld)
    arguments = ARGUMENTS | {"env_id": "tests/Depth-v0"}
    with pytest.raises(EnvironmentFailure, match=r"\(32, 40\) with uint16 values.*--picture-range LOW:HIGH"):
        collect(tmp_path / "none", **arguments)
    dataset = collect(tmp_path / "d", **arguments, pictures=PictureOptions(range=(0.0, 2550.0)))
    assert dataset.spec.observation.pixels == (32, 40, 1)
    assert dataset.spec.environment["pictures"] == {"axes": None, "range": [0.0, 2550.0]}
    for number in range(len(dataset)):
        episode = dataset.episode(number)
        assert episode.pixels is not None
        place = episode.labels["place"][:, 0] / 2
        np.testing.assert_allclose(episode.pixels[:, 0, 0, 0], 100 + 10 * place, atol=1)
    with pytest.raises(DataError, match="pictures was"):
        collect(tmp_path / "d", **arguments | {"episodes": 9}, pictures=PictureOptions(range=(0.0, 100.0)))
