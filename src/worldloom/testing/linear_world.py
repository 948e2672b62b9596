"""A world model whose rollout has a closed form."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from worldloom.core.types import ActionSpec, Context, ModelSpec, Observations, ObservationSpec


class LinearWorld:
    """The world z' = z + B a, fully observed: the latent is the observation vector.

    B is `gain` (D, A), the effect of one environment action; one model step adds B times the sum of the `block` actions
    in a block. With `context` > 1, the model accepts a history but ignores it. The bounds are the same for each action
    dimension.
    """

    def __init__(
        self,
        gain: Float[Tensor, "D A"] | Sequence[Sequence[float]] = ((1.0, 0.0), (0.0, 1.0)),
        *,
        block: int = 1,
        context: int = 1,
        low: float = -1.0,
        high: float = 1.0,
    ) -> None:
        self.gain = torch.as_tensor(gain, dtype=torch.float32)
        dimension, actions = self.gain.shape
        self.spec = ModelSpec(
            observation=ObservationSpec(vector=dimension),
            action=ActionSpec(low=(low,) * actions, high=(high,) * actions),
            block=block,
            context=context,
            latent_dim=dimension,
            fingerprint="linear-world",
        )

    @property
    def device(self) -> torch.device:
        """The device of the gain."""
        return self.gain.device

    def encode(self, observations: Observations) -> Float[Tensor, "*axes D"]:
        """Return the observation vector."""
        assert observations.vector is not None
        return observations.vector

    def rollout(self, context: Context, actions: Float[Tensor, "B S T A"]) -> Float[Tensor, "B S T D"]:
        """Return z + gain (a_1 + ... + a_t) for each t; z is the last latent of the context, a_i the sum of block i."""
        moves: Tensor = actions.unflatten(-1, (self.spec.block, -1)).sum(-2) @ self.gain.T
        return context.latents[:, -1, None, None] + moves.cumsum(2)
