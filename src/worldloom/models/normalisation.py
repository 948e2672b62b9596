"""Normalisation of pixels, of vectors and actions, and of latents."""

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.nn import functional

from worldloom.models.distributed import mean_over_ranks, world_size

_CHUNK = 2**19  # pixels turned to floats at a time on a CPU, so that they stay in its cache
_COLOURED = 2.0  # grey levels (of 255) between the means or the deviations of two channels
_MOMENTUM, _EPSILON = 0.1, 1e-5  # of the batch norm of latents


class PixelNormalisation(nn.Module):
    """Normalises frames: (value - mean) / std for each pixel and channel, padded with zeros to multiples of `patch`.

    If a moving object of contrast c covers a pixel in a small share p of the frames, the pixel's std is about
    c sqrt(p). Division by the std gives the covered pixel a value of about 1 / sqrt(p): the rarer the visit, the larger
    the value. A small moving object then counts as much as large static walls. A pixel that the object never covers in
    the sample has std 0. Each std is therefore raised to at least half the median std of the varying pixels. The first
    visit to such a pixel then has at most twice the value of a visit to a typical pixel. The limit is at least one grey
    level (of 255), because smaller values are quantisation noise.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, mean: Float[Tensor, "H W C"], std: Float[Tensor, "H W C"], patch: int = 1) -> None:
        super().__init__()
        # On the meta device, where only the size of a model is computed, there are no values to compare.
        varying = std[:0] if std.is_meta else std[std > 1]
        floor = max(1.0, 0.5 * varying.median().item()) if len(varying) else 1.0
        scale = 1 / std.clamp_min(floor)
        height, width, _ = mean.shape
        # (left, right) of channels, width, height; with a scale and shift of 0, padded pixels become 0.
        self._padding = (0, 0, 0, -width % patch, 0, -height % patch)
        self.register_buffer("scale", functional.pad(scale, self._padding))
        self.register_buffer("shift", functional.pad(-mean * scale, self._padding))

    @property
    def size(self) -> tuple[int, int, int]:
        """The height, width and channels of the padded frames."""
        height, width, channels = self.scale.shape
        return height, width, channels

    @property
    def colours(self) -> bool:
        """Whether the channels of the training frames differ by more than the loss of a video, so they had colours."""
        std = 1 / self.scale[self.scale[..., 0] > 0]  # without the padding
        mean = -self.shift[self.scale[..., 0] > 0] * std
        return any(bool((each.amax(1) - each.amin(1) > _COLOURED).any()) for each in (mean, std))

    def forward(self, pixels: UInt8[Tensor, "R H W C"]) -> Float[Tensor, "R C Hp Wp"]:
        """Return normalised frames, with channels first in the shape and channels last in memory."""
        if any(self._padding):
            pixels = functional.pad(pixels, self._padding)
        if pixels.device.type == "cpu" and not torch.compiler.is_compiling():
            frames = torch.empty(pixels.shape, dtype=self.scale.dtype)
            rows = max(1, _CHUNK // self.scale.numel())
            for part, out in zip(pixels.split(rows), frames.split(rows), strict=True):
                torch.addcmul(self.shift, part.to(out.dtype), self.scale, out=out)
        else:
            frames = torch.addcmul(self.shift, pixels.to(self.scale.dtype), self.scale)
        return frames.permute(0, 3, 1, 2)


class Standardise(nn.Module):
    """Standardises values along the last axis: (x - mean) / std."""

    shift: Tensor
    scale: Tensor

    def __init__(self, mean: Float[Tensor, "V"], std: Float[Tensor, "V"]) -> None:
        super().__init__()
        self.register_buffer("shift", mean.clone())
        self.register_buffer("scale", 1 / std)

    def forward(self, values: Float[Tensor, "*axes V"]) -> Float[Tensor, "*axes V"]:
        """Standardise the values."""
        return (values - self.shift) * self.scale


class LatentNorm(nn.Module):
    """Batch norm without affine parameters, with statistics over all ranks in training and running ones otherwise."""

    running_mean: Tensor
    running_variance: Tensor

    def __init__(self, dimension: int) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(dimension))
        self.register_buffer("running_variance", torch.ones(dimension))

    def forward(self, values: Float[Tensor, "R D"]) -> Float[Tensor, "R D"]:
        """Normalise each dimension in single precision."""
        values = values.float()
        if world_size() == 1 or not self.training:
            return functional.batch_norm(
                values,
                self.running_mean,
                self.running_variance,
                training=self.training,
                momentum=_MOMENTUM,
                eps=_EPSILON,
            )
        mean = mean_over_ranks(values.mean(0))
        centred = values - mean
        variance = mean_over_ranks(centred.square().mean(0))
        with torch.no_grad():
            count = len(values) * world_size()
            self.running_mean.lerp_(mean, _MOMENTUM)
            self.running_variance.lerp_(variance * (count / (count - 1)), _MOMENTUM)
        return centred * torch.rsqrt(variance + _EPSILON)
