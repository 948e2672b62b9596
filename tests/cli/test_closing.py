"""Commands close the memory and the audit log on every way out, errors included."""

import shutil
from collections.abc import Callable, Mapping
from typing import Any

import pytest
from PIL import Image

from worldloom.agents import AuditLog, PlanningAgent
from worldloom.core.errors import EnvironmentFailure, PlanningError
from worldloom.core.files import read_json, write_json
from worldloom.data import EpisodeDataset
from worldloom.memory import EpisodicMemory
from worldloom.workflow import jobs

pytestmark = pytest.mark.slow  # all wait for the demo


@pytest.fixture
def closed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was closed so far."""
    found: list[str] = []

    def watch(kind: type[Any]) -> None:
        close = kind.close

        def told(self: Any) -> None:
            found.append(kind.__name__)
            close(self)

        monkeypatch.setattr(kind, "close", told)

    watch(EpisodicMemory)
    watch(AuditLog)
    return found


def test_an_evaluation_that_fails_closes_its_memory(demo, refused, closed, monkeypatch, tmp_path) -> None:
    run = tmp_path / "run"
    shutil.copytree(demo.run, run)
    config = read_json(run / "config.json")
    config["recipe"]["methods"] = {"landmarks": {"name": "landmarks"}}
    config["recipe"]["default_method"] = "landmarks"
    write_json(run / "config.json", config)

    def fail(protocol: object, agents: Mapping[str, Callable[[], object]], **_: object) -> None:
        agents["landmarks"]()
        raise EnvironmentFailure("the world broke")

    monkeypatch.setattr(jobs, "evaluate_methods", fail)
    refused(6, "evaluate", str(run), "--memory", str(tmp_path / "m"), "--method", "landmarks")
    assert closed == ["EpisodicMemory"]


def test_a_plan_that_fails_closes_its_audit_log(demo, refused, closed, monkeypatch, tmp_path) -> None:
    def fail(agent: PlanningAgent, observations: object) -> None:
        raise PlanningError("no plan today")

    monkeypatch.setattr(PlanningAgent, "act", fail)
    refused(8, "plan", demo.run, "--method", "CEM, latent L2", "--audit", str(tmp_path / "log"))
    assert closed == ["AuditLog"]


def test_a_deployment_without_a_plant_closes_its_audit_log(demo, refused, closed, tmp_path) -> None:
    pixels = EpisodeDataset.open(demo.data).episode(0).pixels
    assert pixels is not None
    picture = tmp_path / "goal.png"
    Image.fromarray(pixels[0]).save(picture)
    audited = ("--method", "CEM, latent L2", "--audit", str(tmp_path / "log"))
    nowhere = f"unix:{tmp_path / 'nowhere'}"
    refused(6, "deploy", demo.run, *audited, "--connect", nowhere, "--goal", str(picture), "--safe-action", "zero")
    assert closed == ["AuditLog"]
