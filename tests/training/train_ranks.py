"""A small training on any number of processes, to be started by torchrun: `train_ranks.py RUN DEVICES`."""

import sys
from pathlib import Path

from blob_world import blob_cache
from train_blobs import CONFIG, MODEL

from worldloom.training import RunFolder, fit

if __name__ == "__main__":
    run = RunFolder.create(Path(sys.argv[1]), {}, {})
    config = CONFIG.override(
        [f"devices={sys.argv[2]}", "accelerator=cpu", "steps=40", "log_every=1", "learning_rate=3e-4"]
    )
    fit(config, MODEL, blob_cache(episodes=10), run)
