"""What all heads share: how they are fitted, and their files, which are tied to the weights of a world model."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import torch
from pydantic import Field
from torch import Tensor, nn

from worldloom.core.config import Config
from worldloom.core.errors import CheckpointError, ConfigError, TrainingError
from worldloom.core.progress import Progress
from worldloom.core.seams import WorldModel
from worldloom.models import load_tensors, save_tensors

VERSION = 1  # of the file format
_WEIGHT_DECAY = 1e-4
_CLIP = 5.0  # of the gradient's norm

ConfigT = TypeVar("ConfigT", bound=Config)
HeadT = TypeVar("HeadT", bound="Head[Any]")


class FitConfig(Config):
    """How a head is fitted: `steps` of AdamW, each on `batch` examples."""

    steps: int = Field(default=1000, ge=1)
    batch: int = Field(default=512, ge=1)
    learning_rate: float = Field(default=1e-3, gt=0)


class Head(nn.Module, Generic[ConfigT]):
    """A module beside a world model: a subclass states its kind, its configuration and its tensors.

    The file of a head holds these, the version of the format and the fingerprint of the world model.
    """

    kind: ClassVar[str]
    config_type: ClassVar[type[Config]]
    config: ConfigT

    @classmethod
    def build(cls: type[HeadT], model: WorldModel, config: Any, **figures: Any) -> HeadT:
        """Build an untrained head of this model; `figures` are what `figures()` returned when it was saved."""
        return cls(model.spec, config, **figures)

    def figures(self) -> dict[str, Any]:
        """Return what the file holds beside the configuration and the tensors, as JSON values."""
        return {}

    def fit(self, loss: Callable[[int], Tensor], progress: Progress) -> float:
        """Minimise `loss(step)`, a scalar, by AdamW with a warm-up and a cosine schedule.

        Leaves the head in evaluation mode and returns the mean loss of the last tenth of the steps.

        Raises:
            TrainingError: the loss is not finite.
        """
        assert isinstance(self.config, FitConfig)
        steps, learning_rate, name = self.config.steps, self.config.learning_rate, self.kind.replace("-", " ")
        optimizer = torch.optim.AdamW(self.parameters(), lr=learning_rate, weight_decay=_WEIGHT_DECAY)
        warmup = max(1, min(100, steps // 20))
        tail: list[float] = []
        self.train()
        with progress.task(name, steps, "step") as task:
            for step in range(steps):
                rate = min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * step / steps))
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate * rate
                value = loss(step)
                figure = value.item()
                if not math.isfinite(figure):
                    raise TrainingError(
                        f"{name}: the loss is {figure} at step {step}; lower the learning rate ({learning_rate})"
                    )
                optimizer.zero_grad(set_to_none=True)
                value.backward()
                nn.utils.clip_grad_norm_(self.parameters(), _CLIP)
                optimizer.step()
                if step >= steps - max(1, steps // 10):
                    tail.append(figure)
                task.advance(1, loss=figure)
        self.eval()
        return sum(tail) / max(1, len(tail))

    def save(self, stem: Path | str, model: WorldModel) -> str:
        """Write `STEM.json` and its tensors beside the model that the head belongs to; return the tensors' digest.

        Raises:
            StorageError: the disk is full or refuses.
        """
        metadata = {
            "version": VERSION,
            "model": model.spec.fingerprint,
            "config": self.config.model_dump(mode="json"),
            "figures": self.figures(),
        }
        return save_tensors(stem, self.state_dict(), metadata, kind=self.kind)

    @classmethod
    def load(cls: type[HeadT], stem: Path | str, model: WorldModel) -> HeadT:
        """Read what `save` wrote, onto the model's device and in evaluation mode.

        Raises:
            CheckpointError: it is missing, damaged, of another kind or version, or belongs to another model.
        """
        device = model.device
        tensors, metadata = load_tensors(stem, kind=cls.kind, device=device)
        if metadata.get("version") != VERSION:
            raise CheckpointError(
                f"{stem} has version {metadata.get('version')!r}; this version of worldloom reads {cls.kind} heads of "
                f"version {VERSION}. Fit it again"
            )
        if metadata["model"] != model.spec.fingerprint:
            raise CheckpointError(
                f"{stem} was fitted for model {str(metadata['model'])[:12]!r} and the model is "
                f"{model.spec.fingerprint[:12]!r}; fit it again, or load the model that it belongs to"
            )
        try:
            config = cls.config_type.parse(metadata["config"])
            head = cls.build(model, config, **metadata["figures"]).to(device)
            head.load_state_dict(tensors)
        except (ConfigError, RuntimeError) as error:
            raise CheckpointError(f"{stem} does not fit its own configuration: {error}; fit it again") from None
        return head.eval()
