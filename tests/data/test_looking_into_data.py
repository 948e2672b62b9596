from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import lance
import numpy as np
import pyarrow as pa
import pytest
from data_samples import SPEC, make_episode
from PIL import Image

from worldloom.core.errors import DataError
from worldloom.core.types import ActionSpec, Episode, ObservationSpec
from worldloom.data import DatasetSpec, EpisodeDataset, contact_sheet, inspect, to_rgb, validate, video
from worldloom.data.layout import _CODEC


def make_dataset(path: Path) -> EpisodeDataset:
    dataset = EpisodeDataset.create(path, SPEC)
    dataset.append([make_episode(index) for index in range(3)])
    return dataset


def rewrite(path: Path, change: Callable[[dict[str, list[Any]]], None]) -> None:
    """Change the rows of a dataset behind the library's back."""
    table = lance.dataset(str(path)).to_table()
    columns = table.to_pydict()
    change(columns)
    lance.write_dataset(pa.table(columns, schema=table.schema), str(path), mode="overwrite", schema=table.schema)


def drop(*rows: int) -> Callable[[dict[str, list[Any]]], None]:
    def change(columns: dict[str, list[Any]]) -> None:
        for column in columns.values():
            for row in sorted(rows, reverse=True):
                del column[row]

    return change


def put(name: str, row: int, value: Any) -> Callable[[dict[str, list[Any]]], None]:
    def change(columns: dict[str, list[Any]]) -> None:
        columns[name][row] = value

    return change


def label(row: int, value: list[float]) -> Callable[[dict[str, list[Any]]], None]:
    def change(columns: dict[str, list[Any]]) -> None:
        columns["label"][row] = {**columns["label"][row], "position": value}

    return change


def repeat_first(columns: dict[str, list[Any]]) -> None:
    for name, column in columns.items():
        column.extend([3] * 6 if name == "episode" else column[:6])


@pytest.mark.parametrize(
    ("change", "where", "what"),
    [
        (drop(17), "episode 2", "truncated: its last frame"),
        (drop(8), "episode 1", "missing steps: 2"),
        (drop(6, 7, 8), "episode 1", "missing steps: 0, 1, 2"),
        (drop(*range(6, 12)), "episode 1", "missing: episode 0 is followed by episode 2"),
        (drop(*range(7, 12)), "episode 1", "only one frame"),
        (put("action", 7, None), "episode 1", "no action at steps 1"),
        (put("action", 7, [float("nan"), 0.0]), "episode 1", "actions are not finite at steps 1"),
        (put("action", 7, [0.0, 5.5]), "episode 1", "actions out of bounds at steps 1; expected low"),
        (put("vector", 9, [float("inf"), 0.0]), "episode 1", "vector is not finite at steps 3"),
        (label(9, [float("nan"), 0.0]), "episode 1", "label 'position' is not finite at steps 3"),
        (put("pixels", 9, b"nothing"), "episode 1", "the frame at step 3 does not decode"),
        (put("pixels", 9, _CODEC.compress(bytes(100), asbytes=True)), "episode 1", "the frame at step 3 does not"),
        (put("pixels", 9, _CODEC.compress(bytes(180), asbytes=True)), "episode 1", "was changed after it was written"),
        (put("metadata", 6, '{"index": 4}'), "episode 1", "was changed after it was written"),
        (put("metadata", 6, "{"), "episode 1", "metadata is missing or is not a JSON object"),
        (put("step", 7, 0), "episode 1", "only one frame"),
        (repeat_first, "episode 3", "is identical to episode 0"),
    ],
)
def test_each_fault_is_found_where_it_is(
    tmp_path: Path, change: Callable[[dict[str, list[Any]]], None], where: str, what: str
) -> None:
    make_dataset(tmp_path / "d")
    assert validate(tmp_path / "d") == []
    rewrite(tmp_path / "d", change)
    problems = validate(tmp_path / "d")
    assert any(problem.where == where and what in problem.what for problem in problems), problems
    assert all(problem.remedy for problem in problems)
    assert not [problem for problem in problems if problem.where == "episode 0"]


@pytest.mark.parametrize("change", [drop(8), drop(6), drop(*range(7, 12))])
def test_episodes_that_are_not_whole_do_not_open(
    tmp_path: Path, change: Callable[[dict[str, list[Any]]], None]
) -> None:
    make_dataset(tmp_path / "d")
    rewrite(tmp_path / "d", change)
    with pytest.raises(DataError, match=r"incomplete episodes; run 'worldloom data validate"):
        EpisodeDataset.open(tmp_path / "d")


