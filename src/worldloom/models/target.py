"""Targets from a slowly following copy of the encoder, a part of training only."""

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
    """Exponential moving average of the encoder's weights: `decay` is what it keeps in one step."""

    decay: float = Field(default=0.99, ge=0, lt=1)


class TargetEncoder(nn.Module):
    """The averaged encoder and its output norm (BYOL, arXiv 2006.07733); its latents carry no gradient."""

    def __init__(self, model: JEPA, config: TargetConfig) -> None:
        super().__init__()
        self.decay = config.decay
        self.encoder = copy.deepcopy(nn.Sequential(model.encoder, model.norm)).requires_grad_(False)

    @torch.no_grad()
    def forward(self, observations: Observations) -> Float[Tensor, "*axes D"]:
        """Encode, with the batch's statistics in training as the online encoder does."""
        latents: Tensor = self.encoder(observations.map(lambda part: part.flatten(0, len(observations.axes) - 1)))
        return latents.view(*observations.axes, -1)

    @torch.no_grad()
    def follow(self, model: JEPA) -> None:
        """Move the weights toward the model's by 1 - decay; buffers are its own."""
        online = nn.Sequential(model.encoder, model.norm)
        targets, sources = ([shard(each) for each in part.parameters()] for part in (self.encoder, online))
        torch._foreach_lerp_(targets, sources, 1 - self.decay)
