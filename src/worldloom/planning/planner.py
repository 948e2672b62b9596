"""The planner applies a solver to a model, and itself computes the cost and violations of the solver's plan."""

from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from worldloom.core.errors import NoFeasiblePlan, PlanningError
from worldloom.core.seams import Guardrail, Objective, WorldModel
from worldloom.core.types import ActionBounds, Context, Plan, Rollouts
from worldloom.heads import LatentGeometry
from worldloom.planning.problem import Deadline, PlanningProblem, Watch, violations_of
from worldloom.planning.solvers import Solver


@dataclass(frozen=True, eq=False)
class Planner:
    """Plans `horizon` blocks ahead for B environments at once.

    Every returned plan satisfies the `guardrails`, as predicted from the current state and, with `noise`, from
    `rechecks` perturbed states. The perturbations are Gaussian with standard deviation `noise` in each latent
    dimension. Only tree search needs `geometry`. Without `bounds`, the action bounds of the model are used.
    """

    model: WorldModel
    solver: Solver
    _: KW_ONLY
    horizon: int
    geometry: LatentGeometry | None = None
    bounds: ActionBounds | None = None
    guardrails: Sequence[Guardrail] = ()
    rechecks: int = 8
    noise: float = 0.0

    def __post_init__(self) -> None:
        if self.horizon < 1:
            raise PlanningError(
                f"expected a horizon of at least one block; got {self.horizon}. Choose a longer horizon"
            )
        if self.rechecks < 0 or not 0 <= self.noise < float("inf"):
            raise PlanningError(
                f"expected rechecks >= 0 and a finite noise >= 0; got rechecks {self.rechecks} and noise {self.noise}"
            )
        object.__setattr__(self, "guardrails", tuple(self.guardrails))

    def stretched(self, times: float) -> "Planner":
        """Return the planner with the margins of its guardrails multiplied by `times`."""
        return self if times == 1 else replace(self, guardrails=[rail.stretched(times) for rail in self.guardrails])

    def plan(
        self,
        context: Context,
        objective: Objective | Callable[[Rollouts], Tensor],
        *,
        initial: Float[Tensor, "B I T A"] | None = None,
        generator: torch.Generator,
        deadline: float | None = None,
        watch: Watch | None = None,
    ) -> Plan:
        """Return the solver's plan with its predicted latents, cost and violations.

        `initial` are candidates to start from, such as a warm start or a policy's proposal. At `deadline`, in seconds
        of `time.monotonic`, the search ends with the best plan so far. `watch` is called with the candidates that are
        scored.

        Raises:
            PlanningError: the problem is invalid, the initial candidates have a wrong shape, or no candidate has a
                finite cost.
            NoFeasiblePlan: in some environment, no plan was found that satisfies every guardrail; the error contains
                the plans of all environments.
        """
        problem = PlanningProblem(
            self.model,
            context,
            objective,
            horizon=self.horizon,
            bounds=self.bounds,
            guardrails=self.guardrails,
            geometry=self.geometry,
            deadline=Deadline(deadline),
            watch=watch,
        )
        if initial is not None:
            expected = (problem.batch, problem.horizon, len(problem.bounds.low))
            got = (initial.shape[0], *initial.shape[2:])
            if initial.ndim != 4 or got != expected:
                raise PlanningError(
                    f"expected initial candidates of shape ({expected[0]}, any, {expected[1]}, {expected[2]}); got "
                    f"{tuple(initial.shape)}"
                )
        with torch.inference_mode():
            plan = self._search(problem, problem, initial, generator)
            if self.noise and plan.refused and not problem.deadline.reached():
                # Plans at the edge of the guardrails break them under noise, so search again with tighter guardrails.
                worst = {name: violation.max().item() for name, violation in plan.violations.items()}
                again = self._search(problem.tightened(worst), problem, plan.actions[:, None], generator)
                plan = _better(plan, again)
            # The totals of both searches.
            plan = replace(plan, cut_short=problem.deadline.cut_short, rollouts=problem.count.rollouts)
        cost = plan.cost
        if bad := plan.refused:
            raise NoFeasiblePlan(_least_broken(plan, bad[0]), rows=bad, plan=plan)
        if not bool(cost.isfinite().all()):
            row = int((~cost.isfinite()).nonzero()[0, 0])
            raise PlanningError(
                f"the best plan found for environment {row} has cost {cost[row].item()}: the model or the objective "
                f"returns values that are not finite. Check the observations, the objective and the model's training"
            )
        return plan

    def _search(
        self,
        asked: PlanningProblem,
        judged: PlanningProblem,
        initial: Float[Tensor, "B I T A"] | None,
        generator: torch.Generator,
    ) -> Plan:
        """Return the solver's plan for the problem `asked`, with its cost and violations in the problem `judged`."""
        solution = self.solver.solve(asked, initial=initial, generator=generator)
        rollouts = judged.rollout(solution.actions[:, None])
        return Plan(
            actions=rollouts.actions[:, 0],
            latents=rollouts.latents[:, 0],
            cost=judged.cost(rollouts)[:, 0],
            violations=self._recheck(judged, rollouts, generator),
        )

    def _recheck(
        self, problem: PlanningProblem, rollouts: Rollouts, generator: torch.Generator
    ) -> dict[str, Float[Tensor, "B T"]]:
        """Return the violations of the chosen plans: the worst over the current and the perturbed states."""
        violations = violations_of(problem.guardrails, rollouts)
        for _ in range(self.rechecks if self.noise and problem.guardrails else 0):
            latents = problem.context.latents
            drawn = torch.randn(latents.shape, generator=generator, device=latents.device)
            context = replace(problem.context, latents=latents + self.noise * drawn)
            again = problem.imagine(context, rollouts.actions)
            around = Rollouts(context=context, actions=rollouts.actions, latents=again)
            beside = violations_of(problem.guardrails, around)
            violations = {name: torch.maximum(worst, beside[name]) for name, worst in violations.items()}
        return {name: violation[:, 0] for name, violation in violations.items()}


def _better(plan: Plan, again: Plan) -> Plan:
    """Return `again` for the environments where only `again` satisfies the guardrails, and `plan` for all others."""
    take = again.feasible & ~plan.feasible

    def chosen(new: Tensor, old: Tensor) -> Tensor:
        return torch.where(take.view(-1, *[1] * (old.ndim - 1)), new, old)

    return Plan(
        actions=chosen(again.actions, plan.actions),
        latents=chosen(again.latents, plan.latents),
        cost=chosen(again.cost, plan.cost),
        violations={name: chosen(again.violations[name], old) for name, old in plan.violations.items()},
    )


def _least_broken(plan: Plan, row: int) -> str:
    """Return a message that lists the guardrails that the best plan for an environment breaks."""
    worst = {name: violation[row].max().item() for name, violation in plan.violations.items()}
    broken = sorted((much, name) for name, much in worst.items() if not much <= 0)
    said = ", ".join(f"{name!r} by {much:.3g}" for much, name in broken)
    return (
        f"no plan for environment {row} satisfies every guardrail; the best plan breaks {said}. Use the fallback, "
        f"search with more samples or a different horizon, or ask the owner of the guardrail to relax it"
    )
