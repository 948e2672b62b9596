"""What a plan is to achieve, as costs over predicted futures."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from worldloom.core.errors import PlanningError
from worldloom.core.protocols import Objective
from worldloom.core.types import Rollouts


@runtime_checkable
class Metric(Protocol):
    """How far latents are from goals, broadcast against each other; 0 at the goal."""

    def __call__(self, latents: Float[Tensor, "*#axes D"], goal: Float[Tensor, "*#axes D"]) -> Float[Tensor, "..."]:
        """Return one distance for each latent."""
        ...


@runtime_checkable
class Selectable(Protocol):
    """An objective that can be narrowed to some environments of its batch."""

    def __call__(self, rollouts: Rollouts) -> Float[Tensor, "B S"]:
        """Return one cost for each candidate."""
        ...

    def select(self, environments: Tensor | slice) -> Objective:
        """Return the objective of these environments."""
        ...


@dataclass(frozen=True)
class LatentL2:
    """Euclidean distance of latents, in units of `step_length`: the typical length of one model step.

    Not squared, so that it pulls as hard from afar as from near. Misleads where a wall lies between.
    """

    step_length: float = 1.0

    def __call__(self, latents: Float[Tensor, "*#axes D"], goal: Float[Tensor, "*#axes D"]) -> Float[Tensor, "..."]:
        """Return the distance."""
        distance: Tensor = (latents - goal).norm(dim=-1) / self.step_length
        return distance


class GoalObjective:
    """Reach a goal latent: the mean distance along the plan plus `last_weight` times the last one.

    The mean settles what the last alone leaves open, so that the agent does not dither before a door.
    """

    def __init__(self, metric: Metric, goal: Float[Tensor, "B D"], *, last_weight: float = 1.0) -> None:
        self.metric, self.goal, self.last_weight = metric, goal, last_weight

    def __call__(self, rollouts: Rollouts) -> Float[Tensor, "B S"]:
        """Return the cost of each candidate."""
        distances = self.metric(rollouts.latents, self.goal[:, None, None])
        return distances.mean(-1) + self.last_weight * distances[..., -1]

    def select(self, environments: Tensor | slice) -> "GoalObjective":
        """Return the objective of some environments."""
        return GoalObjective(self.metric, self.goal[environments], last_weight=self.last_weight)


class WeightedSum:
    """Several objectives at once, each with its weight; its goal is that of the first part that has one.

    Raises:
        PlanningError: there is no part.
    """

    def __init__(self, parts: Sequence[tuple[float, Objective]]) -> None:
        if not parts:
            raise PlanningError("a weighted sum needs at least one objective; got none")
        self.parts = tuple(parts)

    @property
    def goal(self) -> Float[Tensor, "B D"] | None:
        """The goal latents, if any part has them."""
        goals = (goal_of(objective) for _, objective in self.parts)
        return next((goal for goal in goals if goal is not None), None)

    def __call__(self, rollouts: Rollouts) -> Float[Tensor, "B S"]:
        """Return the cost of each candidate."""
        costs = [weight * objective(rollouts) for weight, objective in self.parts]
        return torch.stack(costs).sum(0)

    def select(self, environments: Tensor | slice) -> "WeightedSum":
        """Return the objective of some environments; a part without `select` is kept as it is."""
        return WeightedSum(
            [
                (weight, part.select(environments) if isinstance(part, Selectable) else part)
                for weight, part in self.parts
            ]
        )


def goal_of(objective: Objective) -> Float[Tensor, "B D"] | None:
    """Return the goal latents that an objective holds, or None."""
    goal = getattr(objective, "goal", None)
    return goal if isinstance(goal, Tensor) else None
