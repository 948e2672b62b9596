"""Checks that the control loop keeps its rate and notices every missed deadline, on the arm of examples/.

    python benchmarks/control_loop.py [--seconds 300] [--run runs/arm] [--threads 1] [--out FILE]

The first run uses the unmodified planner. In the second run the planner is slowed on purpose: with probability 0.1 a
call sleeps for one to three periods, and one call hangs for three seconds. The plant runs in a separate process and
logs by its own clock when each action arrived. The results are written to one JSON file.

`unnoticed` must be 0. It counts the periods that the plant logged without an action of the agent in time, but that the
loop's report does not list as missed. `reaction_ms` is the time from the deadline of a missed period to the safe
action, and must be below one period. It is negative if the planner was still busy at the beginning of the period,
because the loop then sends the safe action at once."""

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

from deploy_arm import learn, plant, reach
from worldloom.core.files import write_json
from worldloom.core.hardware import describe_hardware
from worldloom.core.seams import Agent
from worldloom.core.types import Goal, Observations
from worldloom.deploy import ControlReport, SocketLink

SECONDS_EACH = 6.0  # for a goal
HANG = 3.0


class Slowed(Agent):
    """An agent that is late in random periods, and hangs once."""

    def __init__(self, agent: Agent, *, period: float, hang_at: float, seed: int) -> None:
        self._agent, self._period = agent, period
        self._generator = np.random.default_rng(seed)
        self._hang_at: float | None = time.monotonic() + hang_at

    def reset(self, goal: Goal) -> None:
        self._agent.reset(goal)

    def act(self, observations: Observations) -> torch.Tensor:
        if self._hang_at is not None and time.monotonic() > self._hang_at:
            self._hang_at = None
            time.sleep(HANG)
        elif self._generator.random() < 0.1:
            time.sleep(self._generator.uniform(1.0, 3.0) * self._period)
        return self._agent.act(observations)


def spread(values: list[float]) -> dict[str, float] | None:
    if not values:
        return None
    names = {"p50": 50, "p95": 95, "p99": 99, "max": 100}
    milliseconds = 1e3 * np.array(values)
    shown = {name: round(float(np.percentile(milliseconds, at)), 3) for name, at in names.items()}
    return {"n": float(len(values)), **shown}


def cross_check(report: ControlReport, log: dict[str, Any]) -> dict[str, Any]:
    """Compare the loop's report with the plant's log; both use the clock of this machine."""
    period = 1 / report.rate
    used = [each.observation for each in report.periods if each.observation >= 0]
    sent = {number: at for number, at in log["observations"] if used[0] <= number < used[-2]}
    answered = {
        number
        for number, kind, at in log["actions"]
        if kind == "agent" and number in sent and at < sent[number] + period
    }
    unanswered = set(sent) - answered
    noticed = {miss.observation for miss in report.misses} | set(report.skipped)
    noticed |= {each.observation for each in report.periods if each.kind == "late"}
    safe = [at for _, kind, at in log["actions"] if kind in ("safe", "watchdog")] + [at for _, at in log["safe"]]
    reactions, too_late = [], []
    for miss in report.misses:
        began = report.start + miss.period * period
        if miss.cause in ("sent too late", "it came late to the plant"):
            too_late.append(min(at for _, _, at in log["actions"] if at > began) - began - report.deadline)
        else:
            reactions.append(min((at for at in safe if at > began), default=float("inf")) - began - report.deadline)
    commands = sorted(at for _, _, at in log["actions"] if sent[used[0]] <= at <= sent[max(sent)] + period)
    return {
        "plant_periods": len(sent),
        "plant_unanswered": len(unanswered),
        "unnoticed": len(unanswered - noticed),
        "unnoticed_observations": sorted(unanswered - noticed)[:20],
        "reaction_ms": spread(reactions),
        "reaction_within_one_period": all(reaction < period for reaction in reactions),
        "late_on_the_way_ms": spread(too_late),
        "plant_longest_without_command_ms": round(1e3 * float(np.diff(commands).max()), 3),
        "plant_watchdog_acts": len([1 for number, _ in log["safe"] if number in sent]),
        "plant_late_observations": log["late"],
        "physics_behind_ms": round(1e3 * log["physics_behind_s"], 3),
    }


def measure(name: str, agent: Agent, seconds: float, folder: Path, *options: str) -> dict[str, Any]:
    log = folder / f"{name}.json"
    with plant("unix:" + str(folder / "arm.sock"), log, *options) as address, SocketLink(address) as link:
        report, goals = reach(link, agent, goals=max(1, round(seconds / SECONDS_EACH)), seconds=SECONDS_EACH)
    figures = report.to_json()
    for verbose in ("missed", "skipped_observations"):
        figures[verbose] = len(figures[verbose])
    figures["watchdog_acts"] = len(figures["watchdog_acts"])
    reached = {key: value for key, value in goals.figures().items() if key != "distance_m"}
    return {"loop": figures, "plant": cross_check(report, json.loads(log.read_text())), **reached}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--run", type=Path, default=Path("runs/arm"))
    parser.add_argument("--threads", type=int, default=1, help="of the planner")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "control-loop.json")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    run = learn(arguments.run, None)
    results: dict[str, Any] = {
        "benchmark": "control-loop",
        "seconds": arguments.seconds,
        "rate": 20.0,
        "planner_threads": arguments.threads,
        "seed": arguments.seed,
        "hardware": describe_hardware(),
        "load_average": [round(value, 2) for value in os.getloadavg()],
    }
    with tempfile.TemporaryDirectory() as name:
        for title in ("as it is", "slowed"):
            agent: Agent = run.agent(seed=arguments.seed)
            if title == "slowed":
                agent = Slowed(agent, period=0.05, hang_at=arguments.seconds / 2, seed=arguments.seed)
            results[title] = measure(title.replace(" ", "-"), agent, arguments.seconds, Path(name))
            print(title, json.dumps(results[title], indent=2), flush=True)
    results["load_average_after"] = [round(value, 2) for value in os.getloadavg()]
    write_json(arguments.out, results)


if __name__ == "__main__":
    main()
