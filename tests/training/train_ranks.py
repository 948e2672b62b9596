"""A small training on two processes, to be started by torchrun: `train_ranks.py RUN`."""

import sys
from pathlib import Path

from blob_world import blob_cache
from train_blobs import CONFIG, MODEL

from worldloom.training import RunFolder, fit

if __name__ == "__main__":
    run = RunFolder.create(Path(sys.argv[1]), {}, {})
    fit(CONFIG.override(["devices=2", "accelerator=cpu", "steps=20"]), MODEL, blob_cache(episodes=10), run)
