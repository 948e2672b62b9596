"""The seams: the interfaces between the packages, and how to select some environments of a batch.

An interchangeable part subclasses its interface. Required methods are abstract; optional ones have a default here, so
callers never check whether a method exists. Conformance kits are in `worldloom.testing`.

A batch shrinks when episodes end, and when a search splits it to fit the CPU cache. Index a value object of
`worldloom.core.types` to select environments (`context[rows]`). `select(rows)` of an objective or a guardrail returns
an objective or a guardrail for those environments; `select(rows)` of an agent changes the agent in place.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Float32, Float64, Int
from torch import Tensor

from worldloom.core.types import Context, Goal, ModelSpec, Observations, Rollouts


@runtime_checkable
class WorldModel(Protocol):
    """Predicts the consequences of actions in representation space.

    Attributes:
        spec: the shapes of the model's inputs and outputs.
    """

    spec: ModelSpec

    @property
    def device(self) -> torch.device:
        """The device on which the model expects observations, contexts and actions; the CPU by default."""
        return torch.device("cpu")

    def encode(self, observations: Observations) -> Float[Tensor, "*axes D"]:
        """Encode each observation. The latent of an observation does not depend on the rest of the batch."""
        ...

    def rollout(self, context: Context, actions: Float[Tensor, "B S T A"]) -> Float[Tensor, "B S T D"]:
        """Predict the latents of the T steps after the context, open loop, for S candidates."""
        ...


class Objective(ABC):
    """A cost over predicted futures; lower is better.

    Attributes:
        goal: the goal latents, for searches that need them; None if the objective has no goal latents.
        aims: whether the objective defines its own goal, which replaces the goal passed to the agent.
        staged: whether the objective has several stages, which an environment completes in order.
    """

    goal: Float[Tensor, "B D"] | None = None
    aims: bool = False
    staged: bool = False

    @abstractmethod
    def __call__(self, rollouts: Rollouts) -> Float[Tensor, "B S"]:
        """Return one cost for each candidate."""

    def select(self, rows: Tensor | slice) -> "Objective":
        """Return the objective for the environments `rows`.

        The default returns `self`; override it if the objective stores per-environment values.
        """
        return self

    def progress(self, context: Context, done: Int[Tensor, "B"] | None) -> Int[Tensor, "B"] | None:
        """Return how many stages each environment has completed: `done`, plus those that its state completes now.

        If `done` is None, no stage is completed yet. The default, for an objective without stages, returns None.
        """
        return None

    def since(self, done: Int[Tensor, "B"]) -> "Objective":
        """Return the objective of the stages that remain after `done` stages."""
        return self


class Stage(Objective):
    """An objective with a condition that a single state can fulfil, so that it can be a stage of a sequence."""

    aims = True

    @abstractmethod
    def away(self, rollouts: Rollouts) -> Float[Tensor, "B S T"]:
        """Return the distance of each predicted state from fulfilling the stage; 0 or less means fulfilled."""

    def select(self, rows: Tensor | slice) -> "Stage":
        """Return the stage for the environments `rows`; see `Objective.select`."""
        return self


class Guardrail(ABC):
    """A hard limit on predicted futures. The planner never chooses a plan that is predicted to break it.

    Attributes:
        name: the name of the guardrail, unique within a rule set.
    """

    name: str

    @property
    def of_actions(self) -> bool:
        """Whether the limit depends only on actions. A search checks such limits first; they need no network."""
        return False

    @abstractmethod
    def violation(self, rollouts: Rollouts) -> Float[Tensor, "B S T"]:
        """Return the violation of each predicted step, in the unit of the limit; 0 or less means satisfied."""

    def select(self, rows: Tensor | slice) -> "Guardrail":
        """Return the guardrail for the environments `rows`.

        The default returns `self`; override it if the guardrail stores per-environment values.
        """
        return self

    def stretched(self, times: float) -> "Guardrail":
        """Return the guardrail with its margin multiplied by `times`; the default, without a margin, returns `self`."""
        return self


class Actor(ABC):
    """Acts in B environments at once; one environment is a batch of one."""

    @abstractmethod
    def act(self, observations: Observations) -> Float[Tensor, "B A"]:
        """Return one environment action for each environment, within bounds."""

    def resume(self, taken: Float[Tensor, "B A"]) -> None:
        """Receive the environment actions that are applied at present, which limits on changes of actions need.

        A caller on a plant calls this after `reset`, and before each action: the plant may have applied its own safe
        action instead of the last action.
        """
        return

    def limited(
        self, action: Float32[np.ndarray, "A"], taken: Float32[np.ndarray, "A"] | None
    ) -> Float32[np.ndarray, "A"]:
        """Return the nearest environment action that the guardrails on actions permit after `taken`.

        A caller that replaces an action, for example by a safe action, or that applies an action after another one than
        the last, must pass it through this method. The default returns the action unchanged.
        """
        return action


class Agent(Actor):
    """Acts toward goals in B environments at once.

    Attributes:
        narrows: whether `select` can reduce the agent to some environments. If not, the agent receives all environments
            of its batch until the last episode ends.
        explores: whether `explorer` returns an actor that explores for the agent.
        statistics: for each name, one value per plan since the agent was created. An evaluation takes its timings from
            `plan_seconds` and `plan_environments` (the number of environments of each plan). If these names are
            missing, it times the calls of `act`.
    """

    narrows: bool = False
    explores: bool = False
    statistics: Mapping[str, Sequence[float]] = MappingProxyType({})

    @abstractmethod
    def reset(self, goal: Goal) -> None:
        """Start a new episode with a new goal for each environment."""

    def act_by(self, deadline: float, observations: Observations) -> Float[Tensor, "B A"]:
        """Return the best action found by `deadline`, in seconds of `time.monotonic`; the default calls `act`."""
        return self.act(observations)

    def select(self, rows: Sequence[int]) -> None:
        """Keep only the environments with these indices in the last batch, in this order; see `narrows`."""
        return

    def conclude(self, rows: Sequence[int], observations: Observations, outcomes: Sequence[str]) -> None:
        """Receive the last observations and the outcomes of episodes that ended, at `rows` of the last batch.

        An outcome is "reached", "limit broken", both joined by a comma, or "not reached".
        """
        return

    @property
    def parts(self) -> Mapping[str, Any]:
        """The `PlanningAgent` of each planning part, by name in the audit log; the part "" chooses the actions."""
        return {}

    def explorer(self) -> Actor:
        """Return an actor that explores separate environments, and fills this agent's memory; see `explores`."""
        raise NotImplementedError(f"{type(self).__name__} does not explore; call 'explorer' only if 'explores' is True")


