"""Measures how fast training windows are read: from memory, from a memory-mapped file, and from Lance.

Prints one JSON line. `lance cold` starts with no data file in the page cache; `lance warm` follows it.
Run: python benchmarks/windows.py --frames 50000
"""

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

import numpy as np

from worldloom.core.hardware import describe_hardware
from worldloom.core.types import ActionSpec, Episode, ObservationSpec
from worldloom.data import DataConfig, DatasetSpec, EpisodeDataset, WindowSampler, load_cache, stream_frames

STEPS = 100
SPEC = DatasetSpec(
    observation=ObservationSpec(pixels=(64, 64, 3)), action=ActionSpec(low=(-1.0, -1.0), high=(1.0, 1.0))
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--frames", type=int, default=20_000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--context", type=int, default=1)
    parser.add_argument("--horizon", type=int, default=8)
    parser.add_argument("--block", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=2.0, help="for each source")
    arguments = parser.parse_args()
    window = {"context": arguments.context, "horizon": arguments.horizon, "block": arguments.block}
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "dataset"
        episodes = arguments.frames // (STEPS + 1)
        start = time.perf_counter()
        dataset = EpisodeDataset.create(path, SPEC)
        for first in range(0, episodes, 50):
            dataset.append(draw_episode(number) for number in range(first, min(first + 50, episodes)))
        written = dataset.frames / (time.perf_counter() - start)

        start = time.perf_counter()
        caches = {"ram": load_cache(dataset, "ram")}
        decoded = dataset.frames / (time.perf_counter() - start)
        caches["mmap"] = load_cache(dataset, "mmap")
        samplers = {name: WindowSampler(cache, **window) for name, cache in caches.items()}
        figures = {name: measure(sampler, arguments) for name, sampler in samplers.items()}
        forget(path)
        with stream_frames(EpisodeDataset.open(path), DataConfig(cache_dir=f"{directory}/chunks")) as streamed:
            figures["streamed"] = measure(WindowSampler(streamed, **window), arguments)
        result = {
            "benchmark": "windows",
            "frames": dataset.frames,
            "pixels": SPEC.observation.pixels,
            "batch": arguments.batch,
            **window,
            "bytes_stored": dataset.stored_bytes(),
            "append_frames_per_second": round(written),
            "decode_frames_per_second": round(decoded),
            "sources": figures,
            "hardware": describe_hardware(),
        }
    print(json.dumps(result))


def draw_episode(number: int) -> Episode:
    """A disc that walks between walls; the time to append includes drawing it."""
    generator = np.random.default_rng(number)
    frames = np.zeros((STEPS + 1, 64, 64, 3), np.uint8)
    frames[:, :, 30:34, 1] = 180
    places = np.clip(32 + generator.normal(size=(STEPS + 1, 2)).cumsum(axis=0), 2, 61).astype(int)
    for frame, (x, y) in zip(frames, places, strict=True):
        frame[y - 2 : y + 3, x - 2 : x + 3] = (220, 40, 40)
    return Episode(pixels=frames, actions=generator.uniform(-1, 1, (STEPS, 2)).astype(np.float32))


def measure(sampler: WindowSampler, arguments: argparse.Namespace) -> dict[str, float]:
    generator, batches = np.random.default_rng(0), 0
    start = time.perf_counter()
    while (elapsed := time.perf_counter() - start) < arguments.seconds:
        sampler.sample(arguments.batch, generator)
        batches += 1
    windows = batches * arguments.batch / elapsed
    return {
        "windows_per_second": round(windows),
        "frames_per_second": round(windows * (arguments.context + arguments.horizon)),
    }


def forget(path: Path) -> None:
    """Ask the operating system to drop the dataset's files from its page cache."""
    if not hasattr(os, "posix_fadvise"):
        return
    for file in path.rglob("*.lance"):
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


if __name__ == "__main__":
    main()
