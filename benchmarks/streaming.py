"""Measures how fast training windows are read from local disk and from a local S3 server.

    python benchmarks/streaming.py [--episodes 300] [--seconds 3] [--beyond] [--out FILE|-]

The caches are cold or warm. The server runs on this machine, so server, network and reader share its cores. A proxy
adds latency and limits the bandwidth. `consumed` is the number of frames per second on which the default model trains
in the same run. `wait_share` is the share of training time spent waiting for a batch.

`--beyond` instead measures a cache for a third of the data with 20 ms of latency. Windows are sampled from all of the
data, and from a sliding pool of a sixth. The training figures then cover the last quarter of training.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from worldloom.core.hardware import describe_hardware
from worldloom.data import (
    DataConfig,
    EpisodeDataset,
    Frames,
    SlidingPool,
    WindowSampler,
    collect,
    load_cache,
    stream_frames,
)
from worldloom.envs import register_envs
from worldloom.models import JEPAConfig
from worldloom.training import RunFolder, TrainingConfig, fit

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "data"))
from s3_server import BUCKET, FaultyProxy, options_for, s3_server

RESULTS = Path(__file__).parent / "results" / "streaming.json"
BEYOND = RESULTS.with_name("streaming_beyond.json")
BATCH, CONTEXT, HORIZON, BLOCK = 64, 1, 8, 1


def windows_per_second(frames: Frames, seconds: float) -> float:
    """Return the frames per second of randomly sampled windows."""
    sampler = WindowSampler(frames, context=CONTEXT, horizon=HORIZON, block=BLOCK)
    generator, count, began = np.random.default_rng(0), 0, time.perf_counter()
    while time.perf_counter() - began < seconds or count == 0:
        sampler.sample(BATCH, generator)
        count += BATCH * (CONTEXT + HORIZON)
    return count / (time.perf_counter() - began)


def beyond(dataset: EpisodeDataset, directory: Path, steps: int) -> list[dict[str, Any]]:
    """Return the traffic of a pass and the waiting time of training, with a cache for a third of the data."""
    chunk_mib, size = 0.2, dataset.frames * 64 * 64 * 3
    rows = []
    for drawing in ("uniform", "pool"):
        config = DataConfig(cache_dir=str(directory / drawing), cache_gib=size / 3 / 2**30, chunk_mib=chunk_mib)
        row: dict[str, Any] = {"source": "s3, a third fits the cache", "drawing": drawing}
        with stream_frames(dataset, config) as frames:
            sampler = WindowSampler(frames, context=CONTEXT, horizon=HORIZON, block=BLOCK)
            assert frames.pixels is not None
            order, turn = SlidingPool(len(sampler), len(sampler) // 6, seed=0), -1
            a_pass = len(sampler) // BATCH
            warm = 8 if drawing == "uniform" else a_pass  # reading ahead fills the cache; the pool needs a pass
            for step in range(warm + a_pass):
                if step == warm:
                    before, began = frames.pixels.fetched, time.perf_counter()
                if drawing == "uniform":
                    sampler.sample(BATCH, np.random.default_rng(step))
                    continue
                if turn != (turn := order.turn(step * BATCH)):
                    sampler.expect(order.coming(turn, 8 * BATCH))
                sampler.at(order.draws(step * BATCH, BATCH))
            spent, fetched = time.perf_counter() - began, frames.pixels.fetched - before
            stored = dataset.stored_bytes() * int(chunk_mib * 2**20 / (64 * 64 * 3)) / dataset.frames
            row |= {
                "steps_of_a_pass": a_pass,
                "chunks": -(-dataset.frames // int(chunk_mib * 2**20 / (64 * 64 * 3))),
                "chunks_read_in_a_pass": fetched,
                "stored_megabytes_a_step": round(fetched * stored / a_pass / 1e6, 4),
                "frames_per_second_drawn": round(a_pass * BATCH * (CONTEXT + HORIZON) / spent),
            }
            pool = len(sampler) // 6 if drawing == "pool" else None
        config = config.model_copy(update={"cache_dir": str(directory / f"{drawing}-training")})
        with stream_frames(dataset, config) as frames:
            row |= training(frames, directory / f"run-{drawing}", steps, pool, log_every=steps // 4)
        rows.append(row)
        print(json.dumps(row), file=sys.stderr)
    return rows


def training(
    frames: Frames, directory: Path, steps: int, pool: int | None = None, log_every: int = 0
) -> dict[str, float]:
    """Return the frames per second that the default model consumes, and the share of time spent waiting."""
    run = RunFolder.create(directory, {}, {})
    config = TrainingConfig(
        steps=steps,
        log_every=log_every or steps,
        validate_every=10 * steps,
        checkpoint_every=10 * steps,
        pool_windows=pool,
    )
    began = time.perf_counter()
    fit(config, JEPAConfig(), frames, run)
    spent = time.perf_counter() - began
    lines: dict[str, Any] = {}
    for line in run.metrics():
        lines.update(line)
    figures = {"seconds": round(spent, 2)}
    return figures | {
        key: round(value, 4) for key, value in lines.items() if key.startswith("time/") or "per_second" in key
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--episodes", type=int, default=300)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--megabytes-per-second", type=float, default=20.0)
    parser.add_argument("--beyond", action="store_true")
    parser.add_argument("--out")
    arguments = parser.parse_args()
    out = arguments.out or str(BEYOND if arguments.beyond else RESULTS)
    register_envs()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name, s3_server() as port:
        directory = Path(name)
        options: dict[str, Any] = {
            "env_id": "worldloom/TwoRoom-v0",
            "episodes": arguments.episodes,
            "steps": 100,
            "seed": 0,
        }
        local = collect(directory / "logs", **options)
        uri = f"s3://{BUCKET}/logs"
        remote = collect(uri, **options, storage_options=options_for(port))
        if arguments.beyond:
            proxy = FaultyProxy(port)
            proxy.delay = 0.02
            rows += beyond(
                EpisodeDataset.open(uri, storage_options=options_for(proxy.port)), directory, arguments.steps
            )
            proxy.close()
            write(out, local, rows)
            return
        cache = load_cache(local, "ram")
        rows.append({"source": "decoded in memory", "frames_per_second": windows_per_second(cache, arguments.seconds)})
        rows[-1] |= training(cache, directory / "run-memory", arguments.steps)

        def measure(source: str, dataset: EpisodeDataset, change: Callable[[], None] = lambda: None) -> None:
            config = DataConfig(cache_dir=str(directory / source), cache_gib=10)
            change()
            for state in ("cold", "warm"):
                with stream_frames(dataset, config) as frames:
                    began = time.perf_counter()
                    row: dict[str, Any] = {"source": source, "state": state}
                    if state == "cold":
                        row |= training(frames, directory / f"run-{source}", arguments.steps)
                        assert frames.pixels is not None
                        frames.pixels[:: max(1, len(frames.pixels) // 64)]
                        row["chunks"] = frames.pixels.fetched
                        row["seconds_until_all_is_local"] = round(time.perf_counter() - began, 2)
                    else:
                        row["frames_per_second"] = round(windows_per_second(frames, arguments.seconds))
                    rows.append(row)
                    print(json.dumps(row), file=sys.stderr)

        measure("disk", local)
        measure("s3", remote)
        for delay, rate in ((0.02, 0.0), (0.05, 0.0), (0.0, arguments.megabytes_per_second * 1e6)):
            proxy = FaultyProxy(port)
            slow = EpisodeDataset.open(uri, storage_options=options_for(proxy.port))
            proxy.delay, proxy.bytes_per_second = delay, rate
            measure(f"s3 +{delay * 1000:.0f} ms" + (f", {rate / 1e6:g} MB/s a connection" if rate else ""), slow)
            proxy.close()
        write(out, local, rows)


def write(out: str, dataset: EpisodeDataset, rows: list[dict[str, Any]]) -> None:
    """Write the measurements and the hardware."""
    result = {
        "benchmark": "streaming",
        "frames": dataset.frames,
        "stored_bytes": dataset.stored_bytes(),
        "bytes_per_frame": round(dataset.stored_bytes() / dataset.frames, 1),
        "rows": rows,
        "hardware": describe_hardware(),
    }
    text = json.dumps(result, indent=2) + "\n"
    if out == "-":
        print(text)
    else:
        Path(out).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
