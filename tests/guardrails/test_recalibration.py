"""Margins follow the errors that an agent sees: they stretch while these are greater than usual, and never shrink."""

import pytest
import torch
from torch import Tensor

from worldloom.agents import PlanningAgent
from worldloom.core.errors import PlanningError
from worldloom.core.types import Goal, Observations, Plan
from worldloom.guardrails import Custom, Recalibration
from worldloom.planning import GoalObjective, LatentL2, Planner
from worldloom.planning.solvers import CEM
from worldloom.testing import LinearWorld

WORLD = LinearWorld()
MARGIN = torch.tensor([0.5, 0.6, 0.7])
LINE = Custom(function=lambda rollouts: rollouts.latents[..., 0] - 4.0).over("line").with_margin(MARGIN)


def recalibration(rate: float = 0.5) -> Recalibration:
    return Recalibration([LINE], usual=0.4, risk=0.1, model=WORLD, rate=rate)


def plan_to(x: Tensor, stretch: float = 1.0) -> Plan:
    """A plan that is predicted to lead to these places along the first axis."""
    latents = torch.stack([x, torch.zeros_like(x)], dim=1)[:, None].expand(-1, 3, -1)
    return Plan(
        actions=torch.zeros(len(x), 3, WORLD.spec.block_size),
        latents=latents,
        cost=torch.zeros(len(x)),
        violations={"line": latents[..., 0] - 4.0 + stretch * MARGIN},
    )


def test_what_errs_as_usual_keeps_the_margins_and_what_errs_more_stretches_them() -> None:
    follows, here = recalibration(), torch.zeros(20, 2)
    for _ in range(50):
        follows.see(plan_to(here[:, 0] - 0.1), here, here)  # 0.1 worse than predicted: 0.2 margins
    assert follows.stretch == 1
    for _ in range(12):
        follows.see(plan_to(here[:, 0] - 1.0, follows.stretch), here, here)  # 2 margins
    assert follows.stretch > 3
    stretched = follows.stretch
    for _ in range(400):
        follows.see(plan_to(here[:, 0] - 0.1, follows.stretch), here, here)
    assert 1 <= follows.stretch < 0.5 * stretched
    follows.reset()
    assert follows.stretch == 1


def test_what_turns_out_better_than_predicted_stretches_nothing() -> None:
    follows, here = recalibration(), torch.zeros(5, 2)
    for _ in range(30):
        follows.see(plan_to(here[:, 0] + 3.0), here, here)
    assert follows.stretch == 1


@pytest.mark.parametrize("rate", [0.0, float("inf")])
def test_a_rate_that_follows_nothing_is_refused(rate: float) -> None:
    with pytest.raises(PlanningError, match="a finite recalibration rate above 0"):
        recalibration(rate)


def farthest(follows: Recalibration | None, speed: float) -> float:
    """Return how far agents come whose world moves so many times as fast as they know, toward a goal on the line."""
    agent = PlanningAgent(
        WORLD,
        Planner(WORLD, CEM(), horizon=3, guardrails=[LINE]),
        lambda goal: GoalObjective(LatentL2(2.0), goal),
        replan=1,
        recalibration=follows,
    )
    place = torch.zeros(16, 2) + torch.linspace(0, 1, 16)[:, None]
    agent.reset(Goal(observations=Observations(vector=torch.tensor([[4.2, 0.0]]).expand(16, -1))))
    far = place[:, 0]
    for _ in range(12):
        action = agent.act(Observations(vector=place))
        place = place + speed * action
        far = torch.maximum(far, place[:, 0])
    return float(far.max())


def test_in_a_world_that_has_become_faster_it_comes_less_far_over_the_edge() -> None:
    assert farthest(None, 1.0) <= 4
    assert farthest(recalibration(), 1.0) <= 4
    assert farthest(recalibration(rate=2.0), 2.0) < farthest(None, 2.0)
