"""Measures training and planning beside busy processes, with fixed numbers of threads and with the measured number.

    python benchmarks/busy.py [--neighbours 0 1 2 4] [--threads 1 2] [--repeats 3] [--steps 300] [--plans 100]

For each number of neighbours, that many processes keep a core busy. The modes (each fixed number of threads, and
"chosen", which measures first) take turns within one process. A rate is work divided by the complete time, including
the measuring. `share` is the chosen mode's rate divided by that of the best fixed number, over all repeats; the target
is at least 0.8. A fixed number of threads that is less than half as fast as the best one in a tenth of the work is not
measured longer, because beside many neighbours it would take hours. Prints one JSON line per number of neighbours and
kind of work, and writes all lines to results/busy.jsonl.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

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
OUT = Path(__file__).parent / "results" / "busy.jsonl"
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
    planner, quick = (Planner(model, solver, horizon=HORIZON) for solver in (CEM(), CEM(iterations=1)))
    generator = torch.Generator().manual_seed(0)
    latents, goal = torch.randn(2, ENVIRONMENTS, model.spec.latent_dim, generator=generator)
    context = Context(latents=latents[:, None], actions=torch.zeros(ENVIRONMENTS, 0, model.spec.block_size))
    objective = GoalObjective(LatentL2(STEP_LENGTH), goal)
    once, probe = (partial(each.plan, context, objective, generator=generator) for each in (planner, quick))
    start = time.perf_counter()
    threads = threads or fastest_threads(time_threads(probe, seconds=0.5))
    with use_threads(threads):
        for _ in range(plans):
            once()
    return plans / (time.perf_counter() - start), threads


def measure(
    work: Callable[[int, int], tuple[float, int]], amount: int, fixed: list[int], repeats: int
) -> dict[str, Any]:
    """Let the modes take turns; return their rates, the share and the numbers of threads that were chosen."""
    tried = {threads: work(amount // 10, threads)[0] for threads in fixed}
    slow = {threads: rate for threads, rate in tried.items() if rate < 0.5 * max(tried.values())}
    spent: dict[str, list[float]] = {str(threads): [1 / rate] for threads, rate in slow.items()}
    used: list[int] = []
    for _ in range(repeats):
        for threads in (0, *(each for each in fixed if each not in slow)):
            rate, number = work(amount, threads)
            spent.setdefault(str(threads or CHOSEN), []).append(1 / rate)
            used += [] if threads else [number]
    rates = {mode: len(times) / sum(times) for mode, times in spent.items()}
    best = max(rate for mode, rate in rates.items() if mode != CHOSEN)
    return {
        "rates": {mode: round(rate, 1) for mode, rate in rates.items()},
        "by_repeat": {mode: [round(1 / time, 1) for time in times] for mode, times in spent.items()},
        "chosen_threads": used,
        "share": round(rates[CHOSEN] / best, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--neighbours", type=int, nargs="+", default=[0, 1, 2, 4])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--plans", type=int, default=100)
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args()
    torch.set_num_threads(max(arguments.threads))
    cache, model = noise_cache(), demo_model()
    works = {
        "training": (partial(train, cache), arguments.steps, "frames per second"),
        "planning": (partial(plan, model), arguments.plans, "plans per second"),
    }
    lines = []
    for neighbours in arguments.neighbours:
        for name, (work, amount, unit) in works.items():
            with busy(neighbours):
                figures = measure(work, amount, arguments.threads, arguments.repeats)
            about = {"benchmark": f"busy {name}", "neighbours": neighbours, "unit": unit}
            lines.append(
                json.dumps({**about, **figures, "repeats": arguments.repeats, "hardware": describe_hardware()})
            )
            print(lines[-1], flush=True)
    arguments.out.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


if __name__ == "__main__":
    main()
