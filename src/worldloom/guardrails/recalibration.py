"""Online recalibration: margins grow while prediction errors are larger than they were in calibration."""

import math
from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from worldloom.core.errors import PlanningError
from worldloom.core.seams import WorldModel
from worldloom.core.types import Context, Plan, Rollouts
from worldloom.guardrails.margins import AdaptiveMargin
from worldloom.guardrails.rails import BoundRail
from worldloom.heads import still
from worldloom.planning import violations_of


class Recalibration:
    """Tracks the prediction errors of an agent from its own observations, and stretches its margins.

    At each replan, the violations of the observed states are compared with the predicted violations, in units of the
    margins. `AdaptiveMargin` tracks the quantile of these errors, starting from `usual`, the quantile in calibration.
    The margins are multiplied by the tracked quantile divided by `usual`, and never fall below the calibrated margins.
    All environments of the agent share one quantile, and each episode begins with the calibrated margins.

    Raises:
        PlanningError: `rate`, the tracking rate in units of `usual`, is not a finite number above 0.
    """

    def __init__(
        self, rails: Sequence[BoundRail], *, usual: float, risk: float, model: WorldModel, rate: float = 0.5
    ) -> None:
        if not 0 < rate < math.inf:
            raise PlanningError(f"expected a finite recalibration rate above 0; got {rate}")
        self._rails, self._model = tuple(rails), model
        self._usual, self._risk, self._rate = usual, risk, rate
        self.reset()

    def reset(self) -> None:
        """Reset to the calibrated margins."""
        self._tracker = AdaptiveMargin(self._usual, risk=self._risk, rate=self._rate * self._usual)

    @property
    def stretch(self) -> float:
        """The factor by which the calibrated margins are multiplied; at least 1."""
        return max(1.0, self._tracker.margin / self._usual)

    def see(self, plan: Plan, before: Float[Tensor, "B D"], here: Float[Tensor, "B D"]) -> None:
        """Compare the observed latents `here` with the prediction of a plan's first block from the latents `before`."""
        seen = seen_violations(self._rails, plan, 0, still(before, self._model), here)
        self._tracker.update(*errors_seen(self._rails, plan, 0, seen, self.stretch).tolist())


def seen_violations(
    rails: Sequence[BoundRail], plan: Plan, block: int, before: Context, here: Float[Tensor, "B D"]
) -> dict[str, Float[Tensor, "B"]]:
    """Return each guardrail's violation, without margin, in the state `here` at the end of a block of a plan.

    As in a plan, the violation is infinite where it cannot be computed.
    """
    actions = plan.actions[:, None, block : block + 1]
    rollouts = Rollouts(context=before, actions=actions, latents=here[:, None, None])
    found = violations_of([rail.with_margin(0.0) for rail in rails], rollouts)
    return {name: violation[:, 0, 0] for name, violation in found.items()}


def errors_seen(
    rails: Sequence[BoundRail], plan: Plan, block: int, seen: Mapping[str, Float[Tensor, "B"]], stretch: float = 1.0
) -> Float[Tensor, "B"]:
    """Return the largest excess of observed over predicted violations, in units of each guardrail's margin.

    `stretch` is the factor by which the margins were multiplied when the plan was made.
    """
    found = torch.stack([seen[rail.name] for rail in rails], dim=1)
    margins = torch.stack([rail.margins(plan.actions.shape[1]) for rail in rails])[:, block].to(found)
    said = torch.stack([plan.violations[rail.name][:, block] for rail in rails], dim=1).to(found) - stretch * margins
    return ((found - said) / margins.clamp_min(1e-9)).amax(dim=1)
