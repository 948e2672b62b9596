from pathlib import Path

import numpy as np
import pytest
from data_samples import SPEC, make_episode
from hypothesis import given, settings
from hypothesis import strategies as st

from worldloom.core.errors import ConfigError
from worldloom.data import DataConfig, EpisodeDataset, Frames, SlidingPool, WindowSampler, stream_frames

FRAME = 180  # bytes of a frame of 6x10x3
ROWS = 9  # of a chunk
pools = {"windows": st.integers(1, 300), "pool": st.integers(1, 700), "seed": st.integers(0, 9)}


@settings(max_examples=25)
@given(**pools, first=st.integers(0, 1000), counts=st.lists(st.integers(1, 90), min_size=1, max_size=6))
def test_what_is_drawn_depends_on_seed_and_position_alone(
    windows: int, pool: int, seed: int, first: int, counts: list[int]
) -> None:
    whole = SlidingPool(windows, pool, seed=seed).draws(first, sum(counts))
    order, parts = SlidingPool(windows, pool, seed=seed), []
    ends = first + np.cumsum(counts)
    for end, count in reversed(list(zip(ends.tolist(), counts, strict=True))):
        parts.append(order.draws(end - count, count))
    assert np.array_equal(np.concatenate(parts[::-1]), whole)
    assert whole.min() >= 0
    assert whole.max() < windows


@settings(max_examples=25)
@given(**pools)
def test_no_window_comes_twice_in_a_pass_and_few_are_left_out(windows: int, pool: int, seed: int) -> None:
    order = SlidingPool(windows, pool, seed=seed)
    passes = 3
    came = [
        np.concatenate([order.segment(turn) for turn in range(p * order.segments, (p + 1) * order.segments)])
        for p in range(passes)
    ]
    assert all(len(np.unique(each)) == len(each) > windows - order.segments for each in came)
    # What comes into the pool is drawn once: the draws are these windows, but for what the pool holds at both ends.
    drawn = np.bincount(order.draws(0, passes * order.segments * order.size), minlength=windows)
    brought = np.bincount(np.concatenate(came), minlength=windows)
    held = np.bincount(
        np.concatenate([order.segment(t) for turn in (-1, passes * order.segments - 1) for t in order.pool(turn)]),
        minlength=windows,
    )
    assert (np.abs(drawn - brought) <= held).all()


@settings(max_examples=25)
@given(**pools, turn=st.integers(0, 200))
def test_what_is_drawn_is_in_the_pool(windows: int, pool: int, seed: int, turn: int) -> None:
    order = SlidingPool(windows, pool, seed=seed)
    there = np.concatenate([order.segment(came) for came in order.pool(turn)])
    assert np.isin(order.draws(turn * order.size, order.size), there).all()
    assert len(there) <= max(pool, 16)
    assert all(order.turn(turn * order.size + within) == turn for within in (0, order.size - 1))


@pytest.mark.parametrize("position", [0, 40, 101])
def test_any_draw_is_equally_likely_to_be_any_window(position: int) -> None:
    windows, seeds = 30, 1500
    drawn = [SlidingPool(windows, 20, seed=seed).draws(position, 1)[0] for seed in range(seeds)]
    counts = np.bincount(drawn, minlength=windows)
    chi2 = ((counts - seeds / windows) ** 2 / (seeds / windows)).sum()
    assert chi2 < 58.3  # the 0.999 quantile for 29 degrees of freedom


