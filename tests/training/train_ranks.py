"""A small training, on one process or started by torchrun on several: `train_ranks.py RUN OVERRIDE...`.

`--vit` takes a vision transformer for the encoder, `--resume` takes the run up, and `--fail-at=STEP` makes the last
rank raise.
"""

import logging
import os
import sys
from pathlib import Path

from blob_world import blob_cache
from train_blobs import CONFIG, MODEL

from worldloom.core.errors import DataError
from worldloom.data.windows import WindowSampler
from worldloom.models.encoders import ViT
from worldloom.training import RunFolder, fit

# Small steps, and every one logged: the curves are compared, and rounding must not be blown up.
RANKS = CONFIG.override(["accelerator=cpu", "steps=40", "log_every=1", "checkpoint_every=20", "learning_rate=0.0005", "batch=32"])
VIT = MODEL.override(["context=2"]).model_copy(update={"encoder": ViT(depth=2, width=16, heads=2)})


def fail_at(step: int) -> None:
    """Make the data of the last rank fail at a step."""
    if os.environ.get("RANK") != "1":
        return
    draw, calls = WindowSampler.at, []

    def at(self: WindowSampler, numbers: object) -> object:
        calls.append(numbers)
        if len(calls) > step:
            raise DataError("the data of this rank are damaged")
        return draw(self, numbers)

    WindowSampler.at = at


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    path, options = Path(sys.argv[1]), sys.argv[2:]
    for option in options:
        if option.startswith("--fail-at="):
            fail_at(int(option.partition("=")[2]))
    config = RANKS.override([option for option in options if not option.startswith("--")])
    resume = "--resume" in options
    run = RunFolder.open(path) if resume else RunFolder.create(path, {}, {})
    fit(config, VIT if "--vit" in options else MODEL, blob_cache(episodes=10), run, resume=resume)
