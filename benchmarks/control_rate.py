"""Measures the latency of a decision for one environment, and its success: reference CEM, our CEM, modes 1 and 2.

    python benchmarks/control_rate.py [--seeds 0 1 2] [--episodes 100] [--reference-episodes 50] [--timing-only]

The reference is CEM with 300 samples x 30 iterations x 5 blocks, a common configuration in the literature, with the
same model in the same process. A decision encodes a recorded observation and plans. The methods take turns, so that
other work on the machine affects all of them equally. Missing runs are trained first. Writes
benchmarks/results/control-rate.json."""

import argparse
import json
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from worldloom import workflow
from worldloom.agents import AgentParts, MethodConfig, PlanMethod, ReactiveMethod
from worldloom.cli.console import print_table, progress
from worldloom.core.files import write_json
from worldloom.core.hardware import describe_hardware, set_threads
from worldloom.core.types import Goal, Observations
from worldloom.evaluation import PROTOCOLS, Protocol, draw_tasks, evaluate, open_world, pool
from worldloom.planning.solvers import CEM, TreeSearch
from worldloom.recipes import load_recipe
from worldloom.workflow import Run

RESULTS = Path(__file__).parent / "results" / "control-rate.json"
REFERENCE = "CEM, 300 x 30 x 5 (reference)"

METHODS: dict[str, MethodConfig] = {
    REFERENCE: PlanMethod(solver=CEM(samples=300, iterations=30, elites=30), horizon=5),
    "CEM, 64 x 3 x 6 (ours)": PlanMethod(),
    "CEM, 32 x 1 x 6": PlanMethod(solver=CEM(samples=32, iterations=1, elites=6)),
    "CEM, 16 x 1 x 4": PlanMethod(solver=CEM(samples=16, iterations=1, elites=4), horizon=4),
    "CEM, 12 x 1 x 6, mode 2": PlanMethod(solver=CEM(samples=12, iterations=1, elites=3), propose=True),
    "tree search": PlanMethod(solver=TreeSearch(), horizon=24),
    "tree search, mode 2": PlanMethod(solver=TreeSearch(), horizon=24, propose=True),
    "reactive policy (mode 1)": ReactiveMethod(),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=Path("runs/benchmarks"))
    parser.add_argument("--protocol", default="two-room@1")
    parser.add_argument("--episodes", type=int, default=100, help="a split and model")
    parser.add_argument("--reference-episodes", type=int, default=50)
    parser.add_argument("--decisions", type=int, default=200)
    parser.add_argument("--threads", type=int, nargs="+", default=[2, 1])
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--timing-only", action="store_true", help="measure latency only; reuse stored success rates")
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    set_threads(2)
    protocol = PROTOCOLS[arguments.protocol]
    runs = [trained(arguments.runs / f"two-room-{seed}", seed) for seed in arguments.seeds]
    before = json.loads(arguments.output.read_text()) if arguments.output.exists() else {}
    values: dict[str, Any] = {
        "command": f"python benchmarks/control_rate.py --episodes {arguments.episodes} "
        f"--reference-episodes {arguments.reference_episodes} --decisions {arguments.decisions}",
        "protocol": protocol.title,
        "seeds": arguments.seeds,
        "methods": {name: METHODS[name].model_dump(mode="json") for name in arguments.methods},
        "hardware": describe_hardware(),
        "latency": {
            str(threads): latency(runs[0], arguments.methods, protocol, arguments.decisions, threads)
            for threads in arguments.threads
        },
    }
    write_json(arguments.output, {**before, **values})
    if not arguments.timing_only:
        set_threads(2)
        fast = [name for name in arguments.methods if name != REFERENCE]
        values["success"] = success(runs, fast, protocol, arguments.episodes)
        if REFERENCE in arguments.methods:
            values["success"] += success(runs, [REFERENCE], protocol, arguments.reference_episodes)
    write_json(arguments.output, {**before, **values})
    print_table(protocol.title, *summary({**before, **values}))


