import logging
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_samples import SPEC, make_episode, same
from s3_server import BUCKET, FaultyProxy, options_for, s3_server

from worldloom.core.errors import DataError, StorageError
from worldloom.data import (
    DataConfig,
    EpisodeDataset,
    Frames,
    WindowSampler,
    compute_statistics,
    load_cache,
    load_frames,
    stream_frames,
    validate,
)
from worldloom.data.chunks import ChunkCache
from worldloom.data.streaming import StreamedPixels

EPISODES = [make_episode(index, 5 + index % 7) for index in range(30)]
URI = f"s3://{BUCKET}/logs"
CHUNK = 9 * 180 / 2**20  # MiB: nine frames of 6x10x3


@pytest.fixture(scope="module")
def server() -> Iterator[int]:
    with s3_server() as port:
        EpisodeDataset.create(URI, SPEC, storage_options=options_for(port)).append(EPISODES)
        yield port


@pytest.fixture(scope="module")
def remote(server: int) -> EpisodeDataset:
    return EpisodeDataset.open(URI, storage_options=options_for(server))


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Frames:
    dataset = EpisodeDataset.create(tmp_path_factory.mktemp("streaming") / "d", SPEC)
    dataset.append(EPISODES)
    return load_cache(dataset, "ram")


@pytest.fixture
def proxy(server: int) -> Iterator[FaultyProxy]:
    proxy = FaultyProxy(server)
    yield proxy
    proxy.close()


def config(directory: Path, **values: object) -> DataConfig:
    return DataConfig.parse({"cache_dir": str(directory), "chunk_mib": CHUNK, "retry_seconds": 20.0, **values})


def all_pixels(cache: Frames) -> np.ndarray:
    assert isinstance(cache.pixels, np.ndarray)
    return cache.pixels


@pytest.mark.parametrize("gib", [1.0, 0.0, 10 * 9 * 180 / 2**30], ids=["disk", "none", "smaller than the data"])
def test_streamed_frames_are_those_of_the_cache(
    remote: EpisodeDataset, cache: Frames, tmp_path: Path, gib: float
) -> None:
    with stream_frames(remote, config(tmp_path, cache_gib=gib, memory_mib=1)) as frames:
        assert frames.fingerprint == cache.fingerprint
        for window in (WindowSampler(frames, context=2, horizon=2, block=2),):
            same_window = WindowSampler(cache, context=2, horizon=2, block=2)
            for step in range(10):
                ours = window.sample(16, np.random.default_rng(step))
                theirs = same_window.sample(16, np.random.default_rng(step))
                assert ours.observations.pixels is not None
                assert theirs.observations.pixels is not None
                assert ours.observations.pixels.equal(theirs.observations.pixels)
                assert ours.actions.equal(theirs.actions)
        ours_mean = compute_statistics(frames, seed=1).pixel_mean
        theirs_mean = compute_statistics(cache, seed=1).pixel_mean
        assert ours_mean is not None
        assert theirs_mean is not None
        assert ours_mean.equal(theirs_mean)
        for ours_part, theirs_part in zip(frames.split(0.2, 3), cache.split(0.2, 3), strict=True):
            assert np.array_equal(ours_part, theirs_part)
    assert sum(file.stat().st_size for file in tmp_path.glob("*/*.chunk")) <= gib * 2**30


@pytest.fixture(scope="module")
def streamed(remote: EpisodeDataset, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Frames]:
    with stream_frames(remote, config(tmp_path_factory.mktemp("chunks"))) as frames:
        yield frames


@pytest.mark.parametrize("seed", range(40))
def test_any_rows_in_any_order(streamed: Frames, cache: Frames, seed: int) -> None:
    # Not with hypothesis: it watches `random`, from which the type checks of the reading threads draw.
    pixels, generator = all_pixels(cache), np.random.default_rng(seed)
    assert streamed.pixels is not None
    shape = tuple(generator.integers(0, 4, generator.integers(0, 4)))
    rows = generator.integers(-len(pixels), len(pixels), shape)
    assert np.array_equal(streamed.pixels[rows], pixels[rows])


def test_rows_that_are_not_there(streamed: Frames) -> None:
    assert streamed.pixels is not None
    with pytest.raises(IndexError):
        streamed.pixels[np.array([len(streamed.pixels)])]


def test_a_warm_cache_needs_no_storage(remote: EpisodeDataset, cache: Frames, tmp_path: Path) -> None:
    rows = np.arange(remote.frames)
    for expected in (True, False):
        with stream_frames(remote, config(tmp_path)) as frames:
            assert frames.pixels is not None
            assert np.array_equal(frames.pixels[rows], all_pixels(cache))
            assert bool(frames.pixels.fetched) is expected


