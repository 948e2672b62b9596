"""Planning over coarser models: when they are followed, how far down they aim, and what it is good for."""

import numpy as np
import pytest
import torch
from torch import Tensor

from worldloom.agents import FollowConfig, HierarchyConfig, HierarchyGuide, LandmarkGuide, PlanningAgent
from worldloom.core.errors import PlanningError
from worldloom.core.types import Context, Goal, Observations
from worldloom.memory import LandmarkGraph
from worldloom.planning import GoalObjective, LatentL2, Planner
from worldloom.planning.solvers import CEM
from worldloom.testing import LinearWorld

SEARCH = CEM(samples=64, iterations=6, elites=8)


def world_of(gain: float) -> LinearWorld:
    """Return a world whose step is `gain` times as long as that of the fast model."""
    return LinearWorld(((gain, 0.0), (0.0, gain)))


def objective(goal: Tensor) -> GoalObjective:
    return GoalObjective(LatentL2(1.0), goal)


def guide_of(*gains: float, horizon: int = 4, config: HierarchyConfig | None = None) -> HierarchyGuide:
    levels = [Planner(world_of(gain), SEARCH, horizon=horizon) for gain in (1.0, *gains)]
    return HierarchyGuide(levels, [1, *(round(gain) for gain in gains)], config, step_length=1.0)


def context_of(*positions: tuple[float, float]) -> Context:
    return Context(
        latents=torch.tensor(positions, dtype=torch.float32)[:, None], actions=torch.zeros(len(positions), 0, 2)
    )


def test_the_coarser_model_is_followed_where_it_sees_farther() -> None:
    guide = guide_of(3.0)
    goal = torch.tensor([[11.0, 0.0], [3.0, 0.0]])
    guide.reset(goal)
    far, near = guide(context_of((0, 0), (0, 0)), None, 0)
    assert guide.depths == [1, 0]
    assert torch.equal(near, goal[1])
    assert (far - goal[0]).norm() < 9
    assert far.norm() < 4.3  # a coarse step from here


def test_depth_is_chosen_among_several() -> None:
    guide = guide_of(2.0, 6.0)
    guide.reset(torch.tensor([[22.0, 0.0], [7.0, 0.0], [2.0, 0.0]]))
    aims = guide(context_of((0, 0), (0, 0), (0, 0)), None, 0)
    assert guide.depths == [2, 1, 0]
    assert (aims.norm(dim=1) < 3.5).all()  # each within what the level below sees


def test_a_first_step_that_the_fast_model_cannot_take_is_not_believed() -> None:
    guide = guide_of(40.0)
    goal = torch.tensor([[80.0, 0.0]])
    guide.reset(goal)
    assert torch.equal(guide(context_of((0, 0)), None, 0), goal)
    assert guide.depths == [0]


def test_depth_can_be_told() -> None:
    start = context_of((0, 0))
    for depth, aimed in ((0, 22.0), (1, 2.0), (2, 2.0)):
        guide = guide_of(2.0, 6.0, config=HierarchyConfig(depth=depth))
        guide.reset(torch.tensor([[22.0, 0.0]]))
        aim = guide(start, None, 0)
        assert guide.depths == [depth]
        assert aim[0, 0] == pytest.approx(aimed, abs=0.8)


def test_a_subgoal_is_kept_until_it_is_reached_or_its_time_is_up() -> None:
    guide = guide_of(3.0)
    guide.reset(torch.tensor([[11.0, 0.0], [0.0, 11.0]]))
    first = guide(context_of((0, 0), (0, 0)), None, 0)
    # The one has reached its subgoal, the other has two of its three plans left.
    second = guide(context_of(tuple(first[0].tolist()), (0, 0)), None, 0)
    assert second[0, 0] > first[0, 0] + 1
    assert torch.equal(second[1], first[1])
    guide.select([1])
    assert guide.depths == [1]
    assert torch.equal(guide(context_of((0, 0)), None, 0), first[1:])
    assert not torch.equal(guide(context_of((0, 0)), None, 0), first[1:])


def test_an_agent_with_a_short_horizon_gets_to_a_far_goal() -> None:
    world, guide = world_of(1.0), guide_of(3.0)
    agent = PlanningAgent(world, Planner(world, SEARCH, horizon=4), objective, replan=1, guide=guide)
    goal, position = torch.tensor([[12.0, 5.0]]), torch.zeros(1, 2)
    agent.reset(Goal(observations=Observations(vector=goal)))
    for _ in range(20):
        position = position + agent.act(Observations(vector=position))
    assert (position - goal).norm() < 1


def test_landmarks_fall_back_on_it_where_no_way_is_known() -> None:
    world = world_of(1.0)
    graph = LandmarkGraph(world.spec, step_length=1.0, reversible=True)
    line = torch.stack([torch.arange(16.0), torch.zeros(16)], dim=1)
    graph.learn(line, np.zeros(16, int), np.arange(16))
    beyond = guide_of(3.0)
    guide = LandmarkGuide(graph, FollowConfig(learn=False), beyond=beyond)
    guide.reset(torch.tensor([[0.0, 11.0], [15.0, 0.0]]))
    unknown, known = guide(context_of((0, 0), (0, 0)), None, 0)
    assert [outlook.kind for outlook in guide.outlook] == ["unknown", "known"]
    assert unknown[1] > 2
    assert torch.equal(known, graph.latents[int(graph.nearest(known[None])[0][0])])
    guide.select([0])
    assert guide(context_of((0, 0)), None, 0)[0, 1] > 2


@pytest.mark.parametrize(
    ("strides", "config"),
    [([1], None), ([1, 2], HierarchyConfig(depth=2))],
)
def test_levels_that_are_not_there_are_refused(strides: list[int], config: HierarchyConfig | None) -> None:
    levels = [Planner(world_of(1.0), SEARCH, horizon=2)] * len(strides)
    with pytest.raises(PlanningError, match="expected the planners of the fast model"):
        HierarchyGuide(levels, strides, config, step_length=1.0)
    with pytest.raises(PlanningError, match="expected one stride for each planner"):
        HierarchyGuide([*levels, levels[0]], strides, config, step_length=1.0)
