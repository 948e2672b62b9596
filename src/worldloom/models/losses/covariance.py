"""The covariance term of VICReg (Bardes et al., arXiv 2105.04906, equations 3 and 4)."""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from worldloom.models.distributed import gather
from worldloom.models.losses.loss import LOSSES, Formula, LossInputs, Samples, draw_samples


@LOSSES.register("covariance")
class Covariance(Formula):
    """Squared covariances over the batch: the sum over pairs of different dimensions, divided by D.

    For `samples` see `draw_samples`.
    """

    name: Literal["covariance"] = "covariance"
    samples: Samples = "frame"

    def compute(self, inputs: LossInputs) -> Float[Tensor, ""]:
        """Return the mean of the term over the groups of samples."""
        latents = gather(draw_samples(inputs.latents, self.samples)).transpose(0, 1)  # G M D
        centred = latents - latents.mean(dim=1, keepdim=True)
        covariance = centred.mT @ centred / (latents.shape[1] - 1)
        squares = covariance.square()
        dimension = latents.shape[2]
        off_diagonal = squares.sum(dim=(1, 2)) - squares.diagonal(dim1=1, dim2=2).sum(dim=1)
        return torch.mean(off_diagonal) / dimension
