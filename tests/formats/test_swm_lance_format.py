import io
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import format_samples
import lance
import numpy as np
import pyarrow as pa
import pytest
from format_samples import SPEC, SPECS, Killed, differences, kill_at, make_episode, make_store, smooth_pixels
from PIL import Image

from worldloom.core.errors import ConfigError, DataError, WorldloomError
from worldloom.core.types import ActionSpec, Episode, ObservationSpec
from worldloom.data import DatasetSpec, EpisodeDataset
from worldloom.formats import FORMATS, WriteOptions, convert, detect, swm_lance

NAME, LENGTHS = "swm-lance", (5, 8, 3)


def picture(value: int, quality: int = 95) -> bytes:
    content = io.BytesIO()
    Image.fromarray(np.full((12, 12, 3), value, np.uint8)).save(content, format="JPEG", quality=quality)
    return content.getvalue()


def lists(column: np.ndarray) -> pa.Array:
    return pa.FixedSizeListArray.from_arrays(pa.array(column.astype(np.float32).reshape(-1)), column.shape[1])


def columns() -> dict[str, Any]:
    """The columns that stable-worldmodel's LanceWriter makes, in its types."""
    episode = np.repeat(np.arange(3, dtype=np.int32), LENGTHS)
    step = np.concatenate([np.arange(length, dtype=np.int32) for length in LENGTHS])
    return {
        "episode_idx": pa.array(episode),
        "step_idx": pa.array(step),
        "pixels": pa.array([picture(10 * t + 40 * e) for e, t in zip(episode, step, strict=True)], pa.binary()),
        "proprio": lists(np.stack([step, step + 0.5], axis=1)),
        "state": lists(np.repeat(step[:, None], 5, axis=1)),
        "action": lists(np.stack([step / 10, -step / 10], axis=1)),
        "reward": lists(np.zeros((16, 1))),
        "env_name": pa.array(["swm/Sample-v1"] * 16),
    }


def table(path: Path, change: Callable[[dict[str, Any]], object] = lambda _: None) -> Path:
    made = columns()
    change(made)
    shutil.rmtree(path, ignore_errors=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    lance.write_dataset(pa.table(made), str(path))
    return path


read_all = partial(format_samples.read_all, NAME)


def test_a_table_in_that_librarys_layout(tmp_path: Path) -> None:
    path = table(tmp_path / "data" / "sample.lance")
    assert detect(path).name == detect(path.parent).name == NAME
    episodes, notes, spec = read_all(path)
    assert spec.observation == ObservationSpec(pixels=(12, 12, 3), vector=2)
    assert spec.labels == {"state": 5}
    assert np.allclose(spec.action.high, (0.6, 0.0))  # of the actions that lead to a frame
    assert [episode.steps for episode in episodes] == [length - 1 for length in LENGTHS]
    for number, episode in enumerate(episodes):
        time = np.arange(episode.steps + 1)
        assert episode.pixels is not None
        assert np.abs(episode.pixels[:, 3, 4, 1].astype(int) - (10 * time + 40 * number)).max() <= 1
        assert episode.vector is not None
        assert np.array_equal(episode.vector, np.stack([time, time + 0.5], axis=1))
        assert np.array_equal(episode.labels["state"][:, 3], time)
        assert episode.metadata == {"index": number, "env_name": "swm/Sample-v1"}
    assert [note.split(":")[0] for note in notes] == ["dropped", "info", "info"]
    assert "reward are left out" in notes[0]


def test_columns_may_be_chosen(tmp_path: Path) -> None:
    path = table(tmp_path / "sample.lance")
    (first, *_), notes, spec = read_all(path, camera="none", vector=["state", "proprio"])
    assert (first.pixels, spec.observation, spec.labels) == (None, ObservationSpec(vector=7), {})
    assert any("the columns pixels are left out" in note for note in notes)
    (first, *_), _, _ = read_all(path, size=(4, 6))
    assert first.pixels is not None
    assert first.pixels.shape == (5, 4, 6, 3)
    with pytest.raises(ConfigError, match="the option 'rate' is not supported"):
        read_all(path, rate=2.0)


@pytest.mark.parametrize("suffix", ["", ".lance"])
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_a_lossless_round_trip_changes_nothing(spec: DatasetSpec, suffix: str, tmp_path: Path) -> None:
    ours = make_store(tmp_path / "ours", spec=spec)
    target = tmp_path / f"there{suffix}"
    there = convert(tmp_path / "ours", target, target_format=NAME, write=WriteOptions(lossless=True))
    back = convert(target, tmp_path / "back")
    assert (back.source_format, there.notes, back.notes) == (NAME, [], [])
    assert EpisodeDataset.open(tmp_path / "back").fingerprint() == ours.fingerprint()  # of the spec, too
    where = target if suffix else target / "there.lance"
    schema = lance.dataset(str(where)).schema
    assert schema.field("episode_idx").type == schema.field("step_idx").type == pa.int32()
    assert schema.field("action").type == pa.list_(pa.float32(), spec.action.size)


def test_jpeg_changes_pixels_within_the_stated_psnr(tmp_path: Path) -> None:
    pixels = smooth_pixels(6)
    spec = DatasetSpec(observation=ObservationSpec(pixels=(64, 64, 3)), action=ActionSpec(low=(-1.0,), high=(1.0,)))
    ours = EpisodeDataset.create(tmp_path / "ours", spec)
    ours.append([Episode(pixels=pixels, actions=np.zeros((5, 1), np.float32))])
    report = convert(tmp_path / "ours", tmp_path / "there.lance", target_format=NAME)
    assert "JPEG at quality 95" in report.notes[0].what
    (episode,), _, _ = read_all(tmp_path / "there.lance")
    assert episode.pixels is not None
    errors = ((episode.pixels.astype(float) - pixels) ** 2).mean(axis=(1, 2, 3))
    assert 10 * np.log10(255**2 / errors).min() > 35.0


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_a_kill_neither_loses_nor_repeats(after: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(swm_lance.SwmLanceSink, "most_episodes", 2)
    ours = make_store(tmp_path / "ours", (2, 3, 1, 4, 2))
    write = WriteOptions(lossless=True)
    with monkeypatch.context() as patch:
        kill_at(patch, swm_lance.SwmLanceSink, "save", 2, after)
        patch.setattr(swm_lance.SwmLanceSink, "close", lambda self: None)
        with pytest.raises(Killed):
            convert(tmp_path / "ours", tmp_path / "there", target_format=NAME, write=write)
    report = convert(tmp_path / "ours", tmp_path / "there", target_format=NAME, write=write)
    assert (report.episodes, report.resumed) == (5, 4 if after else 2)
    episodes, _, _ = read_all(tmp_path / "there")
    assert [differences(episode, ours.episode(number)) for number, episode in enumerate(episodes)] == [[]] * 5


def spoil(name: str, row: int, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(made: dict[str, Any]) -> None:
        values = made[name].to_pylist()
        values[row] = value
        made[name] = pa.array(values, made[name].type)

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda made: made.pop("action"), "has no numeric column 'action'; it has"),
        (lambda made: made.update(action=pa.array(["a"] * 16)), "'action' has type string; expected a list of numbers"),
        (spoil("episode_idx", 9, 0), "episode_idx decreases from 1 to 0 in row 9"),
        (spoil("step_idx", 7, 9), "step_idx is 9 in row 7; expected 2"),
        (spoil("pixels", 6, b"no picture"), "episode 1: the picture of 'pixels' in step 1 does not decode"),
        (spoil("pixels", 6, None), "episode 1: the picture of 'pixels' in step 1 does not decode"),
        (spoil("pixels", 6, picture(3)[:300]), "episode 1: the picture of 'pixels' in step 1 does not decode"),
    ],
)
def test_damage_is_named(change: Callable[[dict[str, Any]], object], message: str, tmp_path: Path) -> None:
    path = table(tmp_path / "sample.lance", change)
    with pytest.raises(DataError, match=message):
        read_all(path)


