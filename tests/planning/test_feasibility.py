"""Feasibility before cost, in every solver: what breaks a guardrail is never chosen without saying so."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from linear_geometry import linear_geometry
from worldloom.core.errors import NoFeasiblePlan, PlanningError
from worldloom.core.seams import Guardrail
from worldloom.core.types import Context, Rollouts
from worldloom.planning import GoalObjective, LatentL2, Planner, PlanningProblem
from worldloom.planning.problem import FORBIDDEN, rank
from worldloom.planning.solvers import SOLVERS
from worldloom.planning.solvers.solver import agree, spread
from worldloom.testing import LinearWorld

ALL = sorted(SOLVERS)
WORLD = LinearWorld(block=2)


class KeepOut(Guardrail):
    """Stay out of a disc."""

    def __init__(self, centre: tuple[float, float], radius: float, name: str = "disc") -> None:
        self.name, self._centre, self._radius = name, torch.tensor(centre), radius

    def violation(self, rollouts: Rollouts) -> Tensor:
        return self._radius - (rollouts.latents - self._centre).norm(dim=-1)


class Below(Guardrail):
    """Stay below a value of the first axis."""

    name = "line"

    def __init__(self, limit: float) -> None:
        self._limit = limit

    def violation(self, rollouts: Rollouts) -> Tensor:
        return rollouts.latents[..., 0] - self._limit


def planner_of(name: str, *guardrails: object, **options: object) -> Planner:
    return Planner(WORLD, SOLVERS[name](), horizon=5, geometry=linear_geometry(WORLD), guardrails=guardrails, **options)


def context_of(*positions: tuple[float, float]) -> Context:
    latents = torch.tensor(positions, dtype=torch.float32)
    return Context(latents=latents[:, None], actions=torch.zeros(len(latents), 0, 4))


def objective(*goals: tuple[float, float]) -> GoalObjective:
    return GoalObjective(LatentL2(2.0), torch.tensor(goals, dtype=torch.float32))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("name", ALL)
@settings(max_examples=15)
@given(
    x=st.floats(-4, 4),
    y=st.floats(-4, 4),
    radius=st.floats(0.1, 6),
    goal=st.tuples(st.floats(-8, 8), st.floats(-8, 8)),
    seed=st.integers(0, 1000),
)
def test_a_plan_keeps_every_guardrail_or_is_refused(
    name: str, x: float, y: float, radius: float, goal: tuple[float, float], seed: int
) -> None:
    planner = planner_of(name, KeepOut((x, y), radius), Below(3.0))
    context = context_of((0, 0), (1, -2))
    try:
        plan, refused = planner.plan(context, objective(goal, (-3, 1)), generator=generator(seed)), ()
    except NoFeasiblePlan as error:
        plan, refused = error.plan, error.rows
    # Judged here, from the actions alone.
    places = context.latents + plan.actions.view(2, 5, 2, 2).sum(2).cumsum(1)
    inside = radius - (places - torch.tensor([x, y])).norm(dim=-1)
    broken = torch.maximum(inside, places[..., 0] - 3.0).amax(1)
    assert [row for row in range(2) if broken[row] > 1e-4] == [row for row in refused if broken[row] > 1e-4]
    assert (broken[list(refused)] > -1e-4).all()


@pytest.mark.parametrize("name", ALL)
def test_the_goal_behind_a_line_is_approached_up_to_it(name: str) -> None:
    free = planner_of(name).plan(context_of((0, 0)), objective((6, 0)), generator=generator())
    assert free.latents[0, -1, 0] > 3
    held = planner_of(name, Below(2.0)).plan(context_of((0, 0)), objective((6, 0)), generator=generator())
    assert (held.latents[..., 0] <= 2.0).all()
    assert held.latents[0, -1, 0] > 0.5
    assert bool(held.feasible.all())
    assert held.violations["line"].shape == (1, 5)


@pytest.mark.parametrize("name", ALL)
def test_what_cannot_be_kept_is_refused_with_its_name_and_the_others_have_their_plans(name: str) -> None:
    planner = planner_of(name, Below(-20.0), KeepOut((0, 50), 1.0))
    with pytest.raises(NoFeasiblePlan, match=r"environment 1 satisfies every guardrail; .* 'line' by 1\d") as error:
        planner.plan(context_of((-40, 0), (0, 0)), objective((-40, 1), (0, 1)), generator=generator())
    assert error.value.rows == (1,)
    plan = error.value.plan
    assert plan.feasible.tolist() == [True, False]
    assert plan[:1].feasible.all()


@pytest.mark.parametrize("kind", ["raises", "is not a number", "has another shape"])
def test_a_guardrail_that_cannot_judge_counts_as_broken(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    class Bad(Guardrail):
        name = "bad"

        def violation(self, rollouts: Rollouts) -> Tensor:
            if kind == "raises":
                raise ValueError("no")
            values = torch.full(rollouts.latents.shape[:3], torch.nan)
            return values[:, :, 0] if kind == "has another shape" else values

    with pytest.raises(NoFeasiblePlan, match="'bad' by inf"):
        planner_of("cem", Bad()).plan(context_of((0, 0)), objective((1, 0)), generator=generator())
    assert ("'bad' raised" in caplog.text) == (kind != "is not a number")


@pytest.mark.parametrize(
    ("given", "held"),
    [
        (lambda raw: (raw <= 9).numpy(), False),
        (lambda raw: raw.to(torch.complex64), False),
        (lambda raw: raw.to_sparse(), False),
        (lambda raw: raw.to("meta"), False),
        (lambda raw: 0.0, False),
        (lambda raw: raw.double(), True),
        (lambda raw: raw.long(), True),
        (lambda raw: raw > 0, True),
    ],
    ids=["an array", "complex", "sparse", "elsewhere", "a number", "finer", "whole numbers", "yes or no"],
)
def test_what_a_guardrail_gives_is_judged_or_counts_as_broken(given: Callable[[Tensor], object], held: bool) -> None:
    class Foreign(Below):
        name = "foreign"

        def violation(self, rollouts: Rollouts) -> Tensor:
            return given(super().violation(rollouts))

    planner = planner_of("cem", Foreign(9.0), Below(3.0))
    if held:
        assert bool(planner.plan(context_of((0, 0)), objective((1, 0)), generator=generator()).feasible.all())
        return
    with pytest.raises(NoFeasiblePlan, match="'foreign' by inf"):
        planner.plan(context_of((0, 0)), objective((1, 0)), generator=generator())


def test_a_future_that_is_not_a_number_is_never_feasible() -> None:
    class Lost(LinearWorld):
        def rollout(self, context: Context, actions: Tensor) -> Tensor:
            latents = super().rollout(context, actions)
            return torch.where(actions[..., :1] > 0, torch.nan, latents)

    world = Lost(block=2)
    planner = Planner(world, SOLVERS["cem"](), horizon=3, guardrails=[Below(10.0)])
    plan = planner.plan(context_of((0, 0)), objective((6, 0)), generator=generator())
    assert (plan.actions[..., 0] <= 0).all()
    problem = PlanningProblem(
        planner.model,
        context_of((0, 0)),
        objective((6, 0)),
        horizon=planner.horizon,
        guardrails=planner.guardrails,
        geometry=planner.geometry,
    )
    assert problem.evaluate(torch.ones(1, 1, 3, 4)).item() >= FORBIDDEN


def test_a_choice_that_holds_only_from_exactly_here_is_refused() -> None:
    context, goal = context_of((0, 0)), objective((6, 0))
    sure = planner_of("cem", Below(2.0), noise=0.0).plan(context, goal, generator=generator())
    assert sure.violations["line"].max() > -0.5  # it goes close to the line
    with pytest.raises(NoFeasiblePlan, match="'line'"):
        planner_of("cem", Below(2.0), noise=5.0, rechecks=32).plan(context, goal, generator=generator())


def test_guardrails_of_one_name_are_refused() -> None:
    with pytest.raises(PlanningError, match="names must be unique"):
        PlanningProblem(WORLD, context_of((0, 0)), objective((1, 0)), horizon=2, guardrails=[Below(1.0), Below(2.0)])


costs = st.lists(st.floats(-1e5, 1e5, width=32), min_size=2, max_size=8)


@given(costs, st.data())
def test_feasible_ones_rank_first_by_cost_and_the_others_by_how_little_they_break(values: list[float], data) -> None:
    count = len(values)
    broken = data.draw(st.lists(st.floats(-10, 100, width=32), min_size=count, max_size=count))
    cost, violation = torch.tensor(values), torch.tensor(broken)
    ranks = rank(cost, violation)
    for one in range(count):
        for other in range(count):
            if violation[one] <= 0 < violation[other]:
                assert ranks[one] < ranks[other]
            if violation[one] <= 0 and violation[other] <= 0 and cost[one] < cost[other]:
                assert ranks[one] < ranks[other]
            if 0 < violation[one] < violation[other]:
                assert ranks[one] <= ranks[other]
    assert rank(torch.tensor([0.0]), torch.tensor([torch.inf])).isfinite().all()
    assert rank(torch.tensor([torch.inf]), torch.tensor([0.0])).isinf().all()


def test_elites_that_break_a_guardrail_do_not_agree() -> None:
    assert agree(torch.tensor([[1.0, 1.01]]), 0.1)
    assert not agree(torch.tensor([[1.0, 1.01], [1.5 * FORBIDDEN, 1.5 * FORBIDDEN]]), 0.1)


def test_the_spread_of_costs_is_that_of_what_may_be_followed() -> None:
    costs = torch.tensor([[1.0, 3.0, 1.2 * FORBIDDEN, torch.inf], [1.2e6, 1.4e6, torch.inf, torch.inf]])
    assert spread(costs)[0, 0] == pytest.approx(2**0.5)
    assert spread(costs)[1, 0] == pytest.approx(2e5 / 2**0.5, rel=1e-4)


@pytest.mark.parametrize("seed", range(5))
def test_a_plan_that_noise_would_lead_over_the_edge_stays_off_it(seed: int) -> None:
    planner = planner_of("cem", Below(2.0), noise=0.1, rechecks=16)
    plan = planner.plan(context_of((0, 0)), objective((6, 0)), generator=generator(seed))
    assert bool(plan.feasible.all())
    assert 1.0 < plan.latents[0, :, 0].max() < 2.0


@settings(max_examples=40)
@given(st.integers(0, 2**20), st.integers(1, 12), st.floats(-1, 4))
def test_looking_at_no_more_than_is_needed_changes_none_of_the_best(seed: int, best: int, radius: float) -> None:
    looked = 0

    class Counted(KeepOut):
        def violation(self, rollouts: Rollouts) -> Tensor:
            nonlocal looked
            looked += rollouts.latents.shape[0] * rollouts.latents.shape[1]
            return super().violation(rollouts)

    problem = PlanningProblem(
        WORLD,
        context_of((0.0, 0.0), (1.0, -1.0), (4.0, 0.0)),
        objective((4.0, 0.0), (-2.0, 0.0), (0.0, 0.0)),
        horizon=3,
        guardrails=[Counted((2.0, 0.0), radius)],
    )
    actions = 2 * torch.rand(3, 40, 3, 4, generator=generator(seed)) - 1
    every = problem.evaluate(actions)
    seen, looked = looked, 0
    some = problem.evaluate(actions, best=best)
    assert looked <= seen
    for full, part in zip(every.topk(best, largest=False), some.topk(best, largest=False), strict=True):
        assert torch.equal(full, part)
    if radius < 0:  # all hold, and no more than a few are looked at
        assert looked <= 3 * 2 * best
