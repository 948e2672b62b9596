"""Measures training and planning beside busy processes, with fixed numbers of threads and with the measured number.

    python benchmarks/busy.py [--neighbours 0 1 2 4] [--threads 1 2] [--repeats 3] [--steps 300] [--plans 100]

For each number of neighbours, that many processes keep a core busy. The modes (each fixed number of threads, and
"chosen", which measures first) take turns within one process. A rate is work divided by the complete time, including
the measuring. `share` is the chosen mode's rate divided by that of the best fixed number, over all repeats; the target
is at least 0.8. Prints one JSON line per number of neighbours and kind of work.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch

from planning import STEP_LENGTH, demo_model
from training import noise_cache
from worldloom.core.hardware import describe_hardware, fastest_threads, time_threads, use_threads
from worldloom.core.types import Context
from worldloom.data import Frames
from worldloom.models import JEPA, JEPAConfig
from worldloom.planning import GoalObjective, LatentL2, Planner
from worldloom.planning.solvers import CEM
from worldloom.training import RunFolder, TrainingConfig, fit

CHOSEN = "chosen"
ENVIRONMENTS, HORIZON = 8, 6  # of the plans that `fast_planning` measures


@contextmanager
def busy(count: int) -> Iterator[None]:
    """Keep `count` processes busy."""
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def train(cache: Frames, steps: int, threads: int) -> tuple[float, int]:
    """Train with a number of threads, 0 for the measured number; return frames per second and the number used."""
    config, model = TrainingConfig(steps=steps, threads=threads, validate_every=10**6), JEPAConfig()
    with tempfile.TemporaryDirectory() as directory:
        run = RunFolder.create(Path(directory) / "run", {}, {})
        start = time.perf_counter()
        fit(config, model, cache, run)
        seconds = time.perf_counter() - start
        return steps * config.batch * (model.context + config.horizon) / seconds, threads or run.threads or 0


def plan(model: JEPA, plans: int, threads: int) -> tuple[float, int]:
    """Plan with a number of threads, 0 for the measured number; return plans per second and the number used."""
    planner = Planner(model, CEM(), horizon=HORIZON)
    generator = torch.Generator().manual_seed(0)
    latents, goal = torch.randn(2, ENVIRONMENTS, model.spec.latent_dim, generator=generator)
    context = Context(latents=latents[:, None], actions=torch.zeros(ENVIRONMENTS, 0, model.spec.block_size))
    once = partial(planner.plan, context, GoalObjective(LatentL2(STEP_LENGTH), goal), generator=generator)
    start = time.perf_counter()
    threads = threads or fastest_threads(time_threads(once, seconds=0.5))
    with use_threads(threads):
        for _ in range(plans):
            once()
    return plans / (time.perf_counter() - start), threads


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--neighbours", type=int, nargs="+", default=[0, 1, 2, 4])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--plans", type=int, default=100)
    arguments = parser.parse_args()
    torch.set_num_threads(max(arguments.threads))
    cache, model = noise_cache(), demo_model()
    works = {"training": partial(train, cache, arguments.steps), "planning": partial(plan, model, arguments.plans)}
    for neighbours in arguments.neighbours:
        for name, work in works.items():
            spent: dict[str, list[float]] = {}
            used: list[int] = []
            with busy(neighbours):
                for _ in range(arguments.repeats):
                    for threads in (0, *arguments.threads):
                        rate, number = work(threads)
                        spent.setdefault(str(threads or CHOSEN), []).append(1 / rate)
                        used += [] if threads else [number]
            rates = {mode: len(times) / sum(times) for mode, times in spent.items()}
            best = max(rate for mode, rate in rates.items() if mode != CHOSEN)
            print(
                json.dumps(
                    {
                        "benchmark": f"busy {name}",
                        "neighbours": neighbours,
                        "unit": "frames per second" if name == "training" else "plans per second",
                        "rates": {mode: round(rate, 1) for mode, rate in rates.items()},
                        "by_repeat": {mode: [round(1 / time, 1) for time in times] for mode, times in spent.items()},
                        "chosen_threads": used,
                        "share": round(rates[CHOSEN] / best, 3),
                        "repeats": arguments.repeats,
                        "hardware": describe_hardware(),
                    }
                ),
                flush=True,
            )


if __name__ == "__main__":
    main()
