"""What an agent sees goes into its memory, and the agent of tomorrow goes on from there."""

from pathlib import Path

import numpy as np
import pytest
import torch
from door_world import BOTTOM, STEP, TOP, DoorWorld
from torch import Tensor

from worldloom.agents import LandmarkGuide, PlanningAgent, Rememberer, recall_landmarks
from worldloom.core.types import Context, Goal, Observations
from worldloom.memory import EpisodicMemory, LandmarkConfig, LandmarkGraph
from worldloom.planning import GoalObjective, LatentL2, Planner
from worldloom.planning.solvers import CEM

LEFT, RIGHT = torch.tensor([[-0.8, 0.0]]), torch.tensor([[0.8, 0.0]])


def empty_graph(world: DoorWorld, **config: float) -> LandmarkGraph:
    return LandmarkGraph(world.spec, LandmarkConfig.parse(config), step_length=STEP, reversible=True)


def agent_of(world: DoorWorld, memory: EpisodicMemory, **config: float) -> PlanningAgent:
    """Return an agent as it is when its process starts."""
    graph = recall_landmarks(memory, empty_graph(world, **config), block=1)
    guide = LandmarkGuide(graph)
    return PlanningAgent(
        world,
        Planner(world, CEM(samples=32, elites=6), horizon=4),
        lambda goal: GoalObjective(LatentL2(STEP), goal),
        replan=1,
        guide=guide,
        observer=Rememberer(memory, graph, replan=1, events=lambda: guide.events),
    )


def go(agent: PlanningAgent, world: DoorWorld, start: Tensor, goal: Tensor, steps: int) -> Tensor:
    agent.reset(Goal(observations=Observations(vector=goal)))
    position = start
    for _ in range(steps):
        position = world.step(position, agent.act(Observations(vector=position)))
    return position


def wander(memory: EpisodicMemory, world: DoorWorld) -> None:
    """Remember walks over the whole square, and save no landmarks."""
    walks = world.wander(60, 60)
    rememberer = Rememberer(memory, empty_graph(world), replan=1)
    # Beginning saves landmarks: of a graph that holds none.
    rememberer.begin(len(walks))
    for step in range(walks.shape[1]):
        here = walks[:, step]
        context = Context(latents=here[:, None], actions=torch.zeros(len(here), 0, 2))
        rememberer(Observations(vector=here), context, None, 0)


def test_each_plan_leaves_a_memory_of_what_led_there_and_how_it_was_foretold(tmp_path: Path) -> None:
    world = DoorWorld()
    with EpisodicMemory.create(tmp_path / "m", spec=world.spec) as memory:
        agent = agent_of(world, memory)
        goal = torch.tensor([[-0.8, 0.3], [0.8, -0.3]])
        position = torch.cat([LEFT, RIGHT])
        agent.reset(Goal(observations=Observations(vector=goal)))
        path, done = [], []
        for _ in range(6):
            path.append(position)
            done.append(agent.act(Observations(vector=position)))
            position = world.step(position, done[-1])
        agent.select([1])
        agent.act(Observations(vector=position[1:]))
        kept = memory.read()
    assert len(kept) == 6 * 2 + 1
    first = kept[kept.episodes == kept.episodes[0]]
    assert np.allclose(first.latents, torch.stack(path)[:, 0])
    assert first.steps.tolist() == list(range(6))
    assert (first.actions[0] == 0).all()
    assert np.allclose(first.actions[1:], torch.stack(done)[:-1, 0])
    assert np.isnan(first.surprises[0])
    assert np.allclose(first.surprises[1:], 0, atol=1e-4)  # the model is the world
    assert "arrived" in first.outcomes.tolist()


def test_a_world_that_is_not_as_predicted_is_remembered_as_surprising(tmp_path: Path) -> None:
    believed, real = DoorWorld(), DoorWorld(closed=(TOP, BOTTOM))
    with EpisodicMemory.create(tmp_path / "m", spec=believed.spec) as memory:
        agent = agent_of(believed, memory)
        go(agent, real, torch.tensor([[-0.2, 0.8]]), torch.tensor([[0.15, 0.8]]), 6)
        assert np.nanmax(memory.read().surprises) > 0.5


@pytest.mark.parametrize("ended", ["whole", "killed", "with other landmarks"])
def test_the_agent_of_tomorrow_goes_where_it_has_been_and_one_without_memory_does_not(
    tmp_path: Path, ended: str
) -> None:
    world, path = DoorWorld(), tmp_path / "m"
    with EpisodicMemory.create(path, spec=world.spec) as memory:
        wander(memory, world)
        if ended == "whole":
            agent_of(world, memory).reset(Goal(observations=Observations(vector=RIGHT)))  # saves its landmarks
    with EpisodicMemory.open(path, spec=world.spec, writable=True) as memory:
        config = {"spacing": 1.3} if ended == "with other landmarks" else {}
        there = go(agent_of(world, memory, **config), world, LEFT, RIGHT, 60)
    assert (there - RIGHT).norm() < 3 * STEP
    with EpisodicMemory.create(tmp_path / "wiped", spec=world.spec) as memory:
        assert go(agent_of(world, memory), world, LEFT, RIGHT, 60)[0, 0] < 0


def test_what_was_seen_since_the_landmarks_were_saved_joins_them(tmp_path: Path) -> None:
    world = DoorWorld()
    with EpisodicMemory.create(tmp_path / "m", spec=world.spec) as memory:
        agent_of(world, memory).reset(Goal(observations=Observations(vector=RIGHT)))
        assert len(recall_landmarks(memory, empty_graph(world), block=1)) == 0
        wander(memory, world)
        assert len(recall_landmarks(memory, empty_graph(world), block=1)) > 30
