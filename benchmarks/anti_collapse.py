"""Compares all anti-collapse variants on the demo's data: effective rank, probe errors and success, in one table.

    python benchmarks/anti_collapse.py [--steps 800] [--episodes 100] [--runs runs/benchmarks] [--only NAME ...]

Writes benchmarks/results/anti-collapse.json. The last row is the slow-feature trap, for which
the diagnostics must raise their alarm.
"""

import argparse
from pathlib import Path

from worldloom import workflow
from worldloom.agents import PlanningAgent
from worldloom.cli.console import print_table, progress
from worldloom.core.files import write_json
from worldloom.core.hardware import describe_hardware, set_threads
from worldloom.core.seams import Agent
from worldloom.data import load_cache
from worldloom.evaluation import PROTOCOLS, evaluate
from worldloom.heads import encode_episodes, measure_geometry
from worldloom.models import TargetConfig
from worldloom.models.losses import InverseDynamics, LossConfig, SIGReg, Straightening, Variance
from worldloom.planning import GoalObjective, LatentL2, Planner
from worldloom.planning.solvers import CEM, TreeSearch
from worldloom.recipes import load_recipe
from worldloom.training import RunFolder, TrainingConfig, alarms, default_losses, fit

RESULTS = Path(__file__).parent / "results"


def variants() -> dict[str, dict[str, object]]:
    """Return the training settings of each variant; they override the recipe's."""
    full = default_losses()
    bare: dict[str, LossConfig] = {"prediction": full["prediction"], "inverse-dynamics": full["inverse-dynamics"]}
    sigreg = SIGReg(weight=0.05, samples="pooled", stride=4)
    without = {name: loss for name, loss in full.items() if name != "inverse-dynamics"}
    return {
        "VICReg + similarity + inverse dynamics (default)": {"losses": full},
        "SIGReg + inverse dynamics": {
            "losses": {**bare, "sigreg": sigreg, "inverse-dynamics": InverseDynamics(weight=1.0)}
        },
        "SIGReg alone": {"losses": {"prediction": full["prediction"], "sigreg": SIGReg(weight=0.1, samples="pooled")}},
        "VICReg centred per window, no inverse dynamics": {
            "losses": {**without, "variance": Variance(weight=4.0, target=0.5, samples="centred")}
        },
        "VICReg + straightening + inverse dynamics": {"losses": {**full, "straightening": Straightening(weight=0.05)}},
        "EMA target + inverse dynamics": {"losses": bare, "target": TargetConfig()},
        "VICReg without inverse dynamics (the trap)": {"losses": without},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--episodes", type=int, default=100)
    parser.add_argument("--runs", type=Path, default=Path("runs/benchmarks"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", nargs="*", default=[], help="run only variants with one of these in their name")
    arguments = parser.parse_args()
    set_threads(arguments.threads)
    recipe = load_recipe("two-room")
    dataset = workflow.collect(recipe, arguments.runs / "two-room-0" / "data", progress=progress())
    cache = load_cache(dataset, progress=progress())
    protocol = PROTOCOLS["two-room@1"].customise(episodes=arguments.episodes)
    rows = []
    for number, (name, changes) in enumerate(variants().items()):
        if arguments.only and not any(part in name for part in arguments.only):
            continue
        config = TrainingConfig.parse(
            {**recipe.training.model_dump(), "steps": arguments.steps, "seed": 0, "target": None, **changes}
        )
        path = arguments.runs / "anti-collapse" / f"{number}-{arguments.steps}"
        fresh = not (path / "config.json").exists()
        folder = RunFolder.create(path, {}, {}) if fresh else RunFolder.open(path)
        model = fit(config, recipe.model, cache, folder, resume=not fresh, progress=progress())
        geometry = measure_geometry(model, encode_episodes(model, cache), recipe.inverse, seed=0)

        def agent(tree: bool, model=model, geometry=geometry) -> Agent:
            solver, horizon = (TreeSearch(), 24) if tree else (CEM(), 6)
            metric = LatentL2(geometry.step_length)
            planner = Planner(model, solver, horizon=horizon, geometry=geometry)
            return PlanningAgent(model, planner, lambda goal: GoalObjective(metric, goal), replan=4)

        results = evaluate(
            protocol,
            {"CEM, latent L2": lambda agent=agent: agent(False), "tree search": lambda agent=agent: agent(True)},
            record=0,
            progress=progress(),
        )
        diagnostics = folder.diagnostics()
        rows.append(
            {
                "variant": name,
                "figures": diagnostics["figures"],
                "alarms": [alarm.name for alarm in alarms(diagnostics["figures"])],
                "success": {
                    f"{row.method}/{row.split}": {
                        "rate": row.overall.rate,
                        "n": row.overall.n,
                        "interval": row.overall.interval,
                    }
                    for row in results.rows
                },
            }
        )
    command = f"python benchmarks/anti_collapse.py --steps {arguments.steps} --episodes {arguments.episodes}"
    values = {"command": command, "training_seeds": [0], "hardware": describe_hardware(), "rows": rows}
    if not arguments.only:
        write_json(RESULTS / "anti-collapse.json", values)
    print_table(
        "anti-collapse variants",
        ["variant", "rank", "probe px", "open loop px", "inverse", "alarms", "CEM cross", "tree cross"],
        [
            [
                row["variant"],
                f"{row['figures']['effective_rank']:.1f}",
                f"{row['figures']['probe/position/error']:.2f}",
                f"{row['figures']['open_loop/position/8']:.2f}",
                f"{row['figures']['inverse_dynamics']:.2f}",
                ", ".join(row["alarms"]) or "none",
                f"{row['success']['CEM, latent L2/cross-room']['rate']:.2f}",
                f"{row['success']['tree search/cross-room']['rate']:.2f}",
            ]
            for row in rows
        ],
    )


if __name__ == "__main__":
    main()
