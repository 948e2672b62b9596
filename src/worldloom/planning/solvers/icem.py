"""The improved cross-entropy method (Pinneri et al., arXiv 2008.06389)."""

from typing import Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from worldloom.planning.problem import PlanningProblem
from worldloom.planning.solvers.solver import SOLVERS, Solution, Solver, agree, better_of, pick, start


@SOLVERS.register("icem")
class ICEM(Solver):
    """CEM with coloured noise along time, fewer samples in each iteration, kept elites and momentum.

    `colour` is the exponent b of the noise's power spectrum 1 / f^b: 0 is white, 2 is brown. Each iteration has `decay`
    times fewer samples. The fraction `kept_elites` of the elites joins the next samples, and the fraction `momentum` of
    the old mean and deviation is kept. Deviations are in units of half an action's range. The search stops early if, in
    all environments, the elites' costs differ by less than the fraction `stop_spread` of the lowest cost.
    """

    name: Literal["icem"] = "icem"
    samples: int = Field(default=64, ge=2)
    iterations: int = Field(default=3, ge=1)
    elites: int = Field(default=8, ge=2)
    deviation: float = Field(default=0.8, gt=0)
    colour: float = Field(default=2.0, ge=0)
    decay: float = Field(default=1.25, ge=1)
    kept_elites: float = Field(default=0.3, ge=0, le=1)
    momentum: float = Field(default=0.1, ge=0, lt=1)
    stop_spread: float = Field(default=0.0, ge=0, lt=1)

    def solve(
        self, problem: PlanningProblem, *, initial: Float[Tensor, "B I T A"] | None, generator: torch.Generator
    ) -> Solution:
        """Search by refitting the distribution; see `Solver.solve`."""
        spec = problem.model.spec
        half = (problem.bounds.high - problem.bounds.low) / 2
        kept = start(problem, initial)
        mean, deviation = kept[:, 0], self.deviation * half.expand_as(kept[:, 0])
        colouring = colouring_matrix(problem.horizon * spec.block, self.colour).to(problem.device)
        best: Solution | None = None
        for iteration in range(self.iterations):
            samples = max(round(self.samples * self.decay**-iteration), 2 * self.elites)
            white = torch.randn(
                problem.batch, samples, spec.action.size, len(colouring), generator=generator, device=problem.device
            )
            noise = (white @ colouring).transpose(-1, -2).reshape(problem.batch, samples, problem.horizon, -1)
            drawn = problem.project(mean[:, None] + deviation[:, None] * noise)
            population = torch.cat([kept, drawn], dim=1)
            if iteration == self.iterations - 1:
                population = torch.cat([population, problem.project(mean)[:, None]], dim=1)
            cost = problem.evaluate(population, best=self.elites)
            best = better_of(best, population, cost)
            lowest, places = cost.topk(min(self.elites, cost.shape[1]), dim=1, largest=False)
            elites = pick(population, places)
            mean = torch.lerp(elites.mean(1), mean, self.momentum)
            deviation = torch.lerp(elites.std(1), deviation, self.momentum)
            kept = elites[:, : max(1, round(self.kept_elites * self.elites))]
            if agree(lowest, self.stop_spread) or (iteration + 1 < self.iterations and problem.deadline.reached()):
                break
        assert best is not None
        return best


def colouring_matrix(steps: int, exponent: float) -> Float[Tensor, "L N"]:
    """Return the matrix that turns rows of white noise into noise of unit variance with spectrum 1 / f^exponent.

    The noise is generated at twice the length, so that its end does not correlate with its beginning (Timmer and
    Koenig 1995).
    """
    frequency = torch.fft.rfftfreq(2 * steps)
    frequency[0] = frequency[1]
    response = torch.fft.irfft(frequency ** (-exponent / 2), n=2 * steps)
    lag = torch.arange(2 * steps)
    matrix = response[(lag[None] - lag[:, None]) % (2 * steps)][:, :steps]
    unit: Tensor = matrix / matrix.norm(dim=0)
    return unit
