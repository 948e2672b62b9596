"""Measures how fast the pixel worlds render frames and `collect` stores them; prints one JSON line.

    python benchmarks/collecting.py [--world TwoRoom] [--num-envs N] [--episodes N] [--steps N] [--cores N]

`frames_per_second` covers only stepping and rendering, including resets, on one core. `collected_frames_per_second`
covers `worldloom.data.collect` with the directed walk into a new Lance dataset, on `--cores` cores. Both are the best
of `--repeats`, because other work on the machine can only slow them down; the medians are also printed."""

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before NumPy and PyTorch are loaded

import gymnasium
import numpy as np

import worldloom.envs
from worldloom.core.hardware import describe_hardware
from worldloom.data import collect


def pin(cores: int) -> int | None:
    """Restrict this process to a number of cores; return None if the system does not support it."""
    if not hasattr(os, "sched_setaffinity"):
        return None
    chosen = sorted(os.sched_getaffinity(0))[:cores]
    os.sched_setaffinity(0, chosen)
    return len(chosen)


def stepping(env_id: str, num_envs: int, steps: int) -> float:
    """Return the frames rendered per second, over one episode in each environment."""
    envs = gymnasium.make_vec(env_id, num_envs=num_envs, vectorization_mode="vector_entry_point")
    actions = np.random.default_rng(0).uniform(-1, 1, (steps, num_envs, 2)).astype(np.float32)
    start = time.perf_counter()
    envs.reset(seed=0)
    for action in actions:
        envs.step(action)
    rate = num_envs * (steps + 1) / (time.perf_counter() - start)
    envs.close()
    return rate


def collecting(env_id: str, num_envs: int, episodes: int, steps: int) -> float:
    """Return the frames collected per second, including the commit of the dataset."""
    with tempfile.TemporaryDirectory() as directory:
        start = time.perf_counter()
        collect(Path(directory) / "log", env_id=env_id, episodes=episodes, steps=steps, num_envs=num_envs, seed=0)
        return episodes * (steps + 1) / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", default="TwoRoom", choices=["TwoRoom", "FourRooms", "Maze"])
    parser.add_argument("--num-envs", type=int, default=50)
    parser.add_argument("--episodes", type=int, default=200, help="for collecting")
    parser.add_argument("--steps", type=int, default=100, help="of each episode")
    parser.add_argument("--cores", type=int, default=2, help="for collecting")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    worldloom.envs.register_envs()
    env_id, available = f"worldloom/{arguments.world}-v0", getattr(os, "sched_getaffinity", lambda _: None)(0)
    one = pin(1)
    stepped = [stepping(env_id, arguments.num_envs, arguments.steps) for _ in range(arguments.repeats)]
    if available is not None:
        os.sched_setaffinity(0, available)
    several = pin(arguments.cores)
    size = (env_id, arguments.num_envs, arguments.episodes, arguments.steps)
    collected = [collecting(*size) for _ in range(arguments.repeats)]
    print(
        json.dumps(
            {
                "benchmark": "collecting",
                "world": env_id,
                "frames_per_second": round(max(stepped)),
                "median_frames_per_second": round(statistics.median(stepped)),
                "pinned_cores": one,
                "collected_frames_per_second": round(max(collected)),
                "median_collected_frames_per_second": round(statistics.median(collected)),
                "collecting_pinned_cores": several,
                "num_envs": arguments.num_envs,
                "episodes": arguments.episodes,
                "steps": arguments.steps,
                "repeats": arguments.repeats,
                "hardware": describe_hardware(),
            }
        )
    )


if __name__ == "__main__":
    main()
