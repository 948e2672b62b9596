"""The seams: what a room asks of another. Conformance kits are in `worldloom.testing`."""

from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Float32
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
