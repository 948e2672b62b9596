"""Margins are measured where they will be needed, kept with what they are for, and refused for anything else."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from worldloom import workflow
from worldloom.agents import HierarchyMethod, LandmarkMethod, PlannedMethod, log_path
from worldloom.core.chain import canonical, entries
from worldloom.core.errors import ConfigError, DataError, StorageError
from worldloom.core.signing import Domain, SigningKey, make_key
from worldloom.core.types import Goal, Observations
from worldloom.core.user_state import own_key
from worldloom.data import EpisodeDataset
from worldloom.guardrails import Box, Margins, RuleLayer, RuleSet
from worldloom.heads import CoarseConfig
from worldloom.models import load_tensors, save_tensors
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
    with pytest.raises(ConfigError, match="none of .* satisfies the guardrail"):
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
    assert not any(replay_entry(tmp_path / "log", entry.index).differ for entry in decided)


@pytest.fixture
def calibrated(folder: Path, tmp_path: Path) -> Path:
    """A run with margins of the method 'per candidate', which the user's own key signed."""
    calibrate(Run.open(folder), method="per candidate")
    return Path(shutil.copytree(folder, tmp_path / "run"))


def signed_again(path: Path, key: SigningKey, **changed: Any) -> None:
    """Write what a calibration by the holder of a key would write."""
    values = {**json.loads(path.read_text()), **changed, "key": key.public}
    content = {name: value for name, value in values.items() if name not in ("kind", "format", "signature")}
    signature = key.sign(canonical(content).encode("ascii"), Domain.MARGINS)
    path.write_text(json.dumps({**values, "signature": signature}))


CHANGES: dict[str, Any] = {
    "zeros": {"values": [[0.0] * 6]}, "one step": {"values": [[1.0]]}, "no steps": {"values": [[]]},
    "negative": {"values": [[-1.0] * 6]}, "nan": {"values": [[math.nan] * 6]}, "inf": {"values": [[math.inf] * 6]},
    "risk": {"risk": 0.99}, "risk nan": {"risk": math.nan}, "episodes": {"episodes": -5},
    "titles": {"guardrails": ["x"]}, "usual": {"usual": 1e30}, "no inputs": {"inputs": {}},
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_margins_that_were_changed_are_refused(calibrated: Path, name: str) -> None:
    run = Run.open(calibrated)
    path = margins_path(run, "per candidate")
    path.write_text(json.dumps({**json.loads(path.read_text()), **CHANGES[name]}))
    with pytest.raises(StorageError, match="Run .worldloom calibrate. with this rule set|not valid JSON"):
        margins_of(run, "per candidate")


@pytest.mark.parametrize("name", ["one step", "no steps", "negative", "risk", "episodes", "titles"])
def test_margins_are_held_against_the_rule_set_even_if_they_are_signed(calibrated: Path, name: str) -> None:
    run = Run.open(calibrated)
    signed_again(margins_path(run, "per candidate"), own_key(), **CHANGES[name])
    with pytest.raises(StorageError, match="Run 'worldloom calibrate' with this rule set"):
        margins_of(run, "per candidate")


@pytest.mark.parametrize("head", ["probe-pit_depth", "support", "geometry", "distance"])
def test_margins_count_only_for_the_heads_that_they_were_measured_with(calibrated: Path, head: str) -> None:
    assert margins_of(Run.open(calibrated), "per candidate") is not None
    kind = {"probe-pit_depth": "probe", "geometry": "latent-geometry", "distance": "temporal-distance"}.get(head, head)
    tensors, metadata = load_tensors(calibrated / "heads" / head, kind=kind)
    name = next(name for name, tensor in tensors.items() if tensor.is_floating_point())
    save_tensors(calibrated / "heads" / head, {**tensors, name: tensors[name] + 1.0}, metadata, kind=kind)
    with pytest.raises(StorageError, match=f"these inputs have changed since the margins were calibrated: {head}"):
        margins_of(Run.open(calibrated), "per candidate")


def test_a_head_that_was_added_later_changes_no_margins(calibrated: Path) -> None:
    run = Run.open(calibrated)
    probes = {**run.recipe.probes, "again": run.recipe.probes["pit_depth"].model_copy(update={"label": "pit_depth"})}
    run = workflow.train(run.recipe.model_copy(update={"probes": probes}), run.data, calibrated, resume=True)
    assert margins_of(run, "per candidate") is not None


def test_margins_of_another_user_count_if_their_key_is_trusted(calibrated: Path, tmp_path: Path, monkeypatch) -> None:
    run = Run.open(calibrated)
    other = make_key(tmp_path / "other.pem")
    signed_again(margins_path(run, "per candidate"), SigningKey(tmp_path / "other.pem"))
    for trusted in ((), {f"site:{other}"}):
        with pytest.raises(StorageError, match=f"signed by {other}, which is neither your own key nor a trusted one"):
            margins_of(Run.open(calibrated, trusted=trusted), "per candidate")
    for trusted in ({other}, {f"operator:{other}"}, None):
        assert margins_of(Run.open(calibrated, trusted=trusted), "per candidate") is not None
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "empty"))  # a user who has never calibrated
    assert margins_of(Run.open(calibrated, trusted={other}), "per candidate") is not None
    assert not (tmp_path / "empty").exists()


