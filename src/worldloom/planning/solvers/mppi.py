"""Model predictive path integral control (Williams et al., arXiv 1707.02342)."""

from typing import Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from worldloom.planning.problem import PlanningProblem
from worldloom.planning.solvers.solver import SOLVERS, Solution, Solver, better_of, held_noise, spread, start


@SOLVERS.register("mppi")
class MPPI(Solver):
    """Move the plan by the noise of the samples, weighted by exp(-cost / temperature).

    This is the paper's information-theoretic form: u <- u + sum_k w_k e_k with w = softmax(-(S + control u' Sigma^-1 e)
    / temperature), where u is the plan, e the noise of the samples with covariance Sigma, and S their cost.
    `temperature` and `control` are in standard deviations of the costs of one iteration, so they do not depend on the
    unit of the cost. The noise's deviation, in units of half an action's range, is multiplied by `decay` in each
    iteration. The actions of a block share the fraction `held` of the noise's variance.
    """

    name: Literal["mppi"] = "mppi"
    samples: int = Field(default=128, ge=2)
    iterations: int = Field(default=3, ge=1)
    deviation: float = Field(default=0.6, gt=0)
    decay: float = Field(default=0.5, gt=0, le=1)
    temperature: float = Field(default=0.1, gt=0)
    control: float = Field(default=0.0, ge=0)
    held: float = Field(default=0.85, ge=0, le=1)

    def solve(
        self, problem: PlanningProblem, *, initial: Float[Tensor, "B I T A"] | None, generator: torch.Generator
    ) -> Solution:
        """Search by weighted averages of noise; see `Solver.solve`."""
        middle = (problem.bounds.low + problem.bounds.high) / 2
        half = (problem.bounds.high - problem.bounds.low) / 2
        kept = start(problem, initial)
        best = better_of(None, kept, problem.evaluate(kept))
        plan = best.actions
        for iteration in range(self.iterations):
            if iteration and problem.deadline.reached():
                break
            sigma = self.deviation * self.decay**iteration * half
            noise = sigma * held_noise(problem, self.samples, self.held, generator)
            candidates = problem.project(plan[:, None] + noise)
            cost = problem.evaluate(candidates)
            best = better_of(best, candidates, cost)
            taken = candidates - plan[:, None]  # the noise that remains after clamping to the bounds
            control = ((plan - middle)[:, None] * taken / sigma.square()).sum((-2, -1))
            weights = torch.softmax(
                -((cost - best.cost[:, None]) / spread(cost) + self.control * control) / self.temperature, 1
            )
            plan = plan + (weights[..., None, None] * taken).sum(1)
        final = problem.project(plan)[:, None]
        return better_of(best, final, problem.evaluate(final))
