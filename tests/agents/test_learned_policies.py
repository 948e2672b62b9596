"""The reactive policy and the baselines: they do what they learned, within bounds, and survive a save."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from worldloom.agents import (
    BehaviourCloningAgent,
    CloningConfig,
    CloningPolicy,
    PolicyProposer,
    RandomAgent,
    ReactiveAgent,
    ReactiveConfig,
    ReactivePolicy,
    fit_behaviour_cloning,
    fit_reactive,
)
from worldloom.core.actions import Walk
from worldloom.core.errors import CheckpointError, DataError, PlanningError
from worldloom.core.seams import Agent
from worldloom.core.types import ActionBounds, ActionSpec, Context, Goal, Observations, ObservationSpec
from worldloom.data import DatasetSpec, Frames
from worldloom.heads import InverseModelConfig, LatentEpisodes, LatentGeometry, TemporalDistance, measure_geometry
from worldloom.planning.solvers import CEM
from worldloom.testing import LinearWorld

WORLD = LinearWorld(block=2)


def look(position: Tensor) -> Observations:
    return Observations(vector=position)


@pytest.fixture(scope="module")
def episodes() -> LatentEpisodes:
    generator = torch.Generator().manual_seed(0)
    blocks = Walk().sample(WORLD.spec, ActionBounds.of(WORLD.spec), (50, 1, 10), generator)
    start = torch.randn(50, 1, 2, generator=generator)
    walked = WORLD.rollout(Context(latents=start, actions=blocks[:, 0, :0]), blocks)[:, 0]
    return LatentEpisodes(latents=torch.cat([start, walked], 1), blocks=blocks[:, 0], lengths=torch.full((50,), 11))


@pytest.fixture(scope="module")
def geometry(episodes: LatentEpisodes) -> LatentGeometry:
    return measure_geometry(WORLD, episodes, InverseModelConfig(steps=150, hidden=(32,)), seed=0)


@pytest.fixture(scope="module")
def policy(episodes: LatentEpisodes, geometry: LatentGeometry) -> ReactivePolicy:
    config = ReactiveConfig(
        hidden=(64,),
        teacher=CEM(samples=64, iterations=4),
        problems=256,
        horizon=8,
        steps=400,
        batch=256,
        hindsight=0.0,
    )
    return fit_reactive(WORLD, episodes, geometry, config, seed=0)


GOAL = torch.tensor([[6.0, 1.0], [-4.0, 4.0], [0.5, 0.0]])


def drive(agent: Agent, steps: int) -> Tensor:
    position = torch.zeros(3, 2)
    agent.reset(Goal(observations=look(GOAL)))
    for _ in range(steps):
        action = agent.act(look(position))
        assert action.shape == (3, 2)
        assert (action.abs() <= 1).all()
        position = position + action
    return (position - GOAL).norm(dim=-1)


@pytest.mark.parametrize("every", [1, 2])
def test_the_reactive_policy_reaches_goals_alone(policy: ReactivePolicy, every: int) -> None:
    agent = ReactiveAgent(WORLD, policy, every=every)
    assert isinstance(agent, Agent)
    assert (drive(agent, 16) < 1.0).all()


def test_only_an_agent_that_is_stuck_takes_random_blocks(policy: ReactivePolicy) -> None:
    goals = torch.tensor([[6.0, 1.0], [6.0, 1.0], [0.1, 0.0]])  # the last agent is at its goal
    agent = ReactiveAgent(WORLD, policy, step_length=1.0, seed=1)
    agent.reset(Goal(observations=look(goals)))
    taken = []
    for step in range(3):
        position = torch.tensor([[0.0, 0.0], [1.0 * step, 0.0], [0.0, 0.0]])  # the first agent does not move
        with torch.no_grad():
            usual = policy(position, goals).view(3, 2, 2)
        block = torch.stack([agent.act(look(position)) for _ in range(2)], dim=1)
        torch.testing.assert_close(block[1:], usual[1:])
        assert (block.abs() <= 1).all()
        assert torch.equal(block[0], usual[0]) == (step == 0)
        taken.append(block[0])
    assert not torch.equal(taken[1], taken[2])
    agent.select([1, 0])
    position = torch.tensor([[5.0, 0.0], [0.0, 0.0]])
    with torch.no_grad():
        usual = policy(position, goals[:2]).view(2, 2, 2)
    block = torch.stack([agent.act(look(position)) for _ in range(2)], dim=1)
    torch.testing.assert_close(block[0], usual[0])
    assert not torch.allclose(block[1], usual[1])


def test_the_reactive_policy_proposes_a_plan(policy: ReactivePolicy) -> None:
    context = Context(latents=torch.zeros(3, 1, 2), actions=torch.zeros(3, 0, 4))
    with torch.no_grad():
        plan = PolicyProposer(model=WORLD, policy=policy)(context, GOAL, 8)
        assert plan.shape == (3, 1, 8, 4)
        reached = WORLD.rollout(context, plan)[:, 0, -1]
        assert torch.equal(plan[:, 0, 0], policy(torch.zeros(3, 2), GOAL))
    assert ((reached - GOAL).norm(dim=-1) < 1.0).all()


def test_a_proposal_from_a_model_with_history_is_the_same(policy: ReactivePolicy) -> None:
    # LinearWorld takes a history and needs none: only the last latent counts.
    short = Context(latents=torch.zeros(3, 1, 2), actions=torch.zeros(3, 0, 4))
    world = LinearWorld(block=2, context=3)
    long = Context(latents=torch.zeros(3, 3, 2), actions=torch.zeros(3, 2, 4))
    with torch.no_grad():
        plans = [PolicyProposer(model=m, policy=policy)(c, GOAL, 5) for m, c in ((WORLD, short), (world, long))]
    assert torch.equal(*plans)


def test_a_saved_reactive_policy_is_the_same(policy: ReactivePolicy, tmp_path: Path) -> None:
    policy.save(tmp_path / "policy", WORLD)
    back = ReactivePolicy.load(tmp_path / "policy", WORLD)
    with torch.no_grad():
        assert torch.equal(back(GOAL, -GOAL), policy(GOAL, -GOAL))
    with pytest.raises(CheckpointError, match="expected a temporal-distance"):
        TemporalDistance.load(tmp_path / "policy", WORLD)


@settings(max_examples=20)
@given(low=st.floats(-9, 9), width=st.floats(0.01, 9), walking=st.booleans(), seed=st.integers(0, 99))
def test_random_actions_are_within_bounds_and_seeded(low: float, width: float, walking: bool, seed: int) -> None:
    spec = ActionSpec(low=(low, low), high=(low + width, low + 2 * width))
    bounds = torch.tensor(spec.low), torch.tensor(spec.high)

    def actions(seed: int) -> Tensor:
        agent = RandomAgent(spec, walk=Walk() if walking else None, seed=seed)
        agent.reset(Goal(observations=look(torch.zeros(3, 2))))
        return torch.stack([agent.act(look(torch.zeros(3, 2))) for _ in range(70)])

    first = actions(seed)
    assert ((first >= bounds[0]) & (first <= bounds[1])).all()
    assert torch.equal(first, actions(seed))
    assert not torch.equal(first, actions(seed + 1))


def test_a_random_walk_persists_and_uniform_actions_do_not() -> None:
    spec = ActionSpec(low=(-1.0, -1.0), high=(1.0, 1.0))

    def correlation(walk: Walk | None) -> float:
        agent = RandomAgent(spec, walk=walk)
        agent.reset(Goal(observations=look(torch.zeros(100, 2))))
        actions = torch.stack([agent.act(look(torch.zeros(100, 2))) for _ in range(40)])
        return ((actions[1:] * actions[:-1]).mean() / actions.square().mean()).item()

    assert abs(correlation(None)) < 0.1
    assert correlation(Walk()) > 0.7


def directed_cache(episodes: int = 60, steps: int = 20) -> Frames:
    """Return straight walks, each in its own direction, of a world that moves by half the action."""
    random = np.random.default_rng(0)
    heading = random.uniform(0, 2 * np.pi, (episodes, 1))
    actions = np.stack([np.cos(heading), np.sin(heading)], -1).repeat(steps + 1, 1).astype(np.float32)
    actions[:, -1] = 0
    start = random.normal(0, 3, (episodes, 1, 2)).astype(np.float32)
    position = np.concatenate([start, start + 0.5 * actions[:, :-1].cumsum(1)], axis=1)
    return Frames(
        spec=DatasetSpec(observation=ObservationSpec(vector=2), action=ActionSpec(low=(-1.0, -2.0), high=(1.0, 2.0))),
        fingerprint="directed",
        pixels=None,
        vector=position.reshape(-1, 2).astype(np.float32),
        actions=actions.reshape(-1, 2),
        labels={},
        starts=np.arange(episodes, dtype=np.int64) * (steps + 1),
        lengths=np.full(episodes, steps, np.int64),
    )


@pytest.fixture(scope="module", params=[1, 3], ids=["pairs", "groups"])
def cloned(request: pytest.FixtureRequest) -> CloningPolicy:
    goals: int = request.param
    config = CloningConfig(latent_dim=16, hidden=(64,), steps=400, batch=256 // (goals + 1), goals=goals, reach=20)
    return fit_behaviour_cloning(directed_cache(), config, seed=0)


def test_cloning_heads_for_the_goal(cloned: CloningPolicy) -> None:
    agent = BehaviourCloningAgent(cloned)
    position = torch.zeros(8, 2)
    angle = torch.arange(8) * torch.pi / 4
    goal = 3 * torch.stack([angle.cos(), angle.sin()], dim=-1)
    agent.reset(Goal(observations=look(goal)))
    action = agent.act(look(position))
    alignment = torch.cosine_similarity(action, goal, dim=-1)
    assert (alignment > 0.7).all(), alignment
    assert (action.abs() <= torch.tensor([1.0, 2.0])).all()


def test_a_clone_refuses_observations_of_another_kind(cloned: CloningPolicy) -> None:
    with pytest.raises(DataError, match="the model expects pixels .* got pixels None and a vector of 9"):
        cloned.encode(Observations(vector=torch.zeros(1, 9)))


def test_a_saved_clone_acts_the_same(cloned: CloningPolicy, tmp_path: Path) -> None:
    cloned.save(tmp_path / "clone", WORLD)
    back = CloningPolicy.load(tmp_path / "clone", WORLD)
    assert back.action == cloned.action
    agents = BehaviourCloningAgent(cloned), BehaviourCloningAgent(back)
    for agent in agents:
        agent.reset(Goal(observations=look(GOAL)))
    first, second = (agent.act(look(-GOAL)) for agent in agents)
    assert torch.equal(first, second)


@pytest.mark.parametrize("kind", ["random", "reactive", "cloning"])
def test_wrong_use_is_refused(kind: str, policy: ReactivePolicy, cloned: CloningPolicy) -> None:
    agent = {
        "random": lambda: RandomAgent(WORLD.spec.action),
        "reactive": lambda: ReactiveAgent(WORLD, policy),
        "cloning": lambda: BehaviourCloningAgent(cloned),
    }[kind]()
    with pytest.raises(PlanningError, match="before reset"):
        agent.act(look(torch.zeros(1, 2)))
    agent.reset(Goal(observations=look(torch.zeros(3, 2))))
    with pytest.raises(PlanningError, match="3 environments"):
        agent.act(look(torch.zeros(2, 2)))
    first = agent.act(look(torch.zeros(3, 2)))
    agent.select([2, 1])
    assert agent.act(look(torch.zeros(2, 2))).shape == (2, first.shape[1])
