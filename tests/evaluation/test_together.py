"""Several protocols judge the same episodes."""

from typing import Any

import numpy as np
import pytest
import torch
from track_world import Shuttle, track

from worldloom.core.errors import ConfigError
from worldloom.core.types import Goal, Observations
from worldloom.evaluation import Limit, Protocol, Split, evaluate, evaluate_together

LOOSE = {"source": "info", "name": "position", "radius": 1.0}
# A rule may measure other quantities, of another size.
NARROW = {"source": "info", "name": "pose", "radius": 0.4, "hold": 3}


def rules(**changes: Any) -> list[Protocol]:
    """One protocol that counts solved pairs, one that skips them, and one with another rule that skips fewer."""
    shared = {"pairs_of": "track", "policy": "uniform", **changes}
    return [
        track(success=LOOSE, count_solved=True, policy="uniform", **changes),
        track(name="track-moderate", success=LOOSE, **shared),
        track(name="track-strict", success=NARROW, **shared),
    ]


class Counting(Shuttle):
    """Counts the episodes that it begins, and records how they end."""

    narrows = True

    def __init__(self, stay: int) -> None:
        super().__init__(stay)
        self.begun, self.ends = 0, []

    def reset(self, goal: Goal) -> None:
        super().reset(goal)
        self.begun += len(self.goal)

    def select(self, rows: list[int]) -> None:
        self.goal, self.there = self.goal[rows], self.there[rows]

    def conclude(self, rows: list[int], observations: Observations, outcomes: list[str]) -> None:
        assert len(rows) == len(outcomes)
        self.ends += outcomes


@pytest.mark.parametrize("batch", [4, 50])
@pytest.mark.parametrize("stay", [2, 9])
def test_each_protocol_judges_as_if_it_were_alone(stay: int, batch: int) -> None:
    alone = [evaluate(each, {"m": lambda: Shuttle(stay)}, batch=batch) for each in rules()]
    together = evaluate_together(rules(), {"m": lambda: Shuttle(stay)}, batch=batch)
    for one, same in zip(alone, together, strict=True):
        assert same.protocol == one.protocol
        assert same.rows[0].episodes == one.rows[0].episodes
        assert [each.index for each in same.rows[0].episodes] == list(range(10))
        for ours, theirs in zip(same.recordings, one.recordings, strict=True):
            assert (ours.seed, ours.success, ours.steps) == (theirs.seed, theirs.success, theirs.steps)
            assert ours.path is not None
            assert theirs.path is not None
            assert np.array_equal(ours.path, theirs.path)
            assert np.array_equal(ours.target, theirs.target)
    assert len({one.to_json()["rows"][0]["successes"] for one in alone}) > 1 or stay == 9


def test_a_pair_that_several_protocols_draw_is_run_once() -> None:
    agents = []

    def build() -> Counting:
        agents.append(Counting(9))
        return agents[-1]

    together = evaluate_together(rules(), {"m": build})
    (agent,) = agents
    different = {(each.seed, each.task) for results in together for each in results.rows[0].episodes}
    assert agent.begun == len(different) == len(agent.ends)
    assert 10 < agent.begun < 30
    # What the start solves under the first rule still runs for the third one.
    assert {each.steps for each in together[0].rows[0].episodes} >= {0}
    assert set(agent.ends) == {"reached"}


def test_broken_limits_are_counted_until_each_protocol_has_judged() -> None:
    limits = (Limit(name="position", most=0.0),)
    narrow, loose = rules(limits=limits)[2], rules(limits=limits)[1]
    alone = [evaluate(each, {"m": lambda: Shuttle(9)}).rows[0].episodes for each in (narrow, loose)]
    together = [results.rows[0].episodes for results in evaluate_together([narrow, loose], {"m": lambda: Shuttle(9)})]
    assert together == alone
    assert sum(each.violations for each in alone[0]) > sum(each.violations for each in alone[1])


def test_protocols_of_other_episodes_are_refused() -> None:
    longer = track(name="longer", budget=31)
    other = track(name="other", splits={"ahead": Split(goal_offset=7, episodes=10)})
    for wrong, key in ((longer, "budget"), (other, "splits")):
        with pytest.raises(ConfigError, match=f"longer@1|other@1 and track@1 differ in {key}"):
            evaluate_together([track(), wrong], {"m": lambda: Shuttle(9)})
    with pytest.raises(ConfigError, match="expected at least one protocol; got none"):
        evaluate_together([], {"m": lambda: Shuttle(9)})


def test_an_agent_that_sees_all_environments_acts_for_those_that_run() -> None:
    class Still(Shuttle):
        def act(self, observations: Observations) -> torch.Tensor:
            return torch.zeros(len(self.goal), 1)

    first, second, third = evaluate_together(rules(), {"m": lambda: Still(9)})
    assert first.rows[0].overall.successes == sum(each.steps == 0 for each in first.rows[0].episodes)
    assert (second.rows[0].overall.successes, third.rows[0].overall.successes) == (0, 0)
