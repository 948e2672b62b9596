"""Measures speed and accuracy of recall from a million records, compared with exact search on the same machine.

    python benchmarks/memory_recall.py [--memories 1000000] [--queries 1000] [--run RUN] [--write]

Records and queries are latents of 64 values near a curved surface of four dimensions, with noise. With `--run` they are
latents of a model, which predicts random walks from states of its data. The first blocks of each walk are records,
later blocks are queries. `--write` stores the figures in benchmarks/results/memory-recall.json."""

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from worldloom.cli.console import progress
from worldloom.core.actions import Walk
from worldloom.core.files import read_json, write_json
from worldloom.core.hardware import describe_hardware, set_threads
from worldloom.core.types import ActionBounds, ActionSpec, ModelSpec, ObservationSpec
from worldloom.data import EpisodeDataset
from worldloom.heads import still
from worldloom.memory import EpisodicMemory, MemoryConfig
from worldloom.workflow import Run

RESULTS = Path(__file__).parent / "results" / "memory-recall.json"
SIZE, K = 64, 10


def surface(count: int, seed: int) -> torch.Tensor:
    """Return points near a surface of four dimensions in 64: random Fourier features, with noise."""
    shared = np.random.default_rng(7)
    waves, phases = shared.normal(size=(4, SIZE)) * 1.5, shared.uniform(0, 2 * np.pi, SIZE)
    generator = np.random.default_rng(seed)
    points = np.cos(generator.uniform(-2, 2, (count, 4)) @ waves + phases)
    return torch.from_numpy((points + 0.05 * generator.normal(size=points.shape)).astype(np.float32))


def imagined(run: Run, count: int, seed: int) -> torch.Tensor:
    """Return latents of predicted walks from states of a run's data."""
    model, generator = run.model, torch.Generator().manual_seed(seed)
    dataset = EpisodeDataset.open(run.data)
    numbers = np.random.default_rng(seed).choice(dataset.frames, min(dataset.frames, 20_000), replace=False)
    rows = np.sort(numbers)
    walk, bounds, found = Walk(), ActionBounds.of(model.spec, "cpu"), []
    with torch.inference_mode():
        from worldloom.core.types import Observations

        for some in np.array_split(rows, -(-len(rows) // 500)):
            starts = model.encode(Observations.from_numpy(dataset.pixels(some), None))
            actions = walk.sample(model.spec, bounds, (len(some), -(-count // (len(rows) * 8)), 8), generator)
            found.append(model.rollout(still(starts, model), actions).flatten(0, 2))
    every = torch.cat(found)
    return every[torch.randperm(len(every), generator=generator)[:count]].float().contiguous()


def measure(name: str, latents: torch.Tensor, queries: torch.Tensor) -> dict[str, object]:
    """Return the figures of one kind of latents."""
    spec = ModelSpec(
        observation=ObservationSpec(vector=1),
        action=ActionSpec(low=(-1.0,), high=(1.0,)),
        block=1,
        context=1,
        latent_dim=latents.shape[1],
        fingerprint=name,
    )
    with tempfile.TemporaryDirectory() as folder:
        config = MemoryConfig(frames="none", capacity=10_000_000, flush_every=50_000)
        with EpisodicMemory.create(Path(folder) / "m", spec=spec, config=config) as memory:
            began = time.perf_counter()
            with progress().task(f"appending ({name})", len(latents), "memory") as task:
                for first in range(0, len(latents), 10_000):
                    some = latents[first : first + 10_000]
                    memory.append(some, episodes=np.zeros(len(some), np.int64), steps=np.arange(len(some)))
                    task.advance(len(some))
            appended = time.perf_counter() - began
            began = time.perf_counter()
            memory.flush()
            tended = time.perf_counter() - began
            size = memory.stored_bytes()
        with EpisodicMemory.open(Path(folder) / "m", spec=spec) as memory:
            memory.recall(queries[:50], K)
            seconds, hits, exact_seconds = [], 0, []
            squares = latents.square().sum(dim=1)
            for query in queries:
                began = time.perf_counter()
                found = memory.recall(query[None], K)
                seconds.append(time.perf_counter() - began)
                began = time.perf_counter()
                exact = (squares - 2 * (latents @ query)).topk(K, largest=False).indices
                exact_seconds.append(time.perf_counter() - began)
                hits += len(set(found.ids[0].tolist()) & set(exact.tolist()))
            indexed = memory.indexed
    milliseconds = np.array(seconds) * 1e3
    return {
        "memories": len(latents),
        "indexed": indexed,
        "queries": len(queries),
        "recall@10": hits / (K * len(queries)),
        "p50 ms": float(np.percentile(milliseconds, 50)),
        "p99 ms": float(np.percentile(milliseconds, 99)),
        "exact search p50 ms": float(np.percentile(exact_seconds, 50) * 1e3),
        "append seconds": appended,
        "index seconds": tended,
        "bytes": size,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--memories", type=int, default=1_000_000)
    parser.add_argument("--queries", type=int, default=1000)
    parser.add_argument("--run", type=Path)
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    set_threads(2)
    count, queries = arguments.memories, arguments.queries
    if arguments.run is None:
        name, latents, asked = "surface", surface(count, 1), surface(queries, 2)
    else:
        every = imagined(Run.open(arguments.run, device="cpu"), count + queries, 1)
        name, latents, asked = f"imagined by {arguments.run.parent.name}", every[:-queries], every[-queries:]
    row = measure(name, latents.contiguous(), asked)
    print(json.dumps({name: row}, indent=2))
    if arguments.write:
        rows = read_json(RESULTS)["rows"] if RESULTS.exists() else {}
        command = "python benchmarks/memory_recall.py"
        write_json(RESULTS, {"command": command, "rows": {**rows, name: row}, "hardware": describe_hardware()})


if __name__ == "__main__":
    main()
