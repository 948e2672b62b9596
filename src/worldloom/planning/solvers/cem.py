"""The cross-entropy method."""

from typing import Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from worldloom.core.actions import Walk
from worldloom.planning.problem import PlanningProblem
from worldloom.planning.solvers.solver import SOLVERS, Solution, Solver, agree, better_of, held_noise, pick, start


@SOLVERS.register("cem")
class CEM(Solver):
    """Sample from a normal distribution, refit the distribution to the elites, and repeat (Rubinstein 1999).

    Deviations are in units of half an action's range. The actions of a block share the fraction `held` of the noise's
    variance, because noise that is independent at each step averages out and explores little. The fraction `walks` of
    the first samples are persistent random walks. The search stops early if the elites agree in all environments: every
    deviation is below `stop_below`, or their costs differ by less than the fraction `stop_spread` of the lowest cost.
    """

    name: Literal["cem"] = "cem"
    samples: int = Field(default=64, ge=2)
    iterations: int = Field(default=3, ge=1)
    elites: int = Field(default=8, ge=2)
    deviation: float = Field(default=0.85, gt=0)
    least_deviation: float = Field(default=0.05, ge=0)
    held: float = Field(default=0.85, ge=0, le=1)
    walks: float = Field(default=0.5, ge=0, le=1)
    walk: Walk = Walk()
    stop_below: float = Field(default=0.0, ge=0)
    stop_spread: float = Field(default=0.0, ge=0, lt=1)

    def solve(
        self, problem: PlanningProblem, *, initial: Float[Tensor, "B I T A"] | None, generator: torch.Generator
    ) -> Solution:
        """Search by refitting the distribution; see `Solver.solve`."""
        spec, bounds = problem.model.spec, problem.bounds
        half = (bounds.high - bounds.low) / 2
        kept = start(problem, initial)
        mean, deviation = kept[:, 0], self.deviation * half.expand_as(kept[:, 0])
        walking = round(self.walks * self.samples)
        best: Solution | None = None
        for iteration in range(self.iterations):
            drawn = self.samples - (walking if iteration == 0 else 0)
            noise = held_noise(problem, drawn, self.held, generator)
            candidates = [kept, problem.project(mean[:, None] + deviation[:, None] * noise)]
            if iteration == 0 and walking:
                shape = (problem.batch, walking, problem.horizon)
                candidates.append(self.walk.sample(spec, bounds, shape, generator))
            population = torch.cat(candidates, dim=1)
            cost = problem.evaluate(population, best=self.elites)
            best = better_of(best, population, cost)
            lowest, places = cost.topk(min(self.elites, cost.shape[1]), dim=1, largest=False)
            elites = pick(population, places)
            mean = elites.mean(1)
            spread = elites.std(1)
            deviation = torch.maximum(spread, self.least_deviation * half)
            kept = problem.project(mean)[:, None]
            if self.stop_below and bool((spread < self.stop_below * half).all()):
                break
            if agree(lowest, self.stop_spread):
                break
            if iteration + 1 < self.iterations and problem.deadline.reached():
                return best
        assert best is not None
        return better_of(best, kept, problem.evaluate(kept, below=best.cost))
