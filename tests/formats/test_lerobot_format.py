import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from format_samples import SPEC, Killed, differences, kill_at, make_episode, make_store, read_all, smooth_pixels

from worldloom.core.errors import ConfigError, DataError, StorageError
from worldloom.core.types import ActionSpec, Episode, ObservationSpec
from worldloom.data import DatasetSpec, EpisodeDataset
from worldloom.formats import FORMATS, ReadOptions, WriteOptions, convert, detect, lerobot_write, video

FIXTURES = Path(__file__).parents[1] / "fixtures"
FIXTURE = FIXTURES / "lerobot_v3"
TOP, WRIST = "observation.images.top", "observation.images.wrist"
BOTH = ["lerobot-v21", "lerobot-v3"]


def written(path: Path, name: str, lengths: tuple[int, ...] = (6, 1, 9, 4), **write: Any) -> Path:
    make_store(path.with_name("ours"), lengths)
    convert(path.with_name("ours"), path, target_format=name, write=WriteOptions(**write))
    return path


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    shutil.copytree(FIXTURE, tmp_path / "copy")
    return tmp_path / "copy"


@pytest.mark.parametrize("camera", [TOP, WRIST])
@pytest.mark.parametrize("name", BOTH)
def test_what_lerobot_itself_wrote(name: str, camera: str) -> None:
    path = FIXTURES / name.replace("-", "_")
    assert detect(path).name == name
    episodes, notes, spec = read_all(name, path, camera=camera)
    assert [episode.steps for episode in episodes] == [5, 3, 7]  # of 6, 4 and 8 rows
    for number, episode in enumerate(episodes):
        time = np.arange(episode.steps + 1)
        assert episode.vector is not None
        assert episode.pixels is not None
        assert np.array_equal(episode.vector, np.stack([time + 0.5, 0 * time + number], axis=1))
        assert np.array_equal(episode.actions, np.stack([time - 3, 0 * time + number / 4], axis=1)[:-1])
        if camera == WRIST:
            assert episode.pixels[:, 7, 7].tolist() == [[10 * step + number] * 3 for step in time]
        else:  # the red bar moves 6 columns a step, and the green tells the episode
            assert np.abs(episode.pixels[:, 5, 0, 1].astype(int) - (60 * number + 40)).max() <= 8
            assert [int(np.flatnonzero(frame[9, :, 0] > 127).mean()) for frame in episode.pixels] == (
                3 + 6 * time
            ).tolist()
        assert episode.metadata == {"episode": number, "tasks": ["go left" if number == 1 else "go right"]}
    assert spec.observation == ObservationSpec(pixels=(64, 64, 3) if camera == TOP else (16, 16, 3), vector=2)
    assert spec.action == ActionSpec(low=(-3.0, 0.0), high=(4.0, 0.5))  # from meta/stats.json
    other = WRIST if camera == TOP else TOP
    assert f"next.done, next.reward, {other} are left out" in notes[0]
    assert [note.split(":")[0] for note in notes] == ["dropped", "info", "info"]
    assert "are set to the range of the data" in notes[2]


def test_lerobot_options(copy: Path) -> None:
    with pytest.raises(ConfigError, match="has 2 cameras"):
        read_all("lerobot-v3", copy)
    episodes, _, spec = read_all("lerobot-v3", copy, camera=TOP, size=(8, 8), action_low=[-9, -9], action_high=[9, 9])
    assert spec.observation.pixels == (8, 8, 3)
    assert spec.action.high == (9.0, 9.0)
    assert episodes[0].pixels is not None
    assert episodes[0].pixels.shape == (6, 8, 8, 3)
    (first, *_), notes, _ = read_all("lerobot-v3", copy, camera=WRIST, rate=5.0)
    assert first.pixels is not None
    assert first.pixels[:, 0, 0, 0].tolist() == [0, 20, 40]
    assert first.actions[:, 0].tolist() == [-3, -1]
    assert any("the log is faster than the steps" in note for note in notes)


