import logging
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from data_samples import SPEC, make_episode
from hypothesis import given, settings
from hypothesis import strategies as st

from worldloom.core.errors import ConfigError, DataError
from worldloom.core.types import Windows
from worldloom.data import (
    DataConfig,
    EpisodeDataset,
    Frames,
    WindowSampler,
    compute_statistics,
    load_cache,
    stream_frames,
)

LENGTHS = [12, 3, 20, 9]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> EpisodeDataset:
    dataset = EpisodeDataset.create(tmp_path_factory.mktemp("windows") / "d", SPEC)
    dataset.append([make_episode(index, steps) for index, steps in enumerate(LENGTHS)])
    return dataset


@pytest.fixture(scope="module")
def cache(dataset: EpisodeDataset) -> Frames:
    return load_cache(dataset, "ram")


def naive(episode: int, current: int, context: int, horizon: int, block: int) -> tuple[np.ndarray, np.ndarray]:
    """The frames and actions of one window, as the documentation says them."""
    data = make_episode(episode, LENGTHS[episode])
    assert data.pixels is not None
    frames, actions = [], []
    for index in range(1 - context, horizon + 1):
        step = current + index * block
        frames.append(data.pixels[max(step, 0)])
        if index < horizon:
            taken = range(step, step + block)
            actions.append(np.concatenate([data.actions[s] if s >= 0 else np.zeros(2, np.float32) for s in taken]))
    return np.stack(frames), np.stack(actions)


@settings(max_examples=40)
@given(context=st.integers(1, 4), horizon=st.integers(1, 4), block=st.integers(1, 5))
def test_every_window_is_what_the_episodes_say(cache: Frames, context: int, horizon: int, block: int) -> None:
    sampler = WindowSampler(cache, context=context, horizon=horizon, block=block)
    expected = [
        naive(episode, current, context, horizon, block)
        for episode, length in enumerate(LENGTHS)
        for current in range(length - horizon * block + 1)
    ]
    assert len(sampler) == len(expected)
    windows = sampler.at(np.arange(len(sampler)))
    assert windows.observations.pixels is not None
    assert np.array_equal(windows.observations.pixels.numpy(), np.stack([frames for frames, _ in expected]))
    assert np.array_equal(windows.actions.numpy(), np.stack([actions for _, actions in expected]))


def test_labels_and_vectors_go_with_the_frames(cache: Frames) -> None:
    windows = WindowSampler(cache, context=2, horizon=2, block=3).at(np.arange(5))
    assert windows.observations.vector is not None
    for window in range(5):
        steps = np.maximum(window + 3 * np.arange(-1, 3), 0)
        episode = make_episode(0, LENGTHS[0])
        assert episode.vector is not None
        assert np.array_equal(windows.observations.vector[window].numpy(), episode.vector[steps])
        assert np.array_equal(windows.labels["position"][window].numpy(), episode.labels["position"][steps])


def test_windows_are_drawn_uniformly_and_by_the_generator_alone(cache: Frames) -> None:
    sampler = WindowSampler(cache, context=1, horizon=2, block=4)  # 5 windows in episode 0, 13 in 2, 2 in 3
    windows = sampler.sample(20_000, np.random.default_rng(0))
    assert windows.observations.pixels is not None
    episodes = windows.observations.pixels[:, 0, 0, 1, 0].numpy()
    shares = np.bincount(episodes, minlength=4) / len(episodes)
    np.testing.assert_allclose(shares, [5 / 20, 0, 13 / 20, 2 / 20], atol=0.015)
    again = sampler.sample(20_000, np.random.default_rng(0))
    assert torch.equal(again.actions, windows.actions)


def test_episodes_may_be_restricted(cache: Frames) -> None:
    sampler = WindowSampler(cache, context=1, horizon=1, block=1, episodes=np.array([3, 1]))
    windows = sampler.sample(200, np.random.default_rng(0))
    assert windows.observations.pixels is not None
    assert set(windows.observations.pixels[:, :, 0, 1, 0].ravel().tolist()) == {1, 3}
    with pytest.raises(DataError, match="within 0 to 3"):
        WindowSampler(cache, context=1, horizon=1, block=1, episodes=np.array([4]))


