"""What the tests of faults run as processes of their own: `python fault_processes.py WHAT ARGUMENT...`."""

import sys
from pathlib import Path

import numpy as np
from data_samples import SPEC, make_episode

from worldloom.core.errors import DataError
from worldloom.data import DataConfig, EpisodeDataset, stream_frames
from worldloom.data.chunks import ChunkCache


def write_chunks(directory: str) -> None:
    """Write large chunks until killed; chunk n holds bytes n."""
    cache = ChunkCache(Path(directory), "killed", 1 << 30)
    print("ready", flush=True)
    for number in range(1 << 20):
        cache.write(number % 8, np.full(4 << 20, number % 8, np.uint8))


def stream(path: str, directory: str, budget: str, seed: str) -> None:
    """Read rows at random, with a cache of `budget` bytes, and compare them with what is stored."""
    dataset = EpisodeDataset.open(path)
    expected = dataset.pixels(np.arange(dataset.frames))
    config = DataConfig(cache_dir=directory, cache_gib=int(budget) / 2**30, chunk_mib=9 * 180 / 2**20, threads=2)
    generator = np.random.default_rng(int(seed))
    with stream_frames(dataset, config) as frames:
        assert frames.pixels is not None
        for _ in range(60):
            rows = generator.integers(dataset.frames, size=32)
            assert np.array_equal(frames.pixels[rows], expected[rows])


def append(path: str, number: str) -> None:
    """Append an episode when a line comes in; say whether it was taken."""
    dataset = EpisodeDataset.open(path)
    assert dataset.spec == SPEC
    print("ready", flush=True)
    sys.stdin.readline()
    try:
        dataset.append([make_episode(int(number), 8)])
    except DataError as error:
        print("refused" if "another process has appended" in str(error) else error)
    else:
        print("taken")


if __name__ == "__main__":
    {"write-chunks": write_chunks, "stream": stream, "append": append}[sys.argv[1]](*sys.argv[2:])