@pytest.mark.parametrize("name", BOTH)
def test_video_changes_pixels_within_the_stated_psnr(name: str, tmp_path: Path) -> None:
    pixels = smooth_pixels(12)
    spec = DatasetSpec(observation=ObservationSpec(pixels=(64, 64, 3)), action=ActionSpec(low=(-1.0,), high=(1.0,)))
    actions = np.linspace(-1, 1, 11, dtype=np.float32)[:, None]
    ours = EpisodeDataset.create(tmp_path / "ours", spec)
    ours.append([Episode(pixels=pixels, actions=actions), Episode(pixels=pixels[::-1].copy(), actions=actions)])
    report = convert(tmp_path / "ours", tmp_path / "there", target_format=name)
    assert "H.264" in report.notes[0].what
    episodes, _, _ = read_all(name, tmp_path / "there")
    for episode, before in zip(episodes, (pixels, pixels[::-1]), strict=True):
        assert episode.pixels is not None
        assert np.array_equal(episode.actions, actions)
        errors = ((episode.pixels.astype(float) - before) ** 2).mean(axis=(1, 2, 3))
        assert 10 * np.log10(255**2 / errors).min() > 41.0


def test_files_of_several_episodes_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = (6, 1, 9, 4, 7, 3)
    monkeypatch.setattr(lerobot_write.LeRobotSinkV3, "most_episodes", 4)
    path = written(tmp_path / "there", "lerobot-v3", lengths)
    files = sorted(file.relative_to(path).as_posix() for file in path.rglob("*.mp4"))
    assert files == [f"videos/observation.image/chunk-000/file-00{number}.mp4" for number in (0, 1)]
    decoded: list[bool] = []
    groups: list[int] = []
    advance, read_group = video.FrameStream._advance, pq.ParquetFile.read_row_group
    monkeypatch.setattr(video.FrameStream, "_advance", lambda self: decoded.append(True) or advance(self))
    monkeypatch.setattr(
        pq.ParquetFile, "read_row_group", lambda self, i, **more: groups.append(i) or read_group(self, i, **more)
    )
    read_all("lerobot-v3", path)
    assert len(decoded) == sum(lengths) + len(lengths)
    assert len(groups) == 2
    with FORMATS["lerobot-v3"].open(path, ReadOptions()) as source:  # in any order, the same
        backwards = [source.read(index)[0] for index in reversed(range(len(source)))]
    forwards, _, _ = read_all("lerobot-v3", path)
    assert [differences(*pair) for pair in zip(forwards, reversed(backwards), strict=True)] == [[]] * len(lengths)


def test_a_row_group_may_end_within_an_episode(copy: Path) -> None:
    file = copy / "data/chunk-000/file-000.parquet"
    pq.write_table(pq.read_table(file), file, row_group_size=5)
    before, _, _ = read_all("lerobot-v3", FIXTURE, camera=WRIST)
    after, _, _ = read_all("lerobot-v3", copy, camera=WRIST)
    assert [differences(*pair) for pair in zip(before, after, strict=True)] == [[], [], []]


@pytest.mark.parametrize("lossless", [False, True], ids=["video", "png"])
@pytest.mark.parametrize(
    ("name", "function", "when"),
    [
        ("lerobot-v21", "write_video", 3),
        ("lerobot-v21", "write_parquet", 3),
        ("lerobot-v21", "write_json", 2),
        ("lerobot-v3", "write_video", 2),
        ("lerobot-v3", "write_parquet", 3),
        ("lerobot-v3", "write_parquet", 4),
        ("lerobot-v3", "write_json", 3),
    ],
)
def test_a_kill_neither_loses_nor_repeats(
    name: str, function: str, when: int, lossless: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lerobot_write.LeRobotSinkV3, "most_episodes", 2)
    ours = make_store(tmp_path / "ours", (2, 3, 1, 4, 2))
    write = WriteOptions(lossless=lossless)
    with monkeypatch.context() as patch:
        kill_at(patch, lerobot_write, function, when, after=False)
        patch.setattr(lerobot_write.LeRobotSinkV3, "close", lambda self: None)
        if function == "write_video" and lossless:
            convert(tmp_path / "ours", tmp_path / "there", target_format=name, write=write)
        else:
            with pytest.raises(Killed):
                convert(tmp_path / "ours", tmp_path / "there", target_format=name, write=write)
    convert(tmp_path / "ours", tmp_path / "there", target_format=name, write=write)
    episodes, _, _ = read_all(name, tmp_path / "there")
    but = [] if lossless else ["pixels"]
    assert [differences(episode, ours.episode(number), but=but) for number, episode in enumerate(episodes)] == [[]] * 5
    info = json.loads((tmp_path / "there/meta/info.json").read_text())
    assert (info["total_episodes"], info["total_frames"]) == (5, ours.frames)


