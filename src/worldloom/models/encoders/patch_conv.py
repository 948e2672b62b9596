"""A convolutional encoder whose first layer has non-overlapping patches, which is fast on CPUs."""

from itertools import pairwise
from typing import Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from worldloom.core.config import Size
from worldloom.core.errors import ConfigError
from worldloom.core.types import Observations, ObservationSpec
from worldloom.data import Statistics
from worldloom.models.encoders.encoder import ENCODERS, EncoderConfig, pixel_statistics
from worldloom.models.normalisation import PixelNormalisation
from worldloom.models.stems import PixelStem


class _Convolutions(EncoderConfig):
    sees = frozenset({"pixels"})
    patch: Size = 8
    channels: tuple[Size, ...] = Field(default=(64, 64), min_length=1, max_length=16)
    kernel: Literal[2, 3] = 2
    hidden: Size = 256

    @property
    def stride(self) -> int:
        """The total stride of all convolutions in pixels."""
        return self.patch << (len(self.channels) - 1)


@ENCODERS.register("patch-conv")
class PatchConv(_Convolutions):
    """A patch convolution, convolutions with stride 2, and a hidden layer, with ReLU activations between them.

    `channels` are the widths of the patch convolution and of each later convolution. `kernel` is the kernel size of the
    later convolutions. Kernels of size 2 do not overlap; they were faster and more accurate in our measurements.
    """

    name: Literal["patch-conv"] = "patch-conv"

    def build(self, observation: ObservationSpec, statistics: Statistics, latent_dim: int) -> nn.Module:
        """Build the module."""
        # Padded to a multiple of the total stride.
        normalise = PixelNormalisation(*pixel_statistics(self.name, observation, statistics), patch=self.stride)
        return PatchConvEncoder(normalise, normalise.size, self, latent_dim)


@ENCODERS.register("stemmed-patch-conv")
class StemmedPatchConv(_Convolutions):
    """`PatchConv` after a stem, a small linear map for one owner's camera. Owners can share all other layers.

    The stem mixes the normalised channels and scales frames to `size` (height, width, channels); see models/stems.py.
    """

    name: Literal["stemmed-patch-conv"] = "stemmed-patch-conv"
    size: tuple[Size, Size, Size] = (64, 64, 3)

    def build(self, observation: ObservationSpec, statistics: Statistics, latent_dim: int) -> nn.Module:
        """Build the module.

        Raises:
            ConfigError: see `EncoderConfig`; or `size` is not a multiple of the total stride.
        """
        if any(side % self.stride for side in self.size[:2]):
            raise ConfigError(
                f"'size' must have a height and width that are multiples of {self.stride}, the total stride of the "
                f"convolutions; got {self.size}. Change 'size', 'patch' or the number of 'channels'"
            )
        normalise = PixelNormalisation(*pixel_statistics(self.name, observation, statistics))
        stem = PixelStem(normalise.size[2], self.size)
        return PatchConvEncoder(normalise, self.size, self, latent_dim, stem=stem)


class PatchConvEncoder(nn.Module):
    """The module that `PatchConv` builds without a stem and `StemmedPatchConv` with a stem.

    `size` is the (height, width, channels) input shape of the convolutions.
    """

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
        """Encode pixels; a vector in the observations is ignored."""
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
        # The features are stored channels last, so this flattening does not copy them.
        flat = features.permute(0, 2, 3, 1).flatten(1)
        latents: Tensor = self.out(functional.relu(self.hidden(flat), inplace=True))
        return latents
