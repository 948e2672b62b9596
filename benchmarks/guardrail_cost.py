"""Measures the cost of guardrails: the time of a plan with five guardrails and without, on one model in one process.

    python benchmarks/guardrail_cost.py [--run runs/benchmarks/pits-0/run] [--decisions 100] [--environments 1 50]

A decision encodes an observation and plans. Both planners use the same observations and take turns, so that other work
on the machine affects both equally. The five guardrails are `keep-in`, `familiar`, `returnable`, `magnitude` and
`rate`, with limits that leave several plans feasible. Writes benchmarks/results/guardrail-cost.json."""

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from worldloom.agents import AgentParts, PlanMethod
from worldloom.cli.console import print_table
from worldloom.core.files import write_json
from worldloom.core.hardware import describe_hardware, set_threads
from worldloom.core.types import Goal
from worldloom.evaluation import PROTOCOLS, draw_tasks, open_world
from worldloom.guardrails import RuleLayer, RuleSet
from worldloom.workflow import Run

RESULTS = Path(__file__).parent / "results" / "guardrail-cost.json"
FIVE = {
    "out of the pits": {"name": "keep-in", "quantity": "pit_depth", "region": {"name": "box", "high": [0.0]}},
    "where it knows its way": {"name": "familiar", "times": 2.0},
    "what can be undone": {"name": "returnable", "steps": 60.0},
    "no great force": {"name": "magnitude", "limit": 1.4},
    "no jerks": {"name": "rate", "limit": 2.5},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/benchmarks/pits-0/run"))
    parser.add_argument("--decisions", type=int, default=100)
    parser.add_argument("--environments", type=int, nargs="+", default=[1, 50])
    parser.add_argument("--threads", type=int, nargs="+", default=[2, 1])
    arguments = parser.parse_args()
    set_threads(max(arguments.threads))
    run = Run.open(arguments.run)
    policy = RuleSet(layers=(RuleLayer.parse({"owner": "the benchmark", "guardrails": FIVE}),))
    rows = [
        {"threads": threads, "environments": size, **timed(run, policy, size, threads, arguments.decisions)}
        for threads in arguments.threads
        for size in arguments.environments
    ]
    command = f"python benchmarks/guardrail_cost.py --decisions {arguments.decisions}"
    write_json(RESULTS, {"command": command, "rows": rows, "hardware": describe_hardware()})
    header = ["threads", "environments", "n", "ms without", "ms with five", "ratio [95%]", "held"]
    shown = [
        [str(row["threads"]), str(row["environments"]), str(row["n"]), f"{row['without']:.2f}", f"{row['with']:.2f}",
         f"{row['ratio']:.2f} [{row['low']:.2f}, {row['high']:.2f}]", f"{row['held']:.0%}"]
        for row in rows
    ]  # fmt: skip
    print_table("the time of a decision", header, shown)


def timed(run: Run, policy: RuleSet, size: int, threads: int, decisions: int) -> dict[str, Any]:
    """Return the medians, their ratio and its bootstrap interval, and how many plans satisfy all five guardrails."""
    torch.set_num_threads(threads)
    protocol = PROTOCOLS["pits@1"]
    split = "in the open"
    method = PlanMethod()
    agents = {
        "without": method.build(AgentParts(heads=run.heads), seed=0),
        "with": method.build(AgentParts(heads=run.heads, rules=run.bind(policy)), seed=0),
    }
    looks: list[tuple[Any, Goal]] = []
    with open_world(protocol, size) as world:
        first = 0
        for _ in range(min(20, decisions)):
            tasks, first = draw_tasks(protocol, split, world, first, split)
            frame = tasks.begin(protocol, split, world, split)
            looks.append((frame.observations.map(torch.clone), tasks.goal))
    taken: dict[str, list[float]] = {name: [] for name in agents}
    refused = 0
    for number in range(-3, decisions):
        look, goal = looks[number % len(looks)]
        for name, agent in agents.items():
            agent.reset(goal)
            began = time.perf_counter()
            agent.act(look)
            if number >= 0:
                taken[name].append(time.perf_counter() - began)
                refused += len(agent.refused)
    rng = np.random.default_rng(0)
    both = np.array([taken["without"], taken["with"]])
    draws = [np.median(both[:, rng.integers(decisions, size=decisions)], axis=1) for _ in range(1000)]
    ratios = [after / before for before, after in draws]
    without, guarded = 1e3 * np.median(both, axis=1)
    low, high = np.percentile(ratios, [2.5, 97.5])
    held = 1 - refused / (decisions * size)
    return {
        "n": decisions,
        "without": without,
        "with": guarded,
        "ratio": guarded / without,
        "low": low,
        "high": high,
        "held": held,
    }


if __name__ == "__main__":
    main()
