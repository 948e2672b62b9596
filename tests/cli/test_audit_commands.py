"""`worldloom audit` on logs that others may have written."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from forging import chained
from worldloom.agents import AuditLog, PlanningAgent, log_path
from worldloom.core.chain import NOTHING, entries
from worldloom.core.types import Goal, Observations
from worldloom.planning import GoalObjective, LatentL2, Planner
from worldloom.planning.solvers import CEM
from worldloom.testing import LinearWorld


@pytest.fixture
def log(tmp_path: Path) -> Path:
    """A log of two decisions; the observation of the second has grey pixels."""
    world = LinearWorld()
    with AuditLog(tmp_path / "log", world, about={}) as log:
        planner = Planner(world, CEM(samples=8, iterations=1), horizon=2)
        agent = PlanningAgent(world, planner, lambda goal: GoalObjective(LatentL2(), goal), replan=1, auditor=log)
        here = Observations(vector=torch.zeros(1, 2))
        agent.reset(Goal(observations=here))
        agent.act(here)
        assert agent.situation is not None
        assert agent.plan is not None
        for channels in (1, 2, 3, 7, 0):
            seen = Observations(pixels=torch.full((1, 5, 6, channels), 9, dtype=torch.uint8))
            log.decided(seen, agent.situation, agent.plan, block=0, whole=True)
    return tmp_path / "log"


def test_a_picture_of_any_number_of_channels_is_written(log, worldloom, refused, tmp_path) -> None:
    for entry in (3, 4, 5, 6):
        path = tmp_path / f"{entry}.png"
        assert worldloom("audit", "show", str(log), "--entry", str(entry), "--picture", str(path)).code == 0
        with Image.open(path) as picture:
            assert picture.size == (6, 5)
            assert picture.getpixel((0, 0)) == ((9, 9, 0) if entry == 4 else (9, 9, 9))
    assert "entry 7 has no picture" in refused(
        3, "audit", "show", str(log), "--entry", "7", "--picture", str(tmp_path / "7.png")
    )


def test_a_head_is_checked_before_it_is_compared(log, worldloom, refused) -> None:
    head = json.loads(worldloom("audit", "verify", str(log), "--json").out)
    kept = f"{head['length']}:{head['hash']}"
    for text in (kept, kept.upper(), f" {kept} "):
        assert worldloom("audit", "verify", str(log), "--kept", text).code == 0
    for text in (
        f"²:{head['hash']}",
        f"{'9' * 5000}:{head['hash']}",
        "0:zz",
        f"0:{NOTHING}",
        f"0{kept}",
        ":",
        f"{kept}:x",
    ):
        assert "expected --kept LENGTH:HASH" in refused(2, "audit", "verify", str(log), f"--kept={text}")


@pytest.mark.parametrize("value", [[1], 5, {"a": 5}, {"a": {"b": 1}}, {"a": ["x"]}, {"a": [10**400]}, "x", None])
def test_what_an_entry_says_besides_its_event_breaks_no_table(log, worldloom, value: Any) -> None:
    bodies = [{**entry.body} for entry in entries(log_path(log))]
    bodies[1] |= {"violations": value, "refused": value}
    chained(log_path(log), bodies)
    shown = worldloom("audit", "show", str(log))
    assert shown.code == 0
    assert "began" in shown.out
