"""Far goals over landmarks: behind a wall, behind a door that closes, unknown; and exploring to learn them."""

import numpy as np
import pytest
import torch
from door_world import BOTTOM, DOOR, STEP, TOP, DoorWorld
from torch import Tensor

from worldloom.agents import (
    CuriosityConfig,
    CuriosityGuide,
    ExploringAgent,
    FollowConfig,
    LandmarkGuide,
    PlanningAgent,
)
from worldloom.core.errors import PlanningError
from worldloom.core.seams import Agent, Guardrail
from worldloom.core.types import Context, Goal, Observations, Plan
from worldloom.guardrails import Custom, Rate
from worldloom.memory import LandmarkGraph
from worldloom.planning import GoalObjective, LatentL2, Planner
from worldloom.planning.solvers import CEM

LEFT, RIGHT = torch.tensor([[-0.8, 0.0]]), torch.tensor([[0.8, 0.0]])


def agent_of(world: DoorWorld, graph: LandmarkGraph | None, follow: FollowConfig | None = None) -> PlanningAgent:
    guide = None if graph is None else LandmarkGuide(graph, follow)
    planner = Planner(world, CEM(samples=32, elites=6), horizon=4)
    return PlanningAgent(world, planner, lambda goal: GoalObjective(LatentL2(STEP), goal), replan=1, guide=guide)


def explorer_of(
    world: DoorWorld,
    graph: LandmarkGraph,
    config: CuriosityConfig | None = None,
    *,
    rail: Guardrail | None = None,
    seed: int = 0,
) -> ExploringAgent:
    planner = Planner(world, CEM(), horizon=4, guardrails=() if rail is None else (rail,))
    guide = CuriosityGuide(world, graph, config, seed=seed)
    return ExploringAgent(
        PlanningAgent(
            world, planner, lambda goal: GoalObjective(LatentL2(STEP), goal), replan=1, guide=guide, seed=seed
        )
    )


def go(agent: Agent, world: DoorWorld, start: Tensor, goal: Tensor, steps: int) -> tuple[Tensor, int]:
    """Act until within two steps of the goal; return where that is, and the steps taken."""
    agent.reset(Goal(observations=Observations(vector=goal)))
    position = start
    for step in range(steps):
        if ((position - goal).norm(dim=1) < 2 * STEP).all():
            return position, step
        position = world.step(position, agent.act(Observations(vector=position)))
    return position, steps


def test_memory_leads_around_a_wall_that_stops_a_flat_planner() -> None:
    world = DoorWorld()
    flat, _ = go(agent_of(world, None), world, LEFT, RIGHT, 80)
    assert flat[0, 0] < 0
    with_memory, steps = go(agent_of(world, world.graph()), world, LEFT, RIGHT, 80)
    assert with_memory[0, 0] > 0
    assert steps < 60  # about 34 along the shortest way


def test_several_environments_at_once_and_fewer_when_some_are_over() -> None:
    world = DoorWorld()
    agent = agent_of(world, world.graph())
    start = torch.tensor([[-0.8, 0.0], [-0.5, 0.5], [0.5, 0.5]])
    goal = torch.tensor([[0.8, 0.0], [0.5, 0.0], [-0.6, -0.2]])
    agent.reset(Goal(observations=Observations(vector=goal)))
    position = start
    for _ in range(10):
        position = world.step(position, agent.act(Observations(vector=position)))
    agent.select([2, 0])
    position, goal = position[[2, 0]], goal[[2, 0]]
    for _ in range(60):
        position = world.step(position, agent.act(Observations(vector=position)))
    assert ((position - goal).norm(dim=1) < 3 * STEP).all()


