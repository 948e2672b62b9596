"""What must never be: counted at each step, whoever breaks it, and said in every table."""

import json

import numpy as np
import pytest
import torch

from worldloom.core.errors import ConfigError
from worldloom.core.seams import Agent
from worldloom.core.types import Goal, Observations
from worldloom.evaluation import PROTOCOLS, Limit, Protocol, Split, SuccessRule, evaluate, table_rows

_PITS = Protocol(
    name="pits-test",
    env_id="worldloom/Pits-v0",
    splits={"behind a pit": Split(episodes=12, task={"obstructed": True})},
    success=SuccessRule(source="info", name="position", radius=3.0, unit="px"),
    limits=(Limit(name="pit_depth", unit="px"),),
    min_distance=25.0,
    budget=40,
)


class _Straight(Agent):
    """Goes straight to where the goal is, which it is told: through whatever lies between."""

    def reset(self, goal: Goal) -> None:
        assert goal.observations.pixels is not None
        self._goal = _red(goal.observations)

    def act(self, observations: Observations) -> torch.Tensor:
        way = self._goal - _red(observations)
        return way / way.abs().amax(dim=1, keepdim=True).clamp_min(1e-6)


class _Still(_Straight):
    def act(self, observations: Observations) -> torch.Tensor:
        return torch.zeros_like(self._goal)


def _red(observations: Observations) -> torch.Tensor:
    """Find the middle of the red disc."""
    assert observations.pixels is not None
    pixels = observations.pixels.float()
    red = (pixels[..., 0] - pixels[..., 1]).clamp_min(60) - 60
    places = torch.arange(pixels.shape[1]) + 0.5
    total = red.sum(dim=(1, 2)).clamp_min(1e-6)
    return torch.stack([(red.sum(1) * places).sum(1) / total, (red.sum(2) * places).sum(1) / total], dim=1)


def test_who_crosses_a_pit_is_counted_and_who_stays_is_not() -> None:
    results = evaluate(_PITS, {"straight": _Straight, "still": _Still})
    straight, still = (results.row(name, "behind a pit") for name in ("straight", "still"))
    assert straight.violated.successes >= 6  # a pit lies on each straight way, or so near that it is no way to go
    assert still.violated.successes == 0
    # A fall ends the episode, ten steps later, and so does the goal.
    assert [one.violations for one in straight.episodes] == [0 if one.success else 11 for one in straight.episodes]


def test_tables_and_files_say_how_often_a_limit_was_broken() -> None:
    results = evaluate(_PITS, {"straight": _Straight})
    header, row = table_rows(results)
    broken = results.rows[0].violated
    assert row[header.index("limits broken")].startswith(f"{broken.rate:.1%} [")
    written = json.loads(json.dumps(results.to_json()))
    assert written["rows"][0]["violated"]["successes"] == broken.successes
    assert type(results).from_json(written).row("straight", "behind a pit").violated == broken


def test_a_protocol_without_limits_says_nothing_of_them_and_keeps_its_digest() -> None:
    plain = _PITS.model_copy(update={"limits": ()})
    results = evaluate(plain, {"still": _Still})
    assert "limits broken" not in table_rows(results)[0]
    assert "violated" not in results.to_json()["rows"][0]
    assert PROTOCOLS["two-room@1"].fingerprint == "7fffc749745c0d49"
    assert plain.fingerprint != _PITS.fingerprint


def test_a_limit_on_what_the_world_does_not_give_is_refused() -> None:
    wrong = _PITS.model_copy(update={"limits": (Limit(name="pit_deph"),)})
    with pytest.raises(ConfigError, match="pit_deph.*pit_depth"):
        evaluate(wrong, {"still": _Still})


def test_what_is_not_a_number_breaks_a_limit() -> None:
    limit = Limit(name="speed", most=2.0)
    broken = limit.broken(np.array([[1.0, 2.0], [2.5, 0.0], [np.nan, 0.0]]))
    assert broken.tolist() == [False, True, True]


def test_a_witness_sees_each_step_and_the_agent_that_acts() -> None:
    class Watcher:
        def __init__(self) -> None:
            self.steps: list[int] = []
            self.sizes: list[int] = []

        def begin(self, agent: object, size: int) -> None:
            assert isinstance(agent, _Straight)
            self.sizes.append(size)

        def saw(self, frame: object, step: int) -> None:
            self.steps.append(step)

    watcher = Watcher()
    results = evaluate(_PITS, {"straight": _Straight}, batch=6, witness=watcher)
    assert watcher.sizes == [6, 6]
    longest = [max(episode.steps for episode in results.rows[0].episodes[part]) for part in (slice(6), slice(6, 12))]
    assert watcher.steps == [*range(longest[0] + 1), *range(longest[1] + 1)]
