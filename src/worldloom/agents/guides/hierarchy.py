"""Far goals with coarser models: the first state of a coarser model's plan is the subgoal of the finer model."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor

from worldloom.core.config import Config
from worldloom.core.errors import PlanningError
from worldloom.core.seeds import torch_generator
from worldloom.core.types import Context, Plan
from worldloom.heads import still
from worldloom.planning import GoalObjective, LatentL2, Planner


class HierarchyConfig(Config):
    """How deep to plan; lengths are in typical steps of the fast model.

    If the fast model's plan does not come within `arrival` of the goal, the agent follows coarser model number `depth`
    (0: never). With `depth=None`, the agent tries the coarser models at each decision, finest first, until the plan of
    the model chosen so far (at first, the fast model) comes within `arrival` of the goal. It chooses a coarser model
    only under two conditions. First, the smallest distance of its plan to the goal is below `ratio` times that of the
    model chosen so far. Second, the finer models can follow it: each finer model plans towards the first state of the
    next coarser model's plan, and comes within `arrival` of that state.
    """

    depth: int | None = Field(default=None, ge=0)
    arrival: float = Field(default=1.0, gt=0)
    ratio: float = Field(default=0.5, gt=0, le=1)


@dataclass
class _Leg:
    """One environment on its way to a subgoal, or to the goal itself if there is no subgoal."""

    subgoal: Tensor | None = None
    left: int = 0  # number of plans before a subgoal is chosen again


class HierarchyGuide:
    """Aims a planning agent at the first state of a coarser model's plan.

    The goal of that plan may in turn be the first state of a still coarser model's plan. `levels` are planners,
    starting with the planner of the fast model; one step of level i is `strides[i]` blocks of the fast model.
    `depths` contains the level that each environment follows; 0 is the fast model only.

    Raises:
        PlanningError: there is no coarser model, the strides do not match the levels, or the depth exceeds the number
            of coarser models.
    """

    def __init__(
        self,
        levels: Sequence[Planner],
        strides: Sequence[int],
        config: HierarchyConfig | None = None,
        *,
        step_length: float,
        seed: int = 0,
    ) -> None:
        self.config = config or HierarchyConfig()
        if len(strides) != len(levels):
            raise PlanningError(
                f"expected one stride for each planner; got {len(levels)} planners and {len(strides)} strides. Pass "
                f"a planner and a stride for each level"
            )
        if len(levels) < 2 or (self.config.depth or 0) >= len(levels):
            raise PlanningError(
                f"expected the planners of the fast model and of at least {self.config.depth or 1} coarser models; got "
                f"{len(levels)} planners. Add coarser models{', or lower the depth' if self.config.depth else ''}"
            )
        self._levels, self._strides, self._step_length = list(levels), list(strides), step_length
        self._generator = torch_generator(seed, "hierarchy", device=levels[0].model.device)
        self._goal = torch.empty(0, 0)
        self._legs: list[_Leg] = []
        self.depths: list[int] = []

    def reset(self, goal: Float[Tensor, "B D"]) -> None:
        """Begin an episode with a goal for each environment."""
        self._goal, self._legs = goal, [_Leg() for _ in goal]
        self.depths = [0] * len(goal)

    def select(self, places: Sequence[int]) -> None:
        """Keep only these environments, given by their places in the last batch, in this order."""
        self._goal = self._goal[list(places)]
        self._legs = [self._legs[place] for place in places]
        self.depths = [self.depths[place] for place in places]

    def __call__(self, context: Context, followed: Plan | None, blocks: int) -> Float[Tensor, "B D"]:
        """Return the subgoal of each environment, or the goal of an environment that follows no coarser model."""
        return self.aim(context, range(len(self._legs)))

    def aim(self, context: Context, rows: Sequence[int]) -> Float[Tensor, "_ D"]:
        """Return the latents that the environments `rows` should aim at."""
        due = []
        for row in rows:
            leg = self._legs[row]
            leg.left -= 1
            if leg.subgoal is not None and self._gaps(context.latents[row, -1], leg.subgoal) <= self.config.arrival:
                leg.left = 0
            if leg.left <= 0:
                due.append(row)
        if due:
            depths, subgoals = self._choose(context[due], self._goal[due])
            for row, depth, subgoal in zip(due, depths.tolist(), subgoals, strict=True):
                self.depths[row] = depth
                self._legs[row] = _Leg(subgoal if depth else None, self._strides[1])
        legs = [(self._legs[row].subgoal, self._goal[row]) for row in rows]
        return torch.stack([goal if subgoal is None else subgoal for subgoal, goal in legs])

    def _choose(self, context: Context, goal: Float[Tensor, "B D"]) -> tuple[Int[Tensor, "B"], Float[Tensor, "B D"]]:
        """Return each environment's level (0: the fast model only), and the subgoal of the fast model."""
        wanted, ratio = self.config.depth, self.config.ratio
        depth, subgoal = torch.zeros(len(goal), dtype=torch.long, device=goal.device), goal.clone()
        near = self._foresee(0, context, goal)[1]
        for level in [wanted] if wanted else range(1, len(self._levels)) if wanted is None else []:
            (rows,) = torch.where(near > self.config.arrival)
            if not len(rows):
                break
            some = context[rows]
            plan, nearer = self._foresee(level, some, goal[rows])
            aim, follow = plan.latents[:, 0], torch.ones_like(rows, dtype=torch.bool)
            if wanted is None:
                follow = nearer < ratio * near[rows]
            for below in range(level - 1, -1, -1):
                plan, gap = self._foresee(below, some, aim)
                if wanted is None:
                    follow = follow & (gap <= self.config.arrival)
                if below:
                    aim = plan.latents[:, 0]
            rows, aim, nearer = rows[follow], aim[follow], nearer[follow]
            depth[rows], subgoal[rows], near[rows] = level, aim, nearer
        return depth, subgoal

    def _foresee(self, level: int, context: Context, goal: Float[Tensor, "B D"]) -> tuple[Plan, Float[Tensor, "B"]]:
        """Return a level's plan, and the smallest distance to the goal along it."""
        planner = self._levels[level]
        if level:
            context = still(context.latents[:, -1], planner.model)
        plan = planner.plan(context, GoalObjective(LatentL2(self._step_length), goal), generator=self._generator)
        return plan, self._gaps(plan.latents, goal[:, None]).min(dim=1).values

    def _gaps(self, latents: Float[Tensor, "*#axes D"], goals: Float[Tensor, "*#axes D"]) -> Float[Tensor, "..."]:
        gaps: Tensor = (latents - goals).norm(dim=-1) / self._step_length
        return gaps