def test_a_damaged_chunk_is_read_again(
    remote: EpisodeDataset, cache: Frames, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = np.arange(remote.frames)
    with stream_frames(remote, config(tmp_path)) as frames:
        assert frames.pixels is not None
        frames.pixels[rows]
    chunks = sorted(tmp_path.glob("*/*.chunk"))
    content = bytearray(chunks[0].read_bytes())
    content[100] ^= 1
    chunks[0].write_bytes(content)
    chunks[1].write_bytes(chunks[1].read_bytes()[:50])
    with caplog.at_level(logging.WARNING), stream_frames(remote, config(tmp_path)) as frames:
        assert frames.pixels is not None
        assert np.array_equal(frames.pixels[rows], all_pixels(cache))
    assert caplog.text.count("is damaged") == 2


def test_a_full_disk_degrades_to_memory(
    remote: EpisodeDataset,
    cache: Frames,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("worldloom.data.chunks.tempfile.mkstemp", full)
    with stream_frames(remote, config(tmp_path)) as frames:
        assert frames.pixels is not None
        assert np.array_equal(frames.pixels[np.arange(remote.frames)], all_pixels(cache))
    assert "the disk is full" in caplog.text
    assert not [file for file in tmp_path.glob("*/*") if file.suffix in (".tmp", ".chunk")]


def test_the_least_recently_used_go_first(tmp_path: Path) -> None:
    content = np.zeros(1000, np.uint8)
    first, second = (ChunkCache(tmp_path, name, 5 * 1024) for name in ("a", "b"))
    for chunk in range(20):
        (first if chunk % 2 else second).write(chunk, content)
    first.evict()
    assert sum(file.stat().st_size for file in tmp_path.glob("*/*.chunk")) <= 5 * 1024
    assert 19 in first
    assert 0 not in second


@pytest.mark.parametrize("fault", ["503", "cut", "refuse"])
def test_a_fault_that_passes_is_outlived(proxy: FaultyProxy, cache: Frames, tmp_path: Path, fault: str) -> None:
    dataset = EpisodeDataset.open(URI, storage_options=options_for(proxy.port))
    failed = []

    def every_third(line: str) -> str:
        if ".lance" in line and len(failed) < 6:
            failed.append(line)
            return fault
        return ""

    with stream_frames(dataset, config(tmp_path, threads=2)) as frames:
        proxy.fault = every_third
        assert frames.pixels is not None
        assert np.array_equal(frames.pixels[np.arange(dataset.frames)], all_pixels(cache))
    assert failed


@pytest.mark.parametrize("fault", ["503", "cut", "refuse"])
def test_a_fault_that_stays_is_named(proxy: FaultyProxy, tmp_path: Path, fault: str) -> None:
    dataset = EpisodeDataset.open(URI, storage_options=options_for(proxy.port))
    with stream_frames(dataset, config(tmp_path, retry_seconds=1.0, cache_gib=0)) as frames:
        proxy.fault = lambda line: fault if ".lance" in line else ""
        assert frames.pixels is not None
        with pytest.raises(StorageError, match=rf"rows 0 to 8 of {URI} .* attempts over .*(?s:.)*retry_seconds"):
            frames.pixels[np.arange(5)]
    assert not list(tmp_path.glob("*/*.chunk"))


def test_a_bucket_that_is_lost_is_named(server: int) -> None:
    with pytest.raises(StorageError, match="bucket"):
        EpisodeDataset.open("s3://other-bucket/logs", storage_options=options_for(server))


@pytest.mark.parametrize("where", ["disk", "s3"])
def test_of_several_writers_one_commits(server: int, tmp_path: Path, where: str) -> None:
    path = f"s3://{BUCKET}/race" if where == "s3" else str(tmp_path / "race")
    options = options_for(server) if where == "s3" else None
    EpisodeDataset.create(path, SPEC, storage_options=options).append(EPISODES[:2])
    writers = [EpisodeDataset.open(path, storage_options=options) for _ in range(4)]
    refused, barrier = [], threading.Barrier(4)

    def write(writer: EpisodeDataset) -> None:
        barrier.wait()
        try:
            writer.append(EPISODES[2:4])
        except DataError as error:
            refused.append(str(error))

    threads = [threading.Thread(target=write, args=(writer,)) for writer in writers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    dataset = EpisodeDataset.open(path, storage_options=options)
    assert len(refused) == 3
    assert all("another process" in text for text in refused)
    assert len(dataset) == 4
    assert all(same(dataset.episode(index), EPISODES[index]) for index in range(4))
    dataset.append(EPISODES[4:5])
    assert list(validate(path, storage_options=options)) == []


def test_the_mode_decides_what_is_opened(remote: EpisodeDataset, tmp_path: Path) -> None:
    with stream_frames(remote, config(tmp_path)) as streamed:
        assert streamed.pixels is not None
    opened = load_frames(remote, config(tmp_path))
    assert isinstance(opened.pixels, StreamedPixels)
    opened.close()
    assert isinstance(load_frames(remote, config(tmp_path, mode="cache")).pixels, np.ndarray)


def test_an_unknown_version_says_which_there_are(remote: EpisodeDataset, server: int) -> None:
    with pytest.raises(DataError, match=r"no version 99; expected 1 to 2"):
        EpisodeDataset.open(URI, version=99, storage_options=options_for(server))


def test_what_is_no_episode_is_refused(tmp_path: Path) -> None:
    dataset = EpisodeDataset.create(tmp_path / "d", SPEC)
    wrong: Any = iter([1])
    with pytest.raises(DataError, match="expected an Episode .*; got int"):
        dataset.append(wrong)
