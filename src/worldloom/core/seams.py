"""The seams: what a room asks of another. Conformance kits are in `worldloom.testing`."""

from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Float32, Int
from torch import Tensor

from worldloom.core.types import Context, Goal, ModelSpec, Observations, Rollouts


@runtime_checkable
class WorldModel(Protocol):
    """Predicts the consequences of actions in representation space."""

    @property
    def spec(self) -> ModelSpec:
        """What the model takes and gives."""
        ...

    def encode(self, observations: Observations) -> Float[Tensor, "*axes D"]:
        """Encode each observation alone; the result does not depend on what else is in the batch."""
        ...

    def rollout(self, context: Context, actions: Float[Tensor, "B S T A"]) -> Float[Tensor, "B S T D"]:
        """Predict T frames after the context, open loop, for S candidates; the future only."""
        ...


@runtime_checkable
class Objective(Protocol):
    """A cost over predicted futures; lower is better."""

    def __call__(self, rollouts: Rollouts) -> Float[Tensor, "B S"]:
        """Return one cost for each candidate."""
        ...


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


@runtime_checkable
class Quantity(Protocol):
    """Reads a named quantity off latents: a probe."""

    def __call__(self, latents: Float[Tensor, "*axes D"]) -> Float[Tensor, "*axes L"]:
        """Return the quantity of each latent."""
        ...


@runtime_checkable
class Area(Protocol):
    """A set of points: a region of `worldloom.guardrails.rails`."""

    def depth(self, points: Float[Tensor, "*axes L"]) -> Float[Tensor, "*axes"]:
        """Return how deep points lie inside; negative outside."""
        ...


@runtime_checkable
class Stage(Protocol):
    """Something to be reached: how far every predicted state is from it, 0 or less where it is reached."""

    def away(self, rollouts: Rollouts) -> Float[Tensor, "B S T"]:
        """Return how far each predicted state is from what is to be reached."""
        ...


@runtime_checkable
class Staged(Protocol):
    """An objective of several stages, of which some may lie behind an environment already."""

    def progress(self, context: Context, done: Int[Tensor, "B"] | None) -> Int[Tensor, "B"] | None:
        """Return how many stages lie behind each environment, one more where the next is reached now."""
        ...

    def since(self, done: Int[Tensor, "B"]) -> Objective:
        """Return the objective of what is left."""
        ...


@runtime_checkable
class Guardrail(Protocol):
    """A hard limit on predicted futures: no plan that is predicted to break it is followed, at whatever cost."""

    @property
    def name(self) -> str:
        """What it is called, among those of one policy only once."""
        ...

    def violation(self, rollouts: Rollouts) -> Float[Tensor, "B S T"]:
        """Return by how much each predicted step breaks the limit, in its own unit; it holds where this is <= 0."""
        ...


@runtime_checkable
class Agent(Protocol):
    """Acts in B environments at once; one environment is a batch of one."""

    def reset(self, goal: Goal) -> None:
        """Forget the last episode and take a new goal for each environment."""
        ...

    def act(self, observations: Observations) -> Float[Tensor, "B A"]:
        """Return one environment action for each environment, within bounds."""
        ...


@runtime_checkable
class Policy(Protocol):
    """Chooses actions for data collection, without reward or goal."""

    def reset(self, generators: list[np.random.Generator]) -> None:
        """Start one episode for each generator."""
        ...

    def act(self, observations: Observations) -> Float32[np.ndarray, "B A"]:
        """Return one environment action for each episode, within bounds."""
        ...
