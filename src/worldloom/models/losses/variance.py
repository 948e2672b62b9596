"""The variance term of VICReg (Bardes et al., arXiv 2105.04906, equation 1)."""

from typing import Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from worldloom.models.distributed import gather
from worldloom.models.losses.loss import LOSSES, Formula, LossInputs, Samples, draw_samples

_EPSILON = 1e-4


@LOSSES.register("variance")
class Variance(Formula):
    """A hinge loss on the std of each dimension over the batch: the mean of max(0, target - sqrt(var + epsilon)).

    For `samples` see `draw_samples`.
    """

    name: Literal["variance"] = "variance"
    target: float = Field(default=1.0, gt=0)
    samples: Samples = "frame"

    def compute(self, inputs: LossInputs) -> Float[Tensor, ""]:
        """Return the mean over dimensions and groups of samples."""
        std = torch.sqrt(gather(draw_samples(inputs.latents, self.samples)).var(dim=0) + _EPSILON)
        return torch.relu(self.target - std).mean()