@settings(max_examples=25)
@given(**pools, position=st.integers(0, 900), draws=st.integers(1, 60))
def test_what_is_drawn_next_is_among_what_is_said_to_come(
    windows: int, pool: int, seed: int, position: int, draws: int
) -> None:
    order = SlidingPool(windows, pool, seed=seed)
    coming = order.coming(order.turn(position), draws)
    assert np.isin(order.draws(position, draws), coming).all()
    assert len(coming) <= (16 + max(2, -(-draws // order.size))) * order.size


def test_a_turn_mixes_all_segments_of_the_pool() -> None:
    order = SlidingPool(16_000, 3200, seed=3)
    segment = {int(window): came for came in order.pool(60) for window in order.segment(came)}
    drawn = np.array([segment[int(window)] for window in order.draws(60 * order.size, order.size)])
    counts = np.bincount(drawn - drawn.min())
    assert len(counts) == 16
    assert counts.max() - counts.min() <= 1
    assert len(np.unique(drawn[:64])) > 12  # in whatever batch


def test_a_pool_of_nothing_is_refused() -> None:
    for windows, pool in ((0, 3), (3, 0)):
        with pytest.raises(ConfigError, match="must be at least 1"):
            SlidingPool(windows, pool, seed=0)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> EpisodeDataset:
    dataset = EpisodeDataset.create(tmp_path_factory.mktemp("pool") / "d", SPEC)
    dataset.append([make_episode(index, 40 + index % 30) for index in range(30)])
    return dataset


@settings(max_examples=25)
@given(first=st.integers(0, 2000), count=st.integers(1, 400), context=st.integers(1, 3), block=st.integers(1, 3))
def test_spans_hold_the_frames_of_the_windows(
    dataset: EpisodeDataset, first: int, count: int, context: int, block: int
) -> None:
    sampler = WindowSampler(dataset_frames(dataset), context=context, horizon=2, block=block)
    windows = (first + np.arange(count)) % len(sampler)
    expected: set[int] = set()
    for begin, end in sampler._spans(windows).tolist():
        expected |= set(range(begin, end + 1))
    read = set(sampler._rows(windows)[0].reshape(-1).tolist())
    assert read <= expected
    # No more than the gaps between the frames of a window.
    assert block > 1 or read == expected


_opened: dict[str, Frames] = {}


def dataset_frames(dataset: EpisodeDataset) -> Frames:
    if str(dataset.path) not in _opened:
        directory = Path(str(dataset.path)).parent / "never"
        _opened[str(dataset.path)] = stream_frames(dataset, DataConfig(cache_dir=str(directory), cache_gib=0))
    return _opened[str(dataset.path)]


def chunks_read(dataset: EpisodeDataset, directory: Path, *, pool: int | None) -> float:
    """Return how often a pass of training reads each chunk, with a cache of half of the data."""
    chunk = ROWS * FRAME
    chunks = -(-dataset.frames // ROWS)
    config = DataConfig(
        cache_dir=str(directory), cache_gib=chunks * chunk / 2 / 2**30, chunk_mib=chunk / 2**20, threads=2
    )
    with stream_frames(dataset, config) as frames:
        assert frames.pixels is not None
        sampler = WindowSampler(frames, context=1, horizon=3, block=1)
        order = SlidingPool(len(sampler), pool or 1, seed=0)
        batch, before = 16, 0
        steps = len(sampler) // batch
        turn = -1
        for step in range(steps if pool is None else 2 * steps):
            if pool is not None and step == steps:  # the first pass fills the pool
                before = frames.pixels.fetched
            if pool is None:
                sampler.sample(batch, np.random.default_rng(step))
                continue
            if turn != (turn := order.turn(step * batch)):
                sampler.expect(order.coming(turn, 2 * batch))
            sampler.at(order.draws(step * batch, batch))
        return (frames.pixels.fetched - before) / chunks


def test_beyond_the_cache_a_pass_reads_each_chunk_about_once(dataset: EpisodeDataset, tmp_path: Path) -> None:
    pooled = chunks_read(dataset, tmp_path / "pooled", pool=dataset.frames // 4)
    uniform = chunks_read(dataset, tmp_path / "uniform", pool=None)
    # A segment is two to three chunks here, and begins and ends within one.
    assert 0.8 < pooled < 1.6
    assert uniform > 2.5 * pooled


def test_what_is_expected_is_held_in_memory_where_there_is_no_disk_cache(
    dataset: EpisodeDataset, tmp_path: Path
) -> None:
    with stream_frames(dataset, DataConfig(cache_dir=str(tmp_path), cache_gib=0.0, chunk_mib=0.002)) as frames:
        assert frames.pixels is not None
        frames.pixels.expect(np.array([[0, dataset.frames - 1]]))
        for _ in range(1000):
            if frames.pixels.fetched == frames.pixels._chunks:
                break
            frames.pixels._closed.wait(0.01)
        assert np.array_equal(frames.pixels[np.arange(9)], dataset.pixels(np.arange(9)))
        assert frames.pixels.fetched == frames.pixels._chunks


def test_a_pool_beyond_the_cache_is_said_once(
    dataset: EpisodeDataset, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    chunk = ROWS * FRAME
    config = DataConfig(cache_dir=str(tmp_path), chunk_mib=chunk / 2**20, cache_gib=8 * chunk / 2**30)
    with stream_frames(dataset, config) as frames:
        sampler = WindowSampler(frames, context=1, horizon=3, block=1)
        for _ in range(2):
            sampler.expect(np.arange(len(sampler)))
    assert caplog.text.count("lower training.pool_windows") == 1


def test_what_is_expected_is_read_before_it_is_asked_for(dataset: EpisodeDataset, tmp_path: Path) -> None:
    config = DataConfig(cache_dir=str(tmp_path), chunk_mib=ROWS * FRAME / 2**20, cache_gib=1.0, threads=1)
    with stream_frames(dataset, config) as frames:
        pixels = frames.pixels
        assert pixels is not None
        pixels.expect(np.array([[ROWS * 150, ROWS * 153 - 1]]))
        pixels[np.array([0])]  # what somebody waits for comes first; the thread is single
        names = [f"{chunk:08d}.chunk" for chunk in (150, 151, 152)]
        for _ in range(500):
            if all(list(tmp_path.glob(f"*/{name}")) for name in names):
                break
            frames.pixels._closed.wait(0.01) if frames.pixels else None
        assert all(list(tmp_path.glob(f"*/{name}")) for name in names)
        assert len(list(tmp_path.glob("*/*.chunk"))) < 150  # the earlier prefetch is dropped
