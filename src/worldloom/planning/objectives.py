"""Objectives: what a plan should achieve, as costs over predicted futures."""

from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from worldloom.core.errors import PlanningError
from worldloom.core.seams import Area, Guardrail, Metric, Objective, Quantity, Stage, WorldModel
from worldloom.core.types import Context, Rollouts
from worldloom.heads import BehaviourPrior


@dataclass(frozen=True)
class LatentL2:
    """Euclidean distance between latents, in units of `step_length`, the typical length of one model step.

    The distance is not squared, so its gradient is as large far from the goal as near it. The distance is misleading if
    a wall is between state and goal.
    """

    step_length: float = 1.0

    def __call__(self, latents: Float[Tensor, "*#axes D"], goal: Float[Tensor, "*#axes D"]) -> Float[Tensor, "..."]:
        """Return the distance."""
        distance: Tensor = (latents - goal).norm(dim=-1) / self.step_length
        return distance


_TIE = 0.02  # the weight of the mean distance, if the nearest predicted state counts


@dataclass(frozen=True, kw_only=True)
class _Reach(Stage):
    """A stage whose cost is its mean distance along the plan, plus `last_weight` times the final distance.

    With `nearest`, the cost is the smallest distance along the plan instead, so that a plan may move away from the goal
    first. The mean distance, with a small weight, then only decides between plans that come equally near.
    """

    last_weight: float = 1.0
    nearest: bool = False

    def __call__(self, rollouts: Rollouts) -> Float[Tensor, "B S"]:
        """Return the cost of each candidate."""
        away = self.away(rollouts).clamp_min(0)
        if self.nearest:
            return away.amin(-1) + _TIE * away.mean(-1)
        return away.mean(-1) + self.last_weight * away[..., -1]


@dataclass(frozen=True)
class GoalObjective(_Reach):
    """Reach a goal latent: the mean distance along the plan plus `last_weight` times the final distance.

    The mean distance decides between plans with the same end. Without it, a plan that waits would cost no more than a
    plan that starts at once, and the agent could hesitate before a door. With `nearest`, the smallest distance along
    the plan counts instead: a hand that has to go around an object first moves away from its own goal. A goal nearer
    than `within` counts as reached.
    """

    metric: Metric
    goal: Float[Tensor, "B D"]
    _: KW_ONLY
    within: float = 0.0

    def away(self, rollouts: Rollouts) -> Float[Tensor, "B S T"]:
        """Return the distance of each predicted state from the goal, minus `within`."""
        return self.metric(rollouts.latents, self.goal[:, None, None]) - self.within

    def select(self, rows: Tensor | slice) -> "GoalObjective":
        """Return the objective for the environments `rows`."""
        return replace(self, goal=self.goal[rows])


@dataclass(frozen=True, kw_only=True)
class VectorGoal(_Reach):
    """Bring a probed quantity within `within` of a target, in the quantity's unit; `target` is (L,) or (B, L)."""

    quantity: Quantity
    target: Float[Tensor, "*B L"]
    within: float = 0.0

    def away(self, rollouts: Rollouts) -> Float[Tensor, "B S T"]:
        """Return the distance of each predicted state from the target, minus `within`."""
        target = self.target if self.target.ndim == 1 else self.target[:, None, None]
        gaps: Tensor = (self.quantity(rollouts.latents) - target).norm(dim=-1)
        return gaps - self.within

    def select(self, rows: Tensor | slice) -> "VectorGoal":
        """Return the objective for the environments `rows`."""
        return self if self.target.ndim == 1 else replace(self, target=self.target[rows])


@dataclass(frozen=True, kw_only=True)
class RegionGoal(_Reach):
    """Bring a probed quantity into a region."""

    quantity: Quantity
    region: Area

    def away(self, rollouts: Rollouts) -> Float[Tensor, "B S T"]:
        """Return the signed distance of each predicted state from the region; it is negative inside the region."""
        return -self.region.depth(self.quantity(rollouts.latents))


@dataclass(frozen=True, kw_only=True)
class Effort(Objective):
    """The mean square of all actions, in environment units."""

    def __call__(self, rollouts: Rollouts) -> Float[Tensor, "B S"]:
        """Return the cost of each candidate."""
        return rollouts.actions.square().mean(dim=(2, 3))


@dataclass(frozen=True, kw_only=True)
class Smoothness(Objective):
    """The mean squared change of the actions from one environment step to the next; an action has `size` values.

    The first action is compared with the last executed action, if the context contains one.
    """

    size: int

    def __call__(self, rollouts: Rollouts) -> Float[Tensor, "B S"]:
        """Return the cost of each candidate."""
        line = rollouts.actions.unflatten(-1, (-1, self.size)).flatten(2, 3)
        taken = rollouts.context.taken
        if taken is not None:
            line = torch.cat([taken[:, None, None].to(line).expand_as(line[:, :, :1]), line], dim=2)
        if line.shape[2] < 2:
            return torch.zeros_like(line[:, :, 0, 0])
        cost: Tensor = line.diff(dim=2).square().mean(dim=(2, 3))
        return cost


