"""What a plan is to achieve, as costs over predicted futures."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from worldloom.core.errors import PlanningError
from worldloom.core.seams import Area, Guardrail, Metric, Objective, Quantity, Selectable, Stage, Staged, WorldModel
from worldloom.core.types import Context, Rollouts


@dataclass(frozen=True)
class LatentL2:
    """Euclidean distance of latents, in units of `step_length`: the typical length of one model step.

    Not squared, so that it pulls as hard from afar as from near. Misleads where a wall lies between.
    """

    step_length: float = 1.0

    def __call__(self, latents: Float[Tensor, "*#axes D"], goal: Float[Tensor, "*#axes D"]) -> Float[Tensor, "..."]:
        """Return the distance."""
        distance: Tensor = (latents - goal).norm(dim=-1) / self.step_length
        return distance


class _Reach(ABC):
    """Costs of a stage along a plan: the mean distance, plus `last_weight` times the last one."""

    last_weight: float

    @abstractmethod
    def away(self, rollouts: Rollouts) -> Float[Tensor, "B S T"]:
        """Return how far each predicted state is from what is to be reached; 0 or less where it is."""

    def __call__(self, rollouts: Rollouts) -> Float[Tensor, "B S"]:
        """Return the cost of each candidate."""
        away = self.away(rollouts).clamp_min(0)
        return away.mean(-1) + self.last_weight * away[..., -1]


class GoalObjective(_Reach):
    """Reach a goal latent: the mean distance along the plan plus `last_weight` times the last one.

    The mean settles what the last alone leaves open, so that the agent does not dither before a door. Nearer than
    `within` counts as there.
    """

    def __init__(
        self, metric: Metric, goal: Float[Tensor, "B D"], *, last_weight: float = 1.0, within: float = 0.0
    ) -> None:
        self.metric, self.goal, self.last_weight, self.within = metric, goal, last_weight, within

    def away(self, rollouts: Rollouts) -> Float[Tensor, "B S T"]:
        """Return how much farther than `within` each predicted state is from the goal."""
        return self.metric(rollouts.latents, self.goal[:, None, None]) - self.within

    def select(self, environments: Tensor | slice) -> "GoalObjective":
        """Return the objective of some environments."""
        goal = self.goal[environments]
        return GoalObjective(self.metric, goal, last_weight=self.last_weight, within=self.within)


@dataclass(frozen=True, kw_only=True)
class VectorGoal(_Reach):
    """A probed quantity comes within `within` of a target, in its own unit; the target is (L,), or (B, L)."""

    quantity: Quantity
    target: Float[Tensor, "*B L"]
    within: float = 0.0
    last_weight: float = 1.0

    def away(self, rollouts: Rollouts) -> Float[Tensor, "B S T"]:
        """Return how much farther than `within` each predicted state is from the target."""
        target = self.target if self.target.ndim == 1 else self.target[:, None, None]
        gaps: Tensor = (self.quantity(rollouts.latents) - target).norm(dim=-1)
        return gaps - self.within

    def select(self, environments: Tensor | slice) -> "VectorGoal":
        """Return the objective of some environments."""
        return self if self.target.ndim == 1 else replace(self, target=self.target[environments])


@dataclass(frozen=True, kw_only=True)
class RegionGoal(_Reach):
    """A probed quantity comes into a region."""

    quantity: Quantity
    region: Area
    last_weight: float = 1.0

    def away(self, rollouts: Rollouts) -> Float[Tensor, "B S T"]:
        """Return how far outside each predicted state is."""
        return -self.region.depth(self.quantity(rollouts.latents))


@dataclass(frozen=True, kw_only=True)
class StayNear:
    """Never go far from a place: the greatest distance along the plan from latents (B, D)."""

    metric: Metric
    place: Float[Tensor, "B D"]

    def __call__(self, rollouts: Rollouts) -> Float[Tensor, "B S"]:
        """Return the cost of each candidate."""
        return self.metric(rollouts.latents, self.place[:, None, None]).amax(dim=-1)

    def select(self, environments: Tensor | slice) -> "StayNear":
        """Return the objective of some environments."""
        return replace(self, place=self.place[environments])


@dataclass(frozen=True, kw_only=True)
class Effort:
    """The mean square of all actions, in their own unit."""

    def __call__(self, rollouts: Rollouts) -> Float[Tensor, "B S"]:
        """Return the cost of each candidate."""
        return rollouts.actions.square().mean(dim=(2, 3))


@dataclass(frozen=True, kw_only=True)
class Smoothness:
    """The mean square of how much actions change from one environment step to the next; `size` values make an action.

    The first is compared with the last one taken, where the context says which that was.
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
class Elapsed:
    """The share of the plan that is over before a stage is reached; 1 where it never is."""

    stage: Stage

    def __call__(self, rollouts: Rollouts) -> Float[Tensor, "B S"]:
        """Return the cost of each candidate."""
        reached = (self.stage.away(rollouts) <= 0).cummax(dim=-1).values
        return 1 - reached.float().mean(dim=-1)

    def select(self, environments: Tensor | slice) -> "Elapsed":
        """Return the objective of some environments."""
        return replace(self, stage=_selected(self.stage, environments))