@runtime_checkable
class Metric(Protocol):
    """The distance between latents and goals, which are broadcast against each other; 0 at the goal."""

    def __call__(self, latents: Float[Tensor, "*#axes D"], goal: Float[Tensor, "*#axes D"]) -> Float[Tensor, "..."]:
        """Return one distance for each latent."""
        ...


@runtime_checkable
class Quantity(Protocol):
    """Predicts a physical quantity from latents; a probe is an example."""

    def __call__(self, latents: Float[Tensor, "*axes D"]) -> Float[Tensor, "*axes L"]:
        """Return the quantity of each latent."""
        ...


@runtime_checkable
class Area(Protocol):
    """A set of points, such as a region of `worldloom.guardrails`."""

    def depth(self, points: Float[Tensor, "*axes L"]) -> Float[Tensor, "*axes"]:
        """Return the Euclidean distance from each point to the edge; positive inside, negative outside."""
        ...


@runtime_checkable
class Policy(Protocol):
    """A logging policy: chooses actions for data collection, without reward or goal."""

    def reset(self, generators: list[np.random.Generator]) -> None:
        """Start one episode for each generator."""
        ...

    def act(self, observations: Observations) -> Float32[np.ndarray, "B A"]:
        """Return one environment action for each episode, within bounds."""
        ...


@runtime_checkable
class SeeingPolicy(Policy, Protocol):
    """A logging policy that also sees the simulator's state, for example an expert. No agent receives this state.

    What collects data calls `see` before each `act`, and records `sees` in the dataset.

    Attributes:
        sees: the names of the environment's infos that the policy needs.
    """

    sees: tuple[str, ...]

    def see(self, infos: Mapping[str, Float64[np.ndarray, "B L"]]) -> None:
        """Receive the infos `sees` of the frames for which the next actions are chosen."""
        ...


@runtime_checkable
class SafePolicy(Policy, Protocol):
    """A logging policy whose actions satisfy guardrails."""

    def resume(self, taken: Float[Tensor, "B A"]) -> None:
        """Receive the environment actions that are applied at present; see `Actor.resume`."""
        ...

    def limited(
        self, action: Float32[np.ndarray, "A"], taken: Float32[np.ndarray, "A"] | None
    ) -> Float32[np.ndarray, "A"]:
        """Return the nearest environment action that the guardrails on actions permit after `taken`."""
        ...
