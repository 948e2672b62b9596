"""Runs on the data of another world, data that cannot be learned from, and places that cannot be written."""

import dataclasses
import logging
import re
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
from quick_training import QUICK

from dot_world import Dot
from worldloom.core.errors import ConfigError, DataError, StorageError
from worldloom.core.files import require_writable
from worldloom.core.picture_layout import PictureOptions
from worldloom.core.types import ActionSpec, Episode, ObservationSpec
from worldloom.data import (
    DatasetSpec,
    EpisodeDataset,
    collect,
    compute_statistics,
    load_frames,
    require_plausible,
)
from worldloom.formats import ReadOptions, convert
from worldloom.memory import EpisodicMemory
from worldloom.recipes import Recipe, load_recipe
from worldloom.workflow import Run, evaluate, plan_once, remember, train


class DepthDot(Dot):
    """Shows the square as 16-bit depth only."""

    def __init__(self) -> None:
        super().__init__()
        self.observation_space = gymnasium.spaces.Box(0, 65535, (32, 32), np.uint16)

    def _observe(self, position: np.ndarray) -> Any:
        image = np.full((32, 32), 900, np.uint16)
        row, column = (position * 1.5).astype(int)
        image[row : row + 3, column : column + 3] = 4000
        return image


gymnasium.register("tests/DepthDot-v0", entry_point=DepthDot)


def logged_run(folder: Path, recipe: Recipe, env_id: str, **options: Any) -> Run:
    data = collect(
        folder / "data", env_id=env_id, episodes=8, steps=40, policy="uniform", num_envs=4, seed=0, **options
    )
    return train(recipe, data, folder / "run")


def test_a_named_recipe_on_another_world_is_evaluated_on_that_world(tmp_path: Path) -> None:
    run = logged_run(tmp_path, load_recipe("two-room").override(QUICK), "tests/Dot-v0")
    assert run.recipe.protocol == "two-room@1"
    assert run.usual_protocol is None
    with pytest.raises(ConfigError, match=r"tests/Dot-v0 has no protocol; define success .*--success"):
        evaluate(run)
    with pytest.raises(ConfigError, match="no default protocol"):
        plan_once(run)
    results = evaluate(run, success="position:3", goal_offset=6, episodes=1, budget=2)
    assert results.protocol.env_id == "tests/Dot-v0"
    assert run.summary()["evaluation"].startswith("logged-goals")


def test_the_worlds_arguments_and_pictures_are_those_of_the_data(tmp_path: Path) -> None:
    recipe = load_recipe("two-room").override(QUICK)
    assert recipe.collection is not None
    maze = {"env_kwargs": {"factors": {"agent_speed": 3.0}}}
    run = logged_run(tmp_path / "fast", recipe, "worldloom/TwoRoom-v0", **maze)
    protocol = run.usual_protocol
    assert protocol is not None
    assert (protocol.title, protocol.env_kwargs) == ("two-room-custom@1", maze["env_kwargs"])
    results = evaluate(run, episodes=1, budget=2, methods=["random"])
    assert (results.protocol.title, results.protocol.env_kwargs) == ("two-room-custom@1", maze["env_kwargs"])
    usual = logged_run(tmp_path / "usual", recipe, "worldloom/TwoRoom-v0")
    assert usual.usual_protocol is not None
    assert usual.usual_protocol.title == "two-room@1"

    pictures = PictureOptions(range=(0.0, 4000.0))
    run = logged_run(tmp_path / "depth", recipe, "tests/DepthDot-v0", pictures=pictures)
    results = evaluate(run, success="position:3", goal_offset=6, episodes=1, budget=2, methods=["random"])
    assert results.protocol.pictures == pictures
    assert run.picture_values == (0.0, 4000.0)


def test_data_without_a_world_name_the_recipes_protocol_but_do_not_take_it(tmp_path: Path) -> None:
    run = logged_run(tmp_path, load_recipe("two-room").override(QUICK), "worldloom/TwoRoom-v0")
    config = run.folder.config
    run.folder.reconfigure(config | {"environment": {"format": "folder", "source": "robot"}})
    with pytest.raises(ConfigError, match="does not name its environment.*--protocol, such as two-room@1"):
        evaluate(run)


