"""Model predictive control: when it plans, from what, and what it remembers."""

import time

import pytest
import torch
from jaxtyping import Float
from torch import Tensor

from worldloom.agents import PlanningAgent
from worldloom.core.errors import PlanningError
from worldloom.core.seams import Agent
from worldloom.core.types import Context, Goal, Observations
from worldloom.planning import GoalObjective, LatentL2, Planner, PlanningProblem
from worldloom.planning.solvers import CEM, Solution, Solver
from worldloom.testing import LinearWorld


class Spy(Solver):
    """Remembers what it is asked, and answers with numbered actions."""

    name: str = "spy"

    def solve(
        self, problem: PlanningProblem, *, initial: Float[Tensor, "B I T A"] | None, generator: torch.Generator
    ) -> Solution:
        asked.append((problem.context, initial))
        number = torch.arange(problem.horizon * 4).view(problem.horizon, 4) / 100 + len(asked) / 1000
        return Solution(actions=number.expand(problem.batch, -1, -1), cost=torch.zeros(problem.batch))


asked: list[tuple[Context, Tensor | None]] = []


@pytest.fixture(autouse=True)
def _forget() -> None:
    asked.clear()


def look(position: Tensor) -> Observations:
    return Observations(vector=position)


def agent_of(world: LinearWorld, solver: Solver, *, replan: int, horizon: int = 3, **options: object) -> PlanningAgent:
    planner = Planner(world, solver, horizon=horizon)
    return PlanningAgent(world, planner, lambda goal: GoalObjective(LatentL2(), goal), replan=replan, **options)


def test_reaches_its_goals_within_bounds() -> None:
    world = LinearWorld(block=2, low=-0.5, high=1.0)
    agent = agent_of(world, CEM(), replan=2)
    assert isinstance(agent, Agent)
    goal, position = torch.tensor([[3.0, 4.0], [-2.0, 1.0], [0.0, 0.0]]), torch.zeros(3, 2)
    agent.reset(Goal(observations=look(goal)))
    for _ in range(14):
        action = agent.act(look(position))
        assert action.shape == (3, 2)
        assert ((action >= -0.5) & (action <= 1.0)).all()
        position = position + action
    assert ((position - goal).norm(dim=-1) < 0.4).all()
    statistics = agent.statistics
    assert len(statistics["plan_seconds"]) == 7
    assert list(statistics["plan_environments"]) == [3.0] * 7
    assert min(statistics["plan_rollouts"]) > 3 * 3 * 64


def test_replans_at_the_stated_steps_and_follows_the_plan_in_between() -> None:
    world = LinearWorld(block=2)
    agent = agent_of(world, Spy(), replan=3)
    agent.reset(Goal(observations=look(torch.zeros(2, 2))))
    actions = [agent.act(look(torch.zeros(2, 2))) for _ in range(8)]
    assert len(asked) == 3, "at steps 0, 3 and 6"
    for step, action in enumerate(actions):
        plan, place = step // 3 + 1, step % 3
        expected = torch.tensor([2 * place, 2 * place + 1]) / 100 + plan / 1000
        assert torch.allclose(action, expected.expand(2, 2)), step


def test_warm_start_is_the_last_plan_shifted_by_what_was_done() -> None:
    agent = agent_of(LinearWorld(block=2), Spy(), replan=3)
    agent.reset(Goal(observations=look(torch.zeros(1, 2))))
    for _ in range(4):
        agent.act(look(torch.zeros(1, 2)))
    assert asked[0][1] is None
    initial = asked[1][1]
    assert initial is not None
    assert initial.shape == (1, 1, 3, 4)
    before = torch.arange(12.0).view(6, 2) / 100 + 1 / 1000
    expected = torch.cat([before[3:], before[-1:].expand(3, 2)])
    assert torch.allclose(initial.view(6, 2), expected)
    agent.reset(Goal(observations=look(torch.zeros(1, 2))))
    agent.act(look(torch.zeros(1, 2)))
    assert asked[2][1] is None, "a new episode starts cold"


