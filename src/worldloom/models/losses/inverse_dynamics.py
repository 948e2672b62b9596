"""Inverse dynamics: predicting the action between two latents, which keeps moving objects in the latents."""

from typing import Literal

from jaxtyping import Float
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from worldloom.models.distributed import mean_over_ranks
from worldloom.models.losses.loss import LOSSES, Loss, LossConfig, LossInputs
from worldloom.models.perceptron import MLP


@LOSSES.register("inverse-dynamics")
class InverseDynamics(LossConfig):
    """The error of a perceptron that predicts the last action block from `frames` consecutive latents.

    Two frames are enough if a single frame shows the state; use three if velocities matter.
    """

    name: Literal["inverse-dynamics"] = "inverse-dynamics"
    frames: int = Field(default=2, ge=2)
    hidden: tuple[int, ...] = (256,)

    def build(self, *, latent_dim: int, block_size: int) -> Loss:
        """Build the module."""
        return InverseDynamicsLoss(latent_dim, block_size, self.frames, self.hidden)


class InverseDynamicsLoss(Loss):
    """The module that `InverseDynamics` builds: the mean squared error, as a share of the action's variance."""

    def __init__(self, latent_dim: int, block_size: int, frames: int, hidden: tuple[int, ...]) -> None:
        super().__init__()
        self.frames = frames
        self.mlp = MLP((frames * latent_dim, *hidden, block_size))

    def forward(self, inputs: LossInputs) -> Float[Tensor, ""]:
        """Return the mean squared error."""
        pairs = inputs.latents.unfold(1, self.frames, 1).flatten(2)  # (B, N - frames + 1, D * frames)
        return mean_over_ranks(functional.mse_loss(self.mlp(pairs), inputs.actions[:, self.frames - 2 :]))
