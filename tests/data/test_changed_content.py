"""Content that is not what was written is never read: each episode and each frame has a digest, checked when read."""

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lance
import numpy as np
import pyarrow as pa
import pytest
from data_samples import SPEC, make_episode, same

from worldloom.core.errors import DataError
from worldloom.data import (
    DataConfig,
    EpisodeDataset,
    Frames,
    contact_sheet,
    layout,
    load_cache,
    stream_frames,
    validate,
)
from worldloom.data.layout import compress_frames, digests_of, frame_digests, spec_of

OLD = Path(__file__).parents[1] / "fixtures" / "formats_v1" / "dataset"


def make_dataset(path: Path, version: int = 2) -> EpisodeDataset:
    """Six episodes; those of version 1 of the format have 31 frames each."""
    if version == 1:
        return EpisodeDataset.open(shutil.copytree(OLD, path))
    dataset = EpisodeDataset.create(path, SPEC)
    dataset.append([make_episode(index, 30) for index in range(6)])
    return dataset


def exchange(path: Path, name: str) -> None:
    """Change one value in the middle of the dataset; the digests of the episodes stay as they are."""
    table = lance.dataset(str(path)).to_table()
    columns, (spec, version), row = table.to_pydict(), spec_of(table.schema, str(path)), 75
    if name == "label":
        label = next(iter(spec.labels))
        columns["label"][row] = {**columns["label"][row], label: [0.25] * spec.labels[label]}
    elif name == "metadata":
        columns["metadata"][62] = '{"index": 17}'
    elif name == "pixels":
        assert spec.observation.pixels is not None
        frame = np.full((1, *spec.observation.pixels), 7, np.uint8)
        columns["pixels"][row] = compress_frames(frame)[0].as_py()
        if version > 1:
            columns["frame_digest"][row] = frame_digests(frame)[0].tobytes()
    else:
        columns[name][row] = [0.25] * len(columns[name][row])
    lance.write_dataset(pa.table(columns, schema=table.schema), str(path), mode="overwrite", schema=table.schema)


def streamed(dataset: EpisodeDataset) -> None:
    with stream_frames(dataset, DataConfig(cache_gib=0.0)) as frames:
        assert frames.pixels is not None
        frames.pixels[:]


WAYS: dict[str, Callable[[EpisodeDataset, Path], Any]] = {
    "episode": lambda dataset, _: dataset.episode(2),
    "columns": lambda dataset, _: dataset.columns(),
    "metadata": lambda dataset, _: dataset.metadata(),
    "a few frames": lambda dataset, _: dataset.pixels(np.array([75])),
    "all frames": lambda dataset, _: list(dataset.scan_pixels()),
    "in memory": lambda dataset, _: load_cache(dataset, "ram"),
    "memory-mapped": lambda dataset, path: load_cache(dataset, "mmap", directory=path),
    "streamed": lambda dataset, _: streamed(dataset),
    "checked": lambda dataset, _: dataset.verify(),
    "preview": lambda dataset, path: contact_sheet(dataset, path / "sheet.png", times=31),
}


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("name", ["pixels", "vector", "action", "label", "metadata"])
def test_exchanged_content_is_refused_however_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, version: int
) -> None:
    monkeypatch.setattr("worldloom.data.retries._DAMAGED_ATTEMPTS", 1)
    before = make_dataset(tmp_path / "d", version).fingerprint()
    if version == 1 and name == "vector":
        pytest.skip("the dataset has no vector")
    exchange(tmp_path / "d", name)
    assert EpisodeDataset.open(tmp_path / "d").fingerprint() == before  # which is that of the digests
    for way, read in WAYS.items():
        with pytest.raises(DataError, match=r"was changed after it was written.*Restore the dataset from a copy"):
            pytest.fail(f"{way}: read {read(EpisodeDataset.open(tmp_path / 'd'), tmp_path)}")
    assert [problem.where for problem in validate(tmp_path / "d")] == ["episode 2"]
    assert EpisodeDataset.open(tmp_path / "d").episode(1).steps == 30  # which was not changed
    assert not list(tmp_path.glob("*.frames"))


@pytest.mark.parametrize("version", [1, 2])
def test_whole_content_is_read_and_has_the_fingerprint_that_was_stored(tmp_path: Path, version: int) -> None:
    dataset = make_dataset(tmp_path / "d", version)
    assert dataset.verify() == dataset.fingerprint()
    for way, read in WAYS.items():
        assert read(EpisodeDataset.open(tmp_path / "d"), tmp_path) is not False, way


