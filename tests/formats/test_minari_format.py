import json
import shutil
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import format_samples
import h5py
import minari
import numpy as np
import pytest
from format_samples import SPEC, SPECS, Killed, differences, kill_at, make_episode, make_store
from gymnasium import spaces
from minari.data_collector import EpisodeBuffer

from worldloom.core.errors import ConfigError, DataError, StorageError
from worldloom.core.types import ActionSpec, ObservationSpec
from worldloom.data import DatasetSpec, EpisodeDataset
from worldloom.formats import FORMATS, WriteOptions, convert, detect
from worldloom.formats import minari as ours_of_minari

LENGTHS = (3, 5, 2)


def buffer(episode: int, steps: int, choose: Callable[[int], Any], nested: bool) -> EpisodeBuffer:
    """Observation t of episode e is made of t and e."""
    times = range(steps + 1)
    observations: Any = [np.array([time, episode], np.float64) for time in times]
    if nested:
        images = [np.full((40, 48, 3), 10 * time + episode, np.uint8) for time in times]
        state = (observations, [np.int64(1 + time % 3) for time in times])
        observations = {"image": images, "state": state, "words": ["hi"] * len(times)}
    return EpisodeBuffer(
        seed=7 + episode,
        observations=observations,
        actions=[choose(time) for time in range(steps)],
        rewards=[1.0] * steps,
        terminations=[False] * steps,
        truncations=[time == steps - 1 for time in range(steps)],
        infos={},
    )


@pytest.fixture
def collect(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))

    def run(
        action: spaces.Space[Any], choose: Callable[[int], Any], *, nested: bool = True, jpeg: bool = False
    ) -> Path:
        observation: spaces.Space[Any] = spaces.Box(-9, 99, (2,), np.float64)
        if nested:
            parts = {"image": spaces.Box(0, 255, (40, 48, 3), np.uint8), "words": spaces.Text(8)}
            observation = spaces.Dict({**parts, "state": spaces.Tuple((observation, spaces.Discrete(3, start=1)))})
        with warnings.catch_warnings():  # that there is no environment
            warnings.simplefilter("ignore", UserWarning)
            minari.create_dataset_from_buffers(
                "sample/made-v0",
                [buffer(number, steps, choose, nested) for number, steps in enumerate(LENGTHS)],
                observation_space=observation,
                action_space=action,
                algorithm_name="drift",
                author="someone",
                author_email="someone@example.org",
                code_permalink="https://example.org",
                description="a sample",
                data_format="hdf5",
                jpeg_encoding=jpeg,
            )
        return tmp_path / "minari" / "sample" / "made-v0"

    return run


def box(step: int) -> np.ndarray:
    return np.array([step / 10, -step / 10], np.float32)


read_all = partial(format_samples.read_all, "minari")


@pytest.mark.parametrize("jpeg", [False, True], ids=["raw", "jpeg"])
def test_what_minari_collected(jpeg: bool, collect: Callable[..., Path]) -> None:
    path = collect(spaces.Box(-1, 2, (2,), np.float32), box, jpeg=jpeg)
    assert detect(path).name == detect(path / "data").name == "minari"
    episodes, notes, spec = read_all(path)
    assert spec.observation == ObservationSpec(pixels=(40, 48, 3), vector=5)
    assert spec.action == ActionSpec(low=(-1.0, -1.0), high=(2.0, 2.0))
    assert spec.environment["vector"] == [["state.0", 2], ["state.1", 3]]
    assert (spec.environment["dataset_id"], spec.environment["algorithm_name"]) == ("sample/made-v0", "drift")
    assert [episode.steps for episode in episodes] == list(LENGTHS)  # with the closing observation: none is lost
    for number, episode in enumerate(episodes):
        time = np.arange(episode.steps + 1)
        assert episode.vector is not None
        assert episode.pixels is not None
        assert np.array_equal(episode.vector[:, :2], np.stack([time, 0 * time + number], axis=1))
        assert np.array_equal(episode.vector[:, 2:], np.eye(3)[time % 3])
        assert np.abs(episode.pixels[:, 5, 7, 1].astype(int) - (10 * time + number)).max() <= (2 if jpeg else 0)
        assert np.array_equal(episode.actions, [box(step) for step in range(episode.steps)])
        assert (episode.metadata["episode"], episode.metadata["seed"]) == (f"episode_{number}", 7 + number)
    text = "\n".join(notes)
    assert "observations words are left out" in text
    assert "rewards, terminations, truncations" in text
    assert ("stored as JPEG" in text) == jpeg
    assert len(notes) == 2 + jpeg


