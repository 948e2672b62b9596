"""A residual perceptron on the last latents and action blocks."""

from typing import Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from worldloom.core.config import Sizes
from worldloom.models.perceptron import MLP, Activation, Norm
from worldloom.models.predictors.predictor import PREDICTORS, Predictor, PredictorConfig


@PREDICTORS.register("mlp")
class MLPPredictor(PredictorConfig):
    """A residual perceptron: z' = z + MLP([the last K latents, the K-1 blocks between them, the next block])."""

    name: Literal["mlp"] = "mlp"
    hidden: Sizes = Field(default=(256, 256), min_length=1)
    norm: Norm = "none"
    activation: Activation = "relu"

    def build(self, *, latent_dim: int, block_size: int, context: int) -> Predictor:
        """Build the module."""
        return ResidualMLP(latent_dim, block_size, context, self)


class ResidualMLP(Predictor):
    """The module that `MLPPredictor` builds."""

    def __init__(self, latent_dim: int, block_size: int, context: int, config: MLPPredictor) -> None:
        super().__init__()
        self.context = context
        inputs = context * (latent_dim + block_size)
        self.mlp = MLP((inputs, *config.hidden, latent_dim), config.norm, config.activation)

    def forward(
        self,
        latents: Float[Tensor, "B K D"],
        past: Float[Tensor, "B K-1 A"],
        actions: Float[Tensor, "B S T A"],
    ) -> Float[Tensor, "B S T D"]:
        """Predict step by step from a sliding history; see `Predictor`."""
        candidates = actions.shape[1]
        states, blocks = (
            [part.unsqueeze(1).expand(-1, candidates, -1) for part in known.unbind(1)] for known in (latents, past)
        )
        for block in actions.unbind(2):
            blocks.append(block)
            # Multiplying the shared parts only once, by their own columns, was not faster in measurements.
            history = torch.cat([*states[-self.context :], *blocks[-self.context :]], dim=-1)
            states.append(states[-1] + self.mlp(history))
        return torch.stack(states[latents.shape[1] :], dim=2)