def test_what_lerobot_needs_is_written(tmp_path: Path) -> None:
    path = written(tmp_path / "there", "lerobot-v3", task="push it")
    ours = EpisodeDataset.open(tmp_path / "ours")
    info = json.loads((path / "meta/info.json").read_text())
    assert (info["codebase_version"], info["fps"], info["total_tasks"]) == ("v3.0", 10, 1)
    assert info["splits"] == {"train": "0:4"}
    assert info["features"]["observation.image"]["dtype"] == "video"
    assert info["features"]["label.speed"]["shape"] == [1]
    data = pq.read_table(path / "data/chunk-000/file-000.parquet")
    assert data["index"].to_pylist() == list(range(ours.frames))
    assert data["timestamp"].type == pa.float32()
    assert data["label.speed"].type == pa.float32()  # one value: no list
    assert data["action"].type.list_size == 2
    assert set(info["features"]) - set(data.column_names) == {"observation.image"}
    tasks = pq.read_table(path / "meta/tasks.parquet")
    assert tasks.to_pydict() == {"task_index": [0], "__index_level_0__": ["push it"]}
    assert json.loads(tasks.schema.metadata[b"pandas"])["index_columns"] == ["__index_level_0__"]
    episodes = pq.read_table(path / "meta/episodes/chunk-000/file-000.parquet").to_pylist()
    assert [row["dataset_to_index"] - row["dataset_from_index"] for row in episodes] == [7, 2, 10, 5]
    assert episodes[2]["videos/observation.image/from_timestamp"] == pytest.approx(0.9)
    stats = json.loads((path / "meta/stats.json").read_text())
    actions = np.concatenate([ours.episode(number).actions for number in range(4)]).astype(np.float64)
    for key, expected in (("min", actions.min(0)), ("mean", actions.mean(0)), ("std", actions.std(0))):
        assert np.allclose(stats["action"][key], expected)
    assert stats["action"]["count"] == [20]
    pixels = ours.pixels(np.arange(ours.frames)) / 255
    assert np.allclose(np.ravel(stats["observation.image"]["std"]), pixels.std(axis=(0, 1, 2)))
    assert np.allclose(np.ravel(stats["observation.image"]["max"]), pixels.max(axis=(0, 1, 2)))
    assert np.shape(stats["observation.image"]["mean"]) == (3, 1, 1)


@pytest.mark.parametrize("name", BOTH)
def test_the_datasets_package_is_told_of_pictures(name: str, tmp_path: Path) -> None:
    path = written(tmp_path / "there", name, lossless=True)
    for file in (path / "data").rglob("*.parquet"):
        features = json.loads(pq.read_schema(file).metadata[b"huggingface"])["info"]["features"]
        assert features["observation.image"] == {"_type": "Image"}
        assert features["action"] == {
            "feature": {"dtype": "float32", "_type": "Value"},
            "length": 2,
            "_type": "Sequence",
        }
        assert set(features) == set(pq.read_schema(file).names)


def test_tasks_are_carried_to_the_next_dataset(tmp_path: Path) -> None:
    convert(FIXTURE, tmp_path / "ours", read=ReadOptions(camera=TOP))
    convert(tmp_path / "ours", tmp_path / "there", target_format="lerobot-v21")
    tasks = [json.loads(line) for line in (tmp_path / "there/meta/tasks.jsonl").read_text().splitlines()]
    assert tasks == [{"task_index": 0, "task": "go right"}, {"task_index": 1, "task": "go left"}]
    rows = [
        pq.read_table(file)["task_index"].to_pylist() for file in sorted((tmp_path / "there/data").rglob("*.parq*"))
    ]
    assert [set(each) for each in rows] == [{0}, {1}, {0}]


