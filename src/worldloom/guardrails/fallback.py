"""Fallbacks, declared beforehand: how an agent acts when no plan satisfies the guardrails."""

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import torch
from jaxtyping import Float
from pydantic import BeforeValidator, SerializeAsAny
from torch import Tensor

from worldloom.core.config import Component, component_of
from worldloom.core.errors import ConfigError, NoFeasiblePlan
from worldloom.core.registry import Registry
from worldloom.core.seams import Objective
from worldloom.core.types import ActionBounds, Context, ModelSpec, Plan
from worldloom.planning import Planner

FALLBACKS: Registry["type[Fallback]"] = Registry("fallback")


@dataclass(frozen=True, kw_only=True)
class Infeasible:
    """The input of a fallback: environments in which no plan satisfies every guardrail, and a planner.

    Attributes:
        safe: the state in which each environment last had a plan that satisfied the guardrails.
        objective: returns the objective of reaching a state.
        deadline: the time at which a search must end, in seconds of `time.monotonic`; None means never.
    """

    planner: Planner
    context: Context
    safe: Float[Tensor, "B D"]
    objective: Callable[[Float[Tensor, "B D"]], Objective]
    generator: torch.Generator
    deadline: float | None = None


class Fallback(Component):
    """A way to act when no plan satisfies every guardrail. To add one, register a subclass in `FALLBACKS`.

    The agent corrects the actions of `plan` where they break a guardrail on actions.
    """

    @property
    def declared(self) -> tuple[float, ...] | None:
        """The environment action that the fallback always takes, or None if it does not declare one."""
        return None

    def check(self, spec: ModelSpec) -> None:
        """Check that the fallback fits a model; the default accepts every model.

        Raises:
            ConfigError: the fallback does not fit the model.
        """

    @abstractmethod
    def plan(self, infeasible: Infeasible) -> Plan:
        """Return the actions to follow until the next plan."""


FallbackField = Annotated[SerializeAsAny[Fallback], BeforeValidator(component_of(FALLBACKS))]


@FALLBACKS.register("stop")
class Stop(Fallback):
    """Repeat one environment action: the declared one, or the action nearest to zero if none is declared."""

    name: Literal["stop"] = "stop"
    action: tuple[float, ...] | None = None

    @property
    def declared(self) -> tuple[float, ...] | None:
        """The declared action."""
        return self.action

    def check(self, spec: ModelSpec) -> None:
        """Check that the action has the right size and is within bounds.

        Raises:
            ConfigError: the action has the wrong size or is out of bounds.
        """
        if self.action is None:
            return
        if len(self.action) != spec.action.size:
            raise ConfigError(
                f"the fallback's action has {len(self.action)} values; expected {spec.action.size}, the size of "
                f"the world's actions. Declare an action of this size"
            )
        action, bounds = torch.tensor(self.action).repeat(spec.block), ActionBounds.of(spec)
        if not torch.allclose(bounds.clamp(action), action):
            raise ConfigError(
                f"the fallback's action {self.action} is out of bounds; expected values from {spec.action.low} to "
                f"{spec.action.high}. Declare an action within these bounds"
            )

    def plan(self, infeasible: Infeasible) -> Plan:
        """Repeat the action."""
        model, context = infeasible.planner.model, infeasible.context
        spec, bounds = model.spec, ActionBounds.of(model.spec, context.latents.device)
        action = torch.zeros(spec.action.size) if self.action is None else torch.tensor(self.action)
        block = bounds.clamp(action.to(bounds.low).repeat(spec.block))
        actions = block.expand(context.batch, infeasible.planner.horizon, -1).clone()
        latents = model.rollout(context, actions[:, None])[:, 0]
        return Plan(actions=actions, latents=latents, cost=latents.new_zeros(context.batch))


class _Toward(Fallback):
    """Plan toward a state, with the smallest violations on the way."""

    @abstractmethod
    def state(self, infeasible: Infeasible) -> Float[Tensor, "B D"]:
        """Return the state to plan toward."""

    def plan(self, infeasible: Infeasible) -> Plan:
        """Return a plan toward the state.

        Where no plan satisfies the guardrails, this is the plan with the smallest violations or, if that plan is not
        finite, the plan of `Stop`.
        """
        toward = infeasible.objective(self.state(infeasible))
        try:
            plan = infeasible.planner.plan(
                infeasible.context, toward, generator=infeasible.generator, deadline=infeasible.deadline
            )
        except NoFeasiblePlan as error:
            plan = error.plan
            assert isinstance(plan, Plan)
        lost = ~plan.actions.isfinite().flatten(1).all(dim=1)
        if bool(lost.any()):  # if violations cannot be computed, the plan with the smallest ones may not be finite
            still = Stop().plan(infeasible)
            plan = replace(plan, actions=torch.where(lost[:, None, None], still.actions, plan.actions))
        return plan


@FALLBACKS.register("hold")
class Hold(_Toward):
    """Stay: plan toward the current state, with the smallest violations."""

    name: Literal["hold"] = "hold"

    def state(self, infeasible: Infeasible) -> Float[Tensor, "B D"]:
        """Return the current state."""
        return infeasible.context.latents[:, -1]


@FALLBACKS.register("retreat")
class Retreat(_Toward):
    """Go toward the last state from which a plan satisfied the guardrails, with the smallest violations on the way."""

    name: Literal["retreat"] = "retreat"

    def state(self, infeasible: Infeasible) -> Float[Tensor, "B D"]:
        """Return the last safe state."""
        return infeasible.safe
