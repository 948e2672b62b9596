"""Fallbacks: what an agent does when no plan keeps its guardrails, declared beforehand."""

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
    """Environments in which no plan keeps every guardrail, and what plans there.

    Attributes:
        safe: where each environment last had a plan that held.
        objective: makes the objective of being at a state.
        deadline: when a search ends, in seconds of `time.monotonic`; None is never.
    """

    planner: Planner
    context: Context
    safe: Float[Tensor, "B D"]
    objective: Callable[[Float[Tensor, "B D"]], Objective]
    generator: torch.Generator
    deadline: float | None = None


class Fallback(Component):
    """A way to act without a plan that keeps every guardrail; a new one is a subclass, registered in `FALLBACKS`."""

    def check(self, spec: ModelSpec) -> None:
        """Check, before anything acts, that it fits a model; by default it does.

        Raises:
            ConfigError: it does not fit.
        """

    @abstractmethod
    def plan(self, infeasible: Infeasible) -> Plan:
        """Return what to follow until the next plan."""


FallbackField = Annotated[SerializeAsAny[Fallback], BeforeValidator(component_of(FALLBACKS))]


@FALLBACKS.register("stop")
class Stop(Fallback):
    """Take one declared environment action throughout; without one, the action nearest to zero."""

    name: Literal["stop"] = "stop"
    action: tuple[float, ...] | None = None

    def check(self, spec: ModelSpec) -> None:
        """Check that the world takes the action.

        Raises:
            ConfigError: it has another size or is out of bounds.
        """
        if self.action is None:
            return
        if len(self.action) != spec.action.size:
            raise ConfigError(
                f"the fallback's action has {len(self.action)} values and the world takes {spec.action.size}"
            )
        action, bounds = torch.tensor(self.action).repeat(spec.block), ActionBounds.of(spec)
        if not torch.allclose(bounds.clamp(action), action):
            raise ConfigError(
                f"the fallback's action {self.action} is out of bounds, {spec.action.low} to {spec.action.high}; "
                f"declare one that the world takes"
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
    """Plan toward a state with the smallest violations on the way."""

    @abstractmethod
    def state(self, infeasible: Infeasible) -> Float[Tensor, "B D"]:
        """Return where to be."""

    def plan(self, infeasible: Infeasible) -> Plan:
        """Plan toward the state; where no plan holds, take the least broken one, and stop where it is not finite."""
        toward = infeasible.objective(self.state(infeasible))
        try:
            plan = infeasible.planner.plan(
                infeasible.context, toward, generator=infeasible.generator, deadline=infeasible.deadline
            )
        except NoFeasiblePlan as error:
            plan = error.plan
            assert isinstance(plan, Plan)
        lost = ~plan.actions.isfinite().flatten(1).all(dim=1)
        if bool(lost.any()):  # where nothing can be judged, a proposal may not be finite
            still = Stop().plan(infeasible)
            plan = replace(plan, actions=torch.where(lost[:, None, None], still.actions, plan.actions))
        return plan


@FALLBACKS.register("hold")
class Hold(_Toward):
    """Stay: plan toward the present state, with the smallest violations."""

    name: Literal["hold"] = "hold"

    def state(self, infeasible: Infeasible) -> Float[Tensor, "B D"]:
        """Return the present state."""
        return infeasible.context.latents[:, -1]


@FALLBACKS.register("retreat")
class Retreat(_Toward):
    """Go back to the last place from which a plan held, with the smallest violations on the way."""

    name: Literal["retreat"] = "retreat"

    def state(self, infeasible: Infeasible) -> Float[Tensor, "B D"]:
        """Return the last safe place."""
        return infeasible.safe
