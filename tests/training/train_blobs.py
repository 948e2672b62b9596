"""A small training as its own process: `python train_blobs.py RUN [--resume]`."""

import sys
from pathlib import Path

from blob_world import blob_cache

from worldloom.models import JEPAConfig
from worldloom.models.encoders import PatchConv
from worldloom.training import RunFolder, TrainingConfig, fit

STEPS = 60
MODEL = JEPAConfig(encoder=PatchConv(patch=8, channels=(8, 8), hidden=16), latent_dim=8, block=2)
CONFIG = TrainingConfig(
    steps=STEPS,
    batch=8,
    horizon=3,
    threads=1,
    log_every=5,
    checkpoint_every=7,
    validate_every=20,
    validation_windows=8,
    validation_share=0.2,
    target={"decay": 0.9},
).override(['losses.sigreg={"name": "sigreg", "weight": 0.1, "projections": 16}', "seed=3"])


def train(path: Path, *, resume: bool = False) -> None:
    run = RunFolder.open(path) if path.exists() else RunFolder.create(path, {}, {})
    fit(CONFIG, MODEL, blob_cache(episodes=10), run, resume=resume)


if __name__ == "__main__":
    train(Path(sys.argv[1]), resume="--resume" in sys.argv)