@dataclass(frozen=True, kw_only=True)
class Unusual(Objective):
    """How unusual a plan's blocks are in the logs: by how much the log density of each falls below the typical one.

    The cost is the mean over the blocks, in nats for each value of a block. A block that is as probable as the median
    block of the logs costs nothing. A search exploits errors of the model, which are largest where the logs never act:
    from experts that never touch a wall, a model does not learn that walls stop an agent.
    """

    prior: BehaviourPrior

    def __call__(self, rollouts: Rollouts) -> Float[Tensor, "B S"]:
        """Return the cost of each candidate."""
        context, actions = rollouts.context, rollouts.actions
        batch, candidates, horizon, size = actions.shape
        seen = torch.cat([_each(context.latents, candidates), rollouts.latents[:, :, :-1]], dim=2)
        done = torch.cat([_each(context.actions, candidates), actions[:, :, :-1]], dim=2)
        length = context.latents.shape[1]
        before = Context(
            latents=seen.unfold(2, length, 1).movedim(-1, 3).flatten(0, 2),
            actions=torch.stack([done[:, :, at : at + length - 1] for at in range(horizon)], dim=2).flatten(0, 2),
        )
        surplus: Tensor = self.prior(before, actions.flatten(0, 2)).view(batch, candidates, horizon)
        return (-surplus).clamp_min(0).mean(dim=-1) / size


def _each(values: Float[Tensor, "B K D"], candidates: int) -> Float[Tensor, "B S K D"]:
    return values[:, None].expand(-1, candidates, -1, -1)


@dataclass(frozen=True, kw_only=True)
class Elapsed(Objective):
    """The fraction of the plan before a stage is reached; 1 if it is never reached."""

    stage: Stage

    def __call__(self, rollouts: Rollouts) -> Float[Tensor, "B S"]:
        """Return the cost of each candidate."""
        reached = (self.stage.away(rollouts) <= 0).cummax(dim=-1).values
        return 1 - reached.float().mean(dim=-1)

    def select(self, rows: Tensor | slice) -> "Elapsed":
        """Return the objective for the environments `rows`."""
        return replace(self, stage=self.stage.select(rows))


@dataclass(frozen=True, kw_only=True)
class Avoid(Objective):
    """A penalty for breaking a guardrail: the mean violation over the plan, up to the step where `until` is reached.

    This is a cost, not a limit: a plan may break the guardrail if that lowers the total cost.
    """

    rail: Guardrail
    until: Stage | None = None

    def __call__(self, rollouts: Rollouts) -> Float[Tensor, "B S"]:
        """Return the cost of each candidate."""
        broken = self.rail.violation(rollouts).clamp_min(0)
        if self.until is not None:
            before = (self.until.away(rollouts) > 0).cummin(dim=-1).values
            broken = broken * before
        return broken.mean(dim=-1)

    def select(self, rows: Tensor | slice) -> "Avoid":
        """Return the objective for the environments `rows`."""
        return Avoid(rail=self.rail.select(rows), until=None if self.until is None else self.until.select(rows))


@dataclass(frozen=True, kw_only=True)
class InformationGain(Objective):
    """Seek states where the planning model and separately trained `models` disagree.

    The cost is minus the mean distance of their predictions from the predictions' mean, in step lengths.
    """

    models: tuple[WorldModel, ...]
    step_length: float

    def __call__(self, rollouts: Rollouts) -> Float[Tensor, "B S"]:
        """Return the cost of each candidate, at most 0."""
        every = [model.rollout(rollouts.context, rollouts.actions) for model in self.models]
        predictions = torch.stack([rollouts.latents, *every])
        spread = (predictions - predictions.mean(dim=0)).norm(dim=-1).mean(dim=(0, -1))
        cost: Tensor = -spread / self.step_length
        return cost


