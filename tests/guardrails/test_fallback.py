"""What an agent does where no plan keeps its guardrails, and that it says so."""

import pytest
import torch
from torch import Tensor

from worldloom.agents import PlanningAgent
from worldloom.core.errors import ConfigError
from worldloom.core.types import Context, Goal, Observations, Rollouts
from worldloom.guardrails import FALLBACKS, BoundRail, Custom, Fallback, Hold, Retreat, Stop
from worldloom.planning import GoalObjective, LatentL2, Planner, PlanningProblem
from worldloom.planning.solvers import CEM, Solution
from worldloom.testing import LinearWorld

WORLD = LinearWorld()
SEARCH = CEM(samples=64, iterations=5)


def line(limit: float) -> BoundRail:
    """Stay left of a line; every step that leads beyond it, or lies beyond it, breaks this."""

    def beyond(rollouts: Rollouts) -> Tensor:
        return rollouts.latents[..., 0] - limit

    return Custom(function=beyond).over("line")


def agent_of(fallback: Fallback | None, limit: float = 2.0) -> PlanningAgent:
    planner = Planner(WORLD, SEARCH, horizon=3, guardrails=[line(limit)])
    return PlanningAgent(WORLD, planner, lambda goal: GoalObjective(LatentL2(), goal), replan=1, fallback=fallback)


def at(*positions: tuple[float, float]) -> Observations:
    return Observations(vector=torch.tensor(positions, dtype=torch.float32))


def test_a_plan_that_holds_is_followed_up_to_the_line() -> None:
    agent, position = agent_of(None), torch.zeros(1, 2)
    agent.reset(Goal(observations=at((8, 0))))
    for _ in range(12):
        position = position + agent.act(Observations(vector=position))
        assert position[0, 0] <= 2.0 + 1e-4
        assert agent.refused == ()
    assert position[0, 0] > 1.0


@pytest.mark.parametrize("action", [None, (-0.25, 0.5)])
def test_who_stops_does_what_was_declared_and_the_others_go_on(action: tuple[float, float] | None) -> None:
    agent = agent_of(Stop(action=action))
    agent.reset(Goal(observations=at((8, 0), (1, 1))))
    # The first has been pushed far beyond the line.
    actions = agent.act(at((9, 0), (0, 0)))
    assert agent.refused == (0,)
    assert actions[0].tolist() == pytest.approx(list(action or (0.0, 0.0)))
    assert actions[1].norm() > 0.5
    assert list(agent.statistics["plan_refused"]) == [1.0]
    assert agent.plan is not None
    assert agent.plan.violations["line"][0].max() > 0  # what was refused stays to be seen
    agent.select([1])
    agent.act(at((0.5, 0.5)))
    assert agent.refused == ()


def test_who_retreats_goes_back_to_where_a_plan_held() -> None:
    agent, position = agent_of(Retreat()), torch.zeros(1, 2)
    agent.reset(Goal(observations=at((8, 0))))
    agent.act(Observations(vector=position))
    position = torch.tensor([[9.0, 3.0]])
    for _ in range(14):
        position = position + agent.act(Observations(vector=position))
    assert position[0, 0] <= 2.0 + 0.5
    assert agent.refused == ()


def test_who_holds_stays() -> None:
    agent, position = agent_of(Hold()), torch.tensor([[9.0, 3.0]])
    agent.reset(Goal(observations=at((8, 0))))
    for _ in range(4):
        position = position + agent.act(Observations(vector=position))
        assert agent.refused == (0,)
    # The least broken way leads out: it never goes deeper.
    assert position[0, 0] < 9.5


@pytest.mark.parametrize(("fallback", "place"), [(Hold(), (-3.0, 0.0)), (Retreat(), (-4.0, 1.0))])
def test_who_holds_or_retreats_has_no_other_target(fallback: Fallback, place: tuple[float, float]) -> None:
    searches, closed = 0, -1

    class Counted(CEM):
        def solve(self, problem: PlanningProblem, *, initial: Tensor | None, generator: torch.Generator) -> Solution:
            nonlocal searches
            searches += 1
            return super().solve(problem, initial=initial, generator=generator)

    def shut(rollouts: Rollouts) -> Tensor:
        return torch.full_like(rollouts.latents[..., 0], 1.0 if searches == closed else -1.0)

    planner = Planner(
        WORLD, Counted(samples=64, iterations=5), horizon=3, guardrails=[Custom(function=shut).over("shut")]
    )
    target = torch.tensor([[20.0, 0.0]])  # what a policy says is to be reached, wherever the agent is told to be
    agent = PlanningAgent(
        WORLD,
        planner,
        lambda goal: GoalObjective(LatentL2(), target),
        replan=1,
        fallback=fallback,
        toward=lambda state: GoalObjective(LatentL2(), state),
    )
    agent.reset(Goal(observations=at((0, 0))))
    agent.act(at((-4, 1)))
    closed = 2
    action = agent.act(at((-3, 0)))
    assert agent.refused == (0,)
    assert ((torch.tensor([[-3.0, 0.0]]) + action) - torch.tensor([place])).norm() < 0.8


@pytest.mark.parametrize("fallback", [Stop(), Hold(), Retreat()])
def test_where_nothing_can_be_judged_what_was_proposed_is_not_followed(fallback: Fallback) -> None:
    def propose(context: Context, goal: Tensor, horizon: int) -> Tensor:
        return context.latents[:, -1:, None].expand(-1, 1, horizon, -1)  # a policy that knows no better than its input

    planner = Planner(WORLD, SEARCH, horizon=3, guardrails=[line(2.0)])
    agent = PlanningAgent(
        WORLD,
        planner,
        lambda goal: GoalObjective(LatentL2(), goal),
        replan=1,
        proposer=propose,
        fallback=fallback,
    )
    agent.reset(Goal(observations=at((8, 0), (1, 1))))
    actions = agent.act(at((float("nan"), 0), (0, 0)))
    assert agent.refused == (0,)
    assert bool(actions.isfinite().all())


@pytest.mark.parametrize(("action", "message"), [((1.0,), "has 1 values"), ((3.0, 0.0), "out of bounds")])
def test_a_declared_action_must_fit(action: tuple[float, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):  # before it is needed
        agent_of(Stop(action=action))


def test_fallbacks_are_known_by_name() -> None:
    assert set(FALLBACKS) == {"stop", "hold", "retreat"}
