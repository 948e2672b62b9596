"""Action limits: enforce the guardrails that depend only on actions for every action that no search has checked.

Fallbacks, safe actions and logged policies do not come from a search under the guardrails. Limits on actions need no
prediction, so these actions can be corrected exactly.
"""

import logging
import math
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Float32
from torch import Tensor

from worldloom.core.actions import project
from worldloom.core.errors import ConfigError
from worldloom.core.seams import Guardrail
from worldloom.core.types import ActionBounds, Context, ModelSpec, Rollouts
from worldloom.guardrails.rails import BoundRail
from worldloom.planning import violations_of

_log = logging.getLogger(__name__)
_SLACK = 1e-6  # relative; covers the rounding of a norm in float32
_SHORTEST, _LONGEST = 1e-12, 1e15  # lengths of actions whose squares neither vanish nor overflow in float32
_SHARES = 32  # candidates between two sequences of actions


class ActionLimits:
    """An agent's guardrails on actions, without calibrated margins, because actions have no prediction errors.

    `bounds` are the bounds of an action block, by default those of the model.

    Raises:
        ConfigError: lengths of actions within the bounds are too small or too large for single precision.
    """

    def __init__(
        self,
        guardrails: Sequence[Guardrail],
        spec: ModelSpec,
        *,
        bounds: ActionBounds | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        rails = [rail for rail in guardrails if rail.of_actions]
        self._rails = [rail.stated() if isinstance(rail, BoundRail) else rail for rail in rails]
        bound = [rail for rail in self._rails if isinstance(rail, BoundRail)]
        self._length = min((rail.rail.longest for rail in bound), default=math.inf)
        self._change = min((rail.rail.largest_change for rail in bound), default=math.inf)
        self._spec, self._bounds = spec, bounds or ActionBounds.of(spec, device)
        low, high = self._bounds.low.double(), self._bounds.high.double()
        longest = math.hypot(*torch.maximum(low.abs(), high.abs()).tolist())
        if self._length >= longest:  # no action within the bounds is longer
            self._length = math.inf
        if self._change >= 2 * longest:
            self._change = math.inf
        if bound and not _SHORTEST < longest < _LONGEST:
            raise ConfigError(
                f"guardrails on actions need actions between {_SHORTEST:g} and {_LONGEST:g}, because lengths are "
                f"computed in single precision; the bounds allow a length of {longest:g}. Use other units for actions"
            )

    def nearest(self, actions: Float[Tensor, "B T A"], context: Context) -> Float[Tensor, "B T A"]:
        """Return the actions, corrected in each environment where they break a limit or are not finite.

        Continuous actions then satisfy `Magnitude` and `Rate`. If no candidate satisfies all limits, the result is the
        candidate with the smallest violation, and an error is logged.
        """
        if not self._rails:
            return actions
        with torch.inference_mode():
            wrong = self._worst(actions[:, None], context)[:, 0] > 0
            if not bool(wrong.any()):
                return actions
            corrected = actions.clone()
            corrected[wrong] = self._corrected(actions[wrong], context[wrong])
            return corrected

    def after(
        self, action: Float32[np.ndarray, "E"], taken: Float32[np.ndarray, "E"] | None
    ) -> Float32[np.ndarray, "E"]:
        """Return the nearest environment action that satisfies the limits after the action `taken`."""
        if not self._rails:
            return action
        device = self._bounds.low.device

        def held(values: np.ndarray) -> Tensor:
            return torch.from_numpy(np.asarray(values, np.float32)).to(device)

        spec = self._spec
        context = Context(
            latents=torch.zeros(1, spec.context, spec.latent_dim, device=device),
            actions=torch.zeros(1, spec.context - 1, spec.block_size, device=device),
            taken=None if taken is None else held(taken)[None],
        )
        block = held(action).repeat(spec.block)
        found: np.ndarray = self.nearest(block[None, None], context)[0, 0, : spec.action.size].cpu().numpy()
        return found

    def _worst(self, actions: Float[Tensor, "B S T A"], context: Context) -> Float[Tensor, "B S"]:
        """Return the largest violation of each candidate; infinite if an action is not finite."""
        latents = actions.sum(dim=-1, keepdim=True).expand(-1, -1, -1, self._spec.latent_dim) * 0
        rollouts = Rollouts(context=context, actions=actions, latents=latents)
        worst: Tensor = torch.stack(list(violations_of(self._rails, rollouts).values())).amax(dim=(0, -1))
        return worst

    def _corrected(self, actions: Float[Tensor, "B T A"], context: Context) -> Float[Tensor, "B T A"]:
        """Return the nearest of the candidates that satisfy the limits, in each environment."""
        finite = actions.isfinite().flatten(1).all(dim=1)[:, None, None]
        taken = None if context.taken is None else context.taken.to(actions)
        still = self._walk(torch.zeros_like(actions), taken)
        wish = torch.where(finite, self._walk(actions.nan_to_num(), taken), still)
        others = [still]
        if taken is not None:
            others.append(self._walk(taken.repeat(1, self._spec.block)[:, None].expand_as(actions), taken))
        if self._spec.action.discrete:
            choices = torch.eye(self._spec.action.size).to(actions).repeat(1, self._spec.block)
            others += [self._walk(choice.expand_as(actions), taken) for choice in choices]
        shares = torch.linspace(0, 1, _SHARES + 1).to(actions)[:, None, None]
        # Convex combinations satisfy `Magnitude` and `Rate`, because the candidates do.
        candidates = torch.cat([torch.lerp(wish[:, None], other[:, None], shares) for other in others], dim=1)
        candidates = project(candidates, self._spec, self._bounds)
        worst = self._worst(candidates, context)
        gap = (candidates - wish[:, None]).square().sum(dim=(2, 3))
        allowed = worst <= 0
        if not bool(allowed.any(dim=1).all()):
            names = ", ".join(repr(rail.name) for rail in self._rails)
            _log.error("no action satisfies the guardrails %s; the agent takes the one that breaks them least", names)
        best = torch.where(allowed, gap, torch.inf).argmin(dim=1)
        best = torch.where(allowed.any(dim=1), best, worst.argmin(dim=1))
        return candidates[torch.arange(len(best), device=best.device), best]

    def _walk(self, actions: Float[Tensor, "B T A"], taken: Float[Tensor, "B E"] | None) -> Float[Tensor, "B T A"]:
        """Return the nearest actions within the bounds and the limits on length and change, step by step."""
        actions = project(actions, self._spec, self._bounds)
        if self._spec.action.discrete:
            return actions
        size = self._spec.action.size
        low, high = (bound.view(-1, size) for bound in (self._bounds.low, self._bounds.high))
        found: list[Tensor] = []
        for step, action in enumerate(actions.unflatten(-1, (-1, size)).flatten(1, 2).unbind(1)):
            least, most = low[step % len(low)], high[step % len(high)]
            action = self._shortened(action, torch.zeros_like(least).clamp(least, most))
            if taken is not None:
                action = self._near(action, taken)
            taken = action.clamp(least, most)
            found.append(taken)
        return torch.stack(found, dim=1).view_as(actions)

    def _shortened(self, action: Float[Tensor, "B E"], rest: Float[Tensor, "E"]) -> Float[Tensor, "B E"]:
        """Return the action or, if it is too long, the longest allowed one between `rest` and the action."""
        if math.isinf(self._length):
            return action
        limit = self._length * (1 - _SLACK)
        way = action - rest
        along, square = (way * rest).sum(-1, keepdim=True), way.square().sum(-1, keepdim=True)
        spare = (limit**2 - rest.square().sum()).clamp_min(0)
        share = ((along.square() + square * spare).sqrt() - along) / square.clamp_min(1e-30)
        return torch.where(action.norm(dim=-1, keepdim=True) > limit, rest + way * share.clamp(0, 1), action)

    def _near(self, action: Float[Tensor, "B E"], taken: Float[Tensor, "B E"]) -> Float[Tensor, "B E"]:
        """Return the action or, if it is too far from `taken`, the farthest allowed one on the way to the action."""
        if math.isinf(self._change):
            return action
        way = action - taken
        far = way.norm(dim=-1, keepdim=True)
        rounding = 4 * torch.finfo(action.dtype).eps * torch.maximum(action.abs(), taken.abs()).sum(-1, keepdim=True)
        limit = (self._change * (1 - _SLACK) - rounding).clamp_min(0)
        return torch.where(far > limit, taken + way * (limit / far.clamp_min(1e-30)), action)