@dataclass(frozen=True, kw_only=True)
class Avoid:
    """Rather not break a guardrail: the mean over the plan of how much it is broken, up to where `until` is reached.

    A cost and no limit: it is paid where the goal is worth it.
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

    def select(self, environments: Tensor | slice) -> "Avoid":
        """Return the objective of some environments."""
        until = None if self.until is None else _selected(self.until, environments)
        return Avoid(rail=self.rail, until=until)


@dataclass(frozen=True, kw_only=True)
class InformationGain:
    """Go where models that were trained apart disagree: less the mean spread of what they predict, in step lengths."""

    models: tuple[WorldModel, ...]
    step_length: float

    def __call__(self, rollouts: Rollouts) -> Float[Tensor, "B S"]:
        """Return the cost of each candidate; it is never above 0."""
        every = [model.rollout(rollouts.context, rollouts.actions) for model in self.models]
        predictions = torch.stack([rollouts.latents, *every])
        spread = (predictions - predictions.mean(dim=0)).norm(dim=-1).mean(dim=(0, -1))
        cost: Tensor = -spread / self.step_length
        return cost


class InOrder:
    """Reach one stage after another: what comes later counts from where what comes before was reached.

    Each stage that a plan does not reach costs `unreached`; of the first of them the distance counts as well, the mean
    from where the one before was reached and the last. `done` stages of each environment lie behind it already.

    Raises:
        PlanningError: there is no stage.
    """

    def __init__(
        self, stages: Sequence[Stage], *, unreached: float = 100.0, done: Int[Tensor, "B"] | None = None
    ) -> None:
        if not stages:
            raise PlanningError("a sequence needs at least one stage; got none")
        self.stages, self.unreached, self.done = tuple(stages), unreached, done

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
            # How far it stays away, where this is what the plan is about: nothing before it was missed.
            far = away.clamp_min(0)
            along = (far * counts).sum(dim=-1) / counts.sum(dim=-1).clamp_min(1) + far[..., -1]
            cost = cost + torch.where(missed, self.unreached, 0.0) + torch.where(missed & ~stuck, along, 0.0)
            stuck = stuck | missed
            start = torch.where(behind, start, torch.where(missed, len(steps), first))
            # What is reached sooner is better, by less than anything else counts.
            cost = cost + torch.where(behind | missed, 0.0, first / len(steps))
        return cost

    def progress(self, context: Context, done: Int[Tensor, "B"] | None) -> Int[Tensor, "B"]:
        """Return how many stages lie behind each environment, by where it is now."""
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
        """Return the objective of what is left."""
        return InOrder(self.stages, unreached=self.unreached, done=done)

    def select(self, environments: Tensor | slice) -> "InOrder":
        """Return the objective of some environments."""
        stages = [_selected(stage, environments) for stage in self.stages]
        done = None if self.done is None else self.done[environments]
        return InOrder(stages, unreached=self.unreached, done=done)


class WeightedSum:
    """Several objectives at once, each with its weight; its goal is that of the first part that has one.

    Raises:
        PlanningError: there is no part.
    """

    def __init__(self, parts: Sequence[tuple[float, Objective]]) -> None:
        if not parts:
            raise PlanningError("a weighted sum needs at least one objective; got none")
        self.parts = tuple(parts)

    @property
    def goal(self) -> Float[Tensor, "B D"] | None:
        """The goal latents, if any part has them."""
        goals = (goal_of(objective) for _, objective in self.parts)
        return next((goal for goal in goals if goal is not None), None)

    def __call__(self, rollouts: Rollouts) -> Float[Tensor, "B S"]:
        """Return the cost of each candidate."""
        costs = [weight * objective(rollouts) for weight, objective in self.parts]
        return torch.stack(costs).sum(0)

    def progress(self, context: Context, done: Int[Tensor, "B"] | None) -> Int[Tensor, "B"] | None:
        """Return how many stages of the first part that has some lie behind each environment; None without one."""
        staged = next((part for _, part in self.parts if isinstance(part, Staged)), None)
        return None if staged is None else staged.progress(context, done)

    def since(self, done: Int[Tensor, "B"]) -> "WeightedSum":
        """Return the objective of what is left of that part, beside the others."""
        first = next((number for number, (_, part) in enumerate(self.parts) if isinstance(part, Staged)), None)
        return WeightedSum([
            (weight, part.since(done) if number == first and isinstance(part, Staged) else part)
            for number, (weight, part) in enumerate(self.parts)
        ])  # fmt: skip

    def select(self, environments: Tensor | slice) -> "WeightedSum":
        """Return the objective of some environments; a part without `select` is kept as it is."""
        return WeightedSum(
            [
                (weight, part.select(environments) if isinstance(part, Selectable) else part)
                for weight, part in self.parts
            ]
        )


def _selected(stage: Stage, environments: Tensor | slice) -> Stage:
    """Narrow a stage to some environments, if it holds anything for each."""
    select = getattr(stage, "select", None)
    if select is None:
        return stage
    selected = select(environments)
    assert isinstance(selected, Stage)
    return selected


def goal_of(objective: Objective) -> Float[Tensor, "B D"] | None:
    """Return the goal latents that an objective holds, or None."""
    goal = getattr(objective, "goal", None)
    return goal if isinstance(goal, Tensor) else None
