"""Measures the memory needed to convert a dataset larger than memory, and to sample windows from the result.

    python benchmarks/convert_large.py --gib 20 [--layout robomimic|swm-hdf5] [--directory PATH] [--out FILE|-]

Writes a file of incompressible random pixels of that size. One process converts it to worldloom's store, and another
samples windows from storage. Then everything is removed, and one JSON line is appended to `--out`. The directory needs
a little more than twice the size. The memory of each measured process is sampled every 20 ms: `peak_rss_mib` is the
resident set; `peak_private_mib` excludes pages shared with files, which are in the page cache in any case."""

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from worldloom.core.hardware import describe_hardware
from worldloom.data import DataConfig, EpisodeDataset, WindowSampler, stream_frames
from worldloom.formats import convert

RESULTS = Path(__file__).parent / "results" / "convert_large.jsonl"
STEPS, SIDE = 200, 64
EPISODE_BYTES = STEPS * SIDE * SIDE * 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=20.0)
    parser.add_argument("--layout", choices=["robomimic", "swm-hdf5"], default="robomimic")
    parser.add_argument("--directory", type=Path, help="a folder for temporary data; the system's by default")
    parser.add_argument("--batches", type=int, default=100, help="the number of batches of 64 windows to sample")
    parser.add_argument("--out", default=str(RESULTS), help="the file to which the line is appended; - for none")
    parser.add_argument("--step", nargs=3, metavar=("NAME", "SOURCE", "TARGET"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.step:
        name, source, target = arguments.step
        step = measured(convert_all if name == "convert" else sample, Path(source), Path(target), arguments.batches)
        print(json.dumps(step))
        return
    with tempfile.TemporaryDirectory(dir=arguments.directory, prefix="convert-large-") as directory:
        source, target = Path(directory) / "source.hdf5", Path(directory) / "target"
        episodes = round(arguments.gib * 2**30 / EPISODE_BYTES)
        start = time.perf_counter()
        write = write_robomimic if arguments.layout == "robomimic" else write_swm
        write(source, episodes)
        result = {
            "benchmark": "convert_large",
            "layout": arguments.layout,
            "source_gib": round(source.stat().st_size / 2**30, 3),
            "episodes": episodes,
            "frames": episodes * STEPS,
            "pixels": [SIDE, SIDE, 3],
            "making_seconds": round(time.perf_counter() - start, 1),
            "convert": in_a_process("convert", source, target, arguments.batches),
        }
        source.unlink()
        result["sample"] = in_a_process("sample", source, target, arguments.batches)
        result["hardware"] = describe_hardware()
    print(json.dumps(result))
    if arguments.out != "-":
        with Path(arguments.out).open("a", encoding="utf-8") as file:
            file.write(json.dumps(result) + "\n")


def in_a_process(name: str, source: Path, target: Path, batches: int) -> dict[str, Any]:
    command = [sys.executable, __file__, "--batches", str(batches), "--step", name, str(source), str(target)]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    figures: dict[str, Any] = json.loads(done.stdout)
    return figures


def convert_all(source: Path, target: Path, batches: int) -> dict[str, Any]:
    report = convert(source, target)
    stored = EpisodeDataset.open(target).stored_bytes()
    return {"episodes": report.episodes, "frames": report.frames, "stored_gib": round(stored / 2**30, 3)}


def sample(source: Path, target: Path, batches: int) -> dict[str, Any]:
    # Read only from storage: no disk cache.
    with stream_frames(EpisodeDataset.open(target), DataConfig(cache_gib=0)) as streamed:
        windows = WindowSampler(streamed, context=1, horizon=4, block=5)
        generator = np.random.default_rng(0)
        start = time.perf_counter()
        for _ in range(batches):
            windows.sample(64, generator)
        frames = batches * 64 * 5
        return {"windows": batches * 64, "frames_per_second": round(frames / (time.perf_counter() - start))}


def measured(step: Any, source: Path, target: Path, batches: int) -> dict[str, Any]:
    with peak_memory() as peak:
        start = time.perf_counter()
        figures: dict[str, Any] = step(source, target, batches)
        figures["seconds"] = round(time.perf_counter() - start, 1)
    return figures | {name: round(value / 2**20) for name, value in peak.items()}


@contextmanager
def peak_memory() -> Iterator[dict[str, int]]:
    """Store the peak memory of this process, in bytes, in a mapping."""
    process, ended = psutil.Process(), threading.Event()
    peak = {"peak_rss_mib": 0, "peak_private_mib": 0}

    def watch() -> None:
        while not ended.wait(0.02):
            memory = process.memory_info()
            peak["peak_rss_mib"] = max(peak["peak_rss_mib"], memory.rss)
            private = memory.rss - getattr(memory, "shared", 0)
            peak["peak_private_mib"] = max(peak["peak_private_mib"], private)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield peak
    finally:
        ended.set()
        watcher.join()


def draw(number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    generator = np.random.default_rng(number)
    pixels = np.frombuffer(generator.bytes(EPISODE_BYTES), np.uint8).reshape(STEPS, SIDE, SIDE, 3)
    return pixels, generator.uniform(-1, 1, (STEPS, 2)).astype(np.float32), generator.normal(size=(STEPS, 4))


def write_robomimic(path: Path, episodes: int) -> None:
    import h5py

    with h5py.File(path, "w", libver="latest") as file:
        for number in range(episodes):
            demo = file.create_group(f"data/demo_{number}")
            demo.attrs["num_samples"] = STEPS
            demo["obs/image"], demo["actions"], demo["obs/state"] = draw(number)


def write_swm(path: Path, episodes: int) -> None:
    import h5py

    with h5py.File(path, "w", libver="latest") as file:
        for name, shape, dtype in (("pixels", (SIDE, SIDE, 3), "u1"), ("action", (2,), "f4"), ("proprio", (4,), "f8")):
            file.create_dataset(name, (episodes * STEPS, *shape), dtype, chunks=(1, *shape))
        for number in range(episodes):
            rows = slice(number * STEPS, (number + 1) * STEPS)
            file["pixels"][rows], file["action"][rows], file["proprio"][rows] = draw(number)
        file["ep_len"] = np.full(episodes, STEPS, np.int32)
        file["ep_offset"] = np.arange(episodes, dtype=np.int64) * STEPS


if __name__ == "__main__":
    main()
