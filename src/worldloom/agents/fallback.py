"""What an agent does when no plan keeps its guardrails: declared beforehand, and said when it is taken."""

from abc import abstractmethod
from collections.abc import Callable
from typing import Annotated, Literal

import torch
from jaxtyping import Float
from pydantic import BeforeValidator, SerializeAsAny
from torch import Tensor

from worldloom.core.config import Component, component_of
from worldloom.core.errors import ConfigError, NoFeasiblePlan
from worldloom.core.protocols import Objective
from worldloom.core.registry import Registry
from worldloom.core.types import ActionBounds, Context, Plan
from worldloom.planning.planner import Planner

FALLBACKS: Registry["type[Fallback]"] = Registry("fallback")


class Fallback(Component):
    """A way to act without a plan that keeps every guardrail; a new one is a subclass, registered in `FALLBACKS`."""

    @abstractmethod
    def plan(
        self,
        planner: Planner,
        context: Context,
        safe: Float[Tensor, "B D"],
        objective: Callable[[Float[Tensor, "B D"]], Objective],
        *,
        generator: torch.Generator,
        deadline: float | None = None,
    ) -> Plan:
        """Return what to follow until the next plan; `safe` is where each environment last had a plan that held."""


FallbackField = Annotated[SerializeAsAny[Fallback], BeforeValidator(component_of(FALLBACKS))]


@FALLBACKS.register("stop")
class Stop(Fallback):
    """Take one declared environment action throughout; without one, the action nearest to zero."""

    name: Literal["stop"] = "stop"
    action: tuple[float, ...] | None = None

    def plan(
        self,
        planner: Planner,
        context: Context,
        safe: Float[Tensor, "B D"],
        objective: Callable[[Float[Tensor, "B D"]], Objective],
        *,
        generator: torch.Generator,
        deadline: float | None = None,
    ) -> Plan:
        """Repeat the action.

        Raises:
            ConfigError: it does not fit the model's actions.
        """
        spec = planner.model.spec
        size, bounds = spec.action.size, ActionBounds.of(spec, context.latents.device)
        action = torch.zeros(size) if self.action is None else torch.tensor(self.action)
        if len(action) != size:
            raise ConfigError(f"the fallback's action has {len(action)} values and the world takes {size}")
        block = bounds.clamp(action.to(bounds.low).repeat(spec.block))
        if self.action is not None and not torch.allclose(block[:size], action.to(block)):
            raise ConfigError(
                f"the fallback's action {self.action} is out of bounds, {spec.action.low} to {spec.action.high}; "
                f"declare one that the world takes"
            )
        actions = block.expand(context.batch, planner.horizon, -1).clone()
        latents = planner.model.rollout(context, actions[:, None])[:, 0]
        return Plan(actions=actions, latents=latents, cost=latents.new_zeros(context.batch))


class _Toward(Fallback):
    """Plan toward a state, breaking as little as may be on the way."""

    @abstractmethod
    def state(self, context: Context, safe: Float[Tensor, "B D"]) -> Float[Tensor, "B D"]:
        """Return where to be."""

    def plan(
        self,
        planner: Planner,
        context: Context,
        safe: Float[Tensor, "B D"],
        objective: Callable[[Float[Tensor, "B D"]], Objective],
        *,
        generator: torch.Generator,
        deadline: float | None = None,
    ) -> Plan:
        """Plan toward the state; where nothing holds, the least broken plan is followed."""
        toward = objective(self.state(context, safe))
        try:
            return planner.plan(context, toward, generator=generator, deadline=deadline)
        except NoFeasiblePlan as refused:
            plan = refused.plan
            assert isinstance(plan, Plan)
            return plan


@FALLBACKS.register("hold")
class Hold(_Toward):
    """Stay where it is: a plan toward the present state, which breaks as little as may be."""

    name: Literal["hold"] = "hold"

    def state(self, context: Context, safe: Float[Tensor, "B D"]) -> Float[Tensor, "B D"]:
        """Return the present state."""
        return context.latents[:, -1]


@FALLBACKS.register("retreat")
class Retreat(_Toward):
    """Go back to the last place from which a plan held, breaking as little as may be on the way."""

    name: Literal["retreat"] = "retreat"

    def state(self, context: Context, safe: Float[Tensor, "B D"]) -> Float[Tensor, "B D"]:
        """Return the last safe place."""
        return safe
