"""A convolutional encoder that begins with non-overlapping patches: fast on CPUs."""

from itertools import pairwise
from typing import Annotated, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from worldloom.core.types import Observations, ObservationSpec
from worldloom.data.statistics import Statistics
from worldloom.models.encoders.base import ENCODERS, EncoderConfig, pixel_statistics
from worldloom.models.normalisation import PixelNormalisation

Size = Annotated[int, Field(ge=1)]


@ENCODERS.register("patch-conv")
class PatchConv(EncoderConfig):
    """Patch convolution, then 3x3 convolutions with stride 2, then a hidden layer; ReLU between.

    `channels` gives the width of the patch convolution and of each one after it.
    """

    name: Literal["patch-conv"] = "patch-conv"
    patch: Size = 8
    channels: tuple[Size, ...] = Field(default=(64, 64), min_length=1)
    hidden: Size = 256

    def build(self, observation: ObservationSpec, statistics: Statistics, latent_dim: int) -> nn.Module:
        """Build the module."""
        normalise = PixelNormalisation(*pixel_statistics(self.name, observation, statistics), patch=self.patch)
        return PatchConvEncoder(normalise, self.patch, self.channels, self.hidden, latent_dim)


class PatchConvEncoder(nn.Module):
    """The module of `PatchConv`."""

    def __init__(
        self, normalise: PixelNormalisation, patch: int, channels: tuple[int, ...], hidden: int, latent_dim: int
    ) -> None:
        super().__init__()
        self.normalise = normalise
        height, width, inputs = normalise.size
        rows, columns = height // patch, width // patch
        convolutions = [nn.Conv2d(inputs, channels[0], patch, stride=patch)]
        for narrow, wide in pairwise(channels):
            convolutions.append(nn.Conv2d(narrow, wide, 3, stride=2, padding=1))
            rows, columns = (rows + 1) // 2, (columns + 1) // 2
        # Features lie channels last, as the frames do; weights that lie likewise are not reordered at each call.
        self.convolutions = nn.ModuleList(convolutions)
        for convolution in convolutions:
            convolution.weight.data = convolution.weight.data.contiguous(memory_format=torch.channels_last)
        self.hidden = nn.Linear(rows * columns * channels[-1], hidden)
        self.out = nn.Linear(hidden, latent_dim)

    def forward(self, observations: Observations) -> Float[Tensor, "R D"]:
        """Encode frames; any vector beside them is not read."""
        assert observations.pixels is not None
        features = self.normalise(observations.pixels)
        for convolution in self.convolutions:
            features = functional.relu(convolution(features), inplace=True)
        # Channels last is how the features lie in memory, so that this flattening copies nothing.
        flat = features.permute(0, 2, 3, 1).flatten(1)
        latents: Tensor = self.out(functional.relu(self.hidden(flat), inplace=True))
        return latents