def test_choices_become_one_hot(collect: Callable[..., Path]) -> None:
    path = collect(spaces.Discrete(4, start=2), lambda step: np.int64(2 + step % 4), nested=False)
    episodes, _, spec = read_all(path)
    assert spec.action == ActionSpec(low=(0.0,) * 4, high=(1.0,) * 4, discrete=True)
    assert spec.observation == ObservationSpec(vector=2)
    assert np.array_equal(episodes[1].actions, np.eye(4)[[0, 1, 2, 3, 0]])


def test_unbounded_actions_take_the_range_of_the_data(collect: Callable[..., Path]) -> None:
    path = collect(spaces.Box(-np.inf, np.inf, (2,), np.float32), box, nested=False)
    _, notes, spec = read_all(path)
    assert np.allclose(spec.action.low, (0, -0.4))
    assert any("are set to the range of the data" in note for note in notes)


def test_options(collect: Callable[..., Path]) -> None:
    path = collect(spaces.Box(-1, 2, (2,), np.float32), box)
    (first, *_), notes, _ = read_all(path, camera="none", vector=["state.0"])
    assert first.pixels is None
    assert first.vector is not None
    assert first.vector.shape == (4, 2)
    assert "image, state.1, words are left out" in notes[0]
    (first, *_), _, _ = read_all(path, size=(4, 6))
    assert first.pixels is not None
    assert first.pixels[:, 0, 0, 0].tolist() == [0, 10, 20, 30]
    with pytest.raises(ConfigError, match="the option 'rate' is not supported here"):
        read_all(path, rate=3.0)


def test_actions_that_are_neither_are_refused(collect: Callable[..., Path]) -> None:
    path = collect(spaces.MultiBinary(2), lambda step: np.zeros(2, np.int8), nested=False)
    with pytest.raises(DataError, match="the action space is MultiBinary; expected a Box or a Discrete"):
        read_all(path)


# Minari takes pictures from 32x32 on for such, and might take them for JPEG.
LARGE = DatasetSpec(observation=ObservationSpec(pixels=(40, 33, 3)), action=SPEC.action)


@pytest.mark.parametrize("spec", [*SPECS.values(), LARGE], ids=[*SPECS, "large pictures"])
def test_a_round_trip_changes_nothing_and_minari_opens_it(spec: DatasetSpec, tmp_path: Path) -> None:
    ours = make_store(tmp_path / "ours", spec=spec)
    there = convert(tmp_path / "ours", tmp_path / "there", target_format="minari")
    back = convert(tmp_path / "there", tmp_path / "back")
    assert (back.source_format, there.notes, back.notes) == ("minari", [], [])
    assert EpisodeDataset.open(tmp_path / "back").fingerprint() == ours.fingerprint()  # of the spec, too
    dataset = minari.MinariDataset(tmp_path / "there" / "data")
    assert (dataset.total_episodes, dataset.total_steps) == (4, int(ours.lengths.sum()))
    for number, theirs in enumerate(dataset.iterate_episodes()):
        episode = ours.episode(number)
        observations = theirs.observations
        parts = observations if isinstance(observations, dict) else {"pixels": observations, "vector": observations}
        for name, column in (("pixels", episode.pixels), ("vector", episode.vector)):
            if column is not None:
                assert np.array_equal(parts[name], column)
        expected = episode.actions.argmax(axis=1) if spec.action.discrete else episode.actions
        assert np.array_equal(theirs.actions, expected)
        assert dataset.action_space.contains(theirs.actions[0])
        assert theirs.truncations.tolist() == [False] * (episode.steps - 1) + [True]


@pytest.mark.parametrize("stage", ["assemble", "write_json", "_clean"])
def test_a_kill_neither_loses_nor_repeats(stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = make_store(tmp_path / "ours")
    with monkeypatch.context() as patch:
        owner = ours_of_minari if stage == "write_json" else ours_of_minari.MinariSink
        kill_at(patch, owner, stage, 1, after=False)
        with pytest.raises(Killed):
            convert(tmp_path / "ours", tmp_path / "there", target_format="minari")
    convert(tmp_path / "ours", tmp_path / "there", target_format="minari")
    episodes, _, _ = read_all(tmp_path / "there")
    assert [differences(episode, ours.episode(number)) for number, episode in enumerate(episodes)] == [[]] * 4
    assert sorted(file.name for file in (tmp_path / "there" / "data").iterdir()) == ["main_data.hdf5", "metadata.json"]


def replace(group: Any, name: str, column: np.ndarray) -> None:
    del group[name]
    group[name] = column


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda group: group.__delitem__("actions"), "episode_1/actions is missing"),
        (lambda group: group.__delitem__("observations/vector"), "episode_1/observations/vector is missing"),
        (
            lambda group: replace(group, "actions", np.zeros((1, 3))),
            r"actions has shape \(1, 3\); expected 2 values",
        ),
        (lambda group: replace(group, "actions", np.zeros((4, 2))), "has 2 rows for 4 actions"),
        (lambda group: replace(group, "actions", np.array([b"a"])), r"actions is \|S1"),
        (
            lambda group: replace(group, "observations/pixels", np.zeros((2, 9, 9, 3), np.uint8)),
            r"pixels is uint8 of shape \(2, 9, 9, 3\); expected uint8 pictures of shape \(16, 24, 3\)",
        ),
    ],
)
def test_a_damaged_episode_is_named(damage: Callable[[Any], None], message: str, tmp_path: Path) -> None:
    make_store(tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "there", target_format="minari")
    with h5py.File(tmp_path / "there/data/main_data.hdf5", "a") as file:
        damage(file["episode_1"])
    with pytest.raises(DataError, match=message):
        read_all(tmp_path / "there")
    report = convert(tmp_path / "there", tmp_path / "t", skip_damaged=True)
    assert (report.episodes, [note.episode for note in report.notes if note.kind == "skipped"]) == (3, [1])


