"""What a loss is, and the names that a configuration may use for one."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Annotated, Literal

from jaxtyping import Float
from pydantic import BeforeValidator, Field, SerializeAsAny
from torch import Tensor, nn

from worldloom.core.config import Component, component_of
from worldloom.core.registry import Registry


@dataclass(frozen=True, kw_only=True, eq=False)
class LossInputs:
    """What losses are computed from: B windows of N = K+T frames, of this rank.

    `predictions` are the open-loop ones of the last T frames and `targets` what they should be; `actions` are
    normalised blocks between frames. `step` seeds what a loss draws, so that all ranks draw the same.
    """

    latents: Float[Tensor, "B N D"]
    predictions: Float[Tensor, "B T D"]
    targets: Float[Tensor, "B T D"]
    actions: Float[Tensor, "B N-1 A"]
    step: int = 0


Samples = Literal["frame", "pooled", "centred"]


def draw_samples(latents: Float[Tensor, "B N D"], samples: Samples) -> Float[Tensor, "M G D"]:
    """Return what a statistic over a batch is taken of: M samples in each of G groups.

    "frame": the windows are samples, one group for each frame of them. "pooled": every frame of every window is a
    sample. "centred": pooled, less each window's mean, so that only what changes within a window counts; what is
    static cannot satisfy the statistic in place of what moves (the slow-feature trap).
    """
    if samples == "centred":
        latents = latents - latents.mean(dim=1, keepdim=True)
    return latents if samples == "frame" else latents.flatten(0, 1).unsqueeze(1)


class Loss(nn.Module, ABC):
    """A scalar of the whole batch over all ranks, see `worldloom.models.distributed`."""

    @abstractmethod
    def forward(self, inputs: LossInputs) -> Float[Tensor, ""]:
        """Return the loss, not weighted."""


class LossConfig(Component):
    """Builds a `Loss`; a weight of 0 leaves it out."""

    weight: float = Field(default=1.0, ge=0)

    @abstractmethod
    def build(self, *, latent_dim: int, block_size: int) -> Loss:
        """Build the module."""


class Formula(LossConfig):
    """A loss without parameters: its configuration computes it."""

    def build(self, *, latent_dim: int, block_size: int) -> Loss:
        """Build the module, whatever the sizes."""
        return FormulaLoss(self)

    @abstractmethod
    def compute(self, inputs: LossInputs) -> Float[Tensor, ""]:
        """Return the loss, not weighted; see `Loss`."""


class FormulaLoss(Loss):
    """The module of a `Formula`."""

    def __init__(self, formula: Formula) -> None:
        super().__init__()
        self.formula = formula

    def forward(self, inputs: LossInputs) -> Float[Tensor, ""]:
        """Return the loss, not weighted."""
        return self.formula.compute(inputs)


LOSSES: Registry[type[LossConfig]] = Registry("loss")

# The field type of a configuration that holds a loss: read by name, written whole.
LossField = Annotated[SerializeAsAny[LossConfig], BeforeValidator(component_of(LOSSES))]
