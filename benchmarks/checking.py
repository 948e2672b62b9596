"""Measures what the digests cost that are checked when a dataset is read; writes results/checking.json.

    python benchmarks/checking.py [--episodes 300] [--steps 400] [--pairs 5]

Each pair trains twice on the same data, once with the checks and once without, in alternating order. A training begins
with opening the data: decoding all frames into memory, or streaming them from disk without a disk cache. The throughput
is the number of frames divided by the seconds of opening and training. `ratio` is with checks / without, as the median
of the pairs, with the lowest and the highest. `cpu_ratio` is the same for frames per second of CPU time, which other
processes disturb less. Training uses one thread.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from worldloom.core.hardware import describe_hardware
from worldloom.data import DataConfig, EpisodeDataset, collect, load_cache, stream_frames
from worldloom.data import dataset as dataset_module
from worldloom.data.layout import decode_frames
from worldloom.envs import register_envs
from worldloom.models import JEPAConfig
from worldloom.training import RunFolder, TrainingConfig, fit

OUT = Path(__file__).parent / "results" / "checking.json"


@contextmanager
def without_checks() -> Iterator[None]:
    """Read without comparing digests."""

    def decode(frames: Any, out: Any, *_: Any) -> None:
        decode_frames(frames, out)

    nothing = mock.Mock(return_value=None)
    with mock.patch.object(dataset_module, "_decode", decode), mock.patch.object(EpisodeDataset, "_check", nothing):
        yield


def train(path: Path, directory: Path, how: str, steps: int) -> dict[str, float]:
    """Open the data and train; return the seconds of each, and the frames per second of both together."""
    model = JEPAConfig()
    training = TrainingConfig(steps=steps, threads=1, validate_every=10**6, checkpoint_every=10**6)
    began, cpu = time.perf_counter(), time.process_time()
    dataset = EpisodeDataset.open(path)
    frames = load_cache(dataset, "ram") if how == "cache" else stream_frames(dataset, DataConfig(cache_gib=0.0))
    opened = time.perf_counter()
    with frames:
        fit(training, model, frames, RunFolder.create(directory, {}, {}))
    ended = time.perf_counter()
    consumed = steps * training.batch * (model.context + training.horizon)
    return {
        "opening_seconds": opened - began,
        "training_seconds": ended - opened,
        "frames_per_second": consumed / (ended - began),
        "frames_per_cpu_second": consumed / (time.process_time() - cpu),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--episodes", type=int, default=300)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args()
    register_envs()
    rows = []
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        dataset = collect(root / "d", env_id="worldloom/TwoRoom-v0", episodes=arguments.episodes, steps=100, seed=0)
        for how in ("cache", "stream"):
            train(root / "d", root / f"{how}-warm", how, 20)
            figures: dict[str, list[dict[str, float]]] = {"with": [], "without": []}
            for pair in range(arguments.pairs):
                for which in ("with", "without") if pair % 2 else ("without", "with"):
                    directory = root / f"{how}-{which}-{pair}"
                    if which == "with":
                        figures[which].append(train(root / "d", directory, how, arguments.steps))
                    else:
                        with without_checks():
                            figures[which].append(train(root / "d", directory, how, arguments.steps))
            row: dict[str, Any] = {"data": how, "pairs": arguments.pairs, "steps": arguments.steps}
            for key, rate in (("ratio", "frames_per_second"), ("cpu_ratio", "frames_per_cpu_second")):
                pairs = zip(figures["with"], figures["without"], strict=True)
                ratios = [one[rate] / other[rate] for one, other in pairs]
                row[key] = [round(value, 3) for value in (statistics.median(ratios), min(ratios), max(ratios))]
            for which, each in figures.items():
                row[which] = {key: round(statistics.median(one[key] for one in each), 3) for key in each[0]}
            rows.append(row)
            print(json.dumps(row))
        result = {
            "benchmark": "checking",
            "frames": dataset.frames,
            "stored_bytes": dataset.stored_bytes(),
            "threads": 1,
            "rows": rows,
            "hardware": describe_hardware(),
        }
    arguments.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
