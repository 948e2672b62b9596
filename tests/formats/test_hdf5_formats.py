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
    with pytest.raises(DataError, match="has no demos; expected the groups"):
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
        (lambda file: file.__delitem__("action"), "no numeric column 'action'"),
        (lambda file: replace(file, "ep_len", np.array([5, 8])), "2 lengths but 3 offsets"),
        (lambda file: replace(file, "action", np.array([b"a"] * 16)), "no numeric column 'action'; it has"),
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


def nested_file(path: Path, **columns: np.ndarray) -> Path:
    """Three demos of 12 steps with these columns, named by their paths with `__` for `/`."""
    generator = np.random.default_rng(0)
    with h5py.File(path, "w") as file:
        for number in range(3):
            demo = file.create_group(f"data/demo_{number}")
            demo["actions"] = generator.uniform(-1, 1, (12, 7))
            for name, column in columns.items():
                demo[name.replace("__", "/")] = column
    return path


def test_groups_beside_columns_are_left_out_and_can_be_chosen(tmp_path: Path) -> None:
    rows = np.arange(108.0).reshape(12, 9)
    path = nested_file(
        tmp_path / "lab.hdf5", obs__joint_pos=rows, obs__datagen__eef=rows[:, :2], states__robot__joints=rows[:, :3]
    )
    episodes, notes, spec = read_all("robomimic", path)
    assert [episode.steps for episode in episodes] == [11, 11, 11]
    assert (spec.observation, spec.labels) == (ObservationSpec(vector=9), {})
    assert any("observations datagen/eef are left out" in note for note in notes)
    assert any("states/robot/joints are left out" in note for note in notes)
    chosen = {"observation": "datagen/eef, joint_pos", "label": "states/robot/joints"}
    (episode, *_), _, spec = read_all("robomimic", path, columns=chosen)
    assert episode.vector is not None
    assert episode.vector[2].tolist() == [*rows[2, :2], *rows[2]]
    assert episode.labels["states/robot/joints"][2].tolist() == rows[2, :3].tolist()


def test_groups_alone_are_observed(tmp_path: Path) -> None:
    rows = np.arange(36.0).reshape(12, 3)
    path = nested_file(tmp_path / "lab.hdf5", obs__policy__joints=rows, obs__policy__eef=rows + 1)
    (episode, *_), notes, _ = read_all("robomimic", path)
    assert episode.vector is not None
    assert episode.vector[1].tolist() == [4, 5, 6, 3, 4, 5]
    assert any(note.startswith("guessed") and "policy/eef, policy/joints" in note for note in notes)


def varying(group: Any, name: str) -> None:
    column = group.create_dataset(name, (12,), dtype=h5py.vlen_dtype(np.float64))
    for row in range(12):
        column[row] = np.zeros(row + 1)


ODD = {
    "a scalar": lambda group, name: group.create_dataset(name, data=3.0),
    "empty": lambda group, name: group.create_dataset(name, data=h5py.Empty("f")),
    "rows of varying length": varying,
    "text": lambda group, name: group.create_dataset(name, data=["a"] * 12, dtype=h5py.string_dtype()),
    "a dead link": lambda group, name: group.__setitem__(name, h5py.SoftLink("/nowhere")),
    "no demo has one row per action": lambda group, name: group.create_dataset(name, data=np.zeros((1, 3))),
    "not chosen, or not numeric": lambda group, name: group.create_dataset(name, data=np.zeros((12, 3), complex)),
}


@pytest.mark.parametrize("what", ODD)
def test_what_is_no_column_of_numbers_is_left_out(what: str, tmp_path: Path) -> None:
    path = nested_file(tmp_path / "lab.hdf5", obs__joints=np.ones((12, 2)))
    with h5py.File(path, "a") as file:
        for number in range(3):
            ODD[what](file[f"data/demo_{number}/obs"], "odd")
        file["data/remark"] = "not a demo"
    episodes, notes, spec = read_all("robomimic", path)
    assert (len(episodes), spec.observation) == (3, ObservationSpec(vector=2))
    assert any("odd are left out" in note and what in note for note in notes)
    assert any("remark are left out" in note for note in notes)


def test_attributes_that_json_lacks_are_read(tmp_path: Path) -> None:
    path = nested_file(tmp_path / "lab.hdf5", obs__joints=np.ones((12, 2)))
    with h5py.File(path, "a") as file:
        demo = file["data/demo_0"].attrs
        demo["empty"], demo["nan"], demo["texts"] = h5py.Empty("f"), np.nan, np.array([b"a", b"b"])
        demo["num_samples"] = h5py.Empty("i")
        file["data"].attrs["env_args"] = h5py.Empty("f")
    (episode, *_), _, spec = read_all("robomimic", path)
    assert episode.metadata["attributes"] == {"empty": None, "nan": "nan", "texts": ["a", "b"]}
    assert spec.environment["env_args"] is None
    assert convert(path, tmp_path / "t").episodes == 3