def test_a_closed_door_is_learnt_within_an_episode_and_remembered() -> None:
    believed, real = DoorWorld(), DoorWorld(closed=(TOP,))
    graph = believed.graph()
    start, goal = torch.tensor([[-0.5, 0.6]]), torch.tensor([[0.5, 0.6]])

    # Who never doubts a way stays before the door.
    stubborn = agent_of(believed, believed.graph(), FollowConfig(patience=10_000))
    stuck, _ = go(stubborn, real, start, goal, 300)
    assert stuck[0, 0] < 0

    there, first = go(agent_of(believed, graph), real, start, goal, 300)
    assert there[0, 0] > 0
    # Another agent with the same memory does not try the door again.
    there, second = go(agent_of(believed, graph), real, start, goal, 300)
    assert there[0, 0] > 0
    assert second < first
    assert second < 70  # about 34 along the shortest way through the other door


def test_when_all_known_ways_have_failed_the_goal_itself_is_aimed_at() -> None:
    class Watched(LandmarkGuide):
        def __call__(self, context: Context, followed: Plan | None, blocks: int) -> Tensor:
            self.aimed = super().__call__(context, followed, blocks)
            return self.aimed

    believed, real = DoorWorld(), DoorWorld(closed=(TOP, BOTTOM))
    guide = Watched(believed.graph())
    planner = Planner(believed, CEM(samples=32, elites=6), horizon=4)
    agent = PlanningAgent(believed, planner, lambda goal: GoalObjective(LatentL2(STEP), goal), replan=1, guide=guide)
    goal = torch.tensor([[0.5, 0.6]])
    agent.reset(Goal(observations=Observations(vector=goal)))
    position, kinds = torch.tensor([[-0.5, 0.6]]), []
    for _ in range(400):
        position = real.step(position, agent.act(Observations(vector=position)))
        kinds.append(guide.outlook[0].kind)
        assert kinds[-1] != "lost" or torch.equal(guide.aimed, goal)
    assert kinds[0] == "known"
    assert "lost" in kinds
    assert "unknown" not in kinds


def test_an_unknown_goal_is_said_to_be_unknown_and_the_nearest_known_place_is_where_it_waits() -> None:
    world = DoorWorld(closed=(TOP, BOTTOM))
    graph = LandmarkGraph(world.spec, step_length=STEP, reversible=True)
    walks = world.wander(60, 60)
    walks = walks[walks[:, 0, 0] < 0]  # nothing was seen right of the wall
    count, length = walks.shape[:2]
    graph.learn(walks.flatten(0, 1), np.repeat(np.arange(count), length), np.tile(np.arange(length), count))
    guide = LandmarkGuide(graph)
    planner = Planner(world, CEM(samples=32, elites=6), horizon=4)
    agent = PlanningAgent(world, planner, lambda goal: GoalObjective(LatentL2(STEP), goal), replan=1, guide=guide)
    goal = torch.tensor([[0.9, 0.3]])
    position, _ = go(agent, world, torch.tensor([[-0.9, -0.9]]), goal, 60)
    (outlook,) = guide.outlook
    assert outlook.kind == "unknown"
    nearest = graph.latents[outlook.nearest]
    assert outlook.gap == pytest.approx(float((nearest - goal[0]).norm() / STEP), rel=1e-4)
    assert (position[0] - nearest).norm() < 3 * STEP


def test_without_memory_a_goal_in_sight_is_planned_for() -> None:
    world = DoorWorld()
    graph = LandmarkGraph(world.spec, step_length=STEP, reversible=True)
    position, _ = go(agent_of(world, graph), world, LEFT, torch.tensor([[-0.5, 0.1]]), 20)
    assert (position - torch.tensor([[-0.5, 0.1]])).norm() < 2 * STEP


