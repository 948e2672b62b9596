"""The behaviour prior: how the logs act, and plans that stay with it."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from worldloom.core.seeds import torch_generator
from worldloom.core.types import Context, Rollouts
from worldloom.heads import BehaviourPrior, BehaviourPriorConfig, LatentEpisodes, fit_behaviour_prior
from worldloom.planning import GoalObjective, LatentL2, Planner, Unusual, WeightedSum
from worldloom.planning.solvers import CEM
from worldloom.testing import LinearWorld

WORLD = LinearWorld(block=2, context=2)
CONFIG = BehaviourPriorConfig(hidden=(32,), modes=2, steps=400, batch=128)


def logs() -> LatentEpisodes:
    """Steps to the right or upward, at random, with a little noise: never both at once, and never back."""
    generator = torch.Generator().manual_seed(0)
    right = torch.randint(2, (300, 10, 1), generator=generator).float()
    step = 0.8 * torch.cat([right, 1 - right], -1) + 0.05 * torch.randn(300, 10, 2, generator=generator)
    blocks = step.repeat(1, 1, 2)
    start = torch.zeros(300, 1, 2)
    walked = WORLD.rollout(Context(latents=start, actions=blocks[:, :0]), blocks[:, None])[:, 0]
    return LatentEpisodes(latents=torch.cat([start, walked], 1), blocks=blocks, lengths=torch.full((300,), 11))


@pytest.fixture(scope="module")
def prior() -> BehaviourPrior:
    return fit_behaviour_prior(WORLD, logs(), CONFIG, seed=0)


def block(x: float, y: float) -> list[float]:
    return [x, y, x, y]


def rolled(blocks: Tensor) -> Rollouts:
    context = Context(latents=torch.zeros(1, 2, 2), actions=torch.zeros(1, 1, 4))
    return Rollouts(context=context, actions=blocks, latents=WORLD.rollout(context, blocks))


def test_what_the_logs_do_is_ordinary(prior: BehaviourPrior) -> None:
    plans = torch.tensor([[block(0.8, 0)], [block(0, 0.8)], [block(0.4, 0.4)], [block(-0.8, 0)]])[None]
    right, up, between, back = Unusual(prior=prior)(rolled(plans))[0].detach().tolist()
    assert max(right, up) < 1 < 3 < between < back  # the mean of two habits is no habit


def test_half_of_the_logs_cost_nothing(prior: BehaviourPrior) -> None:
    episodes = logs()
    episode, frame = torch.arange(300), torch.full((300,), 4)
    with torch.no_grad():
        surplus = prior(episodes.context(episode, frame, 2), episodes.blocks[:, 4])
    assert 0.3 < float((surplus > 0).float().mean()) < 0.7


def test_each_block_is_judged_in_its_own_context(prior: BehaviourPrior) -> None:
    plans = torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(1)) / 2
    rollouts = rolled(plans)
    cost = Unusual(prior=prior)(rollouts)[0].detach()
    for candidate in range(3):
        seen = torch.cat([rollouts.context.latents[0], rollouts.latents[0, candidate]])
        done = torch.cat([rollouts.context.actions[0], plans[0, candidate]])
        total = 0.0
        for at in range(4):
            context = Context(latents=seen[None, at : at + 2], actions=done[None, at : at + 1])
            total += max(0.0, -prior(context, plans[0, candidate, at][None]).item())
        assert float(cost[candidate]) == pytest.approx(total / 4 / 4, rel=1e-4)


def test_a_search_keeps_to_the_habits_of_the_logs(prior: BehaviourPrior) -> None:
    goal = GoalObjective(LatentL2(), torch.tensor([[-2.0, 2.0]]))  # the logs never go left
    context = Context(latents=torch.zeros(1, 2, 2), actions=torch.zeros(1, 1, 4))
    planner = Planner(WORLD, CEM(samples=256, iterations=6, elites=16), horizon=2)
    plain = planner.plan(context, goal, generator=torch_generator(0, "p"))
    kept = planner.plan(
        context, WeightedSum([(1.0, goal), (5.0, Unusual(prior=prior))]), generator=torch_generator(0, "p")
    )
    assert float(plain.latents[0, -1, 0]) < -1.5
    assert float(kept.latents[0, -1, 0]) > -0.3
    assert float(kept.latents[0, -1, 1]) > 1.5


def test_it_is_saved_with_its_typical_density(prior: BehaviourPrior, tmp_path: Path) -> None:
    prior.save(tmp_path / "prior", WORLD)
    loaded = BehaviourPrior.load(tmp_path / "prior", WORLD)
    assert float(loaded.typical) == float(prior.typical) != 0
