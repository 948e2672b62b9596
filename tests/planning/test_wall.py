"""Search in the model crosses a wall where a greedy cost fails, backwards only where a test allows it."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from linear_geometry import linear_geometry
from wall_world import DOOR, WallWorld
from worldloom.core.actions import Walk
from worldloom.core.errors import CheckpointError
from worldloom.core.types import Context
from worldloom.heads import InverseModelConfig, LatentGeometry, measure_geometry, still
from worldloom.planning import GoalObjective, LatentL2, Planner, PlanningProblem
from worldloom.planning.solvers import CEM, Solver, TreeSearch
from worldloom.planning.solvers.tree_search import _assemble, _Tree
from worldloom.testing import LinearWorld

START = torch.tensor([[-0.5, -0.7], [-0.4, -0.5], [-0.6, -0.2], [-0.3, -0.8]])
GOAL = torch.tensor([[0.5, -0.7], [0.4, -0.6], [0.6, -0.3], [0.3, -0.4]])


@pytest.fixture(scope="module")
def geometries() -> dict[bool, LatentGeometry]:
    config = InverseModelConfig(steps=500, hidden=(64, 64), batch=256)
    worlds = {one_way: WallWorld(one_way=one_way) for one_way in (False, True)}
    return {
        one_way: measure_geometry(world, world.episodes(count=200, length=8), config, seed=0)
        for one_way, world in worlds.items()
    }


def drive(world: WallWorld, solver: Solver, geometry: LatentGeometry, *, replans: int = 60) -> Tensor:
    """Replan after each block, as an agent does; return how near each comes to its goal."""
    planner = Planner(world, solver, horizon=32, geometry=geometry)
    objective = GoalObjective(LatentL2(geometry.step_length), GOAL)
    generator = torch.Generator().manual_seed(0)
    position, initial = START, None
    nearest = torch.full((len(START),), torch.inf)
    for _ in range(replans):
        context = Context(latents=position[:, None], actions=torch.zeros(len(START), 0, 4))
        plan = planner.plan(context, objective, initial=initial, generator=generator)
        position = world.rollout(context, plan.actions[:, None, :1])[:, 0, 0]
        initial = torch.cat([plan.actions[:, 1:], torch.zeros(len(START), 1, 4)], dim=1)[:, None]
        nearest = torch.minimum(nearest, (position - GOAL).norm(dim=-1))
    return nearest


def test_tree_search_crosses_where_a_greedy_cost_stays_at_the_wall(geometries: dict[bool, LatentGeometry]) -> None:
    world, geometry = WallWorld(), geometries[False]
    assert geometry.reversibility.reversible
    greedy = drive(world, CEM(walks=0.0), geometry, replans=30)
    assert (greedy > 0.25).all(), f"the wall is meant to hold a greedy search up; it came within {greedy}"
    searched = drive(world, TreeSearch(), geometry)
    assert (searched < 0.08).all(), f"tree search stopped {searched} from its goals"


def test_tree_search_grows_one_side_where_there_is_no_way_back(geometries: dict[bool, LatentGeometry]) -> None:
    world, geometry = WallWorld(one_way=True), geometries[True]
    assert not geometry.reversibility.reversible
    searched = drive(world, TreeSearch(branches=256), geometry, replans=30)
    assert (searched < 0.2).sum() >= 3, f"one-sided search stopped {searched} from its goals"


def test_reversibility_is_measured(geometries: dict[bool, LatentGeometry]) -> None:
    there_and_back, one_way = geometries[False].reversibility, geometries[True].reversibility
    assert there_and_back.remaining < 0.3
    assert one_way.remaining > 0.45


def test_step_length_is_measured(geometries: dict[bool, LatentGeometry]) -> None:
    before, _, after = WallWorld().episodes(count=200, length=8).transitions()
    expected = (after - before).norm(dim=-1).mean().item()
    assert geometries[False].step_length == pytest.approx(expected, rel=1e-4)


def test_inverse_dynamics_leads_from_latent_to_latent(geometries: dict[bool, LatentGeometry]) -> None:
    world = WallWorld()
    before, _, after = world.episodes(seed=1).transitions()
    with torch.no_grad():
        block = geometries[False].inverse(before, after)
        reached = world.rollout(
            Context(latents=before[:, None], actions=block[:, None, :][:, :0]), block[:, None, None]
        )
    moved = (after - before).norm(dim=-1)
    missed = (reached[:, 0, 0] - after).norm(dim=-1)
    assert missed.mean() < 0.3 * moved.mean()


def test_geometry_is_kept_with_its_model(geometries: dict[bool, LatentGeometry], tmp_path: Path) -> None:
    geometry, world = geometries[False], WallWorld()
    geometry.save(tmp_path / "geometry", world)
    back = LatentGeometry.load(tmp_path / "geometry", world)
    assert (back.step_length, back.reversibility, back.config) == (
        geometry.step_length,
        geometry.reversibility,
        geometry.config,
    )
    latents = torch.rand(5, 2)
    with torch.no_grad():
        assert torch.equal(back.inverse(latents, -latents), geometry.inverse(latents, -latents))
    with pytest.raises(CheckpointError, match="fit the head again"):
        LatentGeometry.load(tmp_path / "geometry", WallWorld(one_way=True))


def test_a_plan_goes_through_the_door(geometries: dict[bool, LatentGeometry]) -> None:
    world = WallWorld()
    planner = Planner(world, TreeSearch(branches=128), horizon=40, geometry=geometries[False])
    context = Context(latents=START[:1, None], actions=torch.zeros(1, 0, 4))
    plan = planner.plan(context, GoalObjective(LatentL2(), GOAL[:1]), generator=torch.Generator().manual_seed(3))
    path = torch.cat([START[:1, None], plan.latents], dim=1)[0]
    (crossing,) = torch.where((path[:-1, 0] < 0) & (path[1:, 0] >= 0))
    assert len(crossing) >= 1
    assert (path[crossing, 1] > DOOR - 0.17).all()
    assert (path - GOAL[0]).norm(dim=-1).min() < 0.4


@pytest.mark.parametrize("one_way", [False, True])
def test_the_measured_reversibility_decides_where_branches_grow(
    one_way: bool, geometries: dict[bool, LatentGeometry]
) -> None:
    world = WallWorld(one_way=one_way)
    planner = Planner(world, TreeSearch(branches=16, checked=3), horizon=20, geometry=geometries[one_way])
    context = Context(latents=START[:, None], actions=torch.zeros(4, 0, 4))
    problem = PlanningProblem(
        planner.model,
        context,
        GoalObjective(LatentL2(), GOAL),
        horizon=planner.horizon,
        guardrails=planner.guardrails,
        geometry=planner.geometry,
    )
    planner.solver.solve(problem, initial=None, generator=torch.Generator().manual_seed(0))
    trees, checks = (1 if one_way else 2) * 16, 3 * 2
    assert problem.count.rollouts == 4 * (trees + checks)


def test_a_plan_through_a_join_walks_out_along_one_branch_and_home_along_the_other() -> None:
    world = LinearWorld(block=2)
    goal, generator = torch.tensor([[9.0, 5.0]]), torch.Generator().manual_seed(0)
    context = Context(latents=torch.zeros(1, 1, 2), actions=torch.zeros(1, 0, 4))
    problem = PlanningProblem(world, context, GoalObjective(LatentL2(), goal), horizon=8)
    trees = []
    for root in (torch.zeros(1, 2), goal):
        actions = Walk().sample(world.spec, problem.bounds, (1, 5, 4), generator)
        latents = world.rollout(still(root, world), actions)
        trees.append(_Tree(root=root, latents=latents, actions=actions, broken=torch.zeros(1, 5, 4).bool()))
    forward, backward = trees
    for out, home in ((0, 0), (1, 4), (3, 2), (4, 0), (0, 3), (4, 4)):
        # Node 1 + n H + h is h + 1 steps along branch n: here branches 2 and 3.
        joins = tuple(torch.tensor([[1 + n * 4 + steps - 1 if steps else 0]]) for n, steps in ((2, out), (3, home)))
        plans, length = _assemble(forward, backward, joins, linear_geometry(world), problem)
        assert length.item() == max(1, out + home)
        path = world.rollout(context, plans)[0, 0]
        there = forward.latents[0, 2, :out]
        node = forward.nodes[0, joins[0][0, 0]]
        back = torch.cat([goal, backward.latents[0, 3]])[:home].flip(0)  # one step nearer each, down to the goal
        gap = node - backward.nodes[0, joins[1][0, 0]]
        assert torch.allclose(path[: out + home], torch.cat([there, back + gap]), atol=1e-4), (out, home)
        assert not plans[0, 0, max(1, out + home) :].any(), "it rests afterwards"
