"""Goal-conditioned inverse dynamics: reaches goals alone, keeps the modes of the data apart, and proposes plans."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from worldloom.agents import GoalInverse, GoalInverseAgent, GoalInverseConfig, GoalInverseProposer, fit_goal_inverse
from worldloom.core.actions import Walk
from worldloom.core.errors import CheckpointError, PlanningError
from worldloom.core.types import ActionBounds, Context, Goal, Observations
from worldloom.heads import LatentEpisodes, TemporalDistance
from worldloom.testing import LinearWorld

WORLD = LinearWorld(block=2, context=2)
GOAL = torch.tensor([[6.0, 1.0], [-4.0, 4.0], [0.5, 0.0]])
HERE = Context(latents=torch.zeros(3, 2, 2), actions=torch.zeros(3, 1, 4))


@pytest.fixture(scope="module")
def policy() -> GoalInverse:
    generator = torch.Generator().manual_seed(0)
    blocks = Walk(renewal=0.1).sample(WORLD.spec, ActionBounds.of(WORLD.spec), (200, 1, 10), generator)
    start = torch.randn(200, 1, 2, generator=generator)
    walked = WORLD.rollout(Context(latents=start, actions=blocks[:, 0, :0]), blocks)[:, 0]
    episodes = LatentEpisodes(
        latents=torch.cat([start, walked], 1), blocks=blocks[:, 0], lengths=torch.full((200,), 11)
    )
    config = GoalInverseConfig(hidden=(64,), reach=8, chunk=3, modes=3, steps=600, batch=256)
    return fit_goal_inverse(WORLD, episodes, config, seed=0)


@pytest.mark.parametrize("blocks", [1, 2])
def test_it_reaches_goals_without_a_search(policy: GoalInverse, blocks: int) -> None:
    agent, position = GoalInverseAgent(WORLD, policy, blocks=blocks), torch.zeros(3, 2)
    agent.reset(Goal(observations=Observations(vector=GOAL)))
    nearest = torch.full((3,), torch.inf)
    for _ in range(20):
        action = agent.act(Observations(vector=position))
        assert action.shape == (3, 2)
        assert (action.abs() <= 1).all()
        position = position + action
        nearest = torch.minimum(nearest, (position - GOAL).norm(dim=-1))
    assert (nearest < 1.0).all()


def test_two_ways_to_a_goal_are_not_averaged() -> None:
    generator = torch.Generator().manual_seed(0)
    world = LinearWorld(block=1)
    side = 0.8 * torch.randint(2, (400, 1), generator=generator).mul(2).sub(1).float()
    blocks = torch.stack([torch.cat([torch.ones_like(side), side], 1), torch.cat([torch.ones_like(side), -side], 1)], 1)
    latents = torch.tensor([[0.0, 0.0], [1.0, 0.0], [2.0, 0.0]]).expand(400, -1, -1)  # the way does not show in them
    episodes = LatentEpisodes(latents=latents, blocks=blocks, lengths=torch.full((400,), 3))
    config = GoalInverseConfig(hidden=(32,), reach=2, chunk=2, modes=4, steps=400, batch=128)
    policy = fit_goal_inverse(world, episodes, config, seed=0)
    here = Context(latents=torch.zeros(1, 1, 2), actions=torch.zeros(1, 0, 2))
    with torch.no_grad():
        chosen = policy(here, torch.tensor([[2.0, 0.0]]))[0, :, 1]
        drawn = policy.sample(here, torch.tensor([[2.0, 0.0]]), 200, generator)[0, :, :, 1]
    assert chosen.abs().sub(0.8).abs().max() < 0.1
    assert chosen[0] * chosen[1] < 0  # the second block belongs to the first
    assert 0.2 < (drawn[:, 0] > 0).float().mean() < 0.8
    assert (drawn[:, 0] * drawn[:, 1] < 0).float().mean() > 0.95


@pytest.mark.parametrize("horizon", [2, 5])
def test_it_proposes_plans_of_any_horizon(policy: GoalInverse, horizon: int) -> None:
    def plans() -> Tensor:
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            return GoalInverseProposer(policy=policy, generator=generator, samples=4)(HERE, GOAL, horizon)

    proposed = plans()
    assert proposed.shape == (3, 5, horizon, 4)
    assert (proposed.abs() <= 1).all()
    assert torch.equal(proposed, plans())
    with torch.no_grad():
        assert torch.equal(proposed[:, 0, :2], policy(HERE, GOAL)[:, :2])
    assert torch.equal(proposed[:, :, 2:], proposed[:, :, 2:3].expand_as(proposed[:, :, 2:]))


def test_an_agent_narrows_to_some_environments(policy: GoalInverse) -> None:
    whole, part = (GoalInverseAgent(WORLD, policy) for _ in range(2))
    for agent in (whole, part):
        agent.reset(Goal(observations=Observations(vector=GOAL)))
        agent.act(Observations(vector=torch.zeros(3, 2)))
    part.select([2, 0])
    moved = Observations(vector=torch.tensor([[0.2, 0.1], [0.3, 0.0], [0.0, 0.4]]))
    for _ in range(3):
        torch.testing.assert_close(part.act(moved[[2, 0]]), whole.act(moved)[[2, 0]])
    with pytest.raises(PlanningError, match="call reset"):
        GoalInverseAgent(WORLD, policy).act(moved)


def test_it_is_the_same_after_a_save(policy: GoalInverse, tmp_path: Path) -> None:
    policy.save(tmp_path / "policy", WORLD)
    back = GoalInverse.load(tmp_path / "policy", WORLD)
    with torch.no_grad():
        assert torch.equal(back(HERE, GOAL), policy(HERE, GOAL))
    with pytest.raises(CheckpointError, match="expected a temporal-distance"):
        TemporalDistance.load(tmp_path / "policy", WORLD)
