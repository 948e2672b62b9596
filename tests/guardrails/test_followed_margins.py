"""Margins of the followed blocks alone keep the promise of margins for whole plans."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from worldloom.agents import PlanMethod, PlanningAgent
from worldloom.core.types import Goal, Observations
from worldloom.guardrails import Custom, Hold, level_after, margin_shape, refusing, tolerance_quantile
from worldloom.planning import GoalObjective, LatentL2, Planner
from worldloom.planning.solvers import CEM
from worldloom.testing import LinearWorld

WORLD, HORIZON, LIMIT, RISK = LinearWorld(), 4, 4.0, 0.1


@given(st.integers(1, 3), st.integers(1, 6), st.integers(1, 6), st.integers(0, 1000))
def test_margins_stay_level_after_the_followed_blocks(rails: int, steps: int, blocks: int, seed: int) -> None:
    shape = torch.rand(rails, steps, generator=torch.Generator().manual_seed(seed)).cumsum(dim=1)
    level = level_after(shape, min(blocks, steps))
    assert level.shape == shape.shape
    assert torch.equal(level[:, :blocks], shape[:, :blocks])
    assert (level[:, blocks:] == shape[:, min(blocks, steps) - 1, None]).all()
    assert (level <= shape).all()


@pytest.mark.parametrize(("replan", "own"), [(0, 1), (1, 1), (2, 1), (3, 2), (6, 3)])
def test_a_begun_block_is_a_followed_block(replan: int, own: int) -> None:
    spec = LinearWorld(block=2).spec
    assert PlanMethod(certified="followed", replan=replan).own_margins(spec) == own
    assert PlanMethod(replan=replan).own_margins(spec) == PlanMethod().horizon


def test_margins_of_older_versions_belong_to_the_default() -> None:
    assert "certified" not in PlanMethod().calibrated_as
    assert PlanMethod(certified="followed").calibrated_as["certified"] == "followed"


def winds(count: int, generator: torch.Generator) -> Tensor:
    """Return a wind for each episode, so that all errors of an episode have the same sign; the model knows no wind."""
    return 0.4 * torch.randn(count, generator=generator)


def episodes(factor: float, shape: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return the score of each episode, as calibration computes it, and whether the episode broke the limit."""
    rail = Custom(function=lambda rollouts: rollouts.latents[..., 0] - LIMIT).over("line")
    agent = PlanningAgent(
        WORLD,
        Planner(
            WORLD,
            CEM(samples=16, iterations=2, elites=4),
            horizon=HORIZON,
            guardrails=[rail.with_margin(factor * shape[0])],
        ),
        lambda goal: GoalObjective(LatentL2(), goal),
        replan=1,
        fallback=Hold(),
        seed=int(torch.randint(2**31, (1,), generator=generator)),
    )
    agent.reset(Goal(observations=Observations(vector=torch.tensor([[6.0, 0.0]]).expand(count, -1))))
    now, wind = torch.zeros(count, 2), winds(count, generator)
    now[:, 0] = torch.linspace(0, 3, count)
    scores, broken = torch.zeros(count), torch.zeros(count, dtype=torch.bool)
    for _ in range(6):
        now = now + agent.act(Observations(vector=now))
        now[:, 0] += wind
        assert agent.plan is not None
        fresh = (now[:, 0] > LIMIT) & ~broken
        needed = refusing(agent.plan.violations["line"][:, None] - factor * shape, shape)
        refused = torch.isin(torch.arange(count), torch.tensor(agent.refused))
        scores = torch.where(fresh, needed.masked_fill(refused, torch.inf).clamp_min(1e-3), scores)
        broken |= fresh
    return scores, broken


def calibrated(shape: Tensor, generator: torch.Generator) -> tuple[float, float]:
    """Return the accepted factor, and the share of episodes that break the limit with the first one."""
    factor, first = 0.4, 0.0
    while True:
        scores, broken = episodes(factor, shape, 100, generator)
        first = first or float(broken.float().mean())
        needed = tolerance_quantile(scores, RISK, 0.9)
        if needed <= factor:
            return factor, first
        factor = min(max(needed, 1.25 * factor), 1.5 * factor)


def test_the_promise_holds_although_later_blocks_have_no_margins_of_their_own() -> None:
    generator, trials = torch.Generator().manual_seed(0), 6
    drift = winds(2000, generator)[:, None, None] * torch.arange(1, HORIZON + 1)  # grows along a plan
    whole = margin_shape(drift, RISK)
    shape = level_after(whole, 1)
    assert whole[0, -1] > 3 * shape[0, -1]
    rates, firsts = [], []
    for _ in range(trials):
        factor, first = calibrated(shape, generator)
        _, broken = episodes(factor, shape, 300, generator)
        rates.append(float(broken.float().mean()))
        firsts.append(first)
    assert sum(firsts) / trials > RISK  # wider margins are needed
    assert sum(rates) / trials <= RISK
    assert sum(rates) / trials > RISK / 10  # and they are not just very wide
    assert sum(rate > 1.5 * RISK for rate in rates) <= 1
