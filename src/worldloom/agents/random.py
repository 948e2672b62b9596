"""Acts at random: the floor of every comparison."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from worldloom.agents.environment_batch import EnvironmentBatch
from worldloom.core.actions import Walk, project
from worldloom.core.seams import Agent
from worldloom.core.seeds import torch_generator
from worldloom.core.types import ActionBounds, ActionSpec, Goal, ModelSpec, Observations, ObservationSpec

_STEPS = 64  # drawn at a time


class RandomAgent(Agent):
    """Uniform actions, or with a `walk` the persistent motion that data are collected with."""

    narrows = True

    def __init__(self, action: ActionSpec, *, walk: Walk | None = None, seed: int = 0) -> None:
        # One environment step makes a block; nothing is observed.
        self._spec = ModelSpec(observation=ObservationSpec(vector=1), action=action, block=1, context=1, latent_dim=1)
        self._bounds = ActionBounds.of(self._spec)
        self._walk, self._generator = walk, torch_generator(seed, "random-agent")
        self._batch = EnvironmentBatch()
        self._coming: list[Tensor] = []

    def reset(self, goal: Goal) -> None:
        """Start anew; the goal tells the number of environments only."""
        self._batch.start(goal)
        self._coming = []

    def select(self, rows: Sequence[int]) -> None:
        """Narrow to these environments, given by their places in the last batch, in this order."""
        places = self._batch.select(rows)
        self._coming = [actions[places] for actions in self._coming]

    def act(self, observations: Observations) -> Float[Tensor, "B A"]:
        """Return one action for each environment.

        Raises:
            PlanningError: before `reset`, or for another number of environments.
        """
        batch = self._batch.check(observations)
        if not self._coming:
            self._coming = list(self._draw(batch).unbind(1))
        return self._coming.pop(0)

    def _draw(self, batch: int) -> Float[Tensor, "B N A"]:
        if self._walk is not None:
            return self._walk.sample(self._spec, self._bounds, (batch, 1, _STEPS), self._generator)[:, 0]
        low, high = self._bounds.low, self._bounds.high
        share = torch.rand(batch, _STEPS, len(low), generator=self._generator)
        return project(low + share * (high - low), self._spec, self._bounds)
