"""One place rolls out and scores; the planner checks what comes out; episodes of latents are what they say."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from worldloom.core.actions import Walk
from worldloom.core.errors import DataError, PlanningError
from worldloom.core.seams import Objective
from worldloom.core.types import ActionBounds, Context, Rollouts
from worldloom.data import DatasetSpec, Frames
from worldloom.heads import dream, encode_episodes
from worldloom.planning import GoalObjective, LatentL2, Planner, PlanningProblem, WeightedSum
from worldloom.planning.solvers import CEM
from worldloom.testing import LinearWorld


class Effort(Objective):
    """The mean square of the actions; holds nothing of the batch."""

    def __call__(self, rollouts: Rollouts) -> Tensor:
        return rollouts.actions.square().mean((-1, -2))


def problem_of(batch: int, objective: object = None, horizon: int = 3) -> PlanningProblem:
    world = LinearWorld(block=2)
    generator = torch.Generator().manual_seed(0)
    context = Context(latents=torch.randn(batch, 1, 2, generator=generator), actions=torch.zeros(batch, 0, 4))
    goal = torch.randn(batch, 2, generator=generator)
    return PlanningProblem(world, context, objective or GoalObjective(LatentL2(), goal), horizon=horizon)


@pytest.mark.parametrize(("batch", "candidates"), [(1, 1), (1, 700), (3, 300), (40, 32), (300, 2)])
def test_what_is_cut_to_fit_the_cache_is_scored_as_a_whole(batch: int, candidates: int) -> None:
    problem = problem_of(batch)
    actions = 2 * torch.randn(batch, candidates, 3, 4, generator=torch.Generator().manual_seed(1))
    inside = actions.clamp(-1, 1)
    latents = problem.model.rollout(problem.context, inside)
    distance = (latents - problem.goal[:, None, None]).norm(dim=-1)
    assert torch.allclose(problem.evaluate(actions), distance.mean(-1) + distance[..., -1], atol=1e-5)
    assert problem.count.rollouts == batch * candidates, "each candidate is rolled out once"
    rollouts = problem.rollout(actions)
    assert torch.allclose(rollouts.latents, latents, atol=1e-6)
    assert torch.equal(rollouts.actions, inside)


def test_objectives_add_up_and_narrow_together() -> None:
    problem = problem_of(4)
    goal = GoalObjective(LatentL2(2.0), torch.zeros(4, 2), last_weight=3.0)
    both = WeightedSum([(2.0, goal), (0.5, Effort())])
    rollouts = problem.rollout(torch.rand(4, 5, 3, 4))
    assert torch.allclose(both(rollouts), 2 * goal(rollouts) + 0.5 * Effort()(rollouts))
    assert both.goal is goal.goal
    narrow = problem_of(4, both).select(torch.tensor([2]))
    assert torch.allclose(narrow.evaluate(rollouts.actions[2:3]), both(rollouts)[2:3], atol=1e-5)
    with pytest.raises(PlanningError, match="at least one"):
        WeightedSum([])


def test_the_mean_and_the_last_distance_both_count() -> None:
    problem = problem_of(1)
    latents = torch.tensor([[[3.0, 0.0], [2.0, 0.0], [1.0, 0.0]]])[:, None]
    rollouts = Rollouts(context=problem.context, actions=torch.zeros(1, 1, 3, 4), latents=latents)
    objective = GoalObjective(LatentL2(0.5), torch.zeros(1, 2), last_weight=10.0)
    assert objective(rollouts).item() == pytest.approx(4.0 + 10 * 2.0)


def test_wrong_problems_are_refused() -> None:
    world = LinearWorld(context=2)
    one_frame = Context(latents=torch.zeros(1, 1, 2), actions=torch.zeros(1, 0, 2))
    objective = GoalObjective(LatentL2(), torch.zeros(1, 2))
    with pytest.raises(PlanningError, match="2 frames"):
        PlanningProblem(world, one_frame, objective, horizon=3)
    with pytest.raises(PlanningError, match="horizon"):
        Planner(world, CEM(), horizon=0)
    bounds = ActionBounds(low=torch.zeros(3), high=torch.ones(3))
    with pytest.raises(PlanningError, match="bounds"):
        PlanningProblem(LinearWorld(), one_frame, objective, horizon=3, bounds=bounds)
    planner = Planner(LinearWorld(), CEM(), horizon=3)
    with pytest.raises(PlanningError, match="initial"):
        planner.plan(one_frame, objective, initial=torch.zeros(1, 1, 4, 2), generator=torch.Generator())


def test_a_plain_function_will_do_unless_it_holds_something_for_each_environment() -> None:
    actions, goal = torch.ones(600, 2, 3, 4), torch.zeros(600, 2)
    plain = problem_of(600, lambda rollouts: rollouts.actions.square().mean((-1, -2)))
    assert torch.equal(plain.evaluate(actions), torch.ones(600, 2))
    assert plain.select(slice(0, 5)).evaluate(actions[:5]).shape == (5, 2)

    class Held(Objective):
        def __call__(self, rollouts: Rollouts) -> Tensor:
            return torch.zeros(600, 2)

    held = problem_of(600, lambda rollouts: (rollouts.latents - goal[:, None, None]).norm(dim=-1).mean(-1))
    for problem, reason in ((held, "failed on a part of the batch"), (problem_of(600, Held()), "costs of shape")):
        with pytest.raises(PlanningError, match=rf"{reason}.*select\(rows\)"):
            problem.evaluate(actions)


def test_narrower_bounds_are_kept() -> None:
    bounds = ActionBounds(low=torch.full((2,), 0.1), high=torch.full((2,), 0.2))
    planner = Planner(LinearWorld(), CEM(deviation=3.0), horizon=3, bounds=bounds)
    context = Context(latents=torch.zeros(1, 1, 2), actions=torch.zeros(1, 0, 2))
    plan = planner.plan(
        context, GoalObjective(LatentL2(), torch.full((1, 2), -9.0)), generator=torch.Generator().manual_seed(0)
    )
    assert torch.allclose(plan.actions, torch.tensor(0.1), atol=0.02)


@settings(max_examples=20)
@given(
    drift=st.floats(0, 2), renewal=st.floats(0, 1), slowest=st.floats(0, 1), more=st.floats(0.1, 3), seed=st.integers(0)
)
def test_walks_keep_bounds_and_persist(drift: float, renewal: float, slowest: float, more: float, seed: int) -> None:
    world = LinearWorld(block=3, low=-0.5, high=4.0)
    bounds = ActionBounds.of(world.spec)
    generator = torch.Generator().manual_seed(seed % 2**31)
    walk = Walk(drift=drift, renewal=renewal, slowest=slowest, fastest=slowest + more)
    actions = walk.sample(world.spec, bounds, (2, 3, 5), generator)
    assert actions.shape == (2, 3, 5, 6)
    assert ((actions >= bounds.low) & (actions <= bounds.high)).all()
    straight = Walk(drift=0, renewal=0, slowest=slowest, fastest=slowest + more)
    line = straight.sample(world.spec, bounds, (2, 3, 5), generator).view(2, 3, 15, 2)
    assert torch.allclose(line, line[:, :, :1].expand_as(line), atol=1e-5)


def cache_of(lengths: list[int]) -> Frames:
    world = LinearWorld(block=3)
    frames = sum(lengths) + len(lengths)
    starts = np.cumsum([0, *(length + 1 for length in lengths[:-1])])
    return Frames(
        spec=DatasetSpec(observation=world.spec.observation, action=world.spec.action),
        fingerprint="test",
        pixels=None,
        vector=np.arange(2 * frames, dtype=np.float32).reshape(frames, 2),
        actions=np.arange(100, 100 + 2 * frames, dtype=np.float32).reshape(frames, 2),
        labels={},
        starts=starts.astype(np.int64),
        lengths=np.array(lengths, np.int64),
    )


@pytest.mark.parametrize("offset", [0, 2])
def test_episodes_are_encoded_one_block_apart(offset: int) -> None:
    cache, world = cache_of([7, 2, 9]), LinearWorld(block=3)
    assert cache.vector is not None
    episodes = encode_episodes(world, cache, offset=offset, frames_at_once=2)
    expected = {0: [3, 4], 2: [2, 3]}[offset]  # frames; the episode of two steps is too short
    assert episodes.lengths.tolist() == expected
    for row, episode in enumerate((0, 2)):
        first = cache.starts[episode] + offset
        for place in range(expected[row]):
            assert episodes.latents[row, place].tolist() == cache.vector[first + 3 * place].tolist()
        for place in range(expected[row] - 1):
            block = cache.actions[first + 3 * place : first + 3 * place + 3].reshape(-1)
            assert episodes.blocks[row, place].tolist() == block.tolist()
    before, _, after = episodes.transitions()
    assert len(before) == sum(expected) - 2
    assert ((after - before) == 6).all(), "padding is no transition"
    with pytest.raises(DataError, match="longer"):
        encode_episodes(world, cache_of([2, 1]))


def test_contexts_before_the_start_repeat_the_first_frame() -> None:
    episodes = encode_episodes(LinearWorld(block=3), cache_of([9, 9]))
    context = episodes.context(torch.tensor([0, 1]), torch.tensor([1, 3]), 3)
    assert torch.equal(context.latents[0], episodes.latents[0, [0, 0, 1]])
    assert torch.equal(context.actions[0], torch.stack([torch.zeros(6), episodes.blocks[0, 0]]))
    assert torch.equal(context.latents[1], episodes.latents[1, 1:4])
    assert torch.equal(context.actions[1], episodes.blocks[1, 1:3])


def test_dreams_leave_from_states_of_their_episode() -> None:
    world = LinearWorld(block=3)
    episodes = encode_episodes(world, cache_of([9, 6]))
    dreams = dream(world, episodes, per_episode=5, horizon=4, walk=Walk(), generator=torch.Generator().manual_seed(0))
    assert dreams.latents.shape == (10, 5, 2)
    for row in range(10):
        source = episodes.latents[row // 5, : episodes.lengths[row // 5]]
        assert (dreams.latents[row, 0] == source).all(-1).any()
    moved = dreams.blocks.view(10, 4, 3, 2).sum(2)
    assert torch.allclose(dreams.latents[:, 1:] - dreams.latents[:, :-1], moved, atol=1e-4)
