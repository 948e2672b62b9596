"""A small causal transformer on the last latents, for GPUs and long contexts."""

from typing import Literal

import torch
from jaxtyping import Float
from pydantic import model_validator
from torch import Tensor, nn

from worldloom.core.config import Depth, Size
from worldloom.models.attention import Block
from worldloom.models.predictors.predictor import PREDICTORS, Predictor, PredictorConfig


@PREDICTORS.register("transformer")
class TransformerPredictor(PredictorConfig):
    """A causal transformer. Each token is a latent with the block after it; the last output is z' - z."""

    name: Literal["transformer"] = "transformer"
    depth: Depth = 2
    width: Size = 128
    heads: Size = 4

    @model_validator(mode="after")
    def _check(self) -> "TransformerPredictor":
        if self.width % self.heads:
            raise ValueError(f"'width' must be a multiple of 'heads' ({self.heads}); got {self.width}")
        return self

    def build(self, *, latent_dim: int, block_size: int, context: int) -> Predictor:
        """Build the module."""
        return CausalTransformer(latent_dim, block_size, context, self)


class CausalTransformer(Predictor):
    """Predicts the next latent from the latents and actions so far, by attention to earlier steps only."""

    def __init__(self, latent_dim: int, block_size: int, context: int, config: TransformerPredictor) -> None:
        super().__init__()
        self.from_latent = nn.Linear(latent_dim, config.width)
        self.from_action = nn.Linear(block_size, config.width)
        self.positions = nn.Parameter(0.02 * torch.randn(context, config.width))
        self.blocks = nn.Sequential(*(Block(config.width, config.heads, causal=True) for _ in range(config.depth)))
        self.norm = nn.LayerNorm(config.width)
        self.out = nn.Linear(config.width, latent_dim)

    def forward(
        self,
        latents: Float[Tensor, "B K D"],
        past: Float[Tensor, "B K-1 A"],
        actions: Float[Tensor, "B S T A"],
    ) -> Float[Tensor, "B S T D"]:
        """Predict step by step from a sliding history; see `Predictor`."""
        batch, candidates, steps, _ = actions.shape
        context = latents.shape[1]
        shared = latents.unsqueeze(1).expand(-1, candidates, -1, -1)
        states = [state.flatten(0, 1) for state in shared.unbind(2)]
        embedded = self.from_action(torch.cat([past.unsqueeze(1).expand(-1, candidates, -1, -1), actions], dim=2))
        for step in range(steps):
            history = torch.stack(states[-context:], dim=1)  # (B S) K D
            window = embedded[:, :, step : step + context].flatten(0, 1)
            tokens = self.blocks(self.from_latent(history) + window + self.positions)
            states.append(states[-1] + self.out(self.norm(tokens[:, -1])))
        predicted: Tensor = torch.stack(states[context:], dim=1)
        return predicted.view(batch, candidates, steps, -1)
