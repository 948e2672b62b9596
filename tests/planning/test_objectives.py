"""What each objective asks for, alone and together."""

import pytest
import torch
from torch import Tensor

from worldloom.core.errors import PlanningError
from worldloom.core.types import Context, Rollouts
from worldloom.guardrails import Ball, Box
from worldloom.planning import (
    Effort,
    Elapsed,
    GoalObjective,
    InformationGain,
    InOrder,
    LatentL2,
    Planner,
    RegionGoal,
    Smoothness,
    VectorGoal,
    WeightedSum,
)
from worldloom.planning.solvers import CEM
from worldloom.testing import LinearWorld

WORLD = LinearWorld()


def rolled(*candidates: list[list[float]], taken: Tensor | None = None) -> Rollouts:
    """Roll out candidates (steps x 2) from the origin."""
    actions = torch.tensor(candidates)[None]
    context = Context(latents=torch.zeros(1, 1, 2), actions=torch.zeros(1, 0, 2), taken=taken)
    return Rollouts(context=context, actions=actions, latents=WORLD.rollout(context, actions))


def place(latents: Tensor) -> Tensor:
    """A probe that reads the latent, in tenths."""
    return 10 * latents


EAST, WEST, STAY = [1.0, 0.0], [-1.0, 0.0], [0.0, 0.0]


def test_a_goal_counts_along_the_way_and_at_the_end_and_near_enough_is_there() -> None:
    rollouts = rolled([EAST, EAST], [STAY, STAY])
    goal = torch.tensor([[2.0, 0.0]])
    assert GoalObjective(LatentL2(), goal)(rollouts)[0].tolist() == pytest.approx([0.5 + 0.0, 2.0 + 2.0])
    assert GoalObjective(LatentL2(), goal, within=1.5)(rollouts)[0].tolist() == pytest.approx([0.0, 0.5 + 0.5])


def test_only_the_nearest_state_counts_and_the_way_decides_between_equals() -> None:
    goal = torch.tensor([[2.0, 0.0]])
    nearest = GoalObjective(LatentL2(), goal, nearest=True)
    # Past the goal; away from it first, and then to it; only half of the way.
    rollouts = rolled([EAST, EAST, EAST, EAST], [WEST, EAST, EAST, EAST], [EAST, STAY, STAY, STAY])
    passing, detour, short = nearest(rollouts)[0].tolist()
    assert passing == pytest.approx(0.0 + 0.02 * 1.0)
    assert detour == pytest.approx(0.0 + 0.02 * 1.5)
    assert short == pytest.approx(1.0 + 0.02 * 1.0)
    assert torch.equal(nearest.select(slice(0, 1))(rollouts), nearest(rollouts))
    # The mean distance would choose the plan that never arrives.
    mean = GoalObjective(LatentL2(), goal, last_weight=0.0)(rollouts)[0]
    assert mean[2] < mean[1]


def test_a_quantity_comes_to_a_value_or_into_a_region() -> None:
    rollouts = rolled([EAST, EAST], [STAY, STAY])
    value = VectorGoal(quantity=place, target=torch.tensor([20.0, 0.0]), last_weight=0.0)
    assert value(rollouts)[0].tolist() == pytest.approx([5.0, 20.0])
    each = VectorGoal(quantity=place, target=torch.tensor([[20.0, 0.0]]), last_weight=0.0)
    assert torch.equal(each(rollouts), value(rollouts))
    assert torch.equal(each.select(slice(0, 1))(rollouts), value.select(slice(0, 1))(rollouts))
    region = RegionGoal(quantity=place, region=Box(low=(5.0, -1.0), high=(15.0, 1.0)), last_weight=0.0)
    assert region(rollouts)[0].tolist() == pytest.approx([2.5, 5.0])