SPEC = DatasetSpec(
    observation=ObservationSpec(pixels=(16, 16, 3), vector=2),
    action=ActionSpec(low=(-1.0, -1.0), high=(1.0, 1.0)),
    environment={"vector": [["arm", 1], ["hand", 1]]},
)


def dataset(path: Path, *, pixels: str = "moving", vector: str = "moving", actions: str = "moving") -> EpisodeDataset:
    """Eight episodes whose parts are `moving`, `still` within an episode, or `constant` over all episodes."""
    made = EpisodeDataset.create(path, SPEC)

    def part(how: str, shape: tuple[int, ...], number: int) -> np.ndarray:
        generator = np.random.default_rng(number if how != "constant" else 99)
        values = generator.uniform(-1, 1, (21 if how == "moving" else 1, *shape))
        return np.repeat(values, 1 if how == "moving" else 21, axis=0)

    made.append(
        [
            Episode(
                pixels=(127 * (1 + part(pixels, (16, 16, 3), number))).astype(np.uint8),
                vector=part(vector, (2,), number).astype(np.float32),
                actions=part(actions, (2,), number)[:20].astype(np.float32),
                metadata={"index": number},
            )
            for number in range(8)
        ]
    )
    return made


@pytest.mark.parametrize(
    ("parts", "encoder", "message"),
    [
        ({"pixels": "still", "vector": "still"}, "fusion", r"the vector \(arm, hand\) or the pixels"),
        ({"pixels": "constant", "vector": "constant"}, "fusion", "nothing that is observed ever moves"),
        ({"vector": "still"}, "vector", r"ever moves: .* in the vector \(arm, hand\), although 120 actions"),
        ({"pixels": "still"}, "patch-conv", "ever moves: .* in the pixels"),
        ({"pixels": "constant"}, "fusion", "all pixels are constant"),
        ({"actions": "constant"}, "fusion", r"all 120 actions are equal, \("),
    ],
)
def test_data_that_cannot_be_learned_from_are_found_before_the_first_step(
    parts: dict[str, str], encoder: str, message: str, tmp_path: Path
) -> None:
    recipe = load_recipe("generic").override([*QUICK, f"model.encoder.name={encoder}", "training.horizon=2"])
    with pytest.raises(DataError, match=message):
        train(recipe, dataset(tmp_path / "data", **parts), tmp_path / "run")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    assert not (tmp_path / "run" / "config.json").exists()


@pytest.mark.parametrize(
    ("parts", "encoder"),
    [
        ({"pixels": "still"}, "fusion"),  # pictures that tell the episodes apart
        ({"vector": "constant"}, "patch-conv"),
        ({"pixels": "constant"}, "vector"),
        ({"actions": "still"}, "fusion"),
    ],
)
def test_data_that_vary_where_it_counts_are_trained_on(parts: dict[str, str], encoder: str, tmp_path: Path) -> None:
    recipe = load_recipe("generic").override([*QUICK, f"model.encoder.name={encoder}", "training.horizon=2"])
    assert train(recipe, dataset(tmp_path / "data", **parts), tmp_path / "run").figures["complete"]


def test_data_without_a_step_or_an_episode_are_refused(tmp_path: Path) -> None:
    recipe = load_recipe("generic").override(QUICK)
    empty = EpisodeDataset.create(tmp_path / "empty", SPEC)
    with pytest.raises(DataError, match="no episodes"):
        train(recipe, empty, tmp_path / "run")
    one = EpisodeDataset.create(tmp_path / "one", SPEC)
    one.append([Episode(pixels=np.zeros((2, 16, 16, 3), np.uint8), vector=np.zeros((2, 2), np.float32),
                        actions=np.zeros((1, 2), np.float32))])  # fmt: skip
    with pytest.raises(DataError, match="no episode is long enough"):
        train(recipe, one, tmp_path / "run")


