import json
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from format_samples import SPEC, make_store, read_all

from worldloom.core.errors import ConfigError, DataError
from worldloom.core.types import ActionSpec, ObservationSpec
from worldloom.data import DatasetSpec, EpisodeDataset
from worldloom.formats import FORMATS, ReadOptions, WriteOptions, convert, detect

COLLECTED = Path(__file__).parents[1] / "fixtures" / "swm_hdf5" / "collected.h5"


def robomimic_file(path: Path, demos: int = 12, closing: bool = True, scale: float = 1.0) -> Path:
    """A file as robomimic's own scripts lay it out; the first position of demo k is k, and then moves by one."""
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        data.attrs["env_args"] = json.dumps({"env_name": "Lift", "type": 1, "env_kwargs": {"robots": "Panda"}})
        data.attrs["total"] = demos * 4
        for number in range(demos):
            demo = data.create_group(f"demo_{number}")
            demo.attrs["num_samples"], demo.attrs["model_file"] = 4, "<mujoco/>"
            time = np.arange(5)
            position = np.stack([number + time, -time, 0 * time], axis=1).astype(np.float64)
            images = np.repeat(10 * time + number, 8 * 8 * 3).reshape(5, 8, 8, 3).astype(np.uint8)
            columns = {"robot0_eef_pos": position, "robot0_gripper_qpos": position[:, :2] / 10}
            columns |= {"agentview_image": images, "robot0_eye_in_hand_image": images + 1}
            for key, column in columns.items():
                demo[f"obs/{key}"] = column[:4]
                if closing:
                    demo[f"next_obs/{key}"] = column[1:]
            demo["actions"] = scale * np.linspace(-1, 1, 8).reshape(4, 2)
            demo["rewards"], demo["dones"] = np.zeros(4), np.array([0, 0, 0, 1])
            demo["states"] = np.arange(20.0).reshape(4, 5)
        file["mask/train"] = np.array([b"demo_0", b"demo_10"])
    return path


def test_robomimic_with_the_closing_frame(tmp_path: Path) -> None:
    path = robomimic_file(tmp_path / "lift.hdf5")
    assert detect(path).name == "robomimic"
    episodes, notes, spec = read_all("robomimic", path, camera="agentview_image")
    assert [episode.metadata["demo"] for episode in episodes] == [f"demo_{number}" for number in range(12)]
    assert [episode.metadata.get("masks") for episode in episodes] == [["train"], *[None] * 9, ["train"], None]
    assert episodes[0].metadata["attributes"] == {"model_file": "<mujoco/>"}
    third = episodes[3]
    assert third.pixels is not None
    assert third.pixels[:, 0, 0, 0].tolist() == [3, 13, 23, 33, 43]
    assert third.vector is not None
    assert third.vector[:, 0].tolist() == [3, 4, 5, 6, 7]
    assert np.allclose(third.vector[:, 3], third.vector[:, 0] / 10)  # sorted: the gripper comes after the position
    assert third.steps == 4
    assert spec.action == ActionSpec(low=(-1.0, -1.0), high=(1.0, 1.0))
    assert spec.environment["env_args"]["env_name"] == "Lift"
    assert spec.environment["vector"] == [["robot0_eef_pos", 3], ["robot0_gripper_qpos", 2]]
    text = "\n".join(notes)
    assert "robot0_eye_in_hand_image are left out" in text
    assert "rewards and dones are left out" in text
    assert "'states' is left out" in text
    assert len(notes) == 3


def test_robomimic_without_the_closing_frame(tmp_path: Path) -> None:
    path = robomimic_file(tmp_path / "lift.hdf5", closing=False, scale=3.0)
    episodes, notes, spec = read_all("robomimic", path, camera="none", vector=["robot0_gripper_qpos"])
    assert episodes[0].pixels is None
    assert episodes[0].actions.shape == (3, 2)
    assert spec.observation == ObservationSpec(vector=2)
    assert spec.labels == {"states": 5}
    assert episodes[0].labels["states"][2].tolist() == [10, 11, 12, 13, 14]
    assert np.allclose(spec.action.low, (-3.0, -3.0 + 6 / 7))  # the range of the data
    assert any(note.startswith("info") and "has no following frame" in note for note in notes)
    assert any(note.startswith("info") and "range of the data" in note for note in notes)


def test_robomimic_asks_which_camera(tmp_path: Path) -> None:
    path = robomimic_file(tmp_path / "lift.hdf5", demos=1)
    with pytest.raises(ConfigError, match="2 cameras: agentview_image, robot0_eye_in_hand_image. Choose one"):
        read_all("robomimic", path)
    with pytest.raises(ConfigError, match="no camera 'agentview'; did you mean 'agentview_image'"):
        read_all("robomimic", path, camera="agentview")
    with pytest.raises(ConfigError, match="no numeric observation column 'eef'"):
        read_all("robomimic", path, camera="none", vector=["eef"])


