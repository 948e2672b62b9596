"""Learn the motion of an arm from a random log, then reach goals in real time with the planner in the loop.

    python examples/deploy_arm.py [--run runs/arm] [--goals 10] [--seconds 6] [--live]

The arm runs in a separate process (examples/arm_plant.py). The log contains random motion. With --live it is recorded
from the running plant at 20 Hz, which takes a quarter of an hour for 15 000 frames. Otherwise it is recorded from the
same simulation at full speed.
"""

import argparse
import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch

from arm_plant import ACTION, SPEED, VECTOR, Arm
from worldloom.agents import PlanMethod, RandomAgent, RandomMethod
from worldloom.core.types import Goal, Observations
from worldloom.deploy import ControlLoop, ControlReport, Link, SocketLink
from worldloom.models import JEPAConfig
from worldloom.planning.solvers import CEM
from worldloom.recipes import CollectionConfig, Recipe
from worldloom.training import TrainingConfig
from worldloom.workflow import Run, collect, train

REACH = np.array([0.22, 0.18])  # lengths of the two links, in metres
CLOSE = 0.03  # the goal is reached within this distance, in metres


class ArmEnv(gymnasium.Env[np.ndarray, np.ndarray]):
    """The plant's arm at full speed, with 25 physics steps (1/20 s) per action."""

    observation_space = gymnasium.spaces.Box(-10.0, 10.0, (VECTOR,), np.float32)
    action_space = gymnasium.spaces.Box(-1.0, 1.0, (2,), np.float32)

    def __init__(self) -> None:
        self._arm = Arm()

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self._arm.write(np.zeros(2))
        self._arm.reset(seed)
        return self._look()

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        self._arm.write(action)
        self._arm.step(25)
        observation, info = self._look()
        return observation, 0.0, False, False, info

    def _look(self) -> tuple[np.ndarray, dict]:
        reading = self._arm.read()
        assert reading.vector is not None
        return reading.vector, dict(reading.labels)


gymnasium.register("examples/Arm-v0", entry_point=ArmEnv, disable_env_checker=True)


def recipe(address: str | None) -> Recipe:
    """Return the recipe; observations include speeds, so one frame determines the state."""
    live = {"env_id": "worldloom/Plant-v0", "env_kwargs": {"address": address}, "num_envs": 1}
    return Recipe(
        name="arm",
        collection=CollectionConfig(
            **(live if address is not None else {"env_id": "examples/Arm-v0", "num_envs": 50}), episodes=150, steps=100
        ),
        model=JEPAConfig(encoder=None, block=2, latent_dim=32),
        training=TrainingConfig(steps=800),
        methods={
            "random": RandomMethod(),
            "CEM": PlanMethod(solver=CEM(samples=64, iterations=3), horizon=8, replan=1),
        },
        default_method="CEM",
    ).override(["reactive.steps=50", "reactive.problems=64", "cloning.steps=50", "distance.steps=200"])


@contextlib.contextmanager
def plant(address: str, log: Path | None = None, *options: str) -> Iterator[str]:
    """Run the arm in another process; yield its address."""
    command = [sys.executable, str(Path(__file__).with_name("arm_plant.py")), "--address", address, *options]
    command += [] if log is None else ["--log", str(log)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        said = process.stdout.readline()
        if not said.startswith("arm: "):
            raise SystemExit(f"the plant did not start (exit code {process.wait()})")
        yield said.removeprefix("arm: ").strip()
    finally:
        process.terminate()
        process.wait(timeout=10)


def goal_at(joints: np.ndarray) -> tuple[Goal, np.ndarray]:
    """Return the observation of the arm at rest in this pose, and the position of its fingertip."""
    angles = np.cumsum(joints)
    tip = np.array([(REACH * np.cos(angles)).sum(), (REACH * np.sin(angles)).sum()])
    vector = np.concatenate([tip / 0.4, np.cos(joints), np.sin(joints), np.zeros(2)])
    return Goal(observations=Observations.from_numpy(None, vector[None])), tip


class Goals:
    """Sets a new goal every `every` periods, and records the final distance to each goal."""

    def __init__(self, every: int, seed: int = 0) -> None:
        self._every, self._generator = every, np.random.default_rng(seed)
        self._goal, self._tip = self._draw()
        self.first = self._goal
        self.distances: list[float] = []
        self.loop: ControlLoop | None = None

    def __call__(self, report: ControlReport) -> None:
        done = report.periods[-1].number + 1
        if self.loop is None or self.loop.reading is None or done // self._every <= len(self.distances):
            return
        self.distances.append(float(np.linalg.norm(self.loop.reading.labels["fingertip"] - self._tip)))
        self._goal, self._tip = self._draw()
        self.loop.aim(self._goal)

    def _draw(self) -> tuple[Goal, np.ndarray]:
        return goal_at(self._generator.uniform([-np.pi, -2.0], [np.pi, 2.0]))

    def figures(self) -> dict[str, Any]:
        reached = sum(distance < CLOSE for distance in self.distances)
        return {
            "goals": len(self.distances),
            "reached": reached,
            "distance_m": [round(distance, 4) for distance in self.distances],
        }


def learn(path: Path, address: str | None) -> Run:
    """Collect and train; resume an interrupted run if there is one."""
    chosen = recipe(address)
    dataset = collect(chosen, path / "data")
    return train(chosen, dataset, path / "run", resume=(path / "run" / "config.json").is_file())


def reach(link: Link, agent: Any, *, goals: int, seconds: float, seed: int = 0) -> tuple[ControlReport, Goals]:
    """Drive the arm from goal to goal."""
    setting = Goals(every=round(seconds * link.rate), seed=seed)
    loop = ControlLoop(agent, link, deadline=0.8 / link.rate, safe_action=[0.0, 0.0], on_period=setting)
    setting.loop = loop
    return loop.run(setting.first, duration=goals * seconds), setting


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, default=Path("runs/arm"))
    parser.add_argument("--goals", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=6.0)
    parser.add_argument("--live", action="store_true")
    parser.add_argument("--threads", type=int, default=1, help="threads of the planner; leave one core to the plant")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with plant("tcp://127.0.0.1:0") as address:
        run = learn(arguments.run, address if arguments.live else None)
        agents = {"CEM": run.agent(), "random": RandomAgent(ACTION)}
        for name, agent in agents.items():
            with SocketLink(address) as link:
                report, goals = reach(link, agent, goals=arguments.goals, seconds=arguments.seconds)
            figures = report.to_json()
            shown = ("rate_held", "periods", "misses", "miss_causes", "plan_ms", "longest_without_command_ms")
            print(name, json.dumps({**goals.figures(), **{key: figures[key] for key in shown}}), flush=True)
    print(f"maximum speed {SPEED} rad/s; a goal is reached within {CLOSE} m after {arguments.seconds:g} s")


if __name__ == "__main__":
    main()
