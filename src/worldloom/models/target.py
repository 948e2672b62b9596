"""The target encoder, a moving average of the encoder that is used only in training."""

import copy

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from worldloom.core.config import Config
from worldloom.core.types import Observations
from worldloom.models.distributed import shard
from worldloom.models.jepa import JEPA


class TargetConfig(Config):
    """The configuration of the target encoder; each step sets its weights to decay * old + (1 - decay) * online."""

    decay: float = Field(default=0.99, ge=0, lt=1)


class TargetEncoder(nn.Module):
    """The exponential moving average of the encoder and its output norm (BYOL, arXiv 2006.07733), without gradients."""

    def __init__(self, model: JEPA, config: TargetConfig) -> None:
        super().__init__()
        self.decay = config.decay
        self.encoder = copy.deepcopy(nn.Sequential(model.encoder, model.norm)).requires_grad_(False)

    @torch.no_grad()
    def forward(self, observations: Observations) -> Float[Tensor, "*axes D"]:
        """Encode observations; in training, normalise by the batch's statistics like the online encoder."""
        latents: Tensor = self.encoder(observations.map(lambda part: part.flatten(0, len(observations.axes) - 1)))
        return latents.view(*observations.axes, -1)

    @torch.no_grad()
    def follow(self, model: JEPA) -> None:
        """Move the weights toward the model's weights by the fraction 1 - decay; buffers do not change."""
        online = nn.Sequential(model.encoder, model.norm)
        targets, sources = ([shard(each) for each in part.parameters()] for part in (self.encoder, online))
        torch._foreach_lerp_(targets, sources, 1 - self.decay)