def test_too_long_windows_say_what_is_there(cache: Frames) -> None:
    with pytest.raises(DataError, match=r"needs 24 steps, but episodes have 3 to 20\. Shorten"):
        WindowSampler(cache, context=1, horizon=6, block=4)
    with pytest.raises(ConfigError, match="at least 1"):
        WindowSampler(cache, context=0, horizon=6, block=4)


def assert_equal(left: Windows, right: Windows) -> None:
    for a, b in (
        (left.observations.pixels, right.observations.pixels),
        (left.observations.vector, right.observations.vector),
        (left.actions, right.actions),
    ):
        assert a is not None
        assert b is not None
        assert torch.equal(a, b)
    assert left.labels.keys() == right.labels.keys()


def test_storage_gives_the_same_windows_as_the_cache(dataset: EpisodeDataset, cache: Frames, tmp_path: Path) -> None:
    arguments: dict[str, Any] = {"context": 3, "horizon": 2, "block": 2, "episodes": np.array([0, 2])}
    with stream_frames(dataset, DataConfig(cache_dir=str(tmp_path))) as frames:
        cold, warm = WindowSampler(frames, **arguments), WindowSampler(cache, **arguments)
        assert len(cold) == len(warm)
        for seed in range(3):
            assert_equal(*(sampler.sample(16, np.random.default_rng(seed)) for sampler in (cold, warm)))