def edit_rows(column: str, change: Callable[[list[Any]], list[Any]]) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        file = path / "data/chunk-000/file-000.parquet"
        table = pq.read_table(file)
        place = table.schema.get_field_index(column)
        values = change(table[column].to_pylist())
        pq.write_table(table.set_column(place, column, pa.array(values)), file)

    return damage


def edit_info(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        info = json.loads((path / "meta/info.json").read_text())
        change(info)
        (path / "meta/info.json").write_text(json.dumps(info))

    return damage


def edit_length(length: str) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        file = path / "meta/episodes.jsonl"
        file.write_text(re.sub(r'"length": \d+', f'"length": {length}', file.read_text(), count=1))

    return damage


def cut(name: str) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        content = (path / name).read_bytes()
        (path / name).write_bytes(content[: len(content) * 2 // 3])

    return damage


def shorter_video(path: Path) -> None:
    frames = np.zeros((16, 64, 64, 3), np.uint8)
    video.write_video(path / f"videos/{TOP}/chunk-000/file-000.mp4", frames, fps=10.0, crf=18, lossless=False)


def slower_video(path: Path) -> None:
    frames = np.zeros((26, 64, 64, 3), np.uint8)
    video.write_video(path / f"videos/{TOP}/chunk-000/file-000.mp4", frames, fps=8.0, crf=18, lossless=False)


DATA, VIDEO = "data/chunk-000/file-000.parquet", f"videos/{TOP}/chunk-000/file-000.mp4"


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (lambda path: (path / DATA).unlink(), StorageError, "file-000.parquet does not exist"),
        (lambda path: (path / VIDEO).unlink(), StorageError, "file-000.mp4 does not exist"),
        (lambda path: shutil.rmtree(path / "meta/episodes"), DataError, "meta/episodes has no Parquet files"),
        (cut(DATA), DataError, "file-000.parquet cannot be read as Parquet"),
        (cut("meta/episodes/chunk-000/file-000.parquet"), DataError, "cannot be read as Parquet"),
        (cut(VIDEO), DataError, "file-000.mp4"),
        (cut("meta/info.json"), StorageError, "info.json is not valid JSON"),
        (shorter_video, DataError, "has 6 frames for episode 2; .* its 8 rows"),
        (slower_video, DataError, r"the video has 8 frames per second and the table 10 rows, .* apart by 0\.25 s in"),
        (
            lambda path: edit_rows("action", lambda v: ["a"] * len(v))(path),
            DataError,
            "column 'action' has type string",
        ),
        (edit_rows("action", lambda v: [[1.0, 2.0, 3.0]] * len(v)), DataError, "has 18 values in 6 rows"),
        (edit_rows("episode_index", lambda v: [0] * 7 + v[7:]), DataError, "row 6 belongs to episode 0; expected 1"),
        (edit_rows("timestamp", lambda v: v[::-1]), DataError, "timestamps that do not increase"),
        (edit_rows("timestamp", lambda v: ["x"] * len(v)), DataError, "column 'timestamp' has type string"),
        (edit_info(lambda info: info.update(codebase_version="v9.0")), DataError, "codebase_version 'v9.0'; expected"),
        (edit_info(lambda info: info.update(codebase_version="v1.6")), DataError, "codebase_version 'v1.6'; expected"),
        (edit_info(lambda info: info.pop("data_path")), DataError, "KeyError: 'data_path'"),
        (edit_info(lambda info: info.update(data_path="../x")), DataError, "outside of the dataset"),
        (edit_info(lambda info: info.update(fps=0)), DataError, "has fps 0.0"),
        (edit_info(lambda info: info["features"].pop("action")), DataError, "has no numeric column 'action'"),
        (
            edit_info(lambda info: info["features"].update({"observation.x": {"dtype": "float32", "shape": [1]}})),
            DataError,
            "no column 'observation.x'; got",
        ),
        (
            edit_info(lambda info: info["features"][TOP].update(shape=[32, 64, 3])),
            DataError,
            r"frames of shape \(64, 64, 3\); expected \(32, 64, 3\)",
        ),
    ],
)
def test_damage_is_named(damage: Callable[[Path], None], error: type[Exception], message: str, copy: Path) -> None:
    damage(copy)
    assert detect(copy).name == "lerobot-v3"
    with pytest.raises(error, match=message):
        read_all("lerobot-v3", copy, camera=TOP)


def test_values_that_are_not_finite_skip_their_episode(copy: Path) -> None:
    def spoil(values: list[Any]) -> list[Any]:
        values[7] = [np.nan, 0.0]
        return values

    edit_rows("action", spoil)(copy)
    episodes, notes, _ = read_all("lerobot-v3", copy, camera="none")
    assert [episode.metadata["episode"] for episode in episodes] == [0, 2]
    assert any("episode 1 is skipped: actions has a value that is not finite" in note for note in notes)


def test_a_gap_in_the_timestamps_splits(copy: Path) -> None:
    edit_rows("timestamp", lambda v: [*v[:10], *v[10:14], *(stamp + 2 for stamp in v[14:])])(copy)
    episodes, notes, _ = read_all("lerobot-v3", copy, camera=WRIST)
    assert [episode.steps for episode in episodes] == [5, 3, 3, 3]
    assert [episode.metadata.get("part") for episode in episodes] == [None, None, 0, 1]
    assert episodes[3].pixels is not None
    assert episodes[3].pixels[0, 0, 0, 0] == 42
    assert any("gap of 2.1 s" in note for note in notes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda stamp: 1.5 * stamp, "rates differ: .* drift apart by .* more than half a frame from row"),
        (lambda stamp: stamp + 0.1, "starts 0.1 s after the video, and stays as far apart .a late start"),
        (lambda stamp: 1000 * stamp, "seem to be in ms; expected seconds"),
    ],
)
def test_times_that_do_not_fit_the_video_say_how_and_rows_may_be_paired_by_number(
    change: Callable[[float], float], message: str, copy: Path
) -> None:
    edit_rows("timestamp", lambda stamps: [change(stamp) for stamp in stamps])(copy)
    with pytest.raises(DataError, match=rf"{message}.*--pair number"):
        read_all("lerobot-v3", copy, camera=TOP)
    episodes, _, _ = read_all("lerobot-v3", copy, camera=TOP, pair="number")
    usual, _, _ = read_all("lerobot-v3", FIXTURE, camera=TOP)
    for ours, theirs in zip(episodes, usual, strict=True):
        assert np.array_equal(ours.pixels, theirs.pixels)
        assert np.array_equal(ours.actions, theirs.actions)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda path: (path / "data/chunk-000/episode_000002.parquet").unlink(),
            "episode_000002.parquet does not exist",
        ),
        (lambda path: next(path.rglob("episode_000001.mp4")).unlink(), "episode_000001.mp4 does not exist"),
        (
            lambda path: shutil.copy(next(path.rglob("episode_000000.mp4")), next(path.rglob("episode_000002.mp4"))),
            "has 7 frames for episode 2; .* its 10 rows",
        ),
        (cut("meta/episodes.jsonl"), "episodes.jsonl: line 3 is not valid JSON"),
        (edit_length("101.9"), "length is 101.9; expected an integer from 0 on"),
        (edit_length("-1"), "length is -1; expected an integer"),
        (edit_length("true"), "length is True; expected an integer"),
        (edit_info(lambda info: info.update(chunks_size=-3)), "chunks_size is -3; expected an integer"),
        (edit_info(lambda info: info.update(data_path="{episode_index:>999999999}")), "expected names in braces"),
        (edit_info(lambda info: info.update(data_path="{episode_index.__class__}")), "expected names in braces"),
        (edit_info(lambda info: info.update(data_path="{other}")), "KeyError: 'other'"),
        (edit_info(lambda info: info.update(data_path=None)), "data_path is None; expected a text"),
        (cut("data/chunk-000/episode_000001.parquet"), "episode_000001.parquet cannot be read as Parquet"),
    ],
)
def test_damage_of_version_2_is_named(damage: Callable[[Path], None], message: str, tmp_path: Path) -> None:
    path = written(tmp_path / "there", "lerobot-v21")
    damage(path)
    with pytest.raises((DataError, StorageError), match=message):
        read_all("lerobot-v21", path)


