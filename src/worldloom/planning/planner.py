"""The planner: one solver on one model, its answer checked outside the solver."""

import torch
from jaxtyping import Float
from torch import Tensor

from worldloom.core.errors import PlanningError
from worldloom.core.protocols import Objective, WorldModel
from worldloom.core.types import ActionBounds, Context, Plan
from worldloom.planning.geometry import LatentGeometry
from worldloom.planning.problem import Deadline, PlanningProblem
from worldloom.planning.solvers.base import Solver


class Planner:
    """Plans `horizon` blocks ahead for B environments at once.

    `geometry` is needed by tree search alone; `bounds` of a block default to the model's.
    """

    def __init__(
        self,
        model: WorldModel,
        solver: Solver,
        *,
        horizon: int,
        geometry: LatentGeometry | None = None,
        bounds: ActionBounds | None = None,
    ) -> None:
        if horizon < 1:
            raise PlanningError(f"a plan needs a horizon of at least one block; got {horizon}")
        self.model, self.solver, self.horizon = model, solver, horizon
        self.geometry, self.bounds = geometry, bounds

    def problem(self, context: Context, objective: Objective, *, deadline: float | None = None) -> PlanningProblem:
        """State a problem to hand to `solve`; it counts the rollouts that its solution takes.

        `deadline` is a moment of `time.monotonic`: the search ends there with the best plan so far.
        """
        return PlanningProblem(
            self.model,
            context,
            objective,
            horizon=self.horizon,
            bounds=self.bounds,
            geometry=self.geometry,
            deadline=Deadline(deadline),
        )

    def plan(
        self,
        context: Context,
        objective: Objective,
        *,
        initial: Float[Tensor, "B I T A"] | None = None,
        generator: torch.Generator,
        deadline: float | None = None,
    ) -> Plan:
        """State and solve a problem in one go; see `problem` and `solve`."""
        problem = self.problem(context, objective, deadline=deadline)
        return self.solve(problem, initial=initial, generator=generator)

    def solve(
        self,
        problem: PlanningProblem,
        *,
        initial: Float[Tensor, "B I T A"] | None = None,
        generator: torch.Generator,
    ) -> Plan:
        """Return the solver's plan with what it is predicted to cause, and at what cost.

        `initial` are candidates to start from: a warm start, a policy's proposal.

        Raises:
            PlanningError: the initial candidates do not fit, or no candidate has a finite cost.
        """
        if initial is not None:
            expected = (problem.batch, problem.horizon, len(problem.bounds.low))
            got = (initial.shape[0], *initial.shape[2:])
            if initial.ndim != 4 or got != expected:
                raise PlanningError(
                    f"initial candidates must have shape ({expected[0]}, any, {expected[1]}, {expected[2]}); got "
                    f"{tuple(initial.shape)}"
                )
        with torch.inference_mode():
            solution = self.solver.solve(problem, initial=initial, generator=generator)
            rollouts = problem.rollout(solution.actions[:, None])
            cost = problem.cost(rollouts)[:, 0]
        if not bool(cost.isfinite().all()):
            row = int((~cost.isfinite()).nonzero()[0, 0])
            raise PlanningError(
                f"the best plan found for environment {row} has cost {cost[row].item()}: the model or the objective "
                f"gives values that are not finite. Check the observations and the training of the model"
            )
        return Plan(
            actions=rollouts.actions[:, 0],
            latents=rollouts.latents[:, 0],
            cost=cost,
            cut_short=problem.deadline.cut_short,
        )