def test_a_place_that_cannot_be_written_is_found_before_the_work(tmp_path: Path, monkeypatch: Any) -> None:
    data = dataset(tmp_path / "data")
    recipe = load_recipe("generic").override([*QUICK, "training.horizon=2"])
    run = train(recipe, data, tmp_path / "run")
    file = tmp_path / "file"
    file.touch()
    work = {
        "train": lambda: train(recipe, data, file / "run"),
        "collect": lambda: collect(file / "data", env_id="tests/Dot-v0", episodes=1, steps=2, seed=0),
        "convert": lambda: convert(tmp_path / "data", file / "data", read=ReadOptions()),
        "plan": lambda: plan_once(run, picture=file / "plan.png"),
    }
    for begin in work.values():
        with pytest.raises(StorageError, match=r"cannot write .*file/.*, because .*file is a file"):
            begin()
    (run.path / "evaluation").touch()  # a file where the results would be
    with pytest.raises(StorageError, match="cannot write .*evaluation is a file"):
        evaluate(run, success="env")


@pytest.mark.skipif(not Path("/sys/kernel").is_dir(), reason="needs a file system that nobody can write")
def test_a_read_only_place_is_named() -> None:
    with pytest.raises(StorageError, match="cannot write /sys/kernel/mine/run: /sys/kernel is read-only or not yours"):
        require_writable("/sys/kernel/mine/run")


def test_what_can_be_written_is_left_as_it_is(tmp_path: Path) -> None:
    require_writable(tmp_path / "a" / "b", tmp_path, "s3://bucket/data")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("episode", "value"), [(0, 3e38), (5, -1e25)])
def test_a_value_of_a_failed_sensor_is_found_before_the_first_step(episode: int, value: float, tmp_path: Path) -> None:
    made, glitch = dataset(tmp_path / "data"), EpisodeDataset.create(tmp_path / "glitch", SPEC)
    episodes = [made.episode(number) for number in range(len(made))]
    assert episodes[episode].vector is not None
    vector = episodes[episode].vector.copy()
    vector[7, 1] = value
    episodes[episode] = dataclasses.replace(episodes[episode], vector=vector)
    glitch.append(episodes)
    recipe = load_recipe("generic").override([*QUICK, "model.encoder.name=fusion", "training.horizon=2"])
    with pytest.raises(DataError, match=re.escape(f"hand is {value:.4g} at step 7 of episode {episode}; the mean is")):
        train(recipe, glitch, tmp_path / "run")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_column_that_is_constant_but_in_one_episode_is_no_failure(tmp_path: Path) -> None:
    made, rare = dataset(tmp_path / "data"), EpisodeDataset.create(tmp_path / "rare", SPEC)
    for number in range(len(made)):
        vector = np.array(made.episode(number).vector)
        vector[:, 1] = 1e6 + 1e5 * (number == 3)
        rare.append([dataclasses.replace(made.episode(number), vector=vector)])
    cache = load_frames(rare)
    for held_out in range(len(made)):
        others = np.delete(np.arange(len(made)), held_out)
        require_plausible(cache, compute_statistics(cache, seed=0, episodes=others))


def test_a_memory_takes_only_the_columns_of_the_runs_data(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    made = dataset(tmp_path / "data")
    recipe = load_recipe("generic").override([*QUICK, "training.horizon=2"])
    run = train(recipe, made, tmp_path / "run")
    for name, columns in (("swapped", ["hand", "arm"]), ("renamed", ["qpos0", "qpos1"])):
        environment = {"vector": [[column, 1] for column in columns]}
        EpisodeDataset.create(tmp_path / name, dataclasses.replace(SPEC, environment=environment)).append(
            [made.episode(0)]
        )
    with EpisodicMemory.open_or_create(tmp_path / "memory", spec=run.model.spec) as memory:
        with pytest.raises(DataError, match="columns hand, arm, but the model was trained on arm, hand, in this"):
            remember(run, tmp_path / "swapped", memory)
        with caplog.at_level(logging.WARNING):
            assert remember(run, tmp_path / "renamed", memory)
        assert "has the columns qpos0, qpos1, and the model was trained on arm, hand" in caplog.text
        caplog.clear()
        assert remember(run, tmp_path / "data", memory)
        assert not caplog.text