def test_values_that_are_not_finite_skip_their_episode(tmp_path: Path) -> None:
    make_store(tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "there", target_format="minari")
    with h5py.File(tmp_path / "there/data/main_data.hdf5", "a") as file:
        file["episode_2/observations/vector"][4, 1] = np.nan
    episodes, notes, _ = read_all(tmp_path / "there")
    assert len(episodes) == 3
    assert "episode_2 is skipped: vector has a value that is not finite" in notes[0]


def edit(path: Path, **values: Any) -> None:
    metadata = json.loads(path.read_text())
    path.write_text(json.dumps({**metadata, **values}))


def test_a_damaged_dataset_is_named(tmp_path: Path) -> None:
    make_store(tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "whole", target_format="minari")

    def refused(damage: Callable[[Path], object], error: type[Exception], message: str) -> None:
        shutil.rmtree(tmp_path / "there", ignore_errors=True)
        shutil.copytree(tmp_path / "whole", tmp_path / "there")
        damage(tmp_path / "there" / "data")
        with pytest.raises(error, match=message):
            read_all(tmp_path / "there")

    metadata, main = "metadata.json", "main_data.hdf5"
    refused(lambda data: (data / main).unlink(), StorageError, "main_data.hdf5 does not exist")
    refused(lambda data: (data / metadata).unlink(), StorageError, "metadata.json does not exist")
    refused(lambda data: (data / main).write_bytes(b"no" * 99), DataError, "is not a valid HDF5 file")
    content = (tmp_path / "whole" / "data" / main).read_bytes()
    refused(lambda data: (data / main).write_bytes(content[: len(content) // 2]), DataError, "not a valid HDF5 file")
    refused(lambda data: edit(data / metadata, total_episodes=9), DataError, "has 4 episodes; expected 9")
    refused(lambda data: edit(data / metadata, data_format="arrow"), DataError, "data_format 'arrow'; expected 'hdf5'")
    refused(lambda data: edit(data / metadata, action_space=None), DataError, "has no action_space")
    many = json.dumps({"type": "Discrete", "n": 10**9})
    refused(lambda data: edit(data / metadata, action_space=many), DataError, "an action has 1,000,000,000 values")


def test_counts_that_disagree_have_a_note(tmp_path: Path) -> None:
    make_store(tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "there", target_format="minari")
    path = tmp_path / "there" / "data"
    assert not any("total_steps" in note for note in read_all(tmp_path / "there")[1])
    edit(path / "metadata.json", total_steps=999)
    with h5py.File(path / "main_data.hdf5", "r+") as file:
        file["episode_1"].attrs["total_steps"] = 77
        file["episode_2"].attrs["id"] = 0
        file["episode_3"].attrs["id"] = np.nan
    notes = "\n".join(read_all(tmp_path / "there")[1])
    assert "has total_steps 999, but the episodes have" in notes
    assert "total_steps differs from the number of actions in episode_1." in notes
    assert "several episodes have the same id" in notes


def test_something_else_at_the_target_is_refused(tmp_path: Path) -> None:
    make_store(tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "there", target_format="minari")
    other = DatasetSpec(observation=SPEC.observation, action=SPEC.action)
    with pytest.raises(DataError, match="other columns or settings"):
        FORMATS["minari"].create(tmp_path / "there", other, WriteOptions(), resume=True)
    with pytest.raises(DataError, match="already exists"):
        FORMATS["minari"].create(tmp_path / "there", SPEC, WriteOptions(), resume=False)
    sink = FORMATS["minari"].create(tmp_path / "there", SPEC, WriteOptions(), resume=True)
    assert sink.written == 4
    with pytest.raises(DataError, match="is complete"):
        sink.write(make_episode(0))