def test_a_proposer_gives_candidates() -> None:
    proposal = torch.full((1, 2, 3, 4), 0.25)

    def propose(context: Context, goal: Tensor, horizon: int) -> Tensor:
        assert (context.latents.shape, goal.shape, horizon) == ((1, 1, 2), (1, 2), 3)
        return proposal

    agent = agent_of(LinearWorld(block=2), Spy(), replan=1, proposer=propose)
    agent.reset(Goal(observations=look(torch.zeros(1, 2))))
    agent.act(look(torch.zeros(1, 2)))
    agent.act(look(torch.zeros(1, 2)))
    assert torch.equal(asked[0][1], proposal)
    assert asked[1][1].shape == (1, 3, 3, 4), "the warm start, then the proposals"
    assert torch.equal(asked[1][1][:, 1:], proposal)


def test_the_context_is_the_frames_one_block_apart() -> None:
    world = LinearWorld(block=2, context=3)
    agent = agent_of(world, Spy(), replan=1)
    frames = torch.randn(9, 2, 2, generator=torch.Generator().manual_seed(0))
    agent.reset(Goal(observations=look(torch.zeros(2, 2))))
    buffer = torch.empty(2, 2)  # a simulator that returns the same buffer each time
    actions = []
    for step in range(9):
        buffer.copy_(frames[step])
        actions.append(agent.act(look(buffer)))
        context, _ = asked[step]
        places = [max(0, step - back) for back in (4, 2, 0)]
        assert torch.equal(context.latents, frames[places].transpose(0, 1)), step
        for block, first in enumerate((step - 4, step - 2)):
            for part in range(2):
                taken = actions[first + part] if first + part >= 0 else torch.zeros(2, 2)
                assert torch.equal(context.actions[:, block, 2 * part : 2 * part + 2], taken), step


def test_environments_that_are_over_are_dropped() -> None:
    world = LinearWorld(block=2, context=2)
    agent = agent_of(world, Spy(), replan=4)
    agent.reset(Goal(observations=look(torch.arange(6.0).view(3, 2))))
    frames = torch.randn(5, 3, 2, generator=torch.Generator().manual_seed(0))
    agent.act(look(frames[0]))
    agent.act(look(frames[1]))
    agent.select([2, 0])
    for step in (2, 3, 4):
        assert agent.act(look(frames[step, [2, 0]])).shape == (2, 2)
    context, initial = asked[1]
    assert torch.equal(context.latents, frames[[2, 4]][:, [2, 0]].transpose(0, 1))
    assert initial is not None
    assert initial.shape[0] == 2
    assert list(agent.statistics["plan_environments"]) == [3.0, 2.0]


def test_wrong_use_is_refused() -> None:
    world = LinearWorld(block=2)
    agent = agent_of(world, Spy(), replan=2)
    with pytest.raises(PlanningError, match="before reset"):
        agent.act(look(torch.zeros(1, 2)))
    agent.reset(Goal(observations=look(torch.zeros(2, 2))))
    with pytest.raises(PlanningError, match="2 environments"):
        agent.act(look(torch.zeros(3, 2)))
    with pytest.raises(PlanningError, match="expected one or more indices from 0 to below 2"):
        agent.select([2])
    with pytest.raises(PlanningError, match="expected replan from 1 to 6"):
        agent_of(world, Spy(), replan=7)
    with pytest.raises(PlanningError, match="leading axis"):
        agent.reset(Goal(observations=look(torch.zeros(2))))


def test_a_deadline_or_a_budget_cuts_the_search_and_the_agent_still_acts() -> None:
    world = LinearWorld(block=2)
    goal, position = look(torch.tensor([[6.0, 3.0]])), look(torch.zeros(1, 2))
    for options, hurried in (({"budget": 1e-6}, False), ({}, True), ({}, False)):
        agent = agent_of(world, CEM(iterations=30), replan=2, **options)
        agent.reset(Goal(observations=goal))
        action = agent.act_by(time.monotonic(), position) if hurried else agent.act(position)
        cut = hurried or bool(options)
        assert action.isfinite().all()
        assert agent.plan is not None
        assert agent.plan.cut_short == cut
        assert list(agent.statistics["plan_cut_short"]) == [float(cut)]
        assert (agent.statistics["plan_rollouts"][0] < 200) == cut
    with pytest.raises(PlanningError, match="budget above 0"):
        agent_of(world, CEM(), replan=2, budget=0.0)
