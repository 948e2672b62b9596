"""Measures the training speed of a world model; prints one JSON line.

    python benchmarks/training.py [--threads N] [--steps N] [--set KEY=VALUE ...]

The default configuration trains on 64x64 RGB noise with `fit`, including the cache of windows, logging and checkpoints.
The rate is the median over the logging intervals. PyTorch counts the floating-point operations (matrix products and
convolutions, forward and backward). They are compared with the rate of square matrix products in the same process.
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from worldloom.core.hardware import describe_hardware, matmul_peak
from worldloom.core.types import ActionSpec, ObservationSpec
from worldloom.data import DatasetSpec, Frames, WindowSampler, compute_statistics
from worldloom.models import JEPAConfig, build_jepa
from worldloom.training import RunFolder, TrainingConfig, fit
from worldloom.training.learner import Learner

EPISODES, STEPS, SIDE = 40, 100, 64


def noise_cache() -> Frames:
    """Return frames and actions of noise; the arithmetic is the same as for a world."""
    random, frames = np.random.default_rng(0), EPISODES * (STEPS + 1)
    actions = random.uniform(-1, 1, (frames, 2)).astype(np.float32)
    return Frames(
        spec=DatasetSpec(
            observation=ObservationSpec(pixels=(SIDE, SIDE, 3)), action=ActionSpec(low=(-1.0, -1.0), high=(1.0, 1.0))
        ),
        fingerprint="noise",
        pixels=random.integers(0, 256, (frames, SIDE, SIDE, 3), dtype=np.uint8),
        vector=None,
        actions=actions,
        labels={},
        starts=np.arange(EPISODES) * (STEPS + 1),
        lengths=np.full(EPISODES, STEPS),
    )


def operations_per_step(config: TrainingConfig, model_config: JEPAConfig, cache: Frames) -> int:
    """Count the floating-point operations of one forward and backward pass."""
    model = build_jepa(
        model_config, cache.spec.observation, cache.spec.action, compute_statistics(cache, seed=0), seed=0
    )
    learner = Learner(model, config).train()
    sampler = WindowSampler(cache, context=model_config.context, horizon=config.horizon, block=model_config.block)
    windows = sampler.sample(config.batch, np.random.default_rng(0))
    with FlopCounterMode(display=False) as counter:
        learner(windows.observations.pixels, windows.observations.vector, windows.actions, 0)[0].backward()
    return int(counter.get_total_flops())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--set", action="append", default=[], help="override of the training configuration")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    cache, model_config = noise_cache(), JEPAConfig()
    config = TrainingConfig(steps=arguments.steps, validate_every=10**6).override(arguments.set)
    dtype = torch.float32 if config.precision == "32-true" else torch.bfloat16
    peaks = [matmul_peak(dtype)]
    with tempfile.TemporaryDirectory() as directory:
        run = RunFolder.create(Path(directory) / "run", {}, {})
        fit(config, model_config, cache, run)
        lines = [line for line in run.metrics() if "frames_per_second" in line]
    peaks.append(matmul_peak(dtype))
    rates = [line["frames_per_second"] for line in lines[1:] or lines]
    rate = statistics.median(rates)
    frames = config.batch * (model_config.context + config.horizon)
    flops = operations_per_step(config, model_config, cache) * rate / frames
    shares = {name: round(value, 3) for name, value in lines[-1].items() if name.startswith("time/")}
    print(
        json.dumps(
            {
                "benchmark": "training",
                "frames_per_second": round(rate),
                "best_frames_per_second": round(max(rates)),
                "gflop_per_second": round(flops / 1e9, 1),
                "matmul_peak_gflop_per_second": round(max(peaks) / 1e9, 1),
                "share_of_peak": round(flops / max(peaks), 3),
                "steps": config.steps,
                "batch": config.batch,
                "frames_per_window": model_config.context + config.horizon,
                "precision": config.precision,
                "overrides": arguments.set,
                **shares,
                "hardware": describe_hardware(),
            }
        )
    )


if __name__ == "__main__":
    main()
