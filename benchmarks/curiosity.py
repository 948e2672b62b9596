"""Compares exploration by curiosity with a random walk: the share of a new maze visited in the same number of steps.

    python benchmarks/curiosity.py [--seeds 0 1 2] [--mazes 32] [--steps 4000] [--threads 1]

For each training seed of long-maze (from benchmarks/success.py), both explorers start at the same places in new mazes
of 6 x 6 cells; every cell is reachable. The random walk is the policy that logged the training data. The measure is the
share of cells that the agent entered. Writes benchmarks/results/curiosity.json: the mean over mazes and seeds with its
95% interval (Student's t), and the hardware."""

import argparse
from pathlib import Path

import numpy as np
from scipy import stats

from worldloom.cli.console import print_table, progress
from worldloom.core.files import write_json
from worldloom.core.hardware import describe_hardware, set_threads
from worldloom.core.types import Observations
from worldloom.data import POLICIES
from worldloom.evaluation import PROTOCOLS, draw_tasks, open_world
from worldloom.workflow import Run

RESULTS = Path(__file__).parent / "results" / "curiosity.json"
PROTOCOL, SPLIT, CELLS, SIDE = PROTOCOLS["maze-200@1"], "covered", 6, 64
MARKS = (250, 500, 1000, 2000, 4000)


class RandomWalk:
    """The recipe's logging policy."""

    def __init__(self, run: Run, mazes: int, seed: int) -> None:
        recipe = run.recipe.collection
        assert recipe is not None
        self._policy = POLICIES[recipe.policy](run.model.spec.action, **recipe.policy_options)
        self._policy.reset([np.random.default_rng([seed, maze]) for maze in range(mazes)])

    def act(self, observations: Observations) -> np.ndarray:
        return self._policy.act(observations)


def seen(name: str, run: Run, arguments: argparse.Namespace, seed: int) -> np.ndarray:
    """Return the share of cells entered after each step, of shape (mazes, steps)."""
    mazes, steps = arguments.mazes, arguments.steps
    entered = np.zeros((mazes, steps, CELLS * CELLS), bool)
    with open_world(PROTOCOL, mazes) as world, progress().task(f"{name}, seed {seed}", steps, "step") as task:
        tasks, _ = draw_tasks(PROTOCOL, SPLIT, world, 0, "drawing mazes")
        frame = tasks.begin(PROTOCOL, SPLIT, world, name)
        explorer = RandomWalk(run, mazes, seed) if name == "random walk" else run.agent("landmarks").explorer()
        for step in range(steps):
            actions = np.asarray(explorer.act(frame.observations))
            frame = world.step(actions, frame.rows)
            position = frame.info("position")
            column, row = np.clip((position * CELLS / SIDE).astype(int), 0, CELLS - 1).T
            entered[np.arange(mazes), step, column + CELLS * row] = True
            task.advance()
    return np.logical_or.accumulate(entered, axis=1).mean(axis=2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--mazes", type=int, default=32)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--runs", type=Path, default=Path("runs/benchmarks"))
    arguments = parser.parse_args()
    set_threads(arguments.threads)
    shares: dict[str, list[np.ndarray]] = {"curiosity": [], "random walk": []}
    for seed in arguments.seeds:
        run = Run.open(arguments.runs / f"long-maze-{seed}" / "run", device="cpu")
        for name, found in shares.items():
            found.append(seen(name, run, arguments, seed))
    marks = [mark for mark in MARKS if mark <= arguments.steps]
    rows = []
    for name, found in shares.items():
        pooled = np.concatenate(found)
        for mark in marks:
            share = pooled[:, mark - 1]
            half = stats.t.ppf(0.975, len(share) - 1) * stats.sem(share)
            models = [float(one[:, mark - 1].mean()) for one in found]
            row = {"explorer": name, "steps": mark, "share": float(share.mean()), "n": len(share), "models": models}
            rows.append({**row, "low": float(share.mean() - half), "high": float(share.mean() + half)})
    values = {
        "command": f"python benchmarks/curiosity.py --seeds {' '.join(map(str, arguments.seeds))} "
        f"--mazes {arguments.mazes} --steps {arguments.steps} --threads {arguments.threads}",
        "rows": rows,
        "hardware": describe_hardware(),
    }
    write_json(RESULTS, values)
    shown = []
    for name in shares:
        mine = [row for row in rows if row["explorer"] == name]
        shown.append(
            [name, *(f"{100 * row['share']:.0f}% [{100 * row['low']:.0f}, {100 * row['high']:.0f}]" for row in mine)]
        )
    print_table("share of cells entered", ["explorer", *(f"{mark} steps" for mark in marks)], shown)


if __name__ == "__main__":
    main()