def test_what_robomimic_needs_is_written(tmp_path: Path) -> None:
    make_store(tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "there.hdf5", target_format="robomimic")
    ours = EpisodeDataset.open(tmp_path / "ours")
    with h5py.File(tmp_path / "there.hdf5") as file:
        assert file["data"].attrs["total"] == int(ours.lengths.sum())
        assert "env_name" in json.loads(file["data"].attrs["env_args"])
        assert [name.decode() for name in file["mask/train"]] == ["demo_1", "demo_3"]
        for number in range(len(ours)):
            episode, demo = ours.episode(number), file[f"data/demo_{number}"]
            assert demo.attrs["num_samples"] == episode.steps == len(demo["actions"])
            assert demo["dones"][()].tolist() == [0] * (episode.steps - 1) + [1]
            assert episode.pixels is not None
            assert np.array_equal(demo["obs/image"], episode.pixels[:-1])
            assert np.array_equal(demo["next_obs/image"], episode.pixels[1:])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda demo: demo.__delitem__("actions"), "data/demo_1 has no actions"),
        (lambda demo: demo.__delitem__("obs/robot0_eef_pos"), "data/demo_1 has no obs/robot0_eef_pos"),
        (lambda demo: demo.__delitem__("next_obs"), "has no next_obs, unlike"),
        (lambda demo: demo.attrs.__setitem__("num_samples", 9), "has 4 actions but num_samples 9"),
        (lambda demo: replace(demo, "obs/robot0_eef_pos", np.zeros((3, 3))), "has 3 rows for 4 actions"),
        (lambda demo: replace(demo, "actions", np.zeros((4, 3))), r"actions is float64 of shape \(4, 3\); expected"),
        (lambda demo: replace(demo, "actions", np.array([[b"a"] * 2] * 4)), r"actions is \|S1"),
    ],
)
def test_a_damaged_demo_is_named(damage: Any, message: str, tmp_path: Path) -> None:
    path = robomimic_file(tmp_path / "lift.hdf5", demos=3)
    with h5py.File(path, "a") as file:
        damage(file["data/demo_1"])
    with pytest.raises(DataError, match=message):
        read_all("robomimic", path, camera="agentview_image")
    report = convert(path, tmp_path / "t", read=ReadOptions(camera="agentview_image"), skip_damaged=True)
    assert (report.episodes, [note.episode for note in report.notes if note.kind == "skipped"]) == (2, [1])


def replace(group: Any, name: str, column: np.ndarray) -> None:
    del group[name]
    group[name] = column


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("where", ["actions", "obs/robot0_eef_pos"])
def test_values_that_are_not_finite_skip_their_demo(bad: float, where: str, tmp_path: Path) -> None:
    path = robomimic_file(tmp_path / "lift.hdf5", demos=3)
    with h5py.File(path, "a") as file:
        file["data/demo_1"][where][2, 0] = bad
    episodes, notes, _ = read_all("robomimic", path, camera="none")
    assert len(episodes) == 2
    (skipped,) = [note for note in notes if note.startswith("skipped")]
    assert "data/demo_1 is skipped" in skipped
    assert "has a value that is not finite (missing, NaN or infinite) at step 2" in skipped


def test_an_empty_demo_is_noted(tmp_path: Path) -> None:
    path = robomimic_file(tmp_path / "lift.hdf5", demos=2)
    with h5py.File(path, "a") as file:
        demo = file["data/demo_1"]
        names: list[str] = []
        demo.visititems(lambda name, item: names.append(name) if isinstance(item, h5py.Dataset) else None)
        for name in names:
            replace(demo, name, demo[name][:0])
        demo.attrs["num_samples"] = 0
    episodes, notes, _ = read_all("robomimic", path, camera="agentview_image")
    assert len(episodes) == 1
    assert any("data/demo_1 is skipped: it has no action" in note for note in notes)


