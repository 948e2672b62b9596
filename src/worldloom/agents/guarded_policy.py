"""A logging policy under a rule set: an action is kept only if a plan that satisfies the guardrails begins with it."""

from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Float, Float32
from torch import Tensor

from worldloom.agents.mpc import PlanningAgent
from worldloom.core.errors import ConfigError
from worldloom.core.seams import Objective, Policy, SafePolicy, SeeingPolicy
from worldloom.core.types import Context, Goal, Observations, Rollouts


class _Wish(Objective):
    """The squared distance of the first environment action to the action `wish` of a policy."""

    def __init__(self, wish: Float[Tensor, "B E"]) -> None:
        self._wish = wish

    def __call__(self, rollouts: Rollouts) -> Float[Tensor, "B S"]:
        """Return one cost for each candidate."""
        first = rollouts.actions[:, :, 0, : self._wish.shape[-1]]
        gap: Tensor = (first - self._wish[:, None]).square().sum(dim=-1)
        return gap

    def select(self, rows: Tensor | slice) -> "_Wish":
        """Return the objective for the environments `rows`."""
        return _Wish(self._wish[rows])


class GuardedPolicy(SafePolicy):
    """A safety filter: replaces each action of a policy by the nearest one that can start a plan under the guardrails.

    `build(objective=..., proposer=...)` returns the planning agent, with its guardrails, margins and fallback. The
    agent must replan at every environment step. Where no plan satisfies the guardrails, the agent's fallback acts.

    Raises:
        ConfigError: the policy sees the simulator.
    """

    def __init__(self, policy: Policy, build: Callable[..., PlanningAgent]) -> None:
        if isinstance(policy, SeeingPolicy):
            raise ConfigError(
                f"a policy under guardrails must act on observations, but {type(policy).__name__} sees the simulator's "
                f"{', '.join(policy.sees)}. Choose a protocol whose goals come from another policy"
            )
        self._policy, self._wish = policy, torch.empty(0, 0)
        self._agent: PlanningAgent = build(objective=lambda goal: _Wish(self._wish), proposer=self._propose)
        self._model = self._agent.planner.model
        self._last: np.ndarray | None = None
        self._begun = False

    def reset(self, generators: list[np.random.Generator]) -> None:
        """Start one episode for each generator."""
        self._policy.reset(generators)
        self._last, self._begun = None, False

    def resume(self, taken: Float[Tensor, "B A"]) -> None:
        """Receive the environment actions that are applied at present; see `Actor.resume`."""
        self._last = taken.numpy()

    def limited(
        self, action: Float32[np.ndarray, "A"], taken: Float32[np.ndarray, "A"] | None
    ) -> Float32[np.ndarray, "A"]:
        """Return the nearest action that the guardrails permit after `taken`; see `Actor.limited`."""
        return self._agent.limited(action, taken)

    def act(self, observations: Observations) -> Float32[np.ndarray, "B A"]:
        """Return one environment action for each episode, within bounds and under the guardrails."""
        wishes = self._policy.act(observations)
        before = [None] * len(wishes) if self._last is None else list(self._last)
        if not self._begun:
            self._agent.reset(Goal(observations=observations))
            self._begun = True
        if self._last is not None:
            self._agent.resume(torch.from_numpy(self._last))
        limited = [self._agent.limited(wish, last) for wish, last in zip(wishes, before, strict=True)]
        self._wish = torch.from_numpy(np.stack(limited)).to(self._model.device)
        actions: np.ndarray = self._agent.act(observations).detach().cpu().numpy()
        self._last = actions
        return actions

    def _propose(self, context: Context, goal: Float[Tensor, "B D"], horizon: int) -> Float[Tensor, "B I T A"]:
        """Return two plans that begin with the policy's action: one repeats it, the other continues with zeros."""
        spec = self._model.spec
        repeated = self._wish.repeat(1, spec.block)[:, None].repeat(1, horizon, 1)
        once = torch.zeros_like(repeated)
        once[:, 0, : spec.action.size] = self._wish
        return torch.stack([repeated, once], dim=1)
