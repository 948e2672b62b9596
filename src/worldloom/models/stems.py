"""Stems: small linear maps between one owner's sensors and motors and the inputs of a shared model.

Owners whose cameras or action conventions differ can then share all that comes after. Both begin as the identity, as
far as sizes let. Their weights are kept divided by `_SPEED`: Adam moves each number by about the learning rate a step,
which is much for one of thousands of weights and little for a map that has to turn half way round.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

_SPEED = 20.0


class PixelStem(nn.Module):
    """Scales frames to the size that a shared encoder takes, and mixes their channels.

    The mixing is folded into the convolution that follows: by itself it would need the gradient of whole frames, which
    makes training several times as slow.
    """

    def __init__(self, channels: int, size: tuple[int, int, int]) -> None:
        super().__init__()
        height, width, shared = size
        self._size = (height, width)
        self.mix = nn.Conv2d(channels, shared, 1, bias=False)  # what comes in has mean 0, and what comes after a bias
        with torch.no_grad():
            self.mix.weight.copy_(torch.eye(shared, channels)[:, :, None, None] / _SPEED)

    def forward(self, frames: Float[Tensor, "R C H W"]) -> Float[Tensor, "R C P Q"]:
        """Return frames of the shared size, their channels not mixed yet; see `fold`."""
        if tuple(frames.shape[-2:]) == self._size:
            return frames
        return functional.interpolate(frames, self._size, mode="bilinear", align_corners=False, antialias=True)

    def fold(self, kernel: Float[Tensor, "O S K L"]) -> Float[Tensor, "O C K L"]:
        """Return a kernel that does to unmixed channels what the given one does to mixed ones."""
        folded = torch.einsum("oskl,sc->ockl", kernel, _SPEED * self.mix.weight[:, :, 0, 0])
        return folded.contiguous(memory_format=torch.channels_last)


class ActionStem(nn.Module):
    """Maps each action of a block alike, to actions of the size that a shared predictor takes."""

    def __init__(self, actions: int, shared: int) -> None:
        super().__init__()
        self._actions = actions
        self.mix = nn.Linear(actions, shared, bias=False)
        with torch.no_grad():
            self.mix.weight.copy_(torch.eye(shared, actions) / _SPEED)

    def forward(self, blocks: Float[Tensor, "*axes A"]) -> Float[Tensor, "*axes M"]:
        """Return blocks of shared actions."""
        single = blocks.unflatten(-1, (-1, self._actions))
        return torch.einsum("...i,ji->...j", single, _SPEED * self.mix.weight).flatten(-2)
