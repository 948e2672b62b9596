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
    """Patch convolution, then convolutions with stride 2, then a hidden layer; ReLU between.

    `channels` gives the width of the patch convolution and of each one after it, whose kernel is `kernel`: 2
    merges neighbours without overlap, which is the faster and was measured to be the better.
    """

    name: Literal["patch-conv"] = "patch-conv"
    patch: Size = 8
    channels: tuple[Size, ...] = Field(default=(64, 64), min_length=1)
    kernel: Literal[2, 3] = 2
    hidden: Size = 256

    def build(self, observation: ObservationSpec, statistics: Statistics, latent_dim: int) -> nn.Module:
        """Build the module."""
        # Padded so that every stride comes out even.
        multiple = self.patch * 2 ** (len(self.channels) - 1)
        normalise = PixelNormalisation(*pixel_statistics(self.name, observation, statistics), patch=multiple)
        return PatchConvEncoder(normalise, self, latent_dim)


class PatchConvEncoder(nn.Module):
    """The module of `PatchConv`."""

    def __init__(self, normalise: PixelNormalisation, config: PatchConv, latent_dim: int) -> None:
        super().__init__()
        self.normalise = normalise
        height, width, inputs = normalise.size
        patch, channels, kernel = config.patch, config.channels, config.kernel
        convolutions = [nn.Conv2d(inputs, channels[0], patch, stride=patch)]
        for narrow, wide in pairwise(channels):
            convolutions.append(nn.Conv2d(narrow, wide, kernel, stride=2, padding=kernel // 3))
        shrink = patch * 2 ** (len(channels) - 1)
        positions = (height // shrink) * (width // shrink)
        self.convolutions = nn.ModuleList(convolutions)
        for convolution in convolutions:
            convolution.weight.data = convolution.weight.data.contiguous(memory_format=torch.channels_last)
        self.hidden = nn.Linear(positions * channels[-1], config.hidden)
        self.out = nn.Linear(config.hidden, latent_dim)

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