def test_columns_that_do_not_fit_the_spec_are_a_problem(tmp_path: Path) -> None:
    make_dataset(tmp_path / "d")
    lance.dataset(str(tmp_path / "d")).drop_columns(["vector"])
    (problem,) = validate(tmp_path / "d")
    assert "do not match the dataset's spec" in problem.what


def test_a_summary_says_what_is_there(tmp_path: Path) -> None:
    spec = DatasetSpec(
        observation=ObservationSpec(pixels=(8, 8, 1)), action=ActionSpec(low=(-1.0,), high=(1.0,)), labels={"x": 1}
    )
    pixels = np.zeros((5, 8, 8, 1), np.uint8)
    pixels[2:, 4] = 9  # one of four steps changes the frame
    actions = np.array([[-0.5], [0.25], [0.5], [0.75]], np.float32)
    labels = {"x": np.arange(5, dtype=np.float32)[:, None]}
    dataset = EpisodeDataset.create(tmp_path / "d", spec)
    dataset.append([Episode(pixels=pixels, actions=actions, labels=labels, metadata={"truncated_by": "Fire"})])
    summary = inspect(dataset)
    assert (summary["episodes"], summary["steps"], summary["frames"]) == (1, 4, 5)
    assert summary["moving_share"] == 0.25
    assert summary["labels"]["x"] == {"min": [0.0], "max": [4.0], "mean": [2.0], "std": [1.414214]}
    assert summary["actions"]["min"] == [-0.5]
    assert summary["actions"]["mean"] == [0.25]  # the last row, which is no action, does not count
    assert summary["bytes_decoded"] == 5 * 64
    assert summary["bytes_stored"] == sum(file.stat().st_size for file in (tmp_path / "d" / "data").iterdir())
    assert summary["broken_off"] == 1
    assert summary["versions"] == 2
    assert [version["frames"] for version in summary["last_versions"]] == [0, 5]
    assert summary["fingerprint"] == dataset.fingerprint()


def test_of_many_versions_the_last_few_are_told(tmp_path: Path) -> None:
    dataset = EpisodeDataset.create(tmp_path / "d", SPEC)
    for index in range(6):
        dataset.append([make_episode(index, 3)])
    summary = inspect(dataset)
    assert summary["versions"] == 7
    assert [entry["version"] for entry in summary["last_versions"]] == [5, 6, 7]


def test_a_summary_of_nothing(tmp_path: Path) -> None:
    summary = inspect(EpisodeDataset.create(tmp_path / "d", SPEC))
    assert summary["frames"] == 0
    assert summary["moving_share"] is None


def test_a_contact_sheet_shows_frames_of_several_episodes(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "d")
    contact_sheet(dataset, tmp_path / "sheet.png", episodes=3, times=4)
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    scale = -(-112 // 6)
    tiles = [make_episode(index).pixels for index in range(3)]
    for row, frames in enumerate(tiles):
        assert frames is not None
        for column, step in enumerate([0, 2, 3, 5]):
            top, left = 6 + row * (6 * scale + 22) + 16, 6 + column * (10 * scale + 6)
            tile = sheet[top : top + 6 * scale : scale, left : left + 10 * scale : scale]
            assert np.array_equal(tile, frames[step])


def test_a_video_holds_every_frame_of_its_episodes(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "d")
    video(dataset, tmp_path / "v.mp4", episodes=2)
    with av.open(str(tmp_path / "v.mp4")) as container:
        stream = container.streams.video[0]
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
        assert stream.codec_context.pix_fmt == "yuv420p"
    assert len(frames) == 2 * 6
    height, width = frames[0].shape[:2]
    assert min(height, width) >= 256
    assert (height % 2, width % 2) == (0, 0)
    assert not list(tmp_path.glob("*.tmp"))


def test_pictures_need_pixels(tmp_path: Path) -> None:
    spec = DatasetSpec(observation=ObservationSpec(vector=1), action=ActionSpec(low=(0.0,), high=(1.0,)))
    dataset = EpisodeDataset.create(tmp_path / "d", spec)
    dataset.append([make_episode(0, spec=spec)])
    for write in (contact_sheet, video):
        with pytest.raises(DataError, match="has no pixels"):
            write(dataset, tmp_path / "out")
        with pytest.raises(DataError, match="has no episodes"):
            write(EpisodeDataset.create(tmp_path / write.__name__, SPEC), tmp_path / "out")


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_any_number_of_channels_can_be_shown(channels: int) -> None:
    frames = np.arange(2 * 3 * 4 * channels, dtype=np.uint8).reshape(2, 3, 4, channels)
    shown = to_rgb(frames)
    assert shown.shape == (2, 3, 4, 3)
    kept = min(channels, 3)
    assert np.array_equal(shown[..., :kept], frames[..., :kept])