@dataclass(frozen=True)
class InOrder(Objective):
    """Reach stages in order: a stage counts only from the step in which the previous stage was reached.

    Each stage that a plan does not reach costs `unreached`. The first unreached stage also costs its mean distance over
    the steps that count, plus its distance at the last step. In environment b, the first `done[b]` stages have been
    reached already.

    Raises:
        PlanningError: `stages` is empty.
    """

    aims = staged = True

    stages: Sequence[Stage]
    _: KW_ONLY
    unreached: float = 100.0
    done: Int[Tensor, "B"] | None = None

    def __post_init__(self) -> None:
        if not self.stages:
            raise PlanningError("a sequence needs at least one stage; got none. Pass the stages in their order")

    def __call__(self, rollouts: Rollouts) -> Float[Tensor, "B S"]:
        """Return the cost of each candidate."""
        steps = torch.arange(rollouts.latents.shape[2], device=rollouts.latents.device)
        shape = rollouts.latents.shape[:2]
        start = torch.zeros(shape, dtype=torch.long, device=steps.device)
        cost, stuck = rollouts.latents.new_zeros(shape), torch.zeros(shape, dtype=torch.bool, device=steps.device)
        for number, stage in enumerate(self.stages):
            away = stage.away(rollouts)
            counts = steps >= start[..., None]
            reached = counts & (away <= 0)
            first = torch.where(reached, steps, len(steps)).amin(dim=-1)
            behind = torch.zeros_like(stuck) if self.done is None else (self.done > number)[:, None].expand(shape)
            missed = ~behind & (first >= len(steps))
            # The distance counts only for the first missed stage.
            far = away.clamp_min(0)
            along = (far * counts).sum(dim=-1) / counts.sum(dim=-1).clamp_min(1) + far[..., -1]
            cost = cost + torch.where(missed, self.unreached, 0.0) + torch.where(missed & ~stuck, along, 0.0)
            stuck = stuck | missed
            start = torch.where(behind, start, torch.where(missed, len(steps), first))
            # Reaching a stage sooner is better, but counts less than any other term.
            cost = cost + torch.where(behind | missed, 0.0, first / len(steps))
        return cost

    def progress(self, context: Context, done: Int[Tensor, "B"] | None) -> Int[Tensor, "B"]:
        """Return the number of completed stages of each environment: `done`, and those that its state completes now."""
        here = Rollouts(
            context=context,
            actions=context.latents.new_zeros(context.batch, 1, 1, 0),
            latents=context.latents[:, None, -1:],
        )
        reached = torch.stack([stage.away(here)[:, 0, 0] <= 0 for stage in self.stages])
        behind = torch.zeros_like(reached[0], dtype=torch.long) if done is None else done
        for number, there in enumerate(reached):
            behind = torch.where((behind == number) & there, number + 1, behind)
        return behind

    def since(self, done: Int[Tensor, "B"]) -> "InOrder":
        """Return the objective of the remaining stages."""
        return replace(self, done=done)

    def select(self, rows: Tensor | slice) -> "InOrder":
        """Return the objective for the environments `rows`."""
        done = None if self.done is None else self.done[rows]
        return replace(self, stages=[stage.select(rows) for stage in self.stages], done=done)


class WeightedSum(Objective):
    """A weighted sum of objectives; the goal of the sum is the goal of the first part that has one.

    Raises:
        PlanningError: `parts` is empty.
    """

    def __init__(self, parts: Sequence[tuple[float, Objective]]) -> None:
        if not parts:
            raise PlanningError("a weighted sum needs at least one objective; got none. Pass (weight, objective) pairs")
        self.parts = tuple(parts)
        self.goal = next((part.goal for _, part in self.parts if part.goal is not None), None)
        self.aims = any(part.aims for _, part in self.parts)
        self.staged = any(part.staged for _, part in self.parts)

    def __call__(self, rollouts: Rollouts) -> Float[Tensor, "B S"]:
        """Return the cost of each candidate."""
        costs = [weight * objective(rollouts) for weight, objective in self.parts]
        return torch.stack(costs).sum(0)

    def progress(self, context: Context, done: Int[Tensor, "B"] | None) -> Int[Tensor, "B"] | None:
        """Return the number of completed stages of the first staged part, per environment; None without such a part."""
        return next((part.progress(context, done) for _, part in self.parts if part.staged), None)

    def since(self, done: Int[Tensor, "B"]) -> "WeightedSum":
        """Return the sum with only the remaining stages of the first staged part; other parts stay the same."""
        first = next((number for number, (_, part) in enumerate(self.parts) if part.staged), None)
        parts = enumerate(self.parts)
        return WeightedSum([(weight, part.since(done) if place == first else part) for place, (weight, part) in parts])

    def select(self, rows: Tensor | slice) -> "WeightedSum":
        """Return the objective for the environments `rows`."""
        return WeightedSum([(weight, part.select(rows)) for weight, part in self.parts])


@dataclass(frozen=True)
class FunctionObjective(Objective):
    """A plain function of rollouts as an objective; it must not depend on per-environment values."""

    function: Callable[[Rollouts], Tensor]

    def __call__(self, rollouts: Rollouts) -> Float[Tensor, "B S"]:
        """Return the function's cost of each candidate.

        Raises:
            PlanningError: the function fails. The planner calls it on parts of the batch, so it fails for example if it
                stores one value for each environment of the whole batch.
        """
        try:
            return self.function(rollouts)
        except RuntimeError as error:
            raise PlanningError(
                f"the objective failed on a part of the batch: {error}. Correct the function; if the function stores "
                f"per-environment values, subclass worldloom.core.seams.Objective and define select(rows)"
            ) from error


def as_objective(objective: Objective | Callable[[Rollouts], Tensor]) -> Objective:
    """Return the objective, or a plain function wrapped as an objective."""
    return objective if isinstance(objective, Objective) else FunctionObjective(objective)