def test_curiosity_comes_to_more_places_than_a_random_walk_of_the_same_length() -> None:
    world, steps = DoorWorld(), 100

    def places(path: list[Tensor]) -> int:
        """Return how many fields of two steps were entered, those of each environment counted apart."""
        fields = (torch.stack(path) // (2 * STEP)).int()
        return len({(row, *field) for moment in fields.tolist() for row, field in enumerate(moment)})

    curious = walked = 0
    for seed in range(4):
        explorer = explorer_of(world, world.graph(learned=False), CuriosityConfig(walks=8), seed=seed)
        path = [torch.tensor([[-0.9, 0.0], [0.9, 0.0]])]
        for _ in range(steps):
            action = explorer.act(Observations(vector=path[-1]))
            assert ((action >= -1) & (action <= 1)).all()
            path.append(world.step(path[-1], action))
        curious += places(path)
        walked += places(list(world.wander(2, steps, seed=seed).unbind(1)))
    assert curious > 1.3 * walked


def test_who_explores_keeps_guardrails() -> None:
    world, graph = DoorWorld(), DoorWorld().graph(learned=False)
    line = Custom(function=lambda rollouts: rollouts.latents[..., 0] + 0.3).over("line")
    explorer = explorer_of(world, graph, CuriosityConfig(walks=8), rail=line)
    position, most = LEFT, []
    for _ in range(150):
        position = world.step(position, explorer.act(Observations(vector=position)))
        most.append(float(position[:, 0].max()))
    assert max(most) <= -0.3 + 1e-5
    assert len(graph) > 5


def test_an_agent_that_explored_reaches_what_it_could_not_before() -> None:
    world = DoorWorld()
    graph = world.graph(learned=False)
    guide = LandmarkGuide(graph)
    planner = Planner(world, CEM(samples=32, elites=6), horizon=4)
    agent = PlanningAgent(
        world,
        planner,
        lambda goal: GoalObjective(LatentL2(STEP), goal),
        replan=1,
        guide=guide,
        explorer=explorer_of(world, graph),
    )
    assert isinstance(agent, Agent)
    assert agent.narrows
    assert agent.explores
    assert "plan_seconds" in agent.statistics
    goal = torch.tensor([[0.4, 0.0]])
    before, _ = go(agent, world, LEFT, goal, 60)
    assert before[0, 0] < 0
    explorer, position = agent.explorer(), LEFT
    for _ in range(600):
        position = world.step(position, explorer.act(Observations(vector=position)))
    after, _ = go(agent, world, LEFT, goal, 80)
    assert after[0, 0] > 0
    assert guide.outlook[0].kind in ("known", "sight")


def test_a_goal_of_another_size_is_refused() -> None:
    guide = LandmarkGuide(DoorWorld().graph(learned=False))
    with pytest.raises(PlanningError, match="a goal of 2 values, as in the landmark graph; got 3"):
        guide.reset(torch.zeros(1, 3))


def test_a_world_that_changes_again_and_again_does_not_double_what_is_remembered_of_the_goal() -> None:
    guide = LandmarkGuide(DoorWorld().graph())
    generator, goals = torch.Generator().manual_seed(0), [RIGHT[0]]
    goals = guide._looks(goals, torch.tensor([0.01 * STEP, 0.0]))
    assert len(goals) == 1  # it hardly looks otherwise
    goals = guide._looks(goals, torch.tensor([6 * STEP, 0.0]))
    assert len(goals) == 2
    for _ in range(12):
        goals = guide._looks(goals, 6 * STEP * torch.randn(2, generator=generator))
    assert 2 < len(goals) <= 8
    assert torch.equal(goals[0], RIGHT[0])


def test_the_doors_of_the_test_world_are_where_they_are_said_to_be() -> None:
    world = DoorWorld(closed=(TOP,))
    heights = torch.tensor([DOOR + 0.1, 0.0, -DOOR - 0.1])
    moved = world.step(torch.stack([torch.full((3,), -0.15), heights], 1), torch.tensor([1.0, 0.0]).expand(3, 2))
    assert (moved[:, 0] > -0.15).tolist() == [False, False, True]


def test_an_explorer_counts_changes_of_the_action_from_the_one_that_is_applied() -> None:
    world = DoorWorld()
    explorer = explorer_of(world, world.graph(), rail=Rate(limit=0.1).over("smoothly", 2))
    for _ in range(2):
        explorer.begin()
        for applied in (torch.tensor([[1.0, 0.0]]), torch.tensor([[-1.0, 0.0]])):
            explorer.resume(applied)
            action = explorer.act(Observations(vector=LEFT))
            assert float((action - applied).norm()) <= 0.1
            assert abs(explorer.limited(np.ones(2, np.float32), applied[0].numpy()) - applied[0].numpy()).max() <= 0.1
