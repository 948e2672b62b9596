"""Temporal straightening of latent paths, based on Hénaff et al. 2019."""

from typing import Literal

from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from worldloom.models.distributed import mean_over_ranks
from worldloom.models.losses.loss import LOSSES, Formula, LossInputs


@LOSSES.register("straightening")
class Straightening(Formula):
    """The mean of 1 - cosine between consecutive latent velocities; needs windows of at least three frames."""

    name: Literal["straightening"] = "straightening"

    def compute(self, inputs: LossInputs) -> Float[Tensor, ""]:
        """Return the mean curvature, from 0 (straight) to 2 (back and forth)."""
        velocity = inputs.latents.diff(dim=1)
        return mean_over_ranks(
            1 - functional.cosine_similarity(velocity[:, 1:], velocity[:, :-1], dim=-1, eps=1e-6).mean()
        )
