"""One planning problem for B environments: the only place where candidates are rolled out and scored."""

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from worldloom.core.actions import project
from worldloom.core.errors import PlanningError
from worldloom.core.seams import Guardrail, Objective, WorldModel
from worldloom.core.types import ActionBounds, Context, Rollouts
from worldloom.heads import LatentGeometry
from worldloom.planning.objectives import as_objective

_log = logging.getLogger(__name__)

# The number of rows that a CPU predicts at a time, so that their activations fit its second-level cache.
_CPU_ROWS = 512

# Above the cost of any allowed plan. The penalised cost of a plan that breaks a guardrail is higher.
FORBIDDEN = 1e6

# Called with the candidates that a search scores, and their violations by guardrail.
Watch = Callable[[Rollouts, Mapping[str, Float[Tensor, "B S T"]]], None]


@dataclass
class RolloutCount:
    """The number of candidates that were rolled out."""

    rollouts: int = 0


@dataclass
class Deadline:
    """The time at which a search must end, in seconds of `time.monotonic`; None means never.

    Attributes:
        cut_short: whether the deadline ended a search.
    """

    moment: float | None = None
    cut_short: bool = False
    _step_began: float = field(default_factory=time.monotonic, repr=False)

    def reached(self) -> bool:
        """Return whether the next step of the search would end too late if it takes as long as the last step.

        A solver calls this between its steps but not before the first, so that there is always a plan.
        """
        if self.moment is None:
            return False
        now = time.monotonic()
        reached = 2 * now - self._step_began > self.moment
        self._step_began = now
        self.cut_short |= reached
        return reached


@dataclass(frozen=True)
class Tightened(Guardrail):
    """A stricter version of the guardrail `rail`: its violation is the violation of `rail` plus `more`."""

    name: str
    rail: Guardrail
    more: float

    @property
    def of_actions(self) -> bool:
        """Whether `rail` depends only on actions."""
        return self.rail.of_actions

    def violation(self, rollouts: Rollouts) -> Float[Tensor, "B S T"]:
        """Return the violation of `rail` plus `more`."""
        return self.rail.violation(rollouts) + self.more

    def select(self, rows: Tensor | slice) -> "Tightened":
        """Return the guardrail for the environments `rows`."""
        return Tightened(self.name, self.rail.select(rows), self.more)


