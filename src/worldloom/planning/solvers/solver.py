"""The base class of solvers, and the helpers that they share."""

from abc import abstractmethod
from dataclasses import dataclass
from typing import Annotated

import torch
from jaxtyping import Float
from pydantic import BeforeValidator, SerializeAsAny
from torch import Tensor

from worldloom.core.config import Component, component_of
from worldloom.core.registry import Registry
from worldloom.planning.problem import FORBIDDEN, PlanningProblem


@dataclass(frozen=True, kw_only=True)
class Solution:
    """The chosen actions of each environment, and the cost of these actions by the solver's measure."""

    actions: Float[Tensor, "B T A"]
    cost: Float[Tensor, "B"]


class Solver(Component):
    """A search for good actions: a configuration with a method `solve`, whose result depends only on its arguments.

    To add a solver, write one file with a subclass, its `solve` and `@SOLVERS.register(name)`.
    """

    @abstractmethod
    def solve(
        self, problem: PlanningProblem, *, initial: Float[Tensor, "B I T A"] | None, generator: torch.Generator
    ) -> Solution:
        """Return actions within the bounds; no `initial` candidate is better by the solver's measure.

        `initial` are I candidates for each environment, such as the last plan.
        """


SOLVERS: Registry[type[Solver]] = Registry("solver")

# The field type for a solver in a configuration: `name` selects the class, and all options are written.
SolverField = Annotated[SerializeAsAny[Solver], BeforeValidator(component_of(SOLVERS))]


def pick(candidates: Float[Tensor, "B S T A"], index: Tensor) -> Float[Tensor, "B K T A"]:
    """Return the candidates at the positions `index` (B, K)."""
    return candidates[torch.arange(len(index), device=index.device)[:, None], index]


def better_of(best: Solution | None, candidates: Float[Tensor, "B S T A"], cost: Float[Tensor, "B S"]) -> Solution:
    """Return the better of `best` and the best candidate, for each environment."""
    lowest, index = cost.min(dim=1)
    actions = pick(candidates, index[:, None])[:, 0]
    if best is None:
        return Solution(actions=actions, cost=lowest)
    better = lowest < best.cost
    return Solution(
        actions=torch.where(better[:, None, None], actions, best.actions), cost=torch.minimum(lowest, best.cost)
    )


def agree(costs: Float[Tensor, "B K"], share: float) -> bool:
    """Return whether the elites agree in all environments: their costs differ by less than `share` times the lowest.

    `costs` are in ascending order. Elites do not agree if `share` is 0 or if one of the elites breaks a guardrail.
    """
    settled = (costs[:, -1] - costs[:, 0] < share * costs[:, 0].abs()) & (costs[:, -1] <= FORBIDDEN)
    return share > 0 and bool(settled.all())


def spread(costs: Float[Tensor, "B S"]) -> Float[Tensor, "B 1"]:
    """Return the standard deviation of the costs of allowed candidates, or of all finite costs if none is allowed."""
    allowed = costs <= FORBIDDEN
    counted = torch.where(allowed.any(dim=1, keepdim=True), allowed, costs.isfinite())
    number = counted.sum(dim=1, keepdim=True).clamp_min(2)
    values = torch.where(counted, costs, 0.0)
    mean = values.sum(dim=1, keepdim=True) / number
    squares = torch.where(counted, (costs - mean).nan_to_num().square(), 0.0).sum(dim=1, keepdim=True)
    deviation: Tensor = (squares / (number - 1)).sqrt()
    return deviation.clamp_min(1e-12)


def start(problem: PlanningProblem, initial: Float[Tensor, "B I T A"] | None) -> Float[Tensor, "B _ T A"]:
    """Return the projected initial candidates, or the middle of the bounds if there are no initial candidates."""
    if initial is not None and initial.shape[1]:
        return problem.project(initial)
    middle = (problem.bounds.low + problem.bounds.high) / 2
    return problem.project(middle.expand(problem.batch, 1, problem.horizon, -1))


def held_noise(
    problem: PlanningProblem, samples: int, held: float, generator: torch.Generator
) -> Float[Tensor, "B S T A"]:
    """Return normal noise of unit variance; the actions of a block share the fraction `held` of its variance."""
    spec = problem.model.spec
    axes = (problem.batch, samples, problem.horizon)
    each = torch.randn(*axes, spec.block, spec.action.size, generator=generator, device=problem.device)
    common = torch.randn(*axes, 1, spec.action.size, generator=generator, device=problem.device)
    noise: Tensor = each * (1 - held) ** 0.5 + common * held**0.5
    return noise.flatten(-2)
