"""The interface of losses, and the registry of their names."""

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
    """The inputs of losses: this rank's B windows of N = K+T frames (K of context, T predicted).

    `predictions` are open-loop predictions of the latents of the last T frames, `targets` the latents that they should
    equal, and `actions` the normalised blocks between frames. `step` seeds the random numbers of a loss, so that all
    ranks use the same ones.
    """

    latents: Float[Tensor, "B N D"]
    predictions: Float[Tensor, "B T D"]
    targets: Float[Tensor, "B T D"]
    actions: Float[Tensor, "B N-1 A"]
    step: int = 0


Samples = Literal["frame", "pooled", "centred"]


def draw_samples(latents: Float[Tensor, "B N D"], samples: Samples) -> Float[Tensor, "M G D"]:
    """Return the samples of a batch statistic: M samples in each of G groups.

    "frame": each window is a sample, with one group per frame position. "pooled": each frame of each window is a
    sample. "centred": pooled, minus each window's mean, so that only changes within a window count. Static features
    then cannot satisfy the statistic in place of moving ones (the slow-feature trap).
    """
    if samples == "centred":
        latents = latents - latents.mean(dim=1, keepdim=True)
    return latents if samples == "frame" else latents.flatten(0, 1).unsqueeze(1)


class Loss(nn.Module, ABC):
    """Base class of losses, which return one scalar for the batch of all ranks; see `worldloom.models.distributed`."""

    @abstractmethod
    def forward(self, inputs: LossInputs) -> Float[Tensor, ""]:
        """Return the loss without its weight."""


class LossConfig(Component):
    """The configuration of a `Loss`; a weight of 0 disables the loss."""

    weight: float = Field(default=1.0, ge=0)

    @abstractmethod
    def build(self, *, latent_dim: int, block_size: int) -> Loss:
        """Build the module."""


class Formula(LossConfig):
    """The configuration of a loss without parameters. The configuration itself computes the loss."""

    def build(self, *, latent_dim: int, block_size: int) -> Loss:
        """Build the module; the sizes are not used."""
        return FormulaLoss(self)

    @abstractmethod
    def compute(self, inputs: LossInputs) -> Float[Tensor, ""]:
        """Return the unweighted loss; see `Loss`."""


class FormulaLoss(Loss):
    """The `nn.Module` that evaluates a `Formula`."""

    def __init__(self, formula: Formula) -> None:
        super().__init__()
        self.formula = formula

    def forward(self, inputs: LossInputs) -> Float[Tensor, ""]:
        """Return the loss without its weight."""
        return self.formula.compute(inputs)


LOSSES: Registry[type[LossConfig]] = Registry("loss")

# The field type for a loss in a configuration: `name` selects the class, and all options are written.
LossField = Annotated[SerializeAsAny[LossConfig], BeforeValidator(component_of(LOSSES))]
