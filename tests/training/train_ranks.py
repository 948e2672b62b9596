"""A small training, on one process or started by torchrun on several: `train_ranks.py RUN OVERRIDE...`.

`--vit` takes a vision transformer for the encoder `--resume` takes the run up and
`--stop-at=STEP` interrupts it. The last rank fails with
`--fail-at=STEP`, sleeps with `--sleep-at=STEP` and has other data with `--other-data`.
"""

import logging
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from blob_world import blob_cache
from train_blobs import CONFIG, MODEL

from worldloom.core.errors import DataError
from worldloom.core.processes import is_first
from worldloom.core.types import Windows
from worldloom.data import WindowSampler
from worldloom.models.encoders import ViT
from worldloom.training import RunFolder, fit

# Small steps, and every one logged: the curves are compared, and rounding must not be blown up.
RANKS = CONFIG.override(
    [
        "accelerator=cpu",
        "steps=40",
        "batch=32",
        "learning_rate=0.0005",
        "log_every=1",
        "checkpoint_every=20",
        "validate_every=40",
    ]
)
VIT = MODEL.override(["context=2"]).model_copy(update={"encoder": ViT(depth=2, width=16, heads=2)})


def hinder(step: int, how: Callable[[], None]) -> None:
    """Call `how` when the batch of a step is drawn."""
    draw, calls = WindowSampler.at, []

    def at(self: WindowSampler, numbers: object) -> Windows:
        calls.append(numbers)
        if len(calls) == step:
            how()
        return draw(self, numbers)

    WindowSampler.at = at


def fail() -> None:
    raise DataError("the data of this rank are damaged")


def main(path: Path, options: list[str]) -> None:
    flags = dict(option[2:].partition("=")[::2] for option in options if option.startswith("--"))
    data = blob_cache(episodes=10)
    if "stop-at" in flags:
        hinder(int(flags["stop-at"]), lambda: os.kill(os.getpid(), signal.SIGINT))
    if not is_first():
        if "fail-at" in flags:
            hinder(int(flags["fail-at"]), fail)
        if "sleep-at" in flags:
            hinder(int(flags["sleep-at"]), lambda: time.sleep(120))
        if "other-data" in flags:
            data = replace(data, fingerprint="other")
    config = RANKS.override([option for option in options if not option.startswith("--")])
    run = RunFolder.open(path) if "resume" in flags else RunFolder.create(path, {}, {})
    fit(config, VIT if "vit" in flags else MODEL, data, run, resume="resume" in flags)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    main(Path(sys.argv[1]), sys.argv[2:])
