"""Random actions: the lower bound of every comparison."""

import torch
from jaxtyping import Float
from torch import Tensor

from worldloom.agents.policy_agent import PolicyAgent
from worldloom.core.actions import Walk, project
from worldloom.core.seeds import torch_generator
from worldloom.core.types import ActionBounds, ActionSpec, ModelSpec, ObservationSpec

_STEPS = 64  # steps sampled at a time


class RandomAgent(PolicyAgent):
    """Samples uniform actions or, with a `walk`, the persistent random motion of data collection."""

    def __init__(self, action: ActionSpec, *, walk: Walk | None = None, seed: int = 0) -> None:
        # A block is one environment step, and there are no observations.
        super().__init__(lambda observations: torch.empty(*observations.axes, 0), self._draw)
        self._spec = ModelSpec(observation=ObservationSpec(vector=1), action=action, block=1, context=1, latent_dim=1)
        self._bounds = ActionBounds.of(self._spec)
        self._walk, self._generator = walk, torch_generator(seed, "random-agent")

    def _draw(self, latents: Float[Tensor, "B _"], goal: Float[Tensor, "B _"]) -> Float[Tensor, "B N A"]:
        batch = len(latents)
        if self._walk is not None:
            return self._walk.sample(self._spec, self._bounds, (batch, 1, _STEPS), self._generator)[:, 0]
        low, high = self._bounds.low, self._bounds.high
        share = torch.rand(batch, _STEPS, len(low), generator=self._generator)
        return project(low + share * (high - low), self._spec, self._bounds)