def test_a_frame_is_checked_against_the_signed_digests_not_against_its_own(tmp_path: Path) -> None:
    make_dataset(tmp_path / "d")
    exchange(tmp_path / "d", "pixels")  # with the frame's digest
    table = lance.dataset(str(tmp_path / "d")).to_table()
    row = digests_of(table["frame_digest"])[75]
    assert np.array_equal(row, frame_digests(np.full((1, 6, 10, 3), 7, np.uint8))[0])
    with pytest.raises(DataError, match="episode 2 was changed"):
        EpisodeDataset.open(tmp_path / "d").pixels(np.array([75]))


def test_a_decoded_cache_of_other_frames_is_not_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    dataset = make_dataset(tmp_path / "d")
    whole = load_cache(dataset, "ram")
    load_cache(dataset, "mmap", directory=tmp_path / "cache")
    (file,) = (tmp_path / "cache").iterdir()
    content = bytearray(file.read_bytes())
    content[12_345] ^= 1
    file.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        frames = load_cache(dataset, "mmap", directory=tmp_path / "cache")
    assert "Decoding the frames again" in caplog.text
    assert np.array_equal(np.asarray(frames.pixels), np.asarray(whole.pixels))


@pytest.mark.parametrize("key", [b"spec", b"pixels"])
def test_a_changed_spec_is_refused(tmp_path: Path, key: bytes) -> None:
    make_dataset(tmp_path / "d")
    table = lance.dataset(str(tmp_path / "d")).to_table()
    metadata = {**table.schema.metadata, key: table.schema.metadata[key].replace(b"6", b"8").replace(b"some", b"any")}
    assert metadata[key] != table.schema.metadata[key]
    lance.write_dataset(table.replace_schema_metadata(metadata), str(tmp_path / "d"), mode="overwrite")
    with pytest.raises(DataError, match="its digest does not match"):
        EpisodeDataset.open(tmp_path / "d")
    assert "its digest does not match" in validate(tmp_path / "d")[0].what


def test_an_older_version_of_a_dataset_is_not_taken_for_the_newest(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "d")
    dataset.append([make_episode(6, 30)])
    hint = tmp_path / "d" / "_versions" / "latest_version_hint.json"
    hint.write_text(hint.read_text().replace("3", "2"))
    assert len(EpisodeDataset.open(tmp_path / "d")) == 7


def test_a_dataset_of_version_1_is_read_but_not_appended_to(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    dataset = make_dataset(tmp_path / "d", version=1)
    with caplog.at_level(logging.WARNING):
        frames: Frames = load_cache(dataset, "ram")
    assert "convert it with" in caplog.text
    episode = dataset.episode(5)
    assert np.array_equal(np.asarray(frames.pixels)[frames.rows(5)], episode.pixels)
    with pytest.raises(DataError, match="Convert it with 'worldloom data convert"):
        dataset.append([episode])
    copy = EpisodeDataset.create(tmp_path / "copy", dataset.spec)
    copy.append([dataset.episode(index) for index in range(6)])
    assert all(same(copy.episode(index), dataset.episode(index)) for index in range(6))


def test_a_run_of_frames_is_checked_once_and_again_when_its_content_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset, rows = make_dataset(tmp_path / "data"), np.arange(40, 80)
    pixels, digest, hashed = dataset.pixels(rows), layout._frame_digest, []
    monkeypatch.setattr(layout, "_frame_digest", lambda content: hashed.append(1) or digest(content))
    np.testing.assert_array_equal(dataset.pixels(rows), pixels)
    assert not hashed  # only the compressed content is hashed
    np.testing.assert_array_equal(dataset.pixels(np.arange(41, 80)), pixels[1:])
    assert len(hashed) == 39
    take = dataset._take

    def other(rows: np.ndarray, columns: list[str]) -> pa.Table:
        frames = take(rows, columns)["pixels"].to_pylist()
        frames[7] = frames[8]
        return pa.table({"pixels": pa.array(frames, pa.large_binary())})

    monkeypatch.setattr(dataset, "_take", other)
    with pytest.raises(DataError, match="row 47 was changed"):
        dataset.pixels(rows)