def test_other_columns_of_swm_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "d.h5"
    path.write_bytes(COLLECTED.read_bytes())
    with h5py.File(path, "a") as file:
        file["ep_seed"], file["fps"], file["stats/mean"] = np.arange(3), 10.0, np.zeros(2)
        file["gone"] = h5py.SoftLink("/nowhere")
    episodes, notes, spec = read_all("swm-hdf5", path)
    assert ([episode.steps for episode in episodes], spec.labels) == ([4, 7, 2], {"state": 5})
    text = "\n".join(notes)
    assert "ep_seed, stats/mean are left out (fewer than the 16 rows" in text
    assert "fps are left out (a scalar)" in text
    assert "gone are left out (a dead link)" in text


def test_actions_in_a_group_are_joined(tmp_path: Path) -> None:
    path = nested_file(tmp_path / "lab.hdf5", obs__joints=np.ones((12, 2)))
    with h5py.File(path, "a") as file:
        for number in range(3):
            demo = file[f"data/demo_{number}"]
            arm = demo["actions"][()]
            del demo["actions"]
            demo["actions/arm"], demo["actions/hand"] = arm, np.full((12, 1), 0.5)
    (episode, *_), notes, _ = read_all("robomimic", path)
    assert episode.actions[:, 7].tolist() == [0.5] * 11
    assert any(note.startswith("guessed") and "actions/arm, actions/hand" in note for note in notes)


@pytest.mark.parametrize("one_axis", [True, False])
def test_integer_choices_are_discrete(one_axis: bool, tmp_path: Path) -> None:
    path = nested_file(tmp_path / "keys.hdf5", obs__joints=np.ones((12, 2)))
    keys = np.arange(12) % 4
    with h5py.File(path, "a") as file:
        for number in range(3):
            replace(file[f"data/demo_{number}"], "actions", keys if one_axis else keys[:, None])
    (episode, *_), notes, spec = read_all("robomimic", path)
    assert spec.action == ActionSpec(low=(0.0,) * 4, high=(1.0,) * 4, discrete=True)
    assert episode.actions.argmax(axis=1).tolist() == keys[:-1].tolist()
    assert any(
        note.startswith("guessed") and "integer from 0 to 3, which is read as a choice" in note for note in notes
    )
    _, notes, spec = read_all("robomimic", path, columns={"action": "actions"})
    assert (spec.action.discrete, spec.action.size) == (False, 1)
    assert not any(note.startswith("guessed") for note in notes)
    _, _, spec = read_all("robomimic", path, action_low=[0.0], action_high=[5.0])
    assert spec.action == ActionSpec(low=(0.0,), high=(5.0,))


def test_totals_and_fine_numbers_of_hdf5_are_said(tmp_path: Path) -> None:
    metres = (500_000 + 0.001 * np.arange(12))[:, None]
    path = nested_file(tmp_path / "lab.hdf5", obs__utm=metres, obs__counts=2**25 + np.arange(24).reshape(12, 2))
    with h5py.File(path, "a") as file:
        file["data"].attrs["total"] = 99
        file["mask/train"] = np.array([b"demo_0", b"demo_7"])
    _, notes, _ = read_all("robomimic", path)
    text = "\n".join(notes)
    assert "states a total of 99 rows, but its demos have 36" in text
    assert "demos demo_7 are left out (named in 'mask', but not in the file)" in text
    assert "utm loses precision in value 0" in text
    assert "counts loses precision in value" in text


def test_rows_of_no_and_of_several_episodes_are_said(tmp_path: Path) -> None:
    path = tmp_path / "d.h5"
    path.write_bytes(COLLECTED.read_bytes())
    with h5py.File(path, "a") as file:
        replace(file, "ep_len", np.array([5, 7, 2]))
        replace(file, "ep_offset", np.array([0, 4, 12]))
    _, notes, _ = read_all("swm-hdf5", path)
    text = "\n".join(notes)
    assert "3 rows are left out, because they belong to no episode" in text
    assert "1 rows belong to several episodes" in text


def test_rows_that_were_never_written_are_said(tmp_path: Path) -> None:
    path = nested_file(tmp_path / "lab.hdf5", obs__joints=np.ones((12, 2)))
    with h5py.File(path, "a") as file:
        demo = file["data/demo_1"]
        for name in ("actions", "obs/joints"):
            stored = demo[name][()]
            del demo[name]
            demo.create_dataset(name, (40, stored.shape[1]), stored.dtype, chunks=(4, stored.shape[1]))[:12] = stored
        file["data/demo_2/obs"].move("joints", "old")
        file["data/demo_2/obs"].create_dataset("joints", (12, 2), np.float64)
    _, notes, _ = read_all("robomimic", path)
    text = "\n".join(notes)
    assert "data/demo_1/actions: 7 of 10 chunks were never written and are read as 0" in text
    assert "data/demo_1/obs/joints: 7 of 10 chunks" in text
    assert "data/demo_2/obs/joints: all values were never written" in text
    assert "demo_0" not in text
