"""Measures the latency of a plan for each solver, and the rate of matrix products; one JSON line per solver.

    python benchmarks/planning.py [--threads 2] [--environments 1 50] [--solvers cem tree-search] [--repeats 20]

The model has the demo's size and random weights, because its predictions do not affect the time. Goals are far, so that
tree search does not end early. `share_of_peak` compares with the rate of 1024 x 1024 products, measured before and
after in the same run.
"""

import argparse
import json
import statistics
import time

import torch
from torch.utils.flop_counter import FlopCounterMode

from worldloom.core.hardware import describe_hardware, matmul_peak
from worldloom.core.seams import Metric
from worldloom.core.types import ActionSpec, Context, ObservationSpec
from worldloom.data import Statistics
from worldloom.heads import (
    DistanceConfig,
    InverseModel,
    InverseModelConfig,
    LatentGeometry,
    Reversibility,
    TemporalDistance,
)
from worldloom.models import JEPA, JEPAConfig, build_jepa
from worldloom.planning import GoalObjective, LatentL2, Planner
from worldloom.planning.solvers import SOLVERS

HORIZONS = {"tree-search": 24}  # blocks: half of it from each side
STEP_LENGTH = 1.7  # of the demo's model, with latents of variance 1


def demo_model() -> JEPA:
    observation, action = ObservationSpec(pixels=(64, 64, 3)), ActionSpec(low=(-1.0, -1.0), high=(1.0, 1.0))
    statistics = Statistics(
        pixel_mean=torch.full((64, 64, 3), 128.0),
        pixel_std=torch.full((64, 64, 3), 30.0),
        vector_mean=None,
        vector_std=None,
        action_mean=torch.zeros(2),
        action_std=torch.full((2,), 0.5),
    )
    return build_jepa(JEPAConfig(), observation, action, statistics, seed=0).eval()


def measure(planner: Planner, metric: Metric, environments: int, repeats: int) -> dict[str, float]:
    spec = planner.model.spec
    generator = torch.Generator().manual_seed(0)
    latents, goal = torch.randn(2, environments, spec.latent_dim, generator=generator)
    context = Context(latents=latents[:, None], actions=torch.zeros(environments, 0, spec.block_size))
    objective = GoalObjective(metric, goal)

    def plan() -> int:
        return planner.plan(context, objective, generator=generator).rollouts

    with FlopCounterMode(display=False) as counter:
        rollouts = plan()
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        plan()
        seconds.append(time.perf_counter() - began)
    median = statistics.median(seconds)
    return {
        "ms_per_plan": round(1e3 * median, 2),
        "ms_per_environment": round(1e3 * median / environments, 3),
        "ms_fastest": round(1e3 * min(seconds), 2),
        "rollouts_per_environment": rollouts / environments,
        "gflop": round(counter.get_total_flops() / 1e9, 3),
        "gflops": round(counter.get_total_flops() / median / 1e9, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--environments", type=int, nargs="+", default=[1, 50])
    parser.add_argument("--solvers", nargs="+", default=list(SOLVERS))
    parser.add_argument("--horizon", type=int, default=12, help="blocks")
    parser.add_argument("--repeats", type=int, default=20)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model = demo_model()
    geometry = LatentGeometry(
        step_length=STEP_LENGTH,
        inverse=InverseModel(model.spec, InverseModelConfig()).eval(),
        reversibility=Reversibility(gap=0.0, displacement=1.0),
    )
    metrics: dict[str, Metric] = {
        "latent-l2": LatentL2(STEP_LENGTH),
        "temporal-distance": TemporalDistance(model.spec, DistanceConfig()).eval(),
    }
    for name in arguments.solvers:
        horizon = HORIZONS.get(name, arguments.horizon)
        planner = Planner(model, SOLVERS[name].parse({"name": name}), horizon=horizon, geometry=geometry)
        for metric in ("latent-l2", "temporal-distance") if name == "cem" else ("latent-l2",):
            for environments in arguments.environments:
                peak = matmul_peak(torch.float32)
                figures = measure(planner, metrics[metric], environments, arguments.repeats)
                peak = max(peak, matmul_peak(torch.float32))  # other work on the machine can only lower it
                line = {
                    "benchmark": "planning",
                    "solver": name,
                    "metric": metric,
                    "environments": environments,
                    "horizon": horizon,
                    **figures,
                    "peak_gflops": round(peak / 1e9, 1),
                    "share_of_peak": round(figures["gflops"] * 1e9 / peak, 3),
                    "hardware": describe_hardware(),
                }
                print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
