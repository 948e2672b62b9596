"""Looking around before the goal is told: who may, for how long, and what it changes."""

import numpy as np
import pytest
import torch
from torch import Tensor

from worldloom.core.seams import Agent
from worldloom.core.types import Goal, Observations
from worldloom.evaluation import PROTOCOLS, Protocol, Split, SuccessRule, evaluate


class Walker(Agent):
    """Goes right for ever, and keeps what it is shown."""

    def __init__(self) -> None:
        self.seen: list[np.ndarray] = []

    def reset(self, goal: Goal) -> None:
        self.seen.clear()

    def act(self, observations: Observations) -> Tensor:
        assert observations.pixels is not None
        self.seen.append(observations.pixels.numpy().copy())
        return torch.tensor([[1.0, 0.0]]).expand(observations.axes[0], 2)


class Curious(Walker):
    """Explores with a walker of its own each time."""

    explores = True

    def __init__(self) -> None:
        super().__init__()
        self.walkers: list[Walker] = []

    def explorer(self) -> Walker:
        self.walkers.append(Walker())
        return self.walkers[-1]


class Incurious(Walker):
    """Cannot explore."""


@pytest.fixture
def protocol() -> Protocol:
    task = {"split": "cross-room", "closes_after": 3}
    return Protocol(
        name="doors",
        env_id="worldloom/FourRooms-v0",
        splits={
            "explored": Split(episodes=4, task=task, exploration=7, exploration_task={"closes_after": 1000}),
            "not explored": Split(episodes=4, task=task),
        },
        success=SuccessRule(source="info", name="position", radius=3.0),
        budget=6,
    )


def test_an_agent_explores_each_world_from_its_start_and_is_brought_back_there(protocol: Protocol) -> None:
    curious, incurious = Curious(), Incurious()
    only = protocol.model_copy(update={"splits": {"explored": protocol.splits["explored"]}})
    evaluate(only, {"curious": lambda: curious, "incurious": lambda: incurious}, batch=2)
    assert [len(walker.seen) for walker in curious.walkers] == [7, 7]  # two batches
    # The last batch: the same start as when it explored, and as who does not explore.
    assert np.array_equal(curious.walkers[-1].seen[0], curious.seen[0])
    assert np.array_equal(curious.seen[0], incurious.seen[0])


def test_nobody_explores_where_the_protocol_does_not_say_so(protocol: Protocol) -> None:
    curious = Curious()
    only = protocol.model_copy(update={"splits": {"not explored": protocol.splits["not explored"]}})
    evaluate(only, {"curious": lambda: curious})
    assert not curious.walkers


def test_task_options_may_differ_meanwhile(protocol: Protocol) -> None:
    curious = Curious()
    only = protocol.model_copy(update={"splits": {"explored": protocol.splits["explored"]}})
    evaluate(only, {"curious": lambda: curious}, batch=4)
    (walker,) = curious.walkers
    # The door closes after three steps of the episode, and not while exploring.
    assert np.array_equal(walker.seen[2], curious.seen[2])
    assert not np.array_equal(walker.seen[4], curious.seen[4])


def test_exploration_stands_among_the_conventions_and_leaves_other_digests_alone(protocol: Protocol) -> None:
    text = " ".join(protocol.describe())
    assert "explored: 7 steps" in text
    assert '{"closes_after": 1000}' in text
    assert not any(line.startswith("Exploration") for line in PROTOCOLS["two-room@1"].describe())
    more = protocol.splits["explored"].model_copy(update={"exploration": 8})
    assert protocol.model_copy(update={"splits": {"explored": more}}).fingerprint != protocol.fingerprint
