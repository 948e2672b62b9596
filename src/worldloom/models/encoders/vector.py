"""An encoder of vectors."""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from worldloom.core.config import Sizes
from worldloom.core.types import Observations, ObservationSpec
from worldloom.data import Statistics
from worldloom.models.encoders.encoder import ENCODERS, EncoderConfig, vector_statistics
from worldloom.models.normalisation import Standardise
from worldloom.models.perceptron import MLP, Activation, Norm


@ENCODERS.register("vector")
class VectorMLP(EncoderConfig):
    """A multilayer perceptron on the standardised vector."""

    sees = frozenset({"vector"})
    name: Literal["vector"] = "vector"
    hidden: Sizes = (256, 256)
    norm: Norm = "none"
    activation: Activation = "relu"

    def build(self, observation: ObservationSpec, statistics: Statistics, latent_dim: int) -> nn.Module:
        """Build the module."""
        mean, std = vector_statistics(self.name, observation, statistics)
        # An element that varies only by rounding keeps about its own scale instead of becoming amplified noise.
        constant = std <= 1e-4 * mean.abs() + 1e-6
        standardise = Standardise(mean, torch.where(constant, mean.abs().clamp_min(1), std))
        mlp = MLP((len(mean), *self.hidden, latent_dim), norm=self.norm, activation=self.activation)
        return VectorEncoder(standardise, mlp)


class VectorEncoder(nn.Module):
    """The module that `VectorMLP` builds."""

    def __init__(self, standardise: Standardise, mlp: MLP) -> None:
        super().__init__()
        self.standardise, self.mlp = standardise, mlp

    def forward(self, observations: Observations) -> Float[Tensor, "R D"]:
        """Encode vectors; pixels in the observations are ignored."""
        assert observations.vector is not None
        latents: Tensor = self.mlp(self.standardise(observations.vector.to(torch.float32)))
        return latents