def test_foreign_version_2_takes_bounds_from_its_statistics(tmp_path: Path) -> None:
    path = written(tmp_path / "there", "lerobot-v21")
    (path / "meta/worldloom.json").unlink()
    ours = EpisodeDataset.open(tmp_path / "ours")
    actions = np.concatenate([ours.episode(number).actions for number in range(4)])
    for expected_note, name in (("range of the data", "stats.json"), ("range of the data", "episodes_stats.jsonl")):
        _, notes, spec = read_all("lerobot-v21", path)
        assert np.allclose(spec.action.low, actions.min(axis=0))
        assert np.allclose(spec.action.high, actions.max(axis=0))
        assert any(expected_note in note for note in notes)
        (path / "meta" / name).unlink()
    _, _, spec = read_all("lerobot-v21", path)  # without statistics, from the rows, whose last is zero
    assert np.all(np.array(spec.action.low) <= actions.min(axis=0))


def test_what_cannot_be_written_is_refused(tmp_path: Path) -> None:
    format = FORMATS["lerobot-v3"]
    four = DatasetSpec(observation=ObservationSpec(pixels=(4, 4, 4)), action=SPEC.action)
    slash = DatasetSpec(observation=SPEC.observation, action=SPEC.action, labels={"a/b": 1})
    for spec, write, error in ((four, {}, DataError), (slash, {}, DataError), (SPEC, {"fps": 12.5}, ConfigError)):
        with pytest.raises(error, match=r"channels|'/'|integer frame rate"):
            format.create(tmp_path / "x", spec, WriteOptions(**write), resume=True)
    assert not (tmp_path / "x").exists()
    with format.create(tmp_path / "x", SPEC, WriteOptions(), resume=True) as sink:
        sink.write(make_episode(0))
    with pytest.raises(DataError, match="already exists"):
        format.create(tmp_path / "x", SPEC, WriteOptions(), resume=False)
    with pytest.raises(DataError, match="settings or options than"):
        format.create(tmp_path / "x", SPEC, WriteOptions(lossless=True), resume=True)
    assert format.create(tmp_path / "x", SPEC, WriteOptions(), resume=True).written == 1


