"""A convolutional encoder that begins with non-overlapping patches: fast on CPUs."""

from itertools import pairwise
from typing import Annotated, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from worldloom.core.errors import ConfigError
from worldloom.core.types import Observations, ObservationSpec
from worldloom.data import Statistics
from worldloom.models.encoders.encoder import ENCODERS, EncoderConfig, pixel_statistics
from worldloom.models.normalisation import PixelNormalisation
from worldloom.models.stems import PixelStem

Size = Annotated[int, Field(ge=1)]


class _Convolutions(EncoderConfig):
    patch: Size = 8
    channels: tuple[Size, ...] = Field(default=(64, 64), min_length=1)
    kernel: Literal[2, 3] = 2
    hidden: Size = 256

    @property
    def stride(self) -> int:
        """Of all convolutions together, in pixels."""
        return self.patch << (len(self.channels) - 1)


@ENCODERS.register("patch-conv")
class PatchConv(_Convolutions):
    """Patch convolution, then convolutions with stride 2, then a hidden layer; ReLU between.

    `channels` gives the width of the patch convolution and of each one after it, whose kernel is `kernel`: 2
    merges neighbours without overlap, which is the faster and was measured to be the better.
    """

    name: Literal["patch-conv"] = "patch-conv"

    def build(self, observation: ObservationSpec, statistics: Statistics, latent_dim: int) -> nn.Module:
        """Build the module."""
        # Padded so that every stride comes out even.
        normalise = PixelNormalisation(*pixel_statistics(self.name, observation, statistics), patch=self.stride)
        return PatchConvEncoder(normalise, normalise.size, self, latent_dim)


@ENCODERS.register("stemmed-patch-conv")
class StemmedPatchConv(_Convolutions):
    """`PatchConv` behind a stem of its own, for owners whose cameras differ: all after it is of one size for each.

    The stem mixes the normalised channels, and scales frames to `size`: height, width and channels.
    """

    name: Literal["stemmed-patch-conv"] = "stemmed-patch-conv"
    size: tuple[Size, Size, Size] = (64, 64, 3)

    def build(self, observation: ObservationSpec, statistics: Statistics, latent_dim: int) -> nn.Module:
        """Build the module.

        Raises:
            ConfigError: see `EncoderConfig`; or the size does not come out even.
        """
        if any(side % self.stride for side in self.size[:2]):
            raise ConfigError(
                f"the size {self.size} must be multiples of {self.stride}, the stride of all convolutions together"
            )
        normalise = PixelNormalisation(*pixel_statistics(self.name, observation, statistics))
        stem = PixelStem(normalise.size[2], self.size)
        return PatchConvEncoder(normalise, self.size, self, latent_dim, stem=stem)


class PatchConvEncoder(nn.Module):
    """The module of `PatchConv` and, with a stem, of `StemmedPatchConv`; `size` is what the convolutions take."""

    def __init__(
        self,
        normalise: PixelNormalisation,
        size: tuple[int, int, int],
        config: _Convolutions,
        latent_dim: int,
        *,
        stem: PixelStem | None = None,
    ) -> None:
        super().__init__()
        self.normalise, self.stem = normalise, stem
        height, width, inputs = size
        patch, channels, kernel = config.patch, config.channels, config.kernel
        self._patch = patch
        convolutions = [nn.Conv2d(inputs, channels[0], patch, stride=patch)]
        for narrow, wide in pairwise(channels):
            convolutions.append(nn.Conv2d(narrow, wide, kernel, stride=2, padding=kernel // 3))
        shrink = config.stride
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
        for number, convolution in enumerate(self.convolutions):
            if self.stem is not None and number == 0:
                assert isinstance(convolution, nn.Conv2d)
                kernel = self.stem.fold(convolution.weight)
                features = functional.conv2d(self.stem(features), kernel, convolution.bias, stride=self._patch)
            else:
                features = convolution(features)
            features = functional.relu(features, inplace=True)
        # Channels last is how the features lie in memory, so that this flattening copies nothing.
        flat = features.permute(0, 2, 3, 1).flatten(1)
        latents: Tensor = self.out(functional.relu(self.hidden(flat), inplace=True))
        return latents
