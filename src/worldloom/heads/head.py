"""The base of all heads: their fit, and their files, which are tied to the weights of a world model."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import torch
from pydantic import Field
from torch import Tensor, nn

from worldloom.core.config import Config, Shape, check_shape
from worldloom.core.errors import CheckpointError, ConfigError, DataError, TrainingError
from worldloom.core.progress import Progress
from worldloom.core.seams import WorldModel
from worldloom.models import build_from, load_tensors, save_tensors

VERSION = 1  # version of the file format
_WEIGHT_DECAY = 1e-4
_CLIP = 5.0  # maximum norm of the gradient

ConfigT = TypeVar("ConfigT", bound=Config)
HeadT = TypeVar("HeadT", bound="Head[Any]")


class FitConfig(Config):
    """How a head is fitted: `steps` of AdamW, each on `batch` examples."""

    steps: int = Field(default=1000, ge=1)
    batch: int = Field(default=512, ge=1)
    learning_rate: float = Field(default=1e-3, gt=0)


class _HeadFile(Shape):
    version: int
    model: str
    config: dict[str, Any]
    figures: dict[str, Any]


class Head(nn.Module, Generic[ConfigT]):
    """A module fitted on a world model; a subclass defines its kind, configuration and tensors.

    The files of a head contain its kind, configuration and tensors, the version of the format, and the fingerprint of
    the world model.
    """

    kind: ClassVar[str]
    config_type: ClassVar[type[Config]]
    config: ConfigT

    @classmethod
    def build(cls: type[HeadT], model: WorldModel, config: Any, **figures: Any) -> HeadT:
        """Build an untrained head of this model; `figures` are the values that `figures()` returned before saving."""
        return cls(model.spec, config, **figures)

    def figures(self) -> dict[str, Any]:
        """Return the JSON values that the file contains besides the configuration and the tensors."""
        return {}

    def check(self) -> None:
        """Check that all tensors are finite, so that the head's outputs can be meaningful. Subclasses add checks.

        Raises:
            DataError: a value makes the outputs meaningless.
        """
        for name, tensor in self.state_dict().items():
            if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
                raise DataError(f"expected finite values in {name!r}; got NaN or infinity")
        for part in self.children():
            if isinstance(part, Head):
                part.check()

    def fit(self, loss: Callable[[int], Tensor], progress: Progress) -> float:
        """Minimise `loss(step)`, a scalar, by AdamW with a warm-up and a cosine schedule.

        Return the mean loss of the last tenth of the steps, and leave the head in evaluation mode.

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
        """Write `STEM.json` and the tensors, tied to `model`, and return the tensors' digest.

        Raises:
            StorageError: the disk is full or the files cannot be written.
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
        """Load a head that `save` wrote, onto the model's device and in evaluation mode.

        Raises:
            CheckpointError: the head is missing, damaged, of a different kind or version, contains values that are not
                finite, or belongs to another model.
        """
        device = model.device
        tensors, metadata = load_tensors(stem, kind=cls.kind, device=device)
        check_shape(metadata, _HeadFile, stem, CheckpointError)
        if metadata["version"] != VERSION:
            raise CheckpointError(
                f"{stem} has version {metadata['version']!r}; this version of worldloom reads {cls.kind} heads of "
                f"version {VERSION}. Fit the head again"
            )
        if metadata["model"] != model.spec.fingerprint:
            raise CheckpointError(
                f"{stem} was fitted on model {str(metadata['model'])[:12]!r}, but this model is "
                f"{model.spec.fingerprint[:12]!r}; fit the head again, or load the model that it was fitted on"
            )
        try:
            config = cls.config_type.parse(metadata["config"])
            head = build_from(tensors, lambda: cls.build(model, config, **metadata["figures"]), stem).to(device)
        except (ConfigError, DataError) as error:
            raise CheckpointError(f"{stem} does not match its configuration: {error}; fit the head again") from None
        try:
            head.check()
        except DataError as error:
            raise CheckpointError(f"{stem} cannot be used: {error}; fit the head again") from None
        return head.eval()