@pytest.mark.parametrize("name", ["robomimic", "swm-hdf5"])
def test_a_file_that_is_cut_or_foreign(name: str, tmp_path: Path) -> None:
    make_store(tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "d.hdf5", target_format=name)
    content = (tmp_path / "d.hdf5").read_bytes()
    for bad in (content[: len(content) // 2], b"", b"not HDF5" * 100):
        (tmp_path / "d.hdf5").write_bytes(bad)
        with pytest.raises(DataError, match=r"d.hdf5 is not a valid HDF5 file"):
            read_all(name, tmp_path / "d.hdf5")
        with pytest.raises(DataError, match="no known format" if bad[:4] != content[:4] else "not a valid HDF5 file"):
            detect(tmp_path / "d.hdf5")
    with h5py.File(tmp_path / "d.hdf5", "w") as file:
        file["something"] = np.zeros(3)
    with pytest.raises(DataError):
        read_all(name, tmp_path / "d.hdf5")


def test_an_hdf5_file_of_the_other_layout_is_refused(tmp_path: Path) -> None:
    path = robomimic_file(tmp_path / "lift.hdf5", demos=1)
    with pytest.raises(DataError, match="no column 'ep_len'; it has data, mask"):
        read_all("swm-hdf5", path)
    with pytest.raises(DataError, match="object 'data' doesn't exist"):
        read_all("robomimic", COLLECTED)


def test_what_the_librarys_own_writer_wrote(tmp_path: Path) -> None:
    assert detect(COLLECTED).name == detect(COLLECTED.parent).name == "swm-hdf5"
    episodes, notes, spec = read_all("swm-hdf5", COLLECTED)
    assert [episode.steps for episode in episodes] == [4, 7, 2]  # of 5, 8 and 3 rows
    for number, episode in enumerate(episodes):
        time = np.arange(episode.steps + 1)
        assert episode.pixels is not None
        assert episode.pixels[:, 0, 0].tolist() == [[10 * step, 40 * number, 0] for step in time]
        assert (episode.pixels[:, 3:6, 3:6, 2] == 255).all()
        assert episode.vector is not None
        assert np.array_equal(episode.vector, np.stack([time, time + 0.5], axis=1))
        assert np.abs(episode.actions).max() <= 1
    assert spec.observation == ObservationSpec(pixels=(12, 12, 3), vector=2)
    assert spec.labels == {"state": 5}
    assert [note.split(":")[0] for note in notes] == ["dropped", "info", "info"]
    assert "reward, terminated are left out" in notes[0]


def test_columns_of_swm_may_be_chosen() -> None:
    (episode, *_), notes, spec = read_all("swm-hdf5", COLLECTED, camera="none", vector=["state", "proprio"])
    assert episode.vector is not None
    assert episode.vector[2, 5:].tolist() == [2.0, 2.5]
    assert (spec.observation, spec.labels) == (ObservationSpec(vector=7), {})
    assert any("the columns pixels are left out" in note for note in notes)


def test_what_stable_worldmodel_needs_is_written(tmp_path: Path) -> None:
    make_store(tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "there.h5", target_format="swm-hdf5")
    ours = EpisodeDataset.open(tmp_path / "ours")
    with h5py.File(tmp_path / "there.h5") as file:
        assert file["ep_len"][()].tolist() == (ours.lengths + 1).tolist()
        assert file["ep_offset"][()].tolist() == ours.starts.tolist()
        rows = {name: len(column) for name, column in file.items() if name not in ("ep_len", "ep_offset")}
        assert rows == dict.fromkeys(
            ["action", "observation", "pixels", "position", "speed", "worldloom_metadata"], ours.frames
        )
        assert np.array_equal(file["action"], ours.columns().actions)
        assert np.array_equal(file["pixels"], ours.pixels(np.arange(ours.frames)))
        assert file["pixels"].chunks == (1, 16, 24, 3)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda file: replace(file, "pixels", np.zeros((9, 4, 4, 3), np.uint8)),
            "'pixels' .* need 16 rows. Restore",
        ),
        (lambda file: file.__delitem__("action"), "no column 'action'"),
        (lambda file: replace(file, "ep_len", np.array([5, 8])), "2 lengths but 3 offsets"),
        (lambda file: replace(file, "action", np.array([b"a"] * 16)), r"'action' is \|S1 of shape \(16,\); expected"),
    ],
)
def test_a_damaged_swm_file_is_refused(damage: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "d.h5"
    path.write_bytes(COLLECTED.read_bytes())
    with h5py.File(path, "a") as file:
        damage(file)
    with pytest.raises(DataError, match=message):
        read_all("swm-hdf5", path)


def test_empty_and_not_finite_episodes_of_swm(tmp_path: Path) -> None:
    path = tmp_path / "d.h5"
    path.write_bytes(COLLECTED.read_bytes())
    with h5py.File(path, "a") as file:
        file["action"][6, 1] = np.nan  # step 1 of the second episode
        for name, column in (("ep_len", [5, 8, 3, 0, 1]), ("ep_offset", [0, 5, 13, 16, 15])):
            replace(file, name, np.array(column))
    episodes, notes, _ = read_all("swm-hdf5", path)
    assert [episode.steps for episode in episodes] == [4, 2]
    skipped = [note.split(": ", 2)[2] for note in notes if note.startswith("skipped")]
    assert (
        skipped[0]
        == "episode 1 is skipped: actions has a value that is not finite (missing, NaN or infinite) at step 1."
    )
    assert [text[:30] for text in skipped[1:]] == ["episode 3 is skipped: it has n", "episode 4 is skipped: it has n"]


def test_a_directory_with_two_files_is_refused(tmp_path: Path) -> None:
    for name in ("a.h5", "b.h5"):
        (tmp_path / name).write_bytes(COLLECTED.read_bytes())
    with pytest.raises(DataError, match="a.h5, b.h5; expected one"):
        read_all("swm-hdf5", tmp_path)


def test_a_label_that_has_a_reserved_name_is_refused(tmp_path: Path) -> None:
    spec = DatasetSpec(observation=SPEC.observation, action=SPEC.action, labels={"reward": 1})
    with pytest.raises(DataError, match="label 'reward' has a name that"):
        FORMATS["swm-hdf5"].create(tmp_path / "t.h5", spec, WriteOptions(), resume=True)


def test_without_h5py_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(__import__("sys").modules, "h5py", None)
    with pytest.raises(ConfigError, match=r"pip install 'worldloom\[hdf5\]'"):
        read_all("robomimic", tmp_path / "x.hdf5")