class PlanningProblem:
    """The problem to find actions that minimise an objective and satisfy every guardrail.

    The actions have `horizon` blocks and lie within `bounds`. A problem is immutable. Only tree search needs
    `geometry`. At `deadline` a search ends with the best plan so far. `watch` is called with the candidates that are
    scored. The objective may be a plain function of rollouts if it stores no per-environment values.

    Raises:
        PlanningError: the context or the bounds do not fit the model, the horizon is below 1, or two guardrails have
            the same name.
    """

    def __init__(
        self,
        model: WorldModel,
        context: Context,
        objective: Objective | Callable[[Rollouts], Tensor],
        *,
        horizon: int,
        bounds: ActionBounds | None = None,
        guardrails: Sequence[Guardrail] = (),
        geometry: LatentGeometry | None = None,
        count: RolloutCount | None = None,
        deadline: Deadline | None = None,
        watch: Watch | None = None,
    ) -> None:
        spec = model.spec
        expected = (spec.context, spec.latent_dim)
        if horizon < 1:
            raise PlanningError(f"expected a horizon of at least one block; got {horizon}. Choose a longer horizon")
        if tuple(context.latents.shape[1:]) != expected:
            raise PlanningError(
                f"expected a context of {expected[0]} frames with latents of size {expected[1]}; got shape "
                f"{tuple(context.latents.shape)}. Encode the context with the model of this problem"
            )
        self.model, self.context, self.objective = model, context, as_objective(objective)
        self.guardrails = tuple(guardrails)
        names = [rail.name for rail in self.guardrails]
        if len(set(names)) < len(names):
            raise PlanningError(f"guardrail names must be unique; got {names}. Rename the guardrails that share a name")
        self.horizon, self.geometry, self.watch = horizon, geometry, watch
        self.bounds = ActionBounds.of(spec, context.latents.device) if bounds is None else bounds
        if self.bounds.low.shape != (spec.block_size,):
            raise PlanningError(
                f"expected bounds of shape ({spec.block_size},), for the values of one block; got shape "
                f"{tuple(self.bounds.low.shape)}. Repeat the bounds of one action for each action of the block"
            )
        self.count = RolloutCount() if count is None else count
        self.deadline = Deadline() if deadline is None else deadline

    @property
    def batch(self) -> int:
        """The number B of environments."""
        return self.context.batch

    @property
    def device(self) -> torch.device:
        """The device of the latents and the actions."""
        return self.context.latents.device

    @property
    def latents(self) -> Float[Tensor, "B D"]:
        """The current state of each environment."""
        return self.context.latents[:, -1]

    @property
    def goal(self) -> Float[Tensor, "B D"]:
        """The objective's goal.

        Raises:
            PlanningError: the objective has no goal.
        """
        if self.objective.goal is None:
            raise PlanningError(
                "this solver searches toward a goal, but the objective has none; use GoalObjective or a different "
                "solver"
            )
        return self.objective.goal

    def select(self, rows: Tensor | slice, *, horizon: int | None = None) -> "PlanningProblem":
        """Return the problem for the environments `rows`; both problems share the rollout count and the deadline."""
        return self._with(
            context=self.context[rows],
            objective=self.objective.select(rows),
            guardrails=[rail.select(rows) for rail in self.guardrails],
            horizon=horizon or self.horizon,
        )

    def tightened(self, by: Mapping[str, float]) -> "PlanningProblem":
        """Return the problem with tighter guardrails: to each violation, 1.5 times its value in `by` is added.

        `by` maps names of guardrails to violations; only finite values above 0 count.
        """
        extra = {name: 1.5 * amount for name, amount in by.items() if 0 < amount < math.inf}
        return self._with(
            guardrails=[
                Tightened(rail.name, rail, extra[rail.name]) if rail.name in extra else rail for rail in self.guardrails
            ]
        )

    def copy(self) -> "PlanningProblem":
        """Return a copy with cloned tensors. Clones made outside inference mode can be used with autograd."""
        bounds = ActionBounds(low=self.bounds.low.clone(), high=self.bounds.high.clone())
        return self.select(torch.arange(self.batch, device=self.device))._with(bounds=bounds)

    def _with(self, **changes: Any) -> "PlanningProblem":
        return PlanningProblem(**{**vars(self), **changes})

    def project(self, actions: Float[Tensor, "*axes A"]) -> Float[Tensor, "*axes A"]:
        """Return the nearest actions that are allowed; see `worldloom.core.actions.project`."""
        return project(actions, self.model.spec, self.bounds)

    def imagine(self, context: Context, actions: Float[Tensor, "B S T A"]) -> Float[Tensor, "B S T D"]:
        """Return the latents of the model's rollouts from any context; the actions must already be projected."""
        self.count.rollouts += actions.shape[0] * actions.shape[1]
        parts = [
            self.model.rollout(context[rows], actions[rows, columns])
            for rows, columns in self._chunks(*actions.shape[:2])
        ]
        if len(parts) == 1:
            return parts[0]
        columns = len(range(0, actions.shape[1], _CPU_ROWS))
        lines = [torch.cat(parts[first : first + columns], dim=1) for first in range(0, len(parts), columns)]
        return torch.cat(lines)

    def rollout(self, actions: Float[Tensor, "B S T A"]) -> Rollouts:
        """Return the model's rollouts of the projected actions, from the problem's context."""
        actions = self.project(actions)
        return Rollouts(context=self.context, actions=actions, latents=self.imagine(self.context, actions))

    def evaluate(
        self,
        actions: Float[Tensor, "B S T A"],
        *,
        best: int | None = None,
        below: Float[Tensor, "B"] | None = None,
    ) -> Float[Tensor, "B S"]:
        """Return a penalised cost for each candidate.

        For a candidate that satisfies all guardrails, this is its cost. For any other candidate, this is a value above
        `FORBIDDEN` that grows with the violation. With `best`, only the `best` lowest values of each environment are
        exact. Guardrails that depend on predictions then judge only the cheapest candidates; they judge more expensive
        ones only while fewer than `best` candidates satisfy all guardrails. `below` has an effect only if S is 1.
        Guardrails are then evaluated only where the cost is lower than `below`, and only values that are lower than
        `below` are exact.
        """
        # Group the environments so that rollouts are scored while they are in the cache.
        chunks = [rows for rows, _ in self._chunks(actions.shape[0], min(actions.shape[1], _CPU_ROWS))]
        if len(chunks) > 1:
            parts = [(rows, None if below is None else below[rows]) for rows in chunks]
            return torch.cat([self.select(rows).evaluate(actions[rows], best=best, below=low) for rows, low in parts])
        rollouts = self.rollout(actions)
        cost = self.cost(rollouts)
        if self.guardrails and self.watch is None:
            if below is not None and cost.shape[1] == 1:
                return rank(cost, self._worst_below(rollouts, cost, below))
            if best is not None and best < cost.shape[1]:
                return rank(cost, self._worst_of_the_best(rollouts, cost, best))
        every = judged(self.guardrails, rollouts)
        if self.watch is not None:
            self.watch(rollouts, _named(self.guardrails, every))
        return rank(cost, every.amax(dim=(0, -1)) if len(every) else torch.zeros_like(cost))

    def _worst_of_the_best(self, rollouts: Rollouts, cost: Float[Tensor, "B S"], best: int) -> Float[Tensor, "B S"]:
        """Return the worst violation of each candidate; infinite for candidates that were not judged.

        Guardrails that depend only on actions need no network and judge all candidates. In each environment, the other
        guardrails then judge the `1.5 best` cheapest candidates that satisfy the first group. If fewer than `best`
        candidates satisfy all guardrails at a finite cost, the next `1.5 best` are judged, and then all others.
        """
        swift = tuple(rail for rail in self.guardrails if rail.of_actions)
        others = tuple(rail for rail in self.guardrails if not rail.of_actions)
        moves = judged(swift, rollouts).amax(dim=(0, -1)) if swift else torch.zeros_like(cost)
        order = cost.masked_fill(moves > 0, torch.inf).argsort(dim=1) if swift else cost.argsort(dim=1)
        worst = torch.full_like(cost, torch.inf)
        rows, begin, first = torch.arange(len(cost), device=cost.device), 0, best + best // 2
        for end in (first, 2 * first, cost.shape[1]):
            places = order[rows, begin:end]
            here = moves[rows[:, None], places]
            if others:
                here = torch.maximum(here, self._worst_at(others, rollouts, rows, places))
            worst[rows[:, None], places] = here
            held = ((worst <= 0) & cost.isfinite()).sum(dim=1)
            rows, begin = torch.nonzero(held < best).flatten(), end
            if not len(rows) or end >= cost.shape[1]:
                break
        return worst

    def _worst_below(
        self, rollouts: Rollouts, cost: Float[Tensor, "B 1"], below: Float[Tensor, "B"]
    ) -> Float[Tensor, "B 1"]:
        """Return the worst violation of each candidate; infinite if its cost is not below `below`."""
        worst = torch.full_like(cost, torch.inf)
        if len(rows := torch.nonzero(cost[:, 0] < below).flatten()):
            worst[rows] = self._worst_at(self.guardrails, rollouts, rows, torch.zeros_like(rows)[:, None])
        return worst

    @staticmethod
    def _worst_at(
        rails: Sequence[Guardrail], rollouts: Rollouts, rows: Int[Tensor, "R"], places: Int[Tensor, "R K"]
    ) -> Float[Tensor, "R K"]:
        """Return the worst violation of the candidates `places` in the environments `rows`."""
        context = rollouts.context
        if len(rows) < context.batch:
            context = context[rows]
            rails = [rail.select(rows) for rail in rails]
        actions, latents = (part[rows[:, None], places] for part in (rollouts.actions, rollouts.latents))
        return judged(rails, Rollouts(context=context, actions=actions, latents=latents)).amax(dim=(0, -1))

    def violation(self, rollouts: Rollouts) -> Float[Tensor, "B S T"]:
        """Return the largest violation at each step; 0 or less where all guardrails are satisfied."""
        every = judged(self.guardrails, rollouts)
        return every.amax(dim=0) if len(every) else torch.zeros_like(rollouts.latents[..., 0])

    def cost(self, rollouts: Rollouts) -> Float[Tensor, "B S"]:
        """Return the cost of the rollouts; NaN counts as infinite.

        Raises:
            PlanningError: the objective returns costs of the wrong shape.
        """
        cost = self.objective(rollouts)
        if cost.shape != rollouts.latents.shape[:2]:
            raise PlanningError(
                f"expected costs of shape {tuple(rollouts.latents.shape[:2])} from the objective; got "
                f"{tuple(cost.shape)}. Return one cost per candidate; if the objective stores per-environment values, "
                f"also define its select(rows)"
            )
        return cost.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)

    def _chunks(self, batch: int, candidates: int) -> Iterator[tuple[slice, slice]]:
        """Split B x S, row by row, into pieces of a size that suits the device."""
        if self.device.type != "cpu" or batch * candidates <= _CPU_ROWS:
            yield slice(0, batch), slice(0, candidates)
            return
        rows = max(1, _CPU_ROWS // candidates)
        for row in range(0, batch, rows):
            for column in range(0, candidates, _CPU_ROWS):
                yield slice(row, row + rows), slice(column, column + _CPU_ROWS)


def violations_of(guardrails: Sequence[Guardrail], rollouts: Rollouts) -> dict[str, Float[Tensor, "B S T"]]:
    """Return the violation of each guardrail at each step, by name; see `judged`."""
    return _named(guardrails, judged(guardrails, rollouts))


def judged(guardrails: Sequence[Guardrail], rollouts: Rollouts) -> Float[Tensor, "G B S T"]:
    """Return the violation of each guardrail at each step.

    States that cannot be judged count as unsafe: the violation is infinite where the rollout or the violation is NaN,
    and where the guardrail raises an exception.
    """
    if not guardrails:
        return rollouts.latents.new_zeros((0, *rollouts.latents.shape[:3]))
    # `total - total` is NaN where a latent is not finite, and 0 elsewhere.
    total, found = rollouts.latents.sum(dim=-1), []
    for rail in guardrails:
        try:
            violation = _numbers(rail.violation(rollouts), rollouts)
        except Exception as error:
            _log.error(
                "guardrail %r raised %s: %s; the guardrail counts as broken", rail.name, type(error).__name__, error
            )
            violation = torch.full_like(rollouts.latents[..., 0], torch.inf)
        found.append(violation)
    # One call for all guardrails, because a search does this many times.
    every = torch.stack(found).add_(total - total)
    return every.nan_to_num_(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)


def _named(guardrails: Sequence[Guardrail], every: Float[Tensor, "G B S T"]) -> dict[str, Float[Tensor, "B S T"]]:
    return dict(zip((rail.name for rail in guardrails), every.unbind(), strict=True))


def _numbers(violation: object, rollouts: Rollouts) -> Float[Tensor, "B S T"]:
    """Return a guardrail's violation with the dtype and device of the latents.

    Raises:
        PlanningError: the violation is not a dense tensor of real numbers, or its shape is wrong.
    """
    shape = rollouts.latents.shape[:3]
    if not isinstance(violation, Tensor) or violation.is_complex() or violation.layout != torch.strided:
        kind = f"{violation.dtype}, {violation.layout}" if isinstance(violation, Tensor) else type(violation).__name__
        raise PlanningError(f"expected violations as a dense tensor of real numbers; got {kind}")
    if violation.shape != shape:
        raise PlanningError(f"expected violations of shape {tuple(shape)}; got {tuple(violation.shape)}")
    return violation.to(rollouts.latents)


def rank(cost: Float[Tensor, "*axes"], violation: Float[Tensor, "*axes"]) -> Float[Tensor, "*axes"]:
    """Return the cost if no guardrail is broken, else a value above `FORBIDDEN` that grows with the violation."""
    beyond = FORBIDDEN * (1 + (violation / (1 + violation)).nan_to_num(nan=1.0))
    allowed = torch.where(cost.isfinite(), cost.clamp(max=FORBIDDEN), cost)
    return torch.where(violation <= 0, allowed, beyond)
