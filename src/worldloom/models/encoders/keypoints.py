"""An encoder that finds where things are: it pools features by attention, which keeps positions and angles.

The expected position under a softmax over the cells of a feature map is the spatial softmax of Levine et al.,
"End-to-End Training of Deep Visuomotor Policies" (JMLR 2016), and Finn et al. (arXiv 1509.06113).
"""

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
from worldloom.models.perceptron import MLP

_CELLS = 8  # along the shorter side of a frame, where the patch is not given
_SHARPNESS = 3.0  # of the softmax: untrained attention is then neither uniform nor on one cell


@ENCODERS.register("keypoints")
class Keypoints(EncoderConfig):
    """An encoder that describes a frame by `maps` keypoints: where each attends, and the features found there.

    Patches of `patch` pixels become `channels[0]` features, and 2x2 patches become one cell with `channels[1]`. A
    residual 3x3 convolution of `mixing` channels exchanges information between neighbouring cells. Without `patch`, the
    shorter side of a frame has about 8 cells. Each keypoint is the softmax of one map over the cells: its mean
    position (x, y), and the mean of `features` features under it. All pixels are normalised by the same mean and std of
    their channel, so that an object looks the same everywhere.
    """

    sees = frozenset({"pixels"})
    name: Literal["keypoints"] = "keypoints"
    patch: Size | None = None
    channels: tuple[Size, Size] = (24, 48)
    mixing: Size = 24
    maps: Size = 32
    features: int = Field(default=6, ge=0, le=65_536)
    hidden: Size = 256

    def build(self, observation: ObservationSpec, statistics: Statistics, latent_dim: int) -> nn.Module:
        """Build the module.

        Raises:
            ConfigError: see `EncoderConfig`; or a patch is larger than a frame.
        """
        mean, std = pixel_statistics(self.name, observation, statistics)
        side = min(mean.shape[:2])
        patch = self.patch or max(1, round(side / (2 * _CELLS)))
        if patch > side:
            raise ConfigError(
                f"'patch' of encoder {self.name!r} is {patch} pixels, but the frames have {mean.shape[0]}x"
                f"{mean.shape[1]}; choose at most {side}, or omit 'patch'"
            )
        # The mean and std of a channel over pixels and frames.
        centre = mean.mean(dim=(0, 1))
        spread = (std.square().mean(dim=(0, 1)) + mean.var(dim=(0, 1), correction=0)).sqrt()
        normalise = PixelNormalisation(centre.expand_as(mean), spread.expand_as(std), patch=2 * patch)
        return KeypointEncoder(normalise, patch, self, latent_dim)


class KeypointEncoder(nn.Module):
    """The module that `Keypoints` builds."""

    positions: Tensor

    def __init__(self, normalise: PixelNormalisation, patch: int, config: Keypoints, latent_dim: int) -> None:
        super().__init__()
        self.normalise = normalise
        height, width, inputs = normalise.size
        rows, columns = height // (2 * patch), width // (2 * patch)
        narrow, wide = config.channels
        self._maps = config.maps
        self.patches = nn.Conv2d(inputs, narrow, patch, stride=patch)
        self.merge = nn.Conv2d(narrow, wide, 2, stride=2)
        self.mix = nn.Conv2d(wide, config.mixing, 3, padding=1)
        for convolution in (self.patches, self.merge, self.mix):
            convolution.weight.data = convolution.weight.data.contiguous(memory_format=torch.channels_last)
        self.expand = nn.Identity() if config.mixing == wide else nn.Linear(config.mixing, wide)
        self.attend = nn.Linear(wide, config.maps + config.features)
        grid = torch.meshgrid(*(torch.linspace(-2, 2, count) for count in (rows, columns)), indexing="ij")
        places = torch.stack([grid[1], grid[0]], dim=-1).flatten(0, 1)  # (cells, 2), x first
        self.register_buffer("positions", places, persistent=False)
        keypoints = config.maps * (2 + config.features)
        self.linear = nn.Linear(keypoints, latent_dim)
        self.mlp = MLP((keypoints, config.hidden, latent_dim))

    def forward(self, observations: Observations) -> Float[Tensor, "R D"]:
        """Encode pixels; a vector in the observations is ignored."""
        found = self.keypoints(observations).flatten(1)
        latents: Tensor = self.linear(found) + self.mlp(found)
        return latents

    def keypoints(self, observations: Observations) -> Float[Tensor, "R M _"]:
        """Return the M keypoints: x and y within [-2, 2], from the upper left, and the features found there."""
        assert observations.pixels is not None
        cells = functional.relu(self.patches(self.normalise(observations.pixels)), inplace=True)
        cells = functional.relu(self.merge(cells), inplace=True)
        mixed = functional.relu(self.mix(cells), inplace=True)
        # Channels are last in memory, so these views are no copies.
        cells, mixed = (features.permute(0, 2, 3, 1).flatten(1, 2) for features in (cells, mixed))  # R cells C
        scores = self.attend(cells + self.expand(mixed))
        attention = torch.softmax(_SHARPNESS * scores[..., : self._maps].mT, dim=-1)  # R M cells
        values = torch.cat([self.positions.expand(len(scores), -1, -1), scores[..., self._maps :]], dim=-1)
        return attention @ values
