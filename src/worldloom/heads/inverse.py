"""Inverse dynamics on frozen latents: the block that leads from one latent to the next."""

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from worldloom.core.actions import Walk, project
from worldloom.core.config import Sizes
from worldloom.core.progress import SILENT, Progress
from worldloom.core.seams import WorldModel
from worldloom.core.seeds import seeded_weights, torch_generator
from worldloom.core.types import ActionBounds, ModelSpec
from worldloom.heads.head import FitConfig, Head
from worldloom.heads.latent_episodes import LatentEpisodes, dream
from worldloom.models import MLP


class InverseModelConfig(FitConfig):
    """The configuration of an `InverseModel` and its fit.

    `dreams` is the number of imagined walks per episode that are added to the training data.
    """

    hidden: Sizes = Field(default=(256, 256), min_length=1)
    steps: int = Field(default=800, ge=1)
    learning_rate: float = Field(default=2e-3, gt=0)
    dreams: int = Field(default=2, ge=0)
    dream_horizon: int = Field(default=12, ge=1)
    walk: Walk = Walk()


class InverseModel(Head[InverseModelConfig]):
    """Inverse dynamics: (z, z') -> the block between them, in environment units and within bounds."""

    kind = "inverse-dynamics"
    config_type = InverseModelConfig
    mean: Tensor
    std: Tensor

    def __init__(self, spec: ModelSpec, config: InverseModelConfig) -> None:
        super().__init__()
        self.spec, self.config = spec, config
        self.network = MLP((2 * spec.latent_dim, *config.hidden, spec.block_size))
        bounds = ActionBounds.of(spec)
        self.register_buffer("mean", (bounds.low + bounds.high) / 2)
        self.register_buffer("std", (bounds.high - bounds.low) / 2)
        self._bounds = bounds

    def forward(
        self, latents: Float[Tensor, "*axes D"], following: Float[Tensor, "*axes D"]
    ) -> Float[Tensor, "*axes A"]:
        """Return the block that leads from `latents` to `following`."""
        blocks = self.mean + self.std * self.normalised(latents, following)
        if self._bounds.low.device != blocks.device:
            self._bounds = ActionBounds.of(self.spec, blocks.device)
        return project(blocks, self.spec, self._bounds)

    def normalised(
        self, latents: Float[Tensor, "*axes D"], following: Float[Tensor, "*axes D"]
    ) -> Float[Tensor, "*axes A"]:
        """Return the block in the network's units, which are also the units of the loss; see `normalise`."""
        blocks: Tensor = self.network(torch.cat([latents, following - latents], dim=-1))
        return blocks

    def normalise(self, blocks: Float[Tensor, "*axes A"]) -> Float[Tensor, "*axes A"]:
        """Convert blocks from environment units to the network's units: (block - mean) / std of the data's blocks."""
        return (blocks - self.mean) / self.std


def fit_inverse_model(
    model: WorldModel,
    episodes: LatentEpisodes,
    config: InverseModelConfig,
    *,
    seed: int,
    progress: Progress = SILENT,
) -> InverseModel:
    """Fit an inverse model on the transitions of the episodes and of imagined walks from states of the episodes."""
    device = episodes.latents.device
    generator = torch_generator(seed, "inverse", device=device)
    parts = [episodes.transitions()]
    if config.dreams:
        count, horizon = config.dreams, config.dream_horizon
        dreams = dream(model, episodes, per_episode=count, horizon=horizon, walk=config.walk, generator=generator)
        parts.append(dreams.transitions())
    latents, blocks, following = (torch.cat(column) for column in zip(*parts, strict=True))
    with seeded_weights(seed, "inverse", "weights"):
        inverse = InverseModel(model.spec, config).to(device)
    inverse.mean.copy_(blocks.mean(0))
    # Do not amplify a dimension that hardly varies.
    inverse.std.copy_(torch.maximum(blocks.std(0), 0.02 * inverse.std))
    target = inverse.normalise(blocks)

    def loss(step: int) -> Tensor:
        rows = torch.randint(len(target), (config.batch,), generator=generator, device=device)
        return (inverse.normalised(latents[rows], following[rows]) - target[rows]).square().mean()

    inverse.fit(loss, progress)
    return inverse
