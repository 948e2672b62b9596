"""The configuration of training."""

import math
from typing import Literal

from pydantic import Field, field_validator

from worldloom.core.config import Config
from worldloom.data import SquareSymmetry
from worldloom.models import TargetConfig
from worldloom.models.losses import (
    Covariance,
    InverseDynamics,
    LossConfig,
    LossField,
    Prediction,
    TemporalSimilarity,
    Variance,
)

# Settings that may change when a run is resumed, because they affect the parameters only by rounding.
FREE = frozenset({
    "log_every", "checkpoint_every", "validate_every", "validation_windows", "threads", "accelerator", "compile",
    "devices", "strategy", "timeout_minutes", "accumulate", "activation_checkpointing",
})  # fmt: skip


def default_losses() -> dict[str, LossConfig]:
    """Return the default losses, which worked best in our measurements."""
    return {
        "prediction": Prediction(),
        "variance": Variance(weight=4.0, samples="pooled"),
        # A small weight, because a weight of 2 makes the dimensions independent but less predictable (docs/log.md).
        "covariance": Covariance(weight=0.03, samples="pooled"),
        "temporal-similarity": TemporalSimilarity(weight=1.0),
        "inverse-dynamics": InverseDynamics(weight=3.0),
    }


class TrainingConfig(Config):
    """The configuration of a training run.

    Attributes:
        batch: the number of windows per step, over all devices.
        horizon: the number of blocks that are predicted open loop.
        losses: the losses by name; the names are also used in the log.
        target: if set, the targets of predictions come from a moving average of the encoder.
        pool_windows: for data larger than the cache: sample from a pool of about this many windows, instead of from all
            windows. The pool slides over the data; each window is used at most once per pass (see
            `worldloom.data.SlidingPool`).
        symmetry: if set, each window is shown in a random one of the eight positions of a square picture, with the
            actions that belong to it.
        schedule: "constant" keeps the learning rate for `constant_share` of the steps, then decreases it to 0 as a
            cosine; "one-cycle" increases it for a tenth of the steps, then decreases it.
        devices: the number of devices on all machines.
        strategy: with "fsdp", each device stores a shard of the parameters and of the optimiser's state (Zhao et al.,
            arXiv 2304.11277), for models that are too large for one device.
        threads: the number of CPU threads; 0 measures which number is fastest (see `fit`).
        accumulate: the number of parts in which the frames of a batch are encoded. More parts need less memory and at
            most a third more time; the gradient is still that of the complete batch, including its statistics
            (gradient caching, Gao et al., arXiv 2101.06983).
        activation_checkpointing: store only the inputs of transformer blocks for the gradient (Chen et al., arXiv
            1604.06174).
        timeout_minutes: the maximum time for which a process waits for the others.
    """

    steps: int = Field(default=1000, ge=1)
    batch: int = Field(default=64, ge=2)
    horizon: int = Field(default=8, ge=1)
    losses: dict[str, LossField] = Field(default_factory=default_losses)
    target: TargetConfig | None = None
    pool_windows: int | None = Field(default=None, ge=1)
    symmetry: SquareSymmetry | None = None

    learning_rate: float = Field(default=2e-3, gt=0)
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = Field(default=1e-4, ge=0)
    schedule: Literal["constant", "one-cycle"] = "constant"
    constant_share: float = Field(default=0.5, ge=0, le=1)
    warmup_steps: int = Field(default=20, ge=0)
    clip: float = Field(default=5.0, gt=0)

    seed: int = 0
    validation_share: float = Field(default=0.05, ge=0, lt=1)
    validation_windows: int = Field(default=256, ge=8)

    accelerator: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    devices: int = Field(default=1, ge=1)
    strategy: Literal["ddp", "fsdp"] = "ddp"
    precision: Literal["32-true", "bf16-mixed", "16-mixed"] = "32-true"
    threads: int = Field(default=0, ge=0)
    compile: bool = False
    accumulate: int = Field(default=1, ge=1)
    activation_checkpointing: bool = False
    timeout_minutes: float = Field(default=60.0, gt=0)

    log_every: int = Field(default=20, ge=1)
    checkpoint_every: int = Field(default=200, ge=1)
    validate_every: int = Field(default=200, ge=1)

    @field_validator("losses")
    @classmethod
    def _check_losses(cls, losses: dict[str, LossConfig]) -> dict[str, LossConfig]:
        wrong = [name for name in losses if not name or "." in name]
        if wrong:
            raise ValueError(f"loss names must not be empty or contain a dot; got {wrong}. Rename these losses")
        if not any(loss.weight > 0 for loss in losses.values()):
            raise ValueError("every loss has weight 0; set the weight of at least one loss above 0")
        return losses

    def learning_rate_at(self, step: int) -> float:
        """Return the learning rate of a step, counted from 0."""
        progress = min(step / self.steps, 1.0)
        if self.schedule == "one-cycle":
            rise = 0.1
            share = progress / rise if progress < rise else _cosine((progress - rise) / (1 - rise))
            return self.learning_rate * max(share, 1 / max(1, self.steps))
        warm = min(1.0, (step + 1) / (self.warmup_steps + 1))
        decay = (
            1.0
            if progress < self.constant_share
            else _cosine((progress - self.constant_share) / (1 - self.constant_share))
        )
        return self.learning_rate * warm * decay


def _cosine(progress: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * progress))