def test_older_margins_are_not_put_back(calibrated: Path) -> None:
    path = margins_path(Run.open(calibrated), "per candidate")
    older = path.read_text()
    assert margins_of(Run.open(calibrated), "per candidate") is not None
    calibrate(Run.open(calibrated), method="per candidate")
    newer = path.read_text()
    signed_again(path, own_key(), time=0)  # as an older version of worldloom signed
    for content in (older, path.read_text(), newer.replace('"usual": 1.0', '"usual": 1.5')):
        path.write_text(content)
        with pytest.raises(StorageError, match="newer margins of this run were used before|was changed after"):
            margins_of(Run.open(calibrated), "per candidate")
    path.write_text(newer)
    signed_again(path, own_key(), usual=2.0)  # of the same second
    with pytest.raises(StorageError, match=r"newer margins of this run were used before\. Run 'worldloom calibrate'"):
        margins_of(Run.open(calibrated), "per candidate")
    path.write_text(newer)
    assert margins_of(Run.open(calibrated), "per candidate") is not None


def test_margins_that_are_read_first_elsewhere_are_remembered_there(
    calibrated: Path, tmp_path: Path, monkeypatch
) -> None:
    path = margins_path(Run.open(calibrated), "per candidate")
    older = path.read_text()
    assert margins_of(Run.open(calibrated), "per candidate") is not None
    calibrate(Run.open(calibrated), method="per candidate")
    newer = path.read_text()
    monkeypatch.setenv("WORLDLOOM_STATE", str(tmp_path / "another machine"))
    for content in (older, newer):
        path.write_text(content)
        assert margins_of(Run.open(calibrated), "per candidate") is not None
    path.write_text(older)
    with pytest.raises(StorageError, match="newer margins"):
        margins_of(Run.open(calibrated), "per candidate")
    assert margins_of(Run.open(calibrated, trusted=None), "per candidate") is not None


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"episodes": 0}, "calibrated on 0 episodes, too few for a risk of 0.3 at a confidence of 0.9"),
        ({"episodes": 6}, "calibrated on 6 episodes, too few"),
        ({"confidence": None}, "does not contain the confidence"),
        ({"episodes": 7}, None),
    ],
)
def test_margins_of_too_few_episodes_are_refused(
    folder: Path, calibrated: Path, changes: dict[str, Any], said: str | None
) -> None:
    run = Run.open(calibrated)
    values = json.loads(margins_path(run, "per candidate").read_text())
    path = margins_path(run, "calibrated")
    path.write_text(json.dumps(values))
    method = planned(run, "calibrated").calibrated_as
    signed_again(path, own_key(), **{"method": method, "confidence": 0.9, "episodes": 8, **changes})
    if said is None:
        assert margins_of(run, "calibrated") is not None
        return
    with pytest.raises(StorageError, match=said):
        margins_of(run, "calibrated")


def test_the_models_and_pictures_of_rules_are_part_of_what_margins_are_bound_to(calibrated: Path) -> None:
    run = Run.open(calibrated)
    peer, picture = Path(shutil.copytree(calibrated, calibrated / "peer")), calibrated / "fire.png"
    picture.write_bytes(b"a fire")
    layer = RuleLayer.parse({
        "owner": "Acme",
        "guardrails": {
            "alike": {"name": "agreed", "runs": [str(peer)], "spread": 1},
            "never": {"name": "unlike", "pictures": [str(picture)], "distance": 1},
        },
        "objectives": {"learn": {"name": "information", "runs": [str(peer)]}},
    })  # fmt: skip
    before = run.bind(RuleSet(layers=(layer,))).inputs()
    picture.write_bytes(b"a meadow")
    tensors, metadata = load_tensors(peer / "model" / "model", kind="world-model")
    save_tensors(
        peer / "model" / "model", {key: value + 1 for key, value in tensors.items()}, metadata, kind="world-model"
    )
    after = run.bind(RuleSet(layers=(layer,))).inputs()
    assert {name for name in before if before[name] != after[name]} == {f"file {picture}", f"run {peer}"}
