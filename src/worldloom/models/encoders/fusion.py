"""An encoder of observations with both pixels and a vector."""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from worldloom.core.types import Observations, ObservationSpec
from worldloom.data import Statistics
from worldloom.models.encoders.encoder import ENCODERS, EncoderConfig, EncoderField
from worldloom.models.encoders.patch_conv import PatchConv
from worldloom.models.encoders.vector import VectorMLP


@ENCODERS.register("fusion")
class Fusion(EncoderConfig):
    """An encoder that runs one encoder on pixels and one on the vector, and projects their concatenated outputs."""

    name: Literal["fusion"] = "fusion"
    pixels: EncoderField = PatchConv()
    vector: EncoderField = VectorMLP()

    def build(self, observation: ObservationSpec, statistics: Statistics, latent_dim: int) -> nn.Module:
        """Build the module."""
        parts = [part.build(observation, statistics, latent_dim) for part in (self.pixels, self.vector)]
        return FusionEncoder(*parts, latent_dim=latent_dim)


class FusionEncoder(nn.Module):
    """The module that `Fusion` builds."""

    def __init__(self, pixels: nn.Module, vector: nn.Module, *, latent_dim: int) -> None:
        super().__init__()
        self.pixels, self.vector = pixels, vector
        self.project = nn.Linear(2 * latent_dim, latent_dim)

    def forward(self, observations: Observations) -> Float[Tensor, "R D"]:
        """Encode pixels and vectors."""
        both = torch.cat([self.pixels(observations), self.vector(observations)], dim=-1)
        latents: Tensor = self.project(torch.relu(both))
        return latents


def default_encoder(observation: ObservationSpec) -> EncoderConfig:
    """Return the default encoder for an observation; the defaults are fast on CPUs."""
    if observation.pixels is None:
        return VectorMLP()
    return Fusion() if observation.vector else PatchConv()