def plain_dataset(root: Path, features: dict[str, Any], rows: int = 8) -> Path:
    """Two episodes of version 2.1; each feature is an array (rows, n)."""
    stated: dict[str, Any] = {name: {"dtype": "int64", "shape": [1]} for name in ("frame_index", "episode_index")}
    (root / "meta").mkdir(parents=True)
    (root / "data/chunk-000").mkdir(parents=True)
    for name, example in features.items():
        stated[name] = {"dtype": str(example.dtype), "shape": list(example.shape[1:]) or [1], "names": None}
    info = {"codebase_version": "v2.1", "fps": 10, "features": stated, "chunks_size": 1000}
    info |= {"data_path": "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet", "total_episodes": 2}
    (root / "meta/info.json").write_text(json.dumps(info | {"total_frames": 2 * rows}))
    lines = [
        json.dumps({"episode_index": number, "tasks": ["push\u2028it"], "length": rows}, ensure_ascii=False)
        for number in (0, 1)
    ]
    (root / "meta/episodes.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    for number in (0, 1):
        table: dict[str, Any] = {"frame_index": np.arange(rows), "episode_index": np.full(rows, number)}
        table |= {name: list(example) for name, example in features.items()}
        pq.write_table(pa.table(table), root / f"data/chunk-000/episode_{number:06d}.parquet")
    return root


def signal(rows: int, size: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-1, 1, (rows, size)).astype(np.float32)


def test_other_names_are_guessed_and_noted(tmp_path: Path) -> None:
    features = {"state": signal(8, 4), "actions": signal(8, 2, 1), "effort": signal(8, 3, 2)}
    root = plain_dataset(tmp_path / "d", features)
    (episode, _), notes, spec = read_all("lerobot-v21", root)
    assert (spec.observation.vector, spec.action.size) == (4, 2)
    assert episode.actions.tolist() == features["actions"][:-1].tolist()
    assert episode.metadata["tasks"] == ["push\u2028it"]
    guesses = [note for note in notes if note.startswith("guessed")]
    assert any("the action is taken from actions. Name other columns with --columns" in note for note in guesses)
    assert any("the vector is taken from state," in note for note in guesses)
    named = {"action": "effort", "observation": "state,actions", "label": "effort"}
    (episode, _), notes, spec = read_all("lerobot-v21", root, columns=named)
    assert (spec.observation.vector, spec.action.size, spec.labels) == (6, 3, {"effort": 3})
    assert not any(note.startswith("guessed") for note in notes)
    with pytest.raises(ConfigError, match="no numeric column 'efort'; did you mean 'effort'"):
        read_all("lerobot-v21", root, columns={"action": "efort"})
    with pytest.raises(ConfigError, match="role 'unit' of the option 'columns' is not supported here"):
        read_all("lerobot-v21", root, columns={"unit": "ms"})
    with pytest.raises(ConfigError, match="both name columns"):
        read_all("lerobot-v21", root, columns={"observation": "state"}, vector=["state"])


def test_an_action_that_others_repeat_stands_alone(tmp_path: Path) -> None:
    action = signal(8, 7)
    features = {"observation.state": signal(8, 4), "action": action}
    features |= {"action.cartesian": action[:, :6], "action.gripper": action[:, 6:]}
    root = plain_dataset(tmp_path / "d", features)
    _, notes, spec = read_all("lerobot-v21", root)
    assert spec.action.size == 7
    assert any(note.startswith("guessed") and "action.cartesian, action.gripper are left out" in note for note in notes)
    (episode, _), _, spec = read_all("lerobot-v21", root, columns={"action": "action.gripper"})
    assert episode.actions.tolist() == action[:-1, 6:].tolist()
    del features["action"]
    _, notes, spec = read_all("lerobot-v21", plain_dataset(tmp_path / "parts", features))
    assert spec.action.size == 7
    assert any("the action joins action.cartesian (6), action.gripper (1)" in note for note in notes)


def test_integer_choices_of_lerobot(tmp_path: Path) -> None:
    keys = np.array([[0], [3], [1], [2], [0], [3], [1], [2]])
    features = {"observation.state": signal(8, 4), "action": keys}
    (episode, _), notes, spec = read_all("lerobot-v21", plain_dataset(tmp_path / "d", features))
    assert (spec.action.discrete, spec.action.size, spec.environment["choices"]) == (True, 4, [0, 3])
    assert episode.actions.argmax(axis=1).tolist() == keys[:-1, 0].tolist()
    features["action"] = keys.astype(np.float32)
    root = plain_dataset(tmp_path / "floats", features)
    assert not read_all("lerobot-v21", root)[2].action.discrete
    assert read_all("lerobot-v21", root, columns={"choice": "action"})[2].action.discrete
    features["action"] = 100 * keys
    _, notes, spec = read_all("lerobot-v21", plain_dataset(tmp_path / "ticks", features))
    assert not spec.action.discrete
    assert any(note.startswith("guessed") and "read as numbers, between which a planner" in note for note in notes)
    features["action"] = keys + 0.5
    with pytest.raises(DataError, match=r"the action in row 0 is 0.5; expected an integer from 0 to 3"):
        read_all("lerobot-v21", plain_dataset(tmp_path / "halves", features), columns={"choice": "action"})


def test_without_an_observation_the_features_are_named(tmp_path: Path) -> None:
    features = {"joints": signal(8, 4), "action": signal(8, 2)}
    with pytest.raises(DataError, match="nothing to observe.* numeric columns: action, joints"):
        read_all("lerobot-v21", plain_dataset(tmp_path / "d", features))


def test_counts_that_disagree_are_said(tmp_path: Path) -> None:
    root = plain_dataset(tmp_path / "d", {"observation.state": signal(8, 4), "action": signal(8, 2)})
    episodes = root / "meta/episodes.jsonl"
    lines = episodes.read_text("utf-8").split("\n")
    episodes.write_text("\n".join([lines[0], lines[0], lines[1].replace('"length": 8', '"length": 6'), ""]), "utf-8")
    found, notes, _ = read_all("lerobot-v21", root)
    assert [episode.steps for episode in found] == [7, 5]
    text = "\n".join(notes)
    assert "1 episodes are stated twice" in text
    assert "has total_frames 16, but the episodes make 14" in text
    assert "episode_000001.parquet: the last 2 rows are left out" in text
    episodes.write_text("\n".join([lines[0], lines[0].replace('"length": 8', '"length": 6'), ""]), "utf-8")
    with pytest.raises(DataError, match="states episode 0 twice, with different values"):
        read_all("lerobot-v21", root)


def test_linked_folders_are_read(copy: Path, tmp_path: Path) -> None:
    ours, _, _ = read_all("lerobot-v3", copy, camera=TOP)
    for folder in ("meta/episodes/chunk-000", "data"):
        (copy / folder).rename(tmp_path / folder.replace("/", "-"))
        (copy / folder).symlink_to(tmp_path / folder.replace("/", "-"))
    (copy / "meta/episodes/loop").symlink_to(copy / "meta/episodes")
    linked, _, _ = read_all("lerobot-v3", copy, camera=TOP)
    assert [differences(a, b) for a, b in zip(ours, linked, strict=True)] == [[]] * len(ours)


def test_numbers_too_fine_for_float32_are_said(tmp_path: Path) -> None:
    metres = (5_400_000 + 0.05 * np.arange(8))[:, None]
    features = {"observation.position": metres, "observation.local": metres - 5_400_000, "action": signal(8, 2)}
    _, notes, _ = read_all("lerobot-v21", plain_dataset(tmp_path / "d", features))
    (first, _) = [note for note in notes if "loses precision" in note]
    assert "observation.position loses precision in value 0" in first
    assert "change by 0.05 per step" in first


def overlapping(root: Path) -> None:
    """Let episode 1 begin where episode 0 begins, as a faulty merge of datasets does."""
    for file in (root / "meta/episodes").rglob("*.parquet"):
        table = pq.read_table(file)
        place = table.column_names.index(f"videos/{TOP}/from_timestamp")
        times = table.column(place).to_pylist()
        times[1] = times[0]
        pq.write_table(table.set_column(place, table.schema.field(place), pa.array(times)), file)


def test_two_episodes_with_one_stretch_of_video_are_refused(copy: Path, tmp_path: Path) -> None:
    overlapping(copy)
    with pytest.raises(DataError, match="episodes 0 and 1 have the same stretch of the video"):
        read_all("lerobot-v3", copy, camera=TOP)
    assert read_all("lerobot-v3", copy, camera="none")[0]
    report = convert(copy, tmp_path / "store", read=ReadOptions(camera=TOP), skip_damaged=True)
    assert report.episodes == report.source_episodes - 2


@pytest.mark.parametrize("name", ["data", "videos", "meta/episodes"])
def test_pointers_of_git_lfs_are_named(name: str, copy: Path) -> None:
    for file in (copy / name).rglob("file-*"):
        file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 12\n", "utf-8")
    with pytest.raises(DataError, match="is a pointer of Git LFS, not the file itself.*run 'git lfs pull'"):
        read_all("lerobot-v3", copy, camera=TOP)


def test_hidden_files_beside_the_files_are_ignored(copy: Path) -> None:
    before, _, _ = read_all("lerobot-v3", copy, camera=TOP)
    for file in [file for file in copy.rglob("*") if file.is_file()]:
        file.with_name(f"._{file.name}").write_bytes(b"\0\5\26\7")
    after, _, _ = read_all("lerobot-v3", copy, camera=TOP)
    assert [differences(a, b) for a, b in zip(before, after, strict=True)] == [[]] * len(before)
