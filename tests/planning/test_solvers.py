"""Every solver keeps within bounds, never loses what it was given, and reaches a known optimum."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from linear_geometry import linear_geometry
from worldloom.core.errors import ConfigError, PlanningError
from worldloom.core.types import ActionBounds, ActionSpec, Context, ModelSpec, ObservationSpec, Rollouts
from worldloom.heads import InverseModel, InverseModelConfig, LatentGeometry, Reversibility
from worldloom.planning import GoalObjective, LatentL2, Planner, PlanningProblem
from worldloom.planning.solvers import CEM, ICEM, MPPI, SOLVERS, Adam, RandomShooting, Solver, TreeSearch
from worldloom.planning.solvers.icem import colouring_matrix
from worldloom.testing import LinearWorld

ALL = sorted(SOLVERS)

# Enough search to converge: the defaults are for speed.
THOROUGH: dict[str, Solver] = {
    "adam": Adam(starts=4, iterations=60),
    "cem": CEM(samples=256, iterations=15, elites=16, least_deviation=0.0),
    "icem": ICEM(samples=256, iterations=15, elites=16, colour=1.0),
    "mppi": MPPI(samples=512, iterations=15, decay=0.75),
    "random-shooting": RandomShooting(samples=20_000),
    "tree-search": TreeSearch(branches=256, near_solver=CEM(samples=256, iterations=15, elites=16)),
}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def context_of(latents: Tensor, block_size: int) -> Context:
    return Context(latents=latents[:, None], actions=latents.new_zeros(len(latents), 0, block_size))


@pytest.mark.parametrize("name", ALL)
def test_reaches_the_known_optimum(name: str) -> None:
    world = LinearWorld(block=2)
    latents = torch.tensor([[0.0, 0.0], [2.0, -1.0], [0.0, 0.0]])
    goal = torch.tensor([[6.0, 3.0], [-5.0, 0.5], [0.5, -0.25]])
    objective = GoalObjective(LatentL2(2.0), goal)
    planner = Planner(world, THOROUGH[name], horizon=6, geometry=linear_geometry(world))
    plan = planner.plan(context_of(latents, 4), objective, generator=generator())
    # The optimum goes straight, each axis as fast as it can: 2 a block.
    ideal = torch.stack([(goal - latents).clamp(-2 * t, 2 * t) for t in range(1, 7)], dim=1) + latents[:, None]
    distance = (ideal - goal[:, None]).norm(dim=-1) / 2
    optimum = distance.mean(-1) + distance[:, -1]
    # In blocks; to stand still is 1 to 7 worse. What only ever draws random walks is coarse.
    tolerance = {"random-shooting": 0.8, "tree-search": 0.5, "adam": 0.1}.get(name, 0.2)
    assert (plan.cost - optimum <= tolerance).all(), (plan.cost, optimum)
    assert (plan.cost >= optimum - 1e-4).all(), "no plan can beat the optimum"
    assert torch.allclose(plan.latents[:, -1], latents + plan.actions.view(3, 12, 2).sum(1), atol=1e-4)


@pytest.mark.parametrize("name", ALL)
@settings(max_examples=12)
@given(
    low=st.floats(-50, 50, width=32),
    width=st.floats(0.015625, 20, width=32),
    reversible=st.booleans(),
    far=st.floats(0, 30),
    seed=st.integers(0, 1000),
)
def test_answers_are_within_any_bounds(
    name: str, low: float, width: float, reversible: bool, far: float, seed: int
) -> None:
    world = LinearWorld(block=2, low=low, high=low + width)
    bounds = ActionBounds.of(world.spec)
    goal = torch.tensor([[far, 0.0], [0.0, -far]])
    planner = Planner(world, SOLVERS[name](), horizon=4, geometry=linear_geometry(world, reversible=reversible))
    wild = 100 * torch.randn(2, 3, 4, 4, generator=generator(seed))
    context, objective = context_of(torch.zeros(2, 2), 4), GoalObjective(LatentL2(2.0), goal)
    problem = PlanningProblem(
        planner.model,
        context,
        objective,
        horizon=planner.horizon,
        guardrails=planner.guardrails,
        geometry=planner.geometry,
    )
    solution = planner.solver.solve(problem, initial=wild, generator=generator(seed))
    assert ((solution.actions >= bounds.low) & (solution.actions <= bounds.high)).all()
    plan = planner.plan(context, objective, initial=wild, generator=generator(seed))
    assert ((plan.actions >= bounds.low) & (plan.actions <= bounds.high)).all()


@pytest.mark.parametrize("name", [name for name in ALL if name != "tree-search"])
@settings(max_examples=12)
@given(seed=st.integers(0, 10_000), count=st.integers(1, 4))
def test_is_never_worse_than_its_initial(name: str, seed: int, count: int) -> None:
    world = LinearWorld(block=2)
    goal = 6 * torch.randn(3, 2, generator=generator(seed))
    problem = PlanningProblem(
        world, context_of(torch.zeros(3, 2), 4), GoalObjective(LatentL2(), goal), horizon=5, bounds=None
    )
    # One of the candidates is the optimum itself: random search would not find it again.
    initial = torch.rand(3, count, 5, 4, generator=generator(seed + 1)) * 2 - 1
    initial[:, -1] = (goal / 10)[:, None].repeat(1, 1, 2).expand(-1, 5, -1)
    best = problem.evaluate(initial).min(1).values
    solution = SOLVERS[name]().solve(problem, initial=initial, generator=generator(seed))
    assert (solution.cost <= best + 1e-5).all()
    assert torch.allclose(problem.evaluate(solution.actions[:, None])[:, 0], solution.cost, atol=1e-4)


@pytest.mark.parametrize("reversible", [True, False])
def test_tree_search_keeps_an_initial_plan_that_is_better(reversible: bool) -> None:
    world = LinearWorld(block=2)
    goal = torch.tensor([[9.0, 4.0]])
    problem = PlanningProblem(
        world,
        context_of(torch.zeros(1, 2), 4),
        GoalObjective(LatentL2(2.0), goal),
        horizon=6,
        geometry=linear_geometry(world, reversible=reversible),
    )
    straight = (goal / 10).repeat(1, 2).expand(1, 1, 5, 4)
    straight = torch.cat([straight, torch.zeros(1, 1, 1, 4)], dim=2)
    solver = TreeSearch(branches=2, near=0.0, gap_weights=(4.0,))
    without = solver.solve(problem, initial=None, generator=generator())
    given_it = solver.solve(problem, initial=straight, generator=generator())
    assert given_it.cost.item() <= 5.0 + 1e-4 < without.cost.item()
    assert torch.allclose(given_it.actions, straight[:, 0], atol=1e-5)


@pytest.mark.parametrize("name", ALL)
def test_the_generator_alone_decides(name: str) -> None:
    world = LinearWorld(block=2)
    objective = GoalObjective(LatentL2(2.0), torch.tensor([[8.0, 1.0]]))
    planner = Planner(world, SOLVERS[name](), horizon=4, geometry=linear_geometry(world))

    def plan(seed: int) -> Tensor:
        return planner.plan(context_of(torch.zeros(1, 2), 4), objective, generator=generator(seed)).actions

    torch.manual_seed(1)
    first = plan(3)
    torch.manual_seed(2)
    assert torch.equal(first, plan(3))
    assert not torch.equal(first, plan(4))


@pytest.mark.parametrize("name", ALL)
def test_discrete_choices_stay_choices(name: str) -> None:
    class Choices(LinearWorld):
        """Three choices: stay, right, left; the reward is to be at the goal."""

        def __init__(self) -> None:
            super().__init__(((0.0, 1.0, -1.0), (0.0, 0.0, 0.0)), block=2, low=0.0, high=1.0)
            action = ActionSpec(low=(0.0,) * 3, high=(1.0,) * 3, discrete=True)
            self.spec = ModelSpec(
                observation=ObservationSpec(vector=2), action=action, block=2, context=1, latent_dim=2
            )

    world = Choices()
    geometry = LatentGeometry(
        step_length=2.0,
        inverse=InverseModel(world.spec, InverseModelConfig(hidden=(4,))),
        reversibility=Reversibility(gap=1.0, displacement=1.0),
    )
    planner = Planner(world, THOROUGH[name], horizon=4, geometry=geometry)
    objective = GoalObjective(LatentL2(), torch.tensor([[6.0, 0.0], [-3.0, 0.0]]))
    plan = planner.plan(context_of(torch.zeros(2, 2), 6), objective, generator=generator())
    choices = plan.actions.view(2, 8, 3)
    assert ((choices == 0) | (choices == 1)).all()
    assert (choices.sum(-1) == 1).all()
    assert torch.allclose(plan.latents[:, -1, 0], torch.tensor([6.0, -3.0]), atol=2.01)


def test_adam_descends_in_inference_mode_and_leaves_the_model_alone() -> None:
    class Learned(LinearWorld):
        def __init__(self) -> None:
            super().__init__(block=1)
            self.layer = nn.Linear(2, 2, bias=False)
            with torch.no_grad():
                self.layer.weight.copy_(torch.eye(2))

        def rollout(self, context: Context, actions: Tensor) -> Tensor:
            return context.latents[:, -1, None, None] + self.layer(actions).cumsum(2)

    world = Learned()
    with torch.inference_mode():  # as the agent encodes
        latents, goal = torch.zeros(1, 2), torch.tensor([[2.5, -2.5]])
    planner = Planner(world, Adam(starts=1), horizon=4)
    plan = planner.plan(context_of(latents, 2), GoalObjective(LatentL2(), goal), generator=generator())
    assert (plan.latents[:, -1] - goal).norm() < 0.3
    assert world.layer.weight.grad is None


def test_cem_stops_early_where_it_has_settled() -> None:
    world = LinearWorld()

    def rollouts(stop_below: float) -> int:
        problem = PlanningProblem(
            world, context_of(torch.zeros(1, 2), 2), GoalObjective(LatentL2(), torch.ones(1, 2)), horizon=2
        )
        CEM(iterations=20, stop_below=stop_below, least_deviation=0.0).solve(
            problem, initial=None, generator=generator()
        )
        return problem.count.rollouts

    assert rollouts(0.05) < 0.7 * rollouts(0.0)


def test_a_spread_of_elites_is_drawn_from_coloured_noise_of_unit_variance() -> None:
    def lag_correlation(exponent: float) -> float:
        noise = torch.randn(4000, 48, generator=generator()) @ colouring_matrix(24, exponent)
        assert abs(noise.var().item() - 1) < 0.1
        return (noise[:, 1:] * noise[:, :-1]).mean().item()

    white, pink, brown = (lag_correlation(exponent) for exponent in (0.0, 1.0, 2.0))
    assert abs(white) < 0.05 < 0.3 < pink < brown


def test_tree_search_says_what_it_lacks() -> None:
    world = LinearWorld()
    objective = GoalObjective(LatentL2(), torch.ones(1, 2))
    context = context_of(torch.zeros(1, 2), 2)
    with pytest.raises(PlanningError, match="measure_geometry"):
        Planner(world, TreeSearch(), horizon=4).plan(context, objective, generator=generator())

    class NoGoal:
        def __call__(self, rollouts: Rollouts) -> Tensor:
            return rollouts.latents.sum((-1, -2))

    with pytest.raises(PlanningError, match="goal"):
        Planner(world, TreeSearch(), horizon=4, geometry=linear_geometry(world)).plan(
            context, NoGoal(), generator=generator()
        )
    plan = Planner(world, CEM(), horizon=4).plan(context, NoGoal(), generator=generator())
    assert plan.cost.item() < -15, "a solver without a goal takes any objective"


def test_a_cost_that_is_not_a_number_is_never_chosen() -> None:
    class Torn(LinearWorld):
        def rollout(self, context: Context, actions: Tensor) -> Tensor:
            latents = super().rollout(context, actions)
            return torch.where(latents[..., :1] > 0.5, math.nan, latents)

    goal = torch.tensor([[0.6, 2.0]])
    for name in ALL:
        world = Torn()
        planner = Planner(world, SOLVERS[name](), horizon=3, geometry=linear_geometry(world))
        plan = planner.plan(context_of(torch.zeros(1, 2), 2), GoalObjective(LatentL2(), goal), generator=generator())
        assert plan.latents.isfinite().all(), name

    with pytest.raises(PlanningError, match="not finite"):
        Planner(Torn(), CEM(), horizon=3).plan(
            context_of(torch.ones(1, 2) * 9, 2), GoalObjective(LatentL2(), goal), generator=generator()
        )


def test_solvers_are_known_by_name() -> None:
    assert ALL == ["adam", "cem", "icem", "mppi", "random-shooting", "tree-search"]
    nested = TreeSearch.parse({"near_solver": {"name": "mppi", "samples": 32}})
    assert nested.near_solver == SOLVERS["mppi"](samples=32)
    assert TreeSearch.parse(nested.model_dump(mode="json")) == nested
    with pytest.raises(ConfigError, match="cem"):
        TreeSearch.parse({"near_solver": {"name": "cme"}})
