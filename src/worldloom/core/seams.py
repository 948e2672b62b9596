"""The seams: what a room asks of another, what of it is optional, and how a batch of environments narrows.

A part that is interchangeable subclasses its seam. What it must write is abstract; what is optional has a default here,
so that no caller asks whether a part can do something. Conformance kits are in `worldloom.testing`.

A batch narrows when episodes end, and when a search cuts it to fit a cache. Value objects (`worldloom.core.types`)
narrow by index, `context[rows]`; an objective or a guardrail returns its part for some rows, `select(rows)`; an agent,
and what belongs to it, narrows itself.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Float32, Int
from torch import Tensor

from worldloom.core.types import Context, Goal, ModelSpec, Observations, Rollouts


@runtime_checkable
class WorldModel(Protocol):
    """Predicts the consequences of actions in representation space.

    Attributes:
        spec: what the model takes and gives.
    """

    spec: ModelSpec

    @property
    def device(self) -> torch.device:
        """Where it takes observations, contexts and actions; the CPU by default."""
        return torch.device("cpu")

    def encode(self, observations: Observations) -> Float[Tensor, "*axes D"]:
        """Encode each observation alone; the result does not depend on what else is in the batch."""
        ...

    def rollout(self, context: Context, actions: Float[Tensor, "B S T A"]) -> Float[Tensor, "B S T D"]:
        """Predict T frames after the context, open loop, for S candidates; the future only."""
        ...


class Objective(ABC):
    """A cost over predicted futures; lower is better.

    Attributes:
        goal: the goal latents, for searches that need one; None where there are none.
        aims: whether it says what is to be reached, in place of what the agent was told to reach.
        staged: whether it consists of stages, some of which may lie behind an environment already.
    """

    goal: Float[Tensor, "B D"] | None = None
    aims: bool = False
    staged: bool = False

    @abstractmethod
    def __call__(self, rollouts: Rollouts) -> Float[Tensor, "B S"]:
        """Return one cost for each candidate."""

    def select(self, rows: Tensor | slice) -> "Objective":
        """Return the objective for some environments; by default it holds nothing for each and stays the same."""
        return self

    def progress(self, context: Context, done: Int[Tensor, "B"] | None) -> Int[Tensor, "B"] | None:
        """Return how many stages lie behind each environment, one more where the next is reached now."""
        return None

    def since(self, done: Int[Tensor, "B"]) -> "Objective":
        """Return the objective of the stages that are left."""
        return self


class Stage(Objective):
    """An objective that is reached at some state."""

    aims = True

    @abstractmethod
    def away(self, rollouts: Rollouts) -> Float[Tensor, "B S T"]:
        """Return how far each predicted state is from what is to be reached; 0 or less where it is reached."""

    def select(self, rows: Tensor | slice) -> "Stage":
        """Return the stage for some environments; by default it stays the same."""
        return self


class Guardrail(ABC):
    """A hard limit on predicted futures: a plan that is predicted to break it is never followed, at whatever cost.

    Attributes:
        name: what it is called; no other guardrail of a rule set has the same name.
    """

    name: str

    @property
    def of_actions(self) -> bool:
        """Whether it looks at actions alone: a search then asks it before guardrails that need a network."""
        return False

    @abstractmethod
    def violation(self, rollouts: Rollouts) -> Float[Tensor, "B S T"]:
        """Return by how much each predicted step breaks the limit, in its own unit; it holds where this is <= 0."""

    def select(self, rows: Tensor | slice) -> "Guardrail":
        """Return the guardrail for some environments; by default it holds nothing for each and stays the same."""
        return self

    def stretched(self, times: float) -> "Guardrail":
        """Return the guardrail with `times` its margin; by default it has no margin and stays the same."""
        return self


@runtime_checkable
class Explorer(Protocol):
    """Acts in B environments at once, without a goal."""

    def act(self, observations: Observations) -> Float[Tensor, "B A"]:
        """Return one environment action for each environment, within bounds."""
        ...


class Agent(ABC):
    """Acts in B environments at once; one environment is a batch of one.

    Attributes:
        narrows: whether `select` narrows it. An agent that does not narrow sees all environments of its batch until the
            last of their episodes ends.
        explores: whether `explorer` returns what explores for it.
        statistics: figures of each plan since the agent was made. With `plan_seconds` and `plan_environments` (for how
            many environments each plan was made) it is timed by them, else by its calls of `act`.
    """

    narrows: bool = False
    explores: bool = False
    statistics: Mapping[str, Sequence[float]] = MappingProxyType({})

    @abstractmethod
    def reset(self, goal: Goal) -> None:
        """Forget the last episode and take a new goal for each environment."""

    @abstractmethod
    def act(self, observations: Observations) -> Float[Tensor, "B A"]:
        """Return one environment action for each environment, within bounds."""

    def act_by(self, deadline: float, observations: Observations) -> Float[Tensor, "B A"]:
        """Return the best action found by `deadline`, in seconds of `time.monotonic`; by default what `act` returns."""
        return self.act(observations)

    def select(self, rows: Sequence[int]) -> None:
        """Narrow to these environments, given by their places in the last batch, in this order; see `narrows`."""
        return

    def conclude(self, rows: Sequence[int], observations: Observations, outcomes: Sequence[str]) -> None:
        """Learn how the episodes of some environments ended, by their places in the last batch, and what is seen there.

        An outcome is "reached", "limit broken", both with a comma between, or "not reached".
        """
        return

    @property
    def parts(self) -> Mapping[str, Any]:
        """The `worldloom.agents.PlanningAgent` of each part that plans, by its name in an audit log; "" acts."""
        return {}

    def explorer(self) -> Explorer:
        """Return what explores other environments from now on for this agent's memory; see `explores`."""
        raise NotImplementedError(f"{type(self).__name__} does not explore")


@runtime_checkable
class Metric(Protocol):
    """How far latents are from goals, broadcast against each other; 0 at the goal."""

    def __call__(self, latents: Float[Tensor, "*#axes D"], goal: Float[Tensor, "*#axes D"]) -> Float[Tensor, "..."]:
        """Return one distance for each latent."""
        ...


@runtime_checkable
class Quantity(Protocol):
    """Reads a named quantity off latents: a probe."""

    def __call__(self, latents: Float[Tensor, "*axes D"]) -> Float[Tensor, "*axes L"]:
        """Return the quantity of each latent."""
        ...


@runtime_checkable
class Area(Protocol):
    """A set of points: a region of `worldloom.guardrails`."""

    def depth(self, points: Float[Tensor, "*axes L"]) -> Float[Tensor, "*axes"]:
        """Return how deep points lie inside, the Euclidean distance to the edge; negative outside."""
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
