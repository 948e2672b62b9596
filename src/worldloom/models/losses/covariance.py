"""The covariance term of VICReg (Bardes et al., arXiv 2105.04906, equations 3 and 4)."""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from worldloom.models.distributed import gather
from worldloom.models.losses.loss import LOSSES, Loss, LossConfig, LossInputs, Samples, draw_samples


@LOSSES.register("covariance")
class Covariance(LossConfig):
    """The squared covariances between latent dimensions over the batch; `draw_samples` describes `samples`."""

    name: Literal["covariance"] = "covariance"
    samples: Samples = "frame"

    def build(self, *, latent_dim: int, block_size: int) -> Loss:
        """Build the module."""
        return CovarianceLoss(self.samples)


class CovarianceLoss(Loss):
    """The module that `Covariance` builds: the sum over pairs of different dimensions, divided by D."""

    def __init__(self, samples: Samples = "frame") -> None:
        super().__init__()
        self.samples = samples

    def forward(self, inputs: LossInputs) -> Float[Tensor, ""]:
        """Return the mean over the groups of samples."""
        latents = gather(draw_samples(inputs.latents, self.samples)).transpose(0, 1)  # G M D
        centred = latents - latents.mean(dim=1, keepdim=True)
        covariance = centred.mT @ centred / (latents.shape[1] - 1)
        squares = covariance.square()
        dimension = latents.shape[2]
        off_diagonal = squares.sum(dim=(1, 2)) - squares.diagonal(dim1=1, dim2=2).sum(dim=1)
        return torch.mean(off_diagonal) / dimension
