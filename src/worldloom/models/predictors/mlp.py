"""A residual perceptron over the last latents and blocks."""

from typing import Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from worldloom.models.heads import MLP, Activation, Norm, hidden_layer
from worldloom.models.predictors.base import PREDICTORS, Predictor, PredictorConfig


@PREDICTORS.register("mlp")
class MLPPredictor(PredictorConfig):
    """z' = z + MLP([the last K latents, the K-1 blocks between them, the next block])."""

    name: Literal["mlp"] = "mlp"
    hidden: tuple[int, ...] = Field(default=(256, 256), min_length=1)
    norm: Norm = "none"
    activation: Activation = "relu"

    def build(self, *, latent_dim: int, block_size: int, context: int) -> Predictor:
        """Build the module."""
        return ResidualMLP(latent_dim, block_size, context, self.hidden, self.norm, self.activation)


class ResidualMLP(Predictor):
    """The module of `MLPPredictor`.

    The first layer is kept in parts, one for each latent and block that it reads: what the candidates share is
    multiplied once and broadcast, and no input is concatenated.
    """

    def __init__(
        self,
        latent_dim: int,
        block_size: int,
        context: int,
        hidden: tuple[int, ...],
        norm: Norm,
        activation: Activation,
    ) -> None:
        super().__init__()
        # Slot k reads the latent (block) that lies context - k steps before the one predicted.
        self.from_latent = nn.ModuleList(nn.Linear(latent_dim, hidden[0], bias=False) for _ in range(context))
        self.from_action = nn.ModuleList(
            nn.Linear(block_size, hidden[0], bias=slot == context - 1) for slot in range(context)
        )
        self.rest = nn.Sequential(
            *hidden_layer(hidden[0], norm, activation), MLP((*hidden, latent_dim), norm, activation)
        )

    def forward(
        self,
        latents: Float[Tensor, "B K D"],
        past: Float[Tensor, "B K-1 A"],
        actions: Float[Tensor, "B S T A"],
    ) -> Float[Tensor, "B S T D"]:
        """Unroll; see `Predictor`."""
        context = len(self.from_latent)
        states = [latent.unsqueeze(1) for latent in latents.unbind(1)]  # (B, 1, D) known, (B, S, D) predicted
        blocks = [block.unsqueeze(1) for block in past.unbind(1)]
        for block in actions.unbind(2):
            blocks.append(block)
            hidden: Tensor = self.from_action[-1](block)
            for layer, state in zip(self.from_latent, states[-context:], strict=True):
                hidden = hidden + layer(state)
            for layer, earlier in zip(self.from_action, blocks[-context:-1], strict=False):
                hidden = hidden + layer(earlier)
            states.append(states[-1] + self.rest(hidden))
        return torch.stack(states[latents.shape[1] :], dim=2)
