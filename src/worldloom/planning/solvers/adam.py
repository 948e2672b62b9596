"""Gradient descent through the model."""

from typing import Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from worldloom.core.actions import Walk
from worldloom.planning.problem import PlanningProblem, judged, rank
from worldloom.planning.solvers.solver import SOLVERS, Solution, Solver, better_of, start

_MOST = 1e3  # cap on a violation in the Lagrangian, because one that cannot be judged is infinite


@SOLVERS.register("adam")
class Adam(Solver):
    """Descend the gradient of the cost with respect to the actions from several starts (Adam, Kingma and Ba 2015).

    Actions are clamped to the bounds after each step. The learning rate is in units of half an action's range and falls
    linearly to 0. Guardrails are added by an augmented Lagrangian (Hestenes 1969; Powell 1969; for inequalities
    Rockafellar 1973) with one multiplier per guardrail and start; `stiffness` weights the squared violation.
    """

    name: Literal["adam"] = "adam"
    starts: int = Field(default=8, ge=1)
    iterations: int = Field(default=10, ge=1)
    learning_rate: float = Field(default=0.3, gt=0)
    stiffness: float = Field(default=10.0, gt=0)
    walk: Walk = Walk()

    def solve(
        self, problem: PlanningProblem, *, initial: Float[Tensor, "B I T A"] | None, generator: torch.Generator
    ) -> Solution:
        """Search by gradient descent; see `Solver.solve`."""
        # Planning runs in inference mode, whose tensors cannot be differentiated: leave it and work on copies.
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
        multipliers = actions.new_zeros(len(problem.guardrails), *actions.shape[:2])
        for step in range(1, self.iterations + 1):
            if step > 1 and problem.deadline.reached():
                assert best is not None
                return Solution(actions=problem.project(best.actions), cost=best.cost)
            actions = actions.detach().requires_grad_()
            if problem.guardrails:
                rollouts = problem.rollout(actions)
                cost = problem.cost(rollouts)
                broken = judged(problem.guardrails, rollouts).amax(dim=-1)
                best = better_of(best, actions.detach(), rank(cost, broken.amax(dim=0)).detach())
                pressed = (multipliers + self.stiffness * broken.clamp(max=_MOST)).clamp_min(0)
                cost = cost + (pressed.square() - multipliers.square()).sum(dim=0) / (2 * self.stiffness)
                multipliers = pressed.detach()
            else:
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
