"""Temporal similarity, which makes latents change slowly (Sobal et al., arXiv 2211.10831 and 2502.14819)."""

from typing import Literal

from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from worldloom.models.distributed import mean_over_ranks
from worldloom.models.losses.loss import LOSSES, Formula, LossInputs


@LOSSES.register("temporal-similarity")
class TemporalSimilarity(Formula):
    """The mean squared difference of consecutive latents. Without other losses, this loss favours static features."""

    name: Literal["temporal-similarity"] = "temporal-similarity"

    def compute(self, inputs: LossInputs) -> Float[Tensor, ""]:
        """Return the mean squared difference."""
        return mean_over_ranks(functional.mse_loss(inputs.latents[:, 1:], inputs.latents[:, :-1]))
