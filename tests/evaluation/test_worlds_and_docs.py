import re
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from worldloom.core.seams import Agent
from worldloom.core.types import Goal, Observations
from worldloom.evaluation import PROTOCOLS, evaluate, gym_protocol

DOCS = Path(__file__).parents[2] / "docs" / "protocols.md"


class Wanderer(Agent):
    """Acts at random in a world with two action dimensions."""

    def __init__(self) -> None:
        self._generator = torch.Generator().manual_seed(0)

    def reset(self, goal: Goal) -> None:
        return None

    def act(self, observations: Observations) -> Tensor:
        return torch.rand(observations.axes[0], 2, generator=self._generator) * 2 - 1


def test_two_rooms_draws_what_its_protocol_says() -> None:
    protocol = PROTOCOLS["two-room@1"].customise(episodes=8, budget=20)
    results = evaluate(protocol, {"random": Wanderer}, batch=5)
    cross, same = (results.row("random", split) for split in ("cross-room", "same-room"))
    for episode in (*cross.episodes, *same.episodes):
        assert episode.start_distance is not None
        assert episode.start_distance > 10
        assert episode.shortest_steps is not None
    assert [rate.label for rate in cross.by_wall] == ["wall between"] or len(cross.by_wall) == 2
    assert len({episode.task for episode in (*cross.episodes, *same.episodes)}) == 16
    assert results.recordings[0].frames is not None
    assert results.recordings[0].frames.shape[1:] == (64, 64, 3)


def test_the_far_maze_asks_for_more_than_a_hundred_steps() -> None:
    results = evaluate(PROTOCOLS["maze-far@1"].customise(episodes=3), {"random": Wanderer})
    for episode in results.rows[0].episodes:
        assert episode.shortest_steps is not None
        assert episode.shortest_steps > 100
        assert episode.budget >= 4 * episode.shortest_steps


@pytest.mark.parametrize("rule", ["position:3", "info:position:3"])
def test_logged_goals_work_in_a_world_of_ours(rule: str) -> None:
    protocol = gym_protocol("worldloom/FourRooms-v0", success=rule, goal_offset=15, budget=10, episodes=6)
    row = evaluate(protocol, {"random": Wanderer}).rows[0]
    assert all(episode.start_distance is not None and episode.start_distance > 3 for episode in row.episodes)
    assert row.spl is None


def test_the_documentation_states_every_named_protocol_as_it_is() -> None:
    text = DOCS.read_text(encoding="utf-8")
    reference = runpy.run_path(str(DOCS.parents[1] / "scripts" / "protocol_reference.py"))
    assert reference["render"](text) == text, "run python scripts/protocol_reference.py"
    # Whatever its form, the page has each protocol's digest, and its conventions word for word.
    for title in PROTOCOLS:
        protocol = PROTOCOLS[title]
        assert protocol.fingerprint in text
        if f"### `{title}`" not in text:
            assert not [words for _, words in reference["conventions"](title) if words not in text]


def test_the_documentation_names_every_key_of_a_row() -> None:
    text = DOCS.read_text(encoding="utf-8")
    protocol = PROTOCOLS["two-room@1"].customise(episodes=1, budget=1)
    value = evaluate(protocol, {"random": Wanderer}, record=0).to_json()
    row = value["rows"][0]
    keys = {*value, *row, *row["latency"], *row["episodes"][0], *row["by_distance"], *row["by_distance"]["bins"][0]}
    assert not [key for key in keys if f"`{key}`" not in text]


@pytest.mark.parametrize("block", re.findall(r"```python\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL))
def test_the_documentations_code_runs(block: str) -> None:
    names: dict[str, Any] = {}
    exec(block, names)
    assert names["protocol"].describe()
