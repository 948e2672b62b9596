"""`worldloom explore`, and evaluating with what was explored."""

import json
import shutil
from pathlib import Path

import pytest

from worldloom.core.files import read_json, write_json
from worldloom.evaluation import PROTOCOLS
from worldloom.memory import EpisodicMemory

WORLDS = ("--protocol", "two-room@1", "--split", "cross-room", "--episodes", "2")


@pytest.fixture(scope="module")
def run(demo, tmp_path_factory) -> str:
    """The demo's run with a method that explores."""
    path = tmp_path_factory.mktemp("explore") / "run"
    shutil.copytree(demo.run, path)
    config = read_json(path / "config.json")
    solver = {"name": "cem", "samples": 8, "iterations": 2, "elites": 3}
    config["recipe"]["methods"]["landmarks"] = {
        "name": "landmarks",
        "solver": solver,
        "curiosity": {"walks": 4},
    }
    write_json(path / "config.json", config)
    return str(path)


def test_what_was_explored_is_there_when_goals_are_told(worldloom, run, tmp_path) -> None:
    memory = str(tmp_path / "m")
    command = ("explore", run, "--memory", memory, "--method", "landmarks", "--steps", "24", *WORLDS)
    explored = json.loads(worldloom(*command, "--json").out)
    with EpisodicMemory.open(memory, spec=None) as opened:
        before = len(opened)
    assert explored == {"memory": memory, "worlds": 2, "memories": before}
    assert before >= 2 * 24 // 5
    command = ("evaluate", run, "--memory", memory, "--method", "landmarks", "--exploration", "0", "--budget", "10")
    results = json.loads(worldloom(*command, *WORLDS, "--json").out)
    ((row,), protocol) = results["rows"], results["protocol"]
    assert (row["method"], row["split"], len(row["episodes"])) == ("landmarks", "cross-room", 2)
    assert list(protocol["splits"]) == ["cross-room"]
    with EpisodicMemory.open(memory, spec=None) as opened:
        assert len(opened) > before
    assert (Path(memory) / "landmarks.json").is_file()


def test_what_cannot_be_explored_is_said(refused, run, tmp_path) -> None:
    memory = str(tmp_path / "m")
    assert "does not explore" in refused(2, "explore", run, "--memory", memory, "--method", "tree search", *WORLDS)
    wrong = ("--protocol", "two-room@1", "--split", "cross-rom")
    said = refused(2, "explore", run, "--memory", memory, "--method", "landmarks", *wrong)
    assert "did you mean 'cross-room'" in said


def test_exploring_before_goals_stands_among_the_conventions() -> None:
    protocol = PROTOCOLS["two-room@1"].customise(split="cross-room", exploration=40)
    assert protocol.title == "two-room-custom@1"
    assert {name: split.exploration for name, split in protocol.splits.items()} == {"cross-room": 40}
    assert any("40 steps" in line for line in protocol.describe())
