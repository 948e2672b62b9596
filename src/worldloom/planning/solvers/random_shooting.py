"""Random shooting: the best of many random walks."""

from typing import Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from worldloom.core.actions import Walk
from worldloom.planning.problem import PlanningProblem
from worldloom.planning.solvers.solver import SOLVERS, Solution, Solver, better_of, start


@SOLVERS.register("random-shooting")
class RandomShooting(Solver):
    """Evaluate persistent random walks once and return the best."""

    name: Literal["random-shooting"] = "random-shooting"
    samples: int = Field(default=256, ge=1)
    walk: Walk = Walk()

    def solve(
        self, problem: PlanningProblem, *, initial: Float[Tensor, "B I T A"] | None, generator: torch.Generator
    ) -> Solution:
        """Search among random walks; see `Solver.solve`."""
        shape = (problem.batch, self.samples, problem.horizon)
        walks = self.walk.sample(problem.model.spec, problem.bounds, shape, generator)
        candidates = torch.cat([start(problem, initial), walks], dim=1)
        return better_of(None, candidates, problem.evaluate(candidates, best=1))