def test_a_mapped_cache_is_the_same_and_is_used_again(
    dataset: EpisodeDataset, cache: Frames, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    mapped = load_cache(dataset, "mmap", directory=tmp_path)
    assert np.array_equal(mapped.pixels, cache.pixels)
    assert mapped.fingerprint == cache.fingerprint
    arguments: dict[str, Any] = {"context": 2, "horizon": 2, "block": 2}
    generators = [np.random.default_rng(1) for _ in range(2)]
    samplers = [WindowSampler(source, **arguments) for source in (mapped, cache)]
    assert_equal(*(sampler.sample(32, generator) for sampler, generator in zip(samplers, generators, strict=True)))

    (file,) = tmp_path.iterdir()
    written = file.stat().st_mtime_ns
    load_cache(dataset, "mmap", directory=tmp_path)
    assert file.stat().st_mtime_ns == written
    file.write_bytes(file.read_bytes()[:-1])
    with caplog.at_level(logging.WARNING):
        repaired = load_cache(dataset, "mmap", directory=tmp_path)
    assert "Decoding the frames again" in caplog.text
    assert np.array_equal(repaired.pixels, cache.pixels)
    with pytest.raises(ValueError, match="read-only"):
        repaired.pixels[:1][:] = 0  # type: ignore[index]


@pytest.mark.parametrize("change", ["written", "truncated"])
def test_a_mapped_cache_that_changes_in_use_is_an_error(dataset: EpisodeDataset, tmp_path: Path, change: str) -> None:
    mapped = load_cache(dataset, "mmap", directory=tmp_path)
    sampler = WindowSampler(mapped, context=2, horizon=2, block=2)
    first = sampler.at(np.arange(4))
    (file,) = tmp_path.iterdir()
    replaced = tmp_path / "replaced"
    replaced.write_bytes(file.read_bytes())
    replaced.rename(file)  # as another process does that decodes the frames again: the mapped file is unchanged
    assert_equal(first, sampler.at(np.arange(4)))
    mapped = load_cache(dataset, "mmap", directory=tmp_path)
    with file.open("rb+") as opened:
        opened.truncate(10) if change == "truncated" else opened.write(b"\xff" * 1000)
    with pytest.raises(DataError, match="was changed by another program while its frames were in use"):
        WindowSampler(mapped, context=2, horizon=2, block=2).at(np.arange(4))


def test_another_content_takes_another_file(tmp_path: Path) -> None:
    dataset = EpisodeDataset.create(tmp_path / "d", SPEC)
    for index in range(2):
        dataset.append([make_episode(index)])
        assert load_cache(dataset, "mmap").pixels is not None
    assert len(list((tmp_path / "d.cache").iterdir())) == 2


def test_auto_takes_memory_only_where_there_is_plenty(dataset: EpisodeDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    size = dataset.frames * 6 * 10 * 3
    directory = Path(f"{dataset.path}.cache")
    for available, mapped in ((4 * size + 4, False), (4 * size, True)):
        memory = psutil.virtual_memory()._replace(available=available)
        monkeypatch.setattr(psutil, "virtual_memory", lambda memory=memory: memory)
        load_cache(dataset)
        assert directory.exists() is mapped


def test_the_cache_knows_where_episodes_stand(cache: Frames) -> None:
    for index, steps in enumerate(LENGTHS):
        rows = cache.rows(index)
        episode = make_episode(index, steps)
        assert cache.pixels is not None
        assert np.array_equal(cache.pixels[rows], episode.pixels)
        assert np.array_equal(cache.actions[rows][:-1], episode.actions)
        assert not cache.actions[rows][-1].any()


@given(st.floats(0, 0.99), st.integers(0, 3))
def test_a_split_is_a_partition_that_the_seed_decides(cache: Frames, fraction: float, seed: int) -> None:
    train, validation = cache.split(fraction, seed)
    assert sorted([*train, *validation]) == [0, 1, 2, 3]
    assert len(train) > 0
    assert (len(validation) > 0) == (fraction > 0)
    assert abs(len(validation) - 4 * fraction) <= 1
    again = cache.split(fraction, seed)
    assert np.array_equal(train, again[0])


def test_a_split_depends_on_the_seed_and_refuses_all(cache: Frames) -> None:
    assert len({tuple(cache.split(0.5, seed)[0]) for seed in range(10)}) > 1
    with pytest.raises(ConfigError, match="below 1"):
        cache.split(1.0, 0)


def test_statistics_are_those_of_the_data(cache: Frames) -> None:
    found = compute_statistics(cache, seed=0)
    episodes = [make_episode(index, steps) for index, steps in enumerate(LENGTHS)]
    for name, parts in {
        "pixel": [episode.pixels for episode in episodes],
        "vector": [episode.vector for episode in episodes],
        "action": [episode.actions for episode in episodes],
    }.items():
        values = np.concatenate([part for part in parts if part is not None]).astype(np.float64)
        np.testing.assert_allclose(getattr(found, f"{name}_mean"), values.mean(axis=0), rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(getattr(found, f"{name}_std"), values.std(axis=0), rtol=1e-5, atol=1e-5)


def test_statistics_of_some_episodes_and_of_a_sample(cache: Frames) -> None:
    only = compute_statistics(cache, seed=0, episodes=np.array([2]))
    episode = make_episode(2, 20)
    np.testing.assert_allclose(only.action_std, episode.actions.std(axis=0), rtol=1e-5)
    few, others, all_ = (
        compute_statistics(cache, seed=seed, max_frames=frames).pixel_mean
        for seed, frames in ((0, 10), (1, 10), (0, 4096))
    )
    assert few is not None
    assert others is not None
    assert all_ is not None
    assert not torch.equal(few, others)
    assert not torch.equal(few, all_)
    repeated = compute_statistics(cache, seed=0, max_frames=10).pixel_mean
    assert repeated is not None
    assert torch.equal(few, repeated)


def test_a_frame_that_does_not_decode_is_named(tmp_path: Path) -> None:
    import lance
    import pyarrow as pa

    source = EpisodeDataset.create(tmp_path / "d", SPEC)
    source.append([make_episode(0)])
    table = lance.dataset(str(tmp_path / "d")).to_table()
    frames = table["pixels"].to_pylist()
    frames[3] = frames[3][:-2]
    broken = table.set_column(2, table.schema.field("pixels"), pa.array(frames, pa.large_binary()))
    lance.write_dataset(broken, str(tmp_path / "broken"), schema=table.schema)
    dataset = EpisodeDataset.open(tmp_path / "broken")
    for mode in ("ram", "mmap"):
        with pytest.raises(DataError, match="the frame in row 3 does not decode"):
            load_cache(dataset, mode)
    with pytest.raises(DataError, match="the frame in row 3 does not decode"):
        dataset.episode(0)
    assert not list(tmp_path.glob("*.cache/*"))