def trained(folder: Path, seed: int) -> Run:
    """Return the run of a seed, and train it if it does not exist."""
    if not (folder / "run" / "heads.json").is_file():
        recipe = load_recipe("two-room").override([f"training.seed={seed}", f"collection.seed={seed}"])
        workflow.collect(recipe, folder / "data", progress=progress())
        workflow.train(recipe, folder / "data", folder / "run", resume=True, progress=progress())
    return Run.open(folder / "run")


def latency(
    run: Run, names: Sequence[str], protocol: Protocol, decisions: int, threads: int
) -> dict[str, dict[str, float]]:
    """Time decisions for one environment, methods in turn, with warm starts as in the middle of an episode."""
    torch.set_num_threads(threads)
    agents = {name: METHODS[name].build(AgentParts(heads=run.heads), seed=0) for name in names}
    starts = tasks_of(protocol, decisions)
    every = run.model.spec.block
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for row in range(-3, decisions):
        look, goal = starts[row % len(starts)]
        for name, agent in agents.items():
            if name == REFERENCE and row >= 0 and row % 4:
                continue  # slow methods: a quarter of the decisions is enough
            agent.reset(goal)
            began = time.perf_counter()
            agent.act(look)
            first = time.perf_counter() - began
            for _ in range(every - 1):
                agent.act(look)
            began = time.perf_counter()
            agent.act(look)  # decides again, starting from the previous plan
            again = time.perf_counter() - began
            if row >= 0:
                seconds[name] += [first, again]
    reference = float(np.median(seconds[REFERENCE])) if REFERENCE in seconds else None
    result = {}
    for name, taken in seconds.items():
        median = float(np.median(taken))
        result[name] = {
            "n": len(taken),
            "median_ms": round(1e3 * median, 3),
            "p99_ms": round(1e3 * float(np.percentile(taken, 99)), 3),
        }
        if reference is not None:
            result[name]["times_faster"] = round(reference / median, 1)
    return result


def tasks_of(protocol: Protocol, count: int) -> list[tuple[Observations, Goal]]:
    """Return the first starts and goals of the protocol, alternating between splits, each as a batch of one."""
    each = -(-count // len(protocol.splits))
    found = []
    with open_world(protocol, each) as world:
        for split in protocol.splits:
            tasks, _ = draw_tasks(protocol, split, world, 0, split)
            starts = tasks.begin(protocol, split, world, split).observations.map(torch.clone)
            goals = tasks.goal.observations
            found.append([(starts[i : i + 1], Goal(observations=goals[i : i + 1])) for i in range(each)])
    return [pair for pairs in zip(*found, strict=True) for pair in pairs]


def success(runs: Sequence[Run], names: Sequence[str], protocol: Protocol, episodes: int) -> list[dict[str, Any]]:
    """Return a row for each method and split, pooled over the models."""
    results = [
        evaluate(
            protocol.customise(episodes=episodes),
            {name: partial(METHODS[name].build, AgentParts(heads=run.heads), seed=0) for name in names},
            record=0,
            model=run.model.spec.fingerprint,
            training_seed=run.recipe.training.seed,
            progress=progress(),
        )
        for run in runs
    ]
    rows: list[dict[str, Any]] = pool(results).to_json()["rows"]
    return rows


def summary(values: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return the header and the rows of the table."""
    threads = list(values["latency"])
    header = ["method", *(f"ms on {each} threads: median / p99" for each in threads), "times faster"]
    splits = list(dict.fromkeys(row["split"] for row in values.get("success", [])))
    rows = []
    for name in values["methods"]:
        times = [values["latency"][each][name] for each in threads]
        line = [name, *(f"{one['median_ms']:.2f} / {one['p99_ms']:.2f}" for one in times)]
        line.append(" / ".join(f"{one['times_faster']:.0f}" for one in times))
        for split in splits:
            row = next(row for row in values["success"] if (row["method"], row["split"]) == (name, split))
            low, high = row["interval"]
            line.append(f"{row['rate']:.2f} ({low:.2f} to {high:.2f}), n = {row['n']}")
        rows.append(line)
    return [*header, *splits], rows


if __name__ == "__main__":
    main()
