"""Margins are measured where they will be needed, kept with what they are for, and refused for anything else."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from worldloom import workflow
from worldloom.agents import HierarchyMethod, LandmarkMethod, PlannedMethod, log_path
from worldloom.core.chain import entries
from worldloom.core.errors import ConfigError, DataError, StorageError
from worldloom.core.types import Goal, Observations
from worldloom.data import EpisodeDataset
from worldloom.guardrails import Box, Margins, RuleLayer, RuleSet
from worldloom.heads import CoarseConfig
from worldloom.planning.solvers import CEM
from worldloom.recipes import Recipe, load_recipe
from worldloom.workflow import Run, Session, calibrate, replay_entry

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


def under(folder: Path, path: Path, rules: RuleLayer | None) -> Run:
    """Copy a run, and give its recipe other rules."""
    shutil.copytree(folder, path)
    run = Run.open(path)
    return workflow.train(run.recipe.model_copy(update={"rules": rules}), run.data, path, resume=True)


def margins_of(run: Run, method: str) -> Margins | None:
    assert run.rules is not None
    return run.rules.margins(planned(run, method).calibrated_as)


def margins_path(run: Run, method: str) -> Path:
    assert run.rules is not None
    return run.rules.margins_path(planned(run, method).calibrated_as)


def planned(run: Run, name: str) -> PlannedMethod:
    method = run.recipe.method(name)
    assert isinstance(method, PlannedMethod)
    return method


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pits")
    chosen = recipe()
    workflow.train(chosen, workflow.collect(chosen, root / "data"), root / "run")
    return root / "run"


def test_margins_are_calibrated_kept_and_taken(folder: Path) -> None:
    run = Run.open(folder)
    assert margins_of(run, "calibrated") is None
    with pytest.raises(ConfigError, match="worldloom calibrate"):
        run.agent("calibrated")
    margins = calibrate(run, split="in the open", episodes=8)
    assert margins.values.shape == (1, 6)
    assert bool((margins.values.diff(dim=1) >= 0).all())  # what is farther ahead is less certain
    kept = margins_of(run, "calibrated")
    assert kept is not None
    assert torch.equal(kept.values, margins.values)
    written = json.loads(margins_path(run, "calibrated").read_text())
    assert [line["needed"] <= line["factor"] for line in written["rounds"]][-1]
    assert run.agent("calibrated").planner.guardrails[0].margin.shape == (6,)
    # Of the logs alone: without a round in the world.
    candidates = calibrate(run, method="per candidate")
    assert candidates.episodes == 0
    assert "rounds" not in json.loads(margins_path(run, "per candidate").read_text())


def test_margins_are_of_one_policy_and_method(folder: Path) -> None:
    run = Run.open(folder)
    margins = calibrate(run, method="per candidate")
    assert run.recipe.rules is not None
    stricter = run.bind(RuleSet(layers=(run.recipe.rules.model_copy(update={"risk": 0.2}),)))
    assert stricter.margins(planned(run, "per candidate").calibrated_as) is None
    path = margins_path(run, "per candidate")
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
        with pytest.raises(StorageError, match="Run 'worldloom calibrate' with this rule set"):
            margins_of(run, "per candidate")
    path.write_text(json.dumps(values))
    found = margins_of(run, "per candidate")
    assert found is not None
    assert torch.equal(found.values, margins.values)


def test_a_risk_that_so_few_episodes_cannot_tell_is_said(folder: Path) -> None:
    with pytest.raises(
        DataError, match="2 episodes are too few to confirm a risk of 0.3 at a confidence of 0.9; use at least 7"
    ):
        calibrate(Run.open(folder), split="in the open", episodes=2)


def test_only_what_uses_margins_is_calibrated(folder: Path, tmp_path: Path) -> None:
    run = Run.open(folder)
    for method in ("random", "penalty", "no guardrail"):
        with pytest.raises(ConfigError, match="does not use margins"):
            calibrate(run, method=method)
    with pytest.raises(ConfigError, match="calibration needs a rule set"):
        calibrate(under(folder, tmp_path / "no rules", None))
    assert run.recipe.rules is not None
    nothing = run.recipe.rules.model_copy(update={"guardrails": {}})
    bare = under(folder, tmp_path / "no guardrails", nothing)
    with pytest.raises(ConfigError, match="calibration needs a rule set"):
        calibrate(bare)
    assert bare.agent("calibrated").planner.guardrails == ()  # no margin is missing


def test_a_rule_set_that_holds_nowhere_is_not_calibrated(folder: Path, tmp_path: Path) -> None:
    layer = Run.open(folder).recipe.rules
    assert layer is not None
    rail = layer.guardrails["out of the pits"].model_copy(update={"region": Box(high=(-1e6,))})
    impossible = layer.model_copy(update={"guardrails": {"out of the pits": rail}})
    with pytest.raises(ConfigError, match="is satisfied in none of"):
        calibrate(under(folder, tmp_path / "run", impossible), split="in the open", episodes=8)


@pytest.mark.parametrize("method", ["landmarks", "hierarchy"])
def test_what_plans_for_far_goals_keeps_guardrails_and_can_be_made_again(
    folder: Path, tmp_path: Path, method: str
) -> None:
    with pytest.raises(ConfigError, match="worldloom calibrate"):
        Run.open(folder).agent(method)
    calibrate(Run.open(folder), method=method, split="in the open", episodes=8)
    with Session(Run.open(folder), audit=tmp_path / "log") as session:
        agent = session.agent(method)
        for part in agent.parts.values():
            assert [rail.name for rail in part.rails] == ["out of the pits"]
        pixels = EpisodeDataset.open(session.run.data).episode(0).pixels
        assert pixels is not None
        look = Observations(pixels=torch.from_numpy(pixels[:1]))
        if agent.explores:
            agent.explorer().act(look)
        agent.reset(Goal(observations=Observations(pixels=torch.from_numpy(pixels[-1:]))))
        agent.act(look)
    decided = [entry for entry in entries(log_path(tmp_path / "log")) if entry.body["event"] == "decided"]
    assert [entry.body.get("part") for entry in decided] == (["exploring", None] if method == "landmarks" else [None])
    assert all(replay_entry(tmp_path / "log", entry.index)[1] for entry in decided)
