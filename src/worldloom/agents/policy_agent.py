"""An agent that applies a policy without a search."""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from worldloom.agents.environment_batch import EnvironmentBatch
from worldloom.core.seams import Agent
from worldloom.core.types import Goal, Observations


class PolicyAgent(Agent):
    """Executes the actions that a policy returns, then calls the policy with a new observation.

    `encode` returns latents (B, D) of observations and goals. `policy` returns the next N environment actions (B, N, A)
    for latents and goal latents.
    """

    narrows = True

    def __init__(self, encode: Callable[[Observations], Tensor], policy: Callable[[Tensor, Tensor], Tensor]) -> None:
        self._encode, self._policy = encode, policy
        self._batch = EnvironmentBatch()
        self._goal = torch.empty(0, 0)
        self._coming: list[Tensor] = []

    def reset(self, goal: Goal) -> None:
        """Set a new goal for each environment."""
        self._batch.start(goal)
        self._coming = []
        with torch.inference_mode():
            self._goal = self._encode(goal.observations)

    def select(self, rows: Sequence[int]) -> None:
        """Keep only these environments, given by their places in the last batch, in this order."""
        places = self._batch.select(rows)
        self._goal, self._coming = self._goal[places], [actions[places] for actions in self._coming]

    def act(self, observations: Observations) -> Float[Tensor, "B A"]:
        """Return the next environment action.

        Raises:
            PlanningError: `reset` was not called, or the last `reset` had a different number of environments.
        """
        self._batch.check(observations)
        if not self._coming:
            with torch.inference_mode():
                self._coming = list(self._policy(self._encode(observations), self._goal).unbind(1))
        return self._coming.pop(0)
