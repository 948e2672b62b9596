"""The variance term of VICReg (Bardes et al., arXiv 2105.04906, equation 1)."""

from typing import Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from worldloom.models.distributed import gather
from worldloom.models.losses.loss import LOSSES, Loss, LossConfig, LossInputs, Samples, draw_samples


@LOSSES.register("variance")
class Variance(LossConfig):
    """A hinge loss on the std of each latent dimension over the batch; `draw_samples` describes `samples`."""

    name: Literal["variance"] = "variance"
    target: float = Field(default=1.0, gt=0)
    samples: Samples = "frame"

    def build(self, *, latent_dim: int, block_size: int) -> Loss:
        """Build the module."""
        return VarianceLoss(self.target, self.samples)


class VarianceLoss(Loss):
    """The module that `Variance` builds: the mean of max(0, target - sqrt(var + epsilon)) over dimensions."""

    def __init__(self, target: float = 1.0, samples: Samples = "frame", *, epsilon: float = 1e-4) -> None:
        super().__init__()
        self.target, self.samples, self.epsilon = target, samples, epsilon

    def forward(self, inputs: LossInputs) -> Float[Tensor, ""]:
        """Return the mean hinge."""
        std = torch.sqrt(gather(draw_samples(inputs.latents, self.samples)).var(dim=0) + self.epsilon)
        return torch.relu(self.target - std).mean()
