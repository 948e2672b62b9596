"""Margins are measured where they will be needed, kept with what they are for, and refused for anything else."""

import json
from pathlib import Path

import pytest
import torch

from worldloom.agents import HierarchyMethod, LandmarkAgent, LandmarkMethod, log_path
from worldloom.core.chain import entries
from worldloom.core.errors import ConfigError, DataError, StorageError
from worldloom.core.types import Goal, Observations
from worldloom.data import EpisodeDataset
from worldloom.guardrails import Box
from worldloom.heads import CoarseConfig
from worldloom.planning.solvers import CEM
from worldloom.recipes import Recipe, load_recipe
from worldloom.workflow import Run, calibrate, replay_entry
from worldloom.workflow import jobs as workflow

_TINY = [
    "collection.episodes=40",
    "collection.steps=40",
    "training.steps=20",
    "training.batch=16",
    "training.validation_share=0.3",
    "training.validation_windows=16",
    "inverse.steps=4",
    "distance.steps=4",
    "reactive.steps=4",
    "reactive.problems=32",
    "cloning.steps=4",
    "probes.pit_depth.steps=50",
    "rules.risk=0.3",
]


def recipe() -> Recipe:
    """Pits that are allowed to be 40 px deep: a model that has learned nothing finds them safe, too."""
    tiny = load_recipe("pits").override(_TINY)
    assert tiny.rules is not None
    rail = tiny.rules.guardrails["out of the pits"].model_copy(update={"region": Box(high=(40.0,))})
    rules = tiny.rules.model_copy(update={"guardrails": {"out of the pits": rail}})
    far = {"landmarks": LandmarkMethod(exploring=CEM(samples=16)), "hierarchy": HierarchyMethod(solver=CEM(samples=32))}
    coarse = (CoarseConfig(stride=2, steps=4),)
    return tiny.model_copy(update={"rules": rules, "methods": tiny.methods | far, "hierarchy": coarse})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pits")
    chosen = recipe()
    workflow.train(chosen, workflow.collect(chosen, root / "data"), root / "run")
    return root / "run"


def test_margins_are_calibrated_kept_and_taken(folder: Path) -> None:
    run = Run.open(folder)
    method = run.method("calibrated")
    assert run.margins(method) is None
    with pytest.raises(ConfigError, match="calibrate first"):
        run.agent("calibrated")
    margins = calibrate(run, split="in the open", episodes=8)
    assert margins.values.shape == (1, 6)
    assert bool((margins.values.diff(dim=1) >= 0).all())  # what is farther ahead is less certain
    kept = run.margins(method)
    assert kept is not None
    assert torch.equal(kept.values, margins.values)
    written = json.loads(run.margins_path(method).read_text())
    assert [line["needed"] <= line["factor"] for line in written["rounds"]][-1]
    assert run.agent("calibrated").planner.guardrails[0].margin.shape == (6,)
    # Of the logs alone: without a round in the world.
    candidates = calibrate(run, method="per candidate")
    assert candidates.episodes == 0
    assert "rounds" not in json.loads(run.margins_path(run.method("per candidate")).read_text())


def test_margins_are_of_one_policy_and_method(folder: Path) -> None:
    run = Run.open(folder)
    margins = calibrate(run, method="per candidate")
    assert run.rules is not None
    stricter = run.under(run.rules.__class__(layers=(run.rules.layers[0].model_copy(update={"risk": 0.2}),)), None)
    assert stricter.margins(run.method("per candidate")) is None
    path = run.margins_path(run.method("per candidate"))
    values = json.loads(path.read_text())
    other = {**values["method"], "horizon": values["method"]["horizon"] + 1}
    for key, wrong in (
        ("rules", "another"),
        ("model", "another"),
        ("method", other),
        ("values", [[-1.0]]),
        ("values", [[1.0], [1.0]]),
        ("risk", None),
    ):
        path.write_text(json.dumps({**values, key: wrong}))
        with pytest.raises(StorageError, match="calibrate again"):
            run.margins(run.method("per candidate"))
    path.write_text(json.dumps(values))
    found = run.margins(run.method("per candidate"))
    assert found is not None
    assert torch.equal(found.values, margins.values)


def test_a_risk_that_so_few_episodes_cannot_tell_is_said(folder: Path) -> None:
    with pytest.raises(DataError, match="2 episodes cannot tell a risk of 0.3 at a confidence of 0.9: at least 7"):
        calibrate(Run.open(folder), split="in the open", episodes=2)


def test_only_what_uses_margins_is_calibrated(folder: Path) -> None:
    run = Run.open(folder)
    for method in ("random", "penalty", "no guardrail"):
        with pytest.raises(ConfigError, match="keeps no margins"):
            calibrate(run, method=method)
    with pytest.raises(ConfigError, match="nothing to calibrate"):
        calibrate(run.under(None, None))
    assert run.rules is not None
    nothing = run.rules.layers[0].model_copy(update={"guardrails": {}})
    bare = run.under(run.rules.__class__(layers=(nothing,)), None)
    with pytest.raises(ConfigError, match="nothing to calibrate"):
        calibrate(bare)
    assert bare.agent("calibrated").planner.guardrails == ()  # no margin is missing


def test_a_policy_that_holds_nowhere_is_not_calibrated(folder: Path) -> None:
    run = Run.open(folder)
    assert run.rules is not None
    layer = run.rules.layers[0]
    rail = layer.guardrails["out of the pits"].model_copy(update={"region": Box(high=(-1e6,))})
    impossible = layer.model_copy(update={"guardrails": {"out of the pits": rail}})
    with pytest.raises(ConfigError, match="holds in none of"):
        calibrate(run.under(run.rules.__class__(layers=(impossible,)), None), split="in the open", episodes=8)


@pytest.mark.parametrize("method", ["landmarks", "hierarchy"])
def test_what_plans_for_far_goals_keeps_guardrails_and_can_be_made_again(
    folder: Path, tmp_path: Path, method: str
) -> None:
    with pytest.raises(ConfigError, match="calibrate first"):
        Run.open(folder).agent(method)
    calibrate(Run.open(folder), method=method, split="in the open", episodes=8)
    run = Run.open(folder, audit=tmp_path / "log")
    agent = run.agent(method)
    for part in agent.parts.values():
        assert [rail.name for rail in part.rails] == ["out of the pits"]
    pixels = EpisodeDataset.open(run.data).episode(0).pixels
    assert pixels is not None
    look = Observations(pixels=torch.from_numpy(pixels[:1]))
    if isinstance(agent, LandmarkAgent):
        agent.explorer().act(look)
    agent.reset(Goal(observations=Observations(pixels=torch.from_numpy(pixels[-1:]))))
    agent.act(look)
    run.close()
    decided = [entry for entry in entries(log_path(tmp_path / "log")) if entry.body["event"] == "decided"]
    assert [entry.body.get("part") for entry in decided] == (["exploring", None] if method == "landmarks" else [None])
    assert all(replay_entry(tmp_path / "log", entry.index)[1] for entry in decided)
