"""Gradient descent through the model."""

from typing import Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from worldloom.planning.actions import Walk
from worldloom.planning.problem import PlanningProblem
from worldloom.planning.solvers.base import SOLVERS, Solution, Solver, better_of, start


@SOLVERS.register("adam")
class Adam(Solver):
    """Follow the cost's gradient with respect to the actions from several starts, by Adam (Kingma and Ba 2015).

    Actions are brought back within bounds after each step. The learning rate is in half ranges of an action; it
    falls to 0 along a line.
    """

    name: Literal["adam"] = "adam"
    starts: int = Field(default=8, ge=1)
    iterations: int = Field(default=10, ge=1)
    learning_rate: float = Field(default=0.3, gt=0)
    walk: Walk = Walk()

    def solve(
        self, problem: PlanningProblem, *, initial: Float[Tensor, "B I T A"] | None, generator: torch.Generator
    ) -> Solution:
        """Solve; see `Solver`."""
        # Planning runs in inference mode, whose tensors cannot be differentiated: leave it, with copies.
        with torch.inference_mode(False), torch.enable_grad():
            problem = problem.copy()
            given = start(problem, None if initial is None else initial.clone())
            shape = (problem.batch, self.starts, problem.horizon)
            walks = self.walk.sample(problem.model.spec, problem.bounds, shape, generator)
            return self._descend(problem, torch.cat([given, walks], dim=1))

    def _descend(self, problem: PlanningProblem, actions: Float[Tensor, "B S T A"]) -> Solution:
        half = (problem.bounds.high - problem.bounds.low) / 2
        first, second = torch.zeros_like(actions), torch.zeros_like(actions)
        best: Solution | None = None
        for step in range(1, self.iterations + 1):
            if step > 1 and problem.deadline.reached():
                assert best is not None
                return Solution(actions=problem.project(best.actions), cost=best.cost)
            actions = actions.detach().requires_grad_()
            cost = problem.evaluate(actions)
            best = better_of(best, actions.detach(), cost.detach())
            (gradient,) = torch.autograd.grad(cost.sum(), actions)
            with torch.no_grad():
                gradient = gradient.nan_to_num(0.0, 0.0, 0.0) * half
                first.lerp_(gradient, 0.1)
                second.lerp_(gradient.square(), 0.05)
                update = (first / (1 - 0.9**step)) / ((second / (1 - 0.95**step)).sqrt() + 1e-8)
                rate = self.learning_rate * (1 - (step - 1) / self.iterations)
                actions = problem.bounds.clamp(actions - rate * half * update)
        actions = problem.project(actions.detach())
        with torch.no_grad():
            best = better_of(best, actions, problem.evaluate(actions))
        return Solution(actions=problem.project(best.actions), cost=best.cost)
