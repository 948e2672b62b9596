"""Planning any time: a search ends at its deadline with the best plan so far, or where its elites agree."""

import time

import pytest
import torch
from torch import Tensor

from linear_geometry import linear_geometry
from worldloom.core.types import Context
from worldloom.planning import GoalObjective, LatentL2, Planner
from worldloom.planning.solvers import CEM, ICEM, MPPI, SOLVERS, Adam, Solver, TreeSearch
from worldloom.testing import LinearWorld

LONG: dict[str, Solver] = {
    "adam": Adam(iterations=50),
    "cem": CEM(iterations=50),
    "icem": ICEM(iterations=50),
    "mppi": MPPI(iterations=50),
    "tree-search": TreeSearch(near=1e9, near_solver=CEM(iterations=50)),
}


def plan(solver: Solver, *, deadline: float | None, initial: Tensor | None = None) -> tuple[Tensor, bool, int]:
    world = LinearWorld(block=2)
    planner = Planner(world, solver, horizon=4, geometry=linear_geometry(world))
    context = Context(latents=torch.zeros(2, 1, 2), actions=torch.zeros(2, 0, 4))
    objective = GoalObjective(LatentL2(2.0), torch.tensor([[6.0, 3.0], [-5.0, 0.5]]))
    generator = torch.Generator().manual_seed(0)
    found = planner.plan(context, objective, initial=initial, generator=generator, deadline=deadline)
    return found.cost, found.cut_short, found.rollouts


@pytest.mark.parametrize("name", list(LONG))
def test_past_its_deadline_a_search_finishes_one_evaluation_and_says_so(name: str) -> None:
    whole, cut, all_rollouts = plan(LONG[name], deadline=None)
    assert not cut
    cost, cut, rollouts = plan(LONG[name], deadline=time.monotonic() - 1.0)
    assert cut
    assert rollouts < all_rollouts / 5
    assert cost.isfinite().all()
    assert (cost >= whole - 1e-4).all()


@pytest.mark.parametrize("name", list(LONG))
def test_a_deadline_far_off_changes_nothing(name: str) -> None:
    never, far = plan(LONG[name], deadline=None), plan(LONG[name], deadline=time.monotonic() + 3600)
    assert torch.equal(never[0], far[0])
    assert not far[1]
    assert never[2] == far[2]


@pytest.mark.parametrize("name", sorted(SOLVERS))
def test_what_was_given_is_not_lost_when_time_is_up(name: str) -> None:
    # The optimum: straight, each axis as fast as it can.
    optimum = torch.tensor([[[1.0, 0.75, 1.0, 0.75]] * 4, [[-1.0, 0.125, -1.0, 0.125]] * 4])
    optimum[0, 3] = optimum[1, 3] = torch.tensor([0.0, 0.0, 0.0, 0.0])
    given = plan(CEM(samples=2, iterations=1, elites=2, walks=0.0), deadline=None, initial=optimum[:, None])[0]
    solver = TreeSearch(near=1e9) if name == "tree-search" else SOLVERS[name]()
    cost, _, _ = plan(solver, deadline=time.monotonic() - 1.0, initial=optimum[:, None])
    assert (cost <= given + 1.0).all()


def test_two_sided_search_that_is_out_of_time_grows_from_the_state_alone() -> None:
    solver = TreeSearch(near=0.0)
    _, cut, rollouts = plan(solver, deadline=time.monotonic() - 1.0)
    assert cut
    assert rollouts < plan(solver, deadline=None)[2]


@pytest.mark.parametrize("kind", [CEM, ICEM])
def test_elites_of_like_cost_stop_the_search(kind: type[CEM | ICEM]) -> None:
    _, _, all_rollouts = plan(kind(iterations=40), deadline=None)
    once, _, _ = plan(kind(iterations=1), deadline=None)
    cost, cut, rollouts = plan(kind(iterations=40, stop_spread=0.1), deadline=None)
    assert not cut, "to agree is not to be cut short"
    assert rollouts < all_rollouts
    assert (cost < once).all()


def test_elites_that_agree_stop_only_when_they_do_in_every_environment() -> None:
    before, _, all_rollouts = plan(CEM(iterations=40, least_deviation=0.0), deadline=None)
    cost, _, rollouts = plan(CEM(iterations=40, least_deviation=0.0, stop_below=0.05), deadline=None)
    assert rollouts < all_rollouts
    assert (cost <= before + 0.1).all()
