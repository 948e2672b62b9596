"""Stems: small linear maps from one owner's sensors and actions to the inputs of a shared model.

Owners with different cameras or action conventions can then share the rest of the model. Stems start as the identity,
as far as the sizes allow. Their weights are stored divided by `_SPEED`, so that a step of Adam changes the map `_SPEED`
times as much. Adam changes each stored weight by about the learning rate per step. This is enough for one of thousands
of weights, but too slow for a map that may have to rotate by 180 degrees.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

_SPEED = 20.0


class PixelStem(nn.Module):
    """Scales frames to the input size of a shared encoder, and mixes their channels.

    The mixing is folded into the following convolution. A separate layer would need the gradient of complete frames and
    make training several times slower.
    """

    def __init__(self, channels: int, size: tuple[int, int, int]) -> None:
        super().__init__()
        height, width, shared = size
        self._size = (height, width)
        self.mix = nn.Conv2d(
            channels, shared, 1, bias=False
        )  # no bias: the input has mean 0, and the next layer has a bias
        with torch.no_grad():
            self.mix.weight.copy_(torch.eye(shared, channels)[:, :, None, None] / _SPEED)

    def forward(self, frames: Float[Tensor, "R C H W"]) -> Float[Tensor, "R C P Q"]:
        """Return frames of the shared size with unmixed channels; `fold` does the mixing."""
        if tuple(frames.shape[-2:]) == self._size:
            return frames
        return functional.interpolate(frames, self._size, mode="bilinear", align_corners=False, antialias=True)

    def fold(self, kernel: Float[Tensor, "O S K L"]) -> Float[Tensor, "O C K L"]:
        """Return the kernel for unmixed channels that is equivalent to `kernel` for mixed channels."""
        folded = torch.einsum("oskl,sc->ockl", kernel, _SPEED * self.mix.weight[:, :, 0, 0])
        return folded.contiguous(memory_format=torch.channels_last)


class ActionStem(nn.Module):
    """Maps each action of a block, with the same linear map, to the action size of a shared predictor."""

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
