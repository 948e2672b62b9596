"""A vision transformer (Dosovitskiy et al., arXiv 2010.11929), for GPUs."""

import math
from typing import Literal

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor, nn

from worldloom.core.config import Depth, Size
from worldloom.core.types import Observations, ObservationSpec
from worldloom.data import Statistics
from worldloom.models.attention import Block
from worldloom.models.encoders.encoder import ENCODERS, EncoderConfig, pixel_statistics
from worldloom.models.normalisation import PixelNormalisation


@ENCODERS.register("vit")
class ViT(EncoderConfig):
    """A pre-norm transformer on patches, with mean pooling at the end."""

    sees = frozenset({"pixels"})
    name: Literal["vit"] = "vit"
    patch: Size = 8
    depth: Depth = 6
    width: int = Field(default=192, ge=4, le=65_536)
    heads: Size = 3
    positions: Literal["learned", "sincos"] = "learned"

    @model_validator(mode="after")
    def _check(self) -> "ViT":
        if self.width % self.heads or self.width % 4:
            raise ValueError(f"'width' must be a multiple of 'heads' ({self.heads}) and of 4; got {self.width}")
        return self

    def build(self, observation: ObservationSpec, statistics: Statistics, latent_dim: int) -> nn.Module:
        """Build the module."""
        normalise = PixelNormalisation(*pixel_statistics(self.name, observation, statistics), patch=self.patch)
        return ViTEncoder(normalise, self, latent_dim)


class ViTEncoder(nn.Module):
    """The module that `ViT` builds."""

    positions: Tensor

    def __init__(self, normalise: PixelNormalisation, config: ViT, latent_dim: int) -> None:
        super().__init__()
        self.normalise = normalise
        height, width, channels = normalise.size
        rows, columns = height // config.patch, width // config.patch
        self.embed = nn.Conv2d(channels, config.width, config.patch, stride=config.patch)
        if config.positions == "learned":
            self.positions = nn.Parameter(0.02 * torch.randn(rows * columns, config.width))
        else:
            self.register_buffer("positions", sincos_positions(rows, columns, config.width))
        self.blocks = nn.Sequential(*(Block(config.width, config.heads, causal=False) for _ in range(config.depth)))
        self.norm = nn.LayerNorm(config.width)
        self.out = nn.Linear(config.width, latent_dim)

    def forward(self, observations: Observations) -> Float[Tensor, "R D"]:
        """Encode pixels; a vector in the observations is ignored."""
        assert observations.pixels is not None
        tokens = self.embed(self.normalise(observations.pixels)).flatten(2).transpose(1, 2) + self.positions
        latents: Tensor = self.out(self.norm(self.blocks(tokens)).mean(1))
        return latents


def sincos_positions(rows: int, columns: int, width: int) -> Float[Tensor, "L W"]:
    """Return fixed position embeddings: the first half encodes the row by sines and cosines, the second the column.

    `width` must be a multiple of 4. Source: Vaswani et al. 2017, extended to two dimensions.
    """
    frequencies = torch.exp(-math.log(10000.0) * torch.arange(width // 4) / (width // 4))
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    angles = [axis.flatten()[:, None] * frequencies for axis in (row, column)]
    return torch.cat([function(angle) for angle in angles for function in (torch.sin, torch.cos)], dim=1)