def test_a_table_that_lost_a_file_is_named(tmp_path: Path) -> None:
    path = table(tmp_path / "sample.lance")
    for file in (path / "data").iterdir():
        file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(WorldloomError, match=r"sample\.lance is damaged"):
        read_all(path)


@pytest.mark.parametrize("value", [[np.nan, 0.0], None])
def test_values_that_are_not_finite_skip_their_episode(value: Any, tmp_path: Path) -> None:
    episodes, notes, _ = read_all(table(tmp_path / "sample.lance", spoil("action", 6, value)))
    assert [episode.metadata["index"] for episode in episodes] == [0, 2]
    assert any("episode 1 is skipped: actions has a value that is not finite" in note for note in notes)


def test_a_directory_with_two_tables_is_refused(tmp_path: Path) -> None:
    table(tmp_path / "a.lance")
    table(tmp_path / "b.lance")
    with pytest.raises(DataError, match=r"a\.lance, b\.lance; expected one"):
        read_all(tmp_path)


def test_our_own_store_is_no_such_table(tmp_path: Path) -> None:
    make_store(tmp_path / "ours.lance")
    assert detect(tmp_path / "ours.lance").name == "worldloom"


def test_what_cannot_be_written_is_refused(tmp_path: Path) -> None:
    reserved = DatasetSpec(observation=SPEC.observation, action=SPEC.action, labels={"reward": 1})
    with pytest.raises(DataError, match="label 'reward' has a name"):
        FORMATS[NAME].create(tmp_path / "x", reserved, WriteOptions(), resume=True)
    with FORMATS[NAME].create(tmp_path / "x", SPEC, WriteOptions(), resume=True) as sink:
        sink.write(make_episode(0))
    with pytest.raises(DataError, match="already exists"):
        FORMATS[NAME].create(tmp_path / "x", SPEC, WriteOptions(), resume=False)
    other = DatasetSpec(observation=SPEC.observation, action=SPEC.action)
    with pytest.raises(DataError, match="other columns or settings"):
        FORMATS[NAME].create(tmp_path / "x", other, WriteOptions(), resume=True)