def test_effort_and_smoothness() -> None:
    rollouts = rolled([EAST, WEST], [EAST, EAST])
    assert Effort()(rollouts)[0].tolist() == [0.5, 0.5]
    assert Smoothness(size=2)(rollouts)[0].tolist() == [2.0, 0.0]
    again = rolled([EAST, WEST], [EAST, EAST], taken=torch.tensor([[1.0, 0.0]]))
    assert Smoothness(size=2)(again)[0].tolist() == [1.0, 0.0]
    assert Smoothness(size=2)(rolled([EAST]))[0].tolist() == [0.0]


def test_time_and_what_is_not_known_yet() -> None:
    rollouts = rolled([EAST, EAST, EAST, EAST], [STAY, STAY, STAY, EAST], [STAY] * 4)
    goal = GoalObjective(LatentL2(), torch.tensor([[1.0, 0.0]]), within=0.1)
    late = Elapsed(stage=goal)
    assert late(rollouts)[0].tolist() == [0.0, 0.75, 1.0]  # it was reached, though it was left again
    assert late.select(torch.tensor([0]))(rollouts)[0].tolist() == [0.0, 0.75, 1.0]
    other = LinearWorld(((2.0, 0.0), (0.0, 1.0)))
    gain = InformationGain(models=(other,), step_length=1.0)(rollouts)[0]
    assert gain[0] < gain[1] < gain[2] == 0


def test_stages_are_reached_in_order() -> None:
    east = GoalObjective(LatentL2(), torch.tensor([[1.0, 0.0]]), within=0.1)
    west = GoalObjective(LatentL2(), torch.tensor([[-1.0, 0.0]]), within=0.1)
    both = InOrder([east, west])
    right, wrong, half, none = both(
        rolled([EAST, WEST, WEST, STAY], [WEST, EAST, EAST, STAY], [EAST, STAY, STAY, STAY], [STAY] * 4)
    )[0].tolist()
    assert right < 2
    assert right < half < none
    assert right < wrong < none  # it reached the east, and the west only before
    # Who has been in the east needs the west alone.
    done = InOrder([east, west], done=torch.tensor([1]))
    assert done(rolled([WEST, STAY], [EAST, STAY]))[0].diff() > 50
    assert done.select(torch.tensor([0])).done.tolist() == [1]
    assert InOrder([east])(rolled([EAST, STAY], [STAY, EAST]))[0].diff() > 0  # sooner is better
    with pytest.raises(PlanningError, match="at least one stage"):
        InOrder([])


def test_a_search_goes_through_stages_in_order_around_what_is_forbidden() -> None:
    world = LinearWorld()
    stages = [
        GoalObjective(LatentL2(), torch.tensor([[2.0, 2.0]]), within=0.5),
        GoalObjective(LatentL2(), torch.tensor([[-2.0, 0.0]]), within=0.5),
    ]
    context = Context(latents=torch.zeros(1, 1, 2), actions=torch.zeros(1, 0, 2))
    planner = Planner(world, CEM(samples=512, iterations=12, elites=32), horizon=8)
    plan = planner.plan(context, InOrder(stages), generator=torch.Generator().manual_seed(0))
    first = (plan.latents[0] - torch.tensor([2.0, 2.0])).norm(dim=1).argmin()
    second = (plan.latents[0] - torch.tensor([-2.0, 0.0])).norm(dim=1).argmin()
    assert first < second
    assert (plan.latents[0, first] - torch.tensor([2.0, 2.0])).norm() <= 0.5
    assert (plan.latents[0, second] - torch.tensor([-2.0, 0.0])).norm() <= 0.5


def test_objectives_add_up() -> None:
    rollouts = rolled([EAST, WEST], [EAST, EAST])
    region = RegionGoal(quantity=place, region=Ball(centre=(20.0, 0.0), radius=1.0))
    total = WeightedSum([(2.0, Effort()), (0.5, region), (1.0, Smoothness(size=2))])
    expected = 2 * Effort()(rollouts) + 0.5 * region(rollouts) + Smoothness(size=2)(rollouts)
    assert torch.allclose(total(rollouts), expected)
