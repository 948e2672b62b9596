"""Checks that SIGKILL during appends, flushes and forgetting neither loses, repeats nor damages a record.

    python benchmarks/memory_kills.py [--kills 200] [--write]

A child process appends as fast as it can and prints each id once it is acknowledged. It is killed after a random time,
and started again on the same directory. Meanwhile this process reads. The content of each record follows from its
episode and step, so a half-written record is detected. In every second directory the memory is small, and forgets
records while it runs. `--write` stores the counts in benchmarks/results/memory-kills.json.
"""

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import torch

from worldloom.core.files import write_json
from worldloom.core.hardware import describe_hardware
from worldloom.core.types import ActionSpec, ModelSpec, Observations, ObservationSpec
from worldloom.memory import EpisodicMemory, Memories, MemoryConfig

SPEC = ModelSpec(
    observation=ObservationSpec(pixels=(8, 8, 3), vector=3),
    action=ActionSpec(low=(-1.0, -1.0), high=(1.0, 1.0)),
    block=1,
    context=1,
    latent_dim=16,
    fingerprint="kills",
)
CAPACITY = 2000
NEWEST = 150  # of the acknowledged: protected from forgetting, by the policy
RESULTS = Path(__file__).parent / "results"


def columns(episodes: np.ndarray, steps: np.ndarray) -> dict[str, np.ndarray]:
    """Return the content of the records of these episodes and steps."""
    key = (episodes * 7919 + steps).astype(np.float64)
    waves = np.sin(key[:, None] * np.arange(1, 17) * 0.01).astype(np.float32)
    return {
        "latents": waves,
        "actions": waves[:, :2].copy(),
        "surprises": np.abs(waves[:, 2]),
        "vectors": waves[:, 3:6].copy(),
        "pixels": np.repeat((key.astype(np.int64) % 251).astype(np.uint8), 192).reshape(-1, 8, 8, 3),
    }


def append(path: Path) -> None:
    """Append until killed; print a line for each acknowledged append."""
    generator = random.Random(time.time_ns())
    with EpisodicMemory.open(path, spec=SPEC, writable=True) as memory:
        while True:
            (episode,) = memory.new_episodes(1)
            for step in range(0, generator.randrange(20, 400), 2):
                steps = np.array([step, step + 1])
                episodes = np.full(2, episode)
                held = columns(episodes, steps)
                ids = memory.append(
                    torch.from_numpy(held["latents"]),
                    episodes=episodes,
                    steps=steps,
                    actions=torch.from_numpy(held["actions"]),
                    surprises=held["surprises"],
                    outcomes=[str(episode), ""],
                    observations=Observations.from_numpy(held["pixels"], held["vectors"]),
                )
                print(*ids, flush=True)
            memory.flush()


def check(memory: EpisodicMemory, acknowledged: list[int], *, forgets: bool) -> list[str]:
    """Return the errors found in a memory."""
    memories: Memories = memory.read()
    wrong = []
    if (np.diff(memories.ids) <= 0).any():
        wrong.append("an id is there twice")
    expected = acknowledged[-NEWEST:] if forgets else acknowledged
    lost = np.setdiff1d(expected, memories.ids)
    if len(lost):
        wrong.append(f"{len(lost)} acknowledged memories are lost, such as {lost[:3]}")
    held = columns(memories.episodes, memories.steps)
    observations = memory.observations(memories.ids)
    there = {
        "latents": memories.latents,
        "actions": memories.actions,
        "surprises": memories.surprises,
        "vectors": observations.vector.numpy(),
        "pixels": observations.pixels.numpy(),
    }
    wrong += [f"{name} are not what was appended" for name in held if not np.array_equal(held[name], there[name])]
    return wrong


def kill(path: Path, kills: int, *, forgets: bool, generator: random.Random) -> dict[str, object]:
    """Kill a child that appends, `kills` times; return the counts and the errors."""
    config = MemoryConfig(capacity=CAPACITY if forgets else 1_000_000, flush_every=64, index_from=1024)
    EpisodicMemory.create(path, spec=SPEC, config=config).close()
    acknowledged: list[int] = []
    wrong: list[str] = []
    reads = 0
    for _ in range(kills):
        child = subprocess.Popen([sys.executable, __file__, "--append", str(path)], stdout=subprocess.PIPE, text=True)
        reading = threading.Thread(target=_collect, args=(child, acknowledged))
        reading.start()
        began = len(acknowledged)
        while len(acknowledged) == began and child.poll() is None:
            time.sleep(0.01)
        end = time.monotonic() + generator.uniform(0.0, 0.6)
        try:
            while time.monotonic() < end:  # at least once in most rounds
                before = list(acknowledged)
                with EpisodicMemory.open(path, spec=SPEC) as reader:
                    wrong += [f"to a reader beside: {each}" for each in check(reader, before, forgets=forgets)]
                reads += 1
        finally:
            child.send_signal(signal.SIGKILL)
            child.wait()
            reading.join()
        with EpisodicMemory.open(path, spec=SPEC) as reader:
            wrong += check(reader, acknowledged, forgets=forgets)
    with EpisodicMemory.open(path, spec=SPEC, writable=True) as memory:
        wrong += check(memory, acknowledged, forgets=forgets)
        left = len(memory)
    return {"kills": kills, "acknowledged": len(acknowledged), "left": left, "reads beside": reads, "wrong": wrong}


def _collect(child: "subprocess.Popen[str]", acknowledged: list[int]) -> None:
    assert child.stdout is not None
    for line in child.stdout:
        if line.endswith("\n"):
            acknowledged.extend(map(int, line.split()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--append", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.append is not None:
        append(arguments.append)
    generator = random.Random(arguments.seed)
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        for forgets in (False, True):
            half = arguments.kills // 2 + (arguments.kills % 2 if not forgets else 0)
            path = Path(folder) / f"memory-{forgets}"
            rows["bounded" if forgets else "unbounded"] = kill(path, half, forgets=forgets, generator=generator)
    values = {"command": f"python benchmarks/memory_kills.py --kills {arguments.kills}", "seed": arguments.seed}
    values |= {"rows": rows, "hardware": describe_hardware()}
    if arguments.write:
        write_json(RESULTS / "memory-kills.json", values)
    print(json.dumps(rows, indent=2))
    sys.exit(any(row["wrong"] for row in rows.values()))


if __name__ == "__main__":
    main()
