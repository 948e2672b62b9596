"""Training that is broken off between its stages, and taken up again."""

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from quick_training import QUICK

from worldloom.agents import (
    METHODS,
    AgentParts,
    CloningMethod,
    GoalInverseMethod,
    HierarchyConfig,
    HierarchyMethod,
    LandmarkMethod,
    PlanMethod,
    ReactiveMethod,
    default_methods,
)
from worldloom.core.errors import CheckpointError, ConfigError, DataError, StorageError, WorldloomError
from worldloom.core.files import read_json, write_json
from worldloom.core.types import Goal, Observations
from worldloom.data import EpisodeDataset
from worldloom.evaluation import default_protocol
from worldloom.recipes import Recipe, load_recipe
from worldloom.workflow import Run, collect, evaluate, evaluate_together, find_runs, report_path
from worldloom.workflow import jobs as workflow
from worldloom.workflow.run import differences

HEADS = ("geometry", "support", "distance", "reactive", "goal-inverse", "behaviour-prior", "cloning")
STAGES = {
    "measure_geometry": (),
    "measure_support": HEADS[:1],
    "fit_distance": HEADS[:2],
    "fit_reactive": HEADS[:3],
    "fit_goal_inverse": HEADS[:4],
    "fit_behaviour_prior": HEADS[:5],
    "fit_behaviour_cloning": HEADS[:6],
}


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    tiny = ["collection.episodes=12", "collection.steps=40", *QUICK]
    return load_recipe("two-room").override(tiny)


@pytest.fixture(scope="module")
def dataset(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> EpisodeDataset:
    return collect(recipe, tmp_path_factory.mktemp("collected") / "data")


@pytest.fixture(scope="module")
def unbroken(recipe: Recipe, dataset: EpisodeDataset, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return workflow.train(recipe, dataset, tmp_path_factory.mktemp("unbroken") / "run")


@pytest.fixture
def run(unbroken: Run, tmp_path: Path) -> Run:
    """A copy to change."""
    shutil.copytree(unbroken.path, tmp_path / "run")
    return Run.open(tmp_path / "run")


@pytest.fixture
def untouched(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Let these stages fail if they are called."""

    def forbid(*names: str) -> None:
        for name in names:
            monkeypatch.setattr(workflow, name, lambda *args, name=name, **kwargs: pytest.fail(f"{name} was called"))

    return forbid


def digests(path: Path) -> dict[str, str]:
    files = [path / "model" / "model.json", *(path / "heads" / f"{name}.json" for name in HEADS)]
    return {file.name: read_json(file)["digest"] for file in files}


def test_broken_off_before_each_stage_it_ends_as_an_unbroken_one(recipe, dataset, unbroken, tmp_path) -> None:
    def stop(*args: object, **kwargs: object) -> None:
        raise RuntimeError("the machine went down")

    path = tmp_path / "run"
    for number, (stage, there) in enumerate(STAGES.items()):
        with pytest.MonkeyPatch.context() as broken:
            broken.setattr(workflow, stage, stop)
            for done in ["fit", *STAGES][:number]:
                broken.setattr(workflow, done, lambda *args, **kwargs: pytest.fail("it was done before"))
            with pytest.raises(RuntimeError, match="went down"):
                workflow.train(recipe, dataset, path, resume=number > 0)
        assert {file.stem for file in (path / "heads").glob("*.json")} == set(there)
        assert not Run.open(path).figures.get("complete")
    resumed = workflow.train(recipe, dataset, path, resume=True)
    assert digests(path) == digests(unbroken.path)
    seconds = {f"{name}_seconds" for name in HEADS}
    assert seconds <= resumed.figures.keys()
    ours, theirs = ({k: v for k, v in each.figures.items() if k not in seconds} for each in (resumed, unbroken))
    assert ours == theirs
    assert ours["complete"]
    assert len(ours["held_out"]) == 2
    assert -1 <= ours["rank_correlation/distance"] <= 1


def test_a_predictor_is_refined_once_and_as_in_an_unbroken_run(recipe, dataset, unbroken, tmp_path) -> None:
    refining = recipe.override(['refinement={"horizon": 2, "steps": 3, "batch": 8}'])
    whole = workflow.train(refining, dataset, tmp_path / "whole")
    ours, theirs = (run.model.state_dict() for run in (whole, unbroken))
    changed = {name.split(".")[0] for name in ours if not torch.equal(ours[name], theirs[name])}
    assert changed == {"predictor"}

    def stop(*args: object, **kwargs: object) -> None:
        raise RuntimeError("the machine went down")

    for stage in ("refine_predictor", "measure_geometry"):
        with pytest.MonkeyPatch.context() as broken:
            broken.setattr(workflow, stage, stop)
            with pytest.raises(RuntimeError, match="went down"):
                workflow.train(refining, dataset, tmp_path / "run", resume=stage != "refine_predictor")
    workflow.train(refining, dataset, tmp_path / "run", resume=True)
    assert digests(tmp_path / "run") == digests(whole.path)


def test_refinement_shows_the_episodes_in_other_positions_too(recipe, dataset, tmp_path, monkeypatch) -> None:
    shown = []

    def refine(model, parts, config, **rest):
        shown.extend(parts)
        return model

    monkeypatch.setattr(workflow, "refine_predictor", refine)
    refining = recipe.override(['refinement={"copies": 2}', 'training.symmetry={"vectors": [[0, 1]]}'])
    workflow.train(refining, dataset, tmp_path / "run")
    block = refining.model.block
    plain, *copies = (shown[at] for at in range(0, len(shown), block))
    assert (len(shown), len(copies)) == (3 * block, 2)
    for copy in copies:
        assert not torch.equal(copy.latents, plain.latents)
        # Turning changes an action's components, but not its length.
        lengths = [part.blocks.unflatten(-1, (-1, 2)).norm(dim=-1) for part in (plain, copy)]
        assert torch.allclose(*lengths)
        assert not torch.equal(copy.blocks, plain.blocks)
    assert not torch.equal(copies[0].blocks, copies[1].blocks)


def test_copies_without_a_symmetry_are_refused(recipe) -> None:
    with pytest.raises(ConfigError, match=r"refinement.copies needs training.symmetry"):
        recipe.override(['refinement={"copies": 2}'])


def test_broken_off_within_the_world_model_it_goes_on_from_the_checkpoint(recipe, dataset, run, untouched) -> None:
    before = digests(run.path)
    shutil.rmtree(run.path / "model")
    shutil.rmtree(run.path / "heads")
    (run.path / "heads.json").unlink()
    resumed = workflow.train(recipe, dataset, run.path, resume=True)
    assert digests(run.path) == before
    assert [line["step"] for line in resumed.folder.metrics() if "loss" in line] == [4]


def test_a_complete_run_is_taken_up_as_it_is(recipe, dataset, run, untouched) -> None:
    before = digests(run.path)
    untouched("load_frames", "fit", *STAGES)
    assert workflow.train(recipe, dataset, run.path, resume=True).figures["complete"]
    assert digests(run.path) == before


def test_a_folder_that_holds_a_run_is_not_written_over(recipe, dataset, run, untouched) -> None:
    before = digests(run.path)
    untouched("fit", *STAGES)
    with pytest.raises(StorageError, match="already contains a run; resume it"):
        workflow.train(recipe, dataset, run.path)
    assert digests(run.path) == before


@pytest.mark.parametrize(
    "assignment", ["training.seed=1", "distance.steps=5", "model.latent_dim=32", "training.losses.variance.weight=1"]
)
def test_another_recipe_is_refused_and_what_differs_is_named(recipe, dataset, run, assignment) -> None:
    before = read_json(run.path / "config.json")
    key, _ = assignment.split("=")
    with pytest.raises(ConfigError, match=f"a different recipe; the recipes differ in {key}. "):
        workflow.train(recipe.override([assignment]), dataset, run.path, resume=True)
    assert read_json(run.path / "config.json") == before


def test_other_methods_are_taken_up_without_training_again(recipe, dataset, run, untouched) -> None:
    untouched("fit", *STAGES)
    before = digests(run.path)
    other = recipe.override(
        ['methods={"quick": {"name": "plan", "horizon": 1}}', "default_method=quick", "protocol=maze-far@1"]
    )
    resumed = workflow.train(other, dataset, run.path, resume=True)
    assert resumed.recipe == other
    assert Run.open(run.path).recipe == other
    resumed.agent("quick")
    assert digests(run.path) == before


def test_coarser_models_are_learned_on_top_of_a_complete_run_and_the_rest_is_kept(
    recipe, dataset, run, untouched
) -> None:
    untouched("fit", *list(STAGES)[1:])
    before = digests(run.path)
    with pytest.raises(ConfigError, match="trains none"):
        HierarchyMethod().build(AgentParts(heads=run.heads), seed=0)
    coarse = '{"stride": 2, "hidden": [16], "steps": 2, "dreams": 1, "dream_horizon": 4}'
    both = recipe.override([f"hierarchy=[{coarse}, {coarse}]"])
    # Broken off after the first level, it goes on with the second.
    first = workflow.train(recipe.override([f"hierarchy=[{coarse}]"]), dataset, run.path, resume=True)
    assert len(first.heads.hierarchy) == 1
    parameters = list(first.heads.hierarchy[0][0].parameters())
    resumed = workflow.train(both, dataset, run.path, resume=True)
    assert [coarse.config.stride for coarse, _ in resumed.heads.hierarchy] == [2, 2]
    assert all(map(torch.equal, parameters, resumed.heads.hierarchy[0][0].parameters()))
    assert digests(run.path) == before
    assert resumed.figures["complete"]
    agent = HierarchyMethod(horizon=2, coarse_horizon=2, follow=HierarchyConfig(depth=2)).build(
        AgentParts(heads=resumed.heads), seed=0
    )
    observations = Observations.from_numpy(dataset.pixels(np.array([0, 5])), None)
    agent.reset(Goal(observations=observations[[1, 0]]))
    assert agent.act(observations).shape == (2, 2)
    # Another one in place of what was learned is another recipe.
    with pytest.raises(ConfigError, match="the recipes differ in hierarchy"):
        workflow.train(recipe, dataset, run.path, resume=True)


def test_a_symmetric_probe_of_more_than_square_pictures_is_refused(recipe, dataset, run, monkeypatch) -> None:
    more = replace(dataset.spec, observation=replace(dataset.spec.observation, vector=2))
    monkeypatch.setattr(dataset, "spec", more)
    symmetric = recipe.override(['probes={"position": {"symmetric": true, "episodes": 8, "steps": 5}}'])
    with pytest.raises(ConfigError, match="'position' is symmetric, which needs observations that are square pictures"):
        workflow.train(symmetric, dataset, run.path, resume=True)


def test_probes_are_learned_on_top_of_a_complete_run(recipe, dataset, run, untouched) -> None:
    untouched("fit", *STAGES)
    before = digests(run.path)
    tiny = '"episodes": 8, "steps": 5'
    with pytest.raises(
        ConfigError, match="needs the label 'positoin', which the dataset does not have; did you mean 'position'"
    ):
        workflow.train(recipe.override([f'probes={{"positoin": {{{tiny}}}}}']), dataset, run.path, resume=True)
    wanted = recipe.override([f'probes={{"place": {{"label": "position", {tiny}}}}}'])
    workflow.train(recipe, dataset, run.path, resume=True)
    resumed = workflow.train(wanted, dataset, run.path, resume=True)
    probe = resumed.heads.probes["place"]
    assert probe.size == 2
    assert len(probe.errors) > 0
    assert digests(run.path) == before
    with pytest.raises(ConfigError, match="the recipes differ in probes"):
        workflow.train(recipe, dataset, run.path, resume=True)


def test_a_policy_is_added_to_a_complete_run(recipe, dataset, tmp_path, untouched) -> None:
    plain = recipe.override(["goal_inverse=null"])
    run = workflow.train(plain, dataset, tmp_path / "run")
    untouched("fit", *STAGES.keys() - {"fit_goal_inverse"})
    proposing = PlanMethod(propose="goal-inverse", horizon=6)
    with pytest.raises(CheckpointError, match="goal-inverse"):
        proposing.build(AgentParts(heads=run.heads), seed=0)
    resumed = workflow.train(recipe, dataset, run.path, resume=True)
    agent = proposing.build(AgentParts(heads=resumed.heads), seed=0)
    frames = Observations.from_numpy(dataset.pixels(np.array([0, 5, 9])), None)
    agent.reset(Goal(observations=frames))
    agent.act(frames)
    assert agent.situation.initial.shape[1:] == (16, 6, resumed.model.spec.block_size)


def test_a_behaviour_prior_is_added_to_a_complete_run_and_counts(recipe, dataset, tmp_path, untouched) -> None:
    run = workflow.train(recipe.override(["behaviour_prior=null"]), dataset, tmp_path / "run")
    untouched("fit", *STAGES.keys() - {"fit_behaviour_prior"})
    staying = PlanMethod(prior=2.0, horizon=3)
    with pytest.raises(CheckpointError, match="behaviour-prior"):
        staying.build(AgentParts(heads=run.heads), seed=0)
    heads = workflow.train(recipe, dataset, run.path, resume=True).heads
    frames = Observations.from_numpy(dataset.pixels(np.array([0, 5, 9])), None)
    plans = []
    for method in (PlanMethod(horizon=3), staying):
        agent = method.build(AgentParts(heads=heads), seed=0)
        agent.reset(Goal(observations=frames))
        agent.act(frames)
        plans.append(agent.plan.actions)
    assert not torch.equal(*plans)


def test_a_run_from_before_an_option_was_added_is_taken_up(recipe, dataset, run, untouched) -> None:
    untouched("fit", *STAGES)
    config = read_json(run.path / "config.json")
    del config["recipe"]["reactive"]["teacher"]["walk"], config["recipe"]["distance"]["follow"]
    write_json(run.path / "config.json", config)
    workflow.train(recipe, dataset, run.path, resume=True)
    assert Run.open(run.path).recipe == recipe


def test_other_data_are_refused(recipe, run, tmp_path) -> None:
    other = collect(recipe.override(["collection.seed=9"]), tmp_path / "other")
    with pytest.raises(CheckpointError, match="started on different data") as error:
        workflow.train(recipe, other, run.path, resume=True)
    assert run.data in str(error.value)


def test_what_cannot_be_trained_leaves_the_folder_free(recipe, dataset, tmp_path) -> None:
    with pytest.raises(DataError, match="no episode is long enough"):
        workflow.train(recipe.override(["training.horizon=50"]), dataset, tmp_path / "run")
    assert not (tmp_path / "run" / "config.json").exists()
    assert not list(find_runs(tmp_path))


def test_collecting_again_adds_nothing(recipe, dataset) -> None:
    again = collect(recipe, dataset.path)
    assert again.fingerprint() == dataset.fingerprint()
    assert len(again) == recipe.collection.episodes


def test_a_recipe_without_a_world_cannot_collect(tmp_path) -> None:
    with pytest.raises(ConfigError, match="has no environment"):
        collect(load_recipe("generic"), tmp_path / "data")
    assert not (tmp_path / "data").exists()


def test_an_agent_of_each_method_acts_for_any_number_of_environments(run, dataset) -> None:
    frames = dataset.pixels(np.array([0, 5, 9]))
    observations = Observations.from_numpy(frames, None)
    bounds = torch.tensor(run.model.spec.action.low), torch.tensor(run.model.spec.action.high)
    methods = {**default_methods(), "landmarks": LandmarkMethod(), "GC-IDM": GoalInverseMethod()}
    assert {method.name for method in methods.values()} | {"hierarchy"} == set(METHODS)  # it has a test of its own
    for method in methods.values():
        agent = method.build(AgentParts(heads=run.heads), seed=0)
        agent.reset(Goal(observations=observations[[2, 0, 1]]))
        actions = agent.act(observations)
        assert actions.shape == (3, 2)
        assert ((actions >= bounds[0]) & (actions <= bounds[1])).all()


def test_an_evaluation_leaves_results_and_a_report(run) -> None:
    results = evaluate(run, episodes=1, budget=4, methods=["random", "tree search"])
    report = report_path(run, results)
    assert report.parent.parent == run.path / "evaluation"
    assert report.parent.name.startswith("two-room-custom@1-")
    other = evaluate(run, episodes=1, budget=4, methods=["random"])
    assert report_path(run, other) != report
    assert report.is_file()
    text = report.read_text()
    assert 'src="http' not in text
    assert 'href="http' not in text
    kept = run.evaluations()[report.parent.name]
    assert kept == results.to_json()
    assert {(row["method"], row["split"]) for row in kept["rows"]} == {
        (method, split) for method in ("random", "tree search") for split in ("cross-room", "same-room")
    }
    assert kept["provenance"]["data"] == run.folder.provenance["data"]
    summary = run.summary()
    rates = [row["rate"] for row in kept["rows"] if row["method"] == "tree search"]
    assert summary["success"] == pytest.approx(sum(rates) / 2)
    assert summary[f"success/{report.parent.name}/cross-room"] == rates[0]
    assert summary["evaluation"] == report.parent.name  # the other one is not of the default method


def test_the_usual_protocol_stands_for_a_run_else_the_last_evaluation(run) -> None:
    def written(name: str, rate: float, age: float) -> None:
        path = run.path / "evaluation" / name / "results.json"
        rows = [{"method": run.recipe.default_method, "split": split, "rate": rate} for split in ("near", "far")]
        write_json(path, {"rows": rows})
        os.utime(path, (2e9 - age, 2e9 - age))

    written("mine@1-b", 0.25, age=50)
    written("mine@1-a", 0.5, age=100)
    assert (run.summary()["evaluation"], run.summary()["success"]) == ("mine@1-b", 0.25)
    usual = default_protocol(run.environment["id"])
    assert usual is not None
    written(usual, 1.0, age=200)
    assert (run.summary()["evaluation"], run.summary()["success"]) == (usual, 1.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"methods": ["random", "tree serch"]}, "did you mean 'tree search'"),
        ({"protocol": "two-rooms@1"}, "did you mean 'two-room@1'"),
        ({"success": "position:3"}, "leave out 'success'"),
        ({"goal_offset": 5}, "leave out 'success' and 'goal_offset'"),
    ],
)
def test_what_cannot_be_evaluated_is_said(run, options, message) -> None:
    with pytest.raises(ConfigError, match=message):
        evaluate(run, **options)
    assert not run.evaluations()


def test_without_a_protocol_of_its_own_the_worlds_is_taken_or_logged_goals(run, recipe, dataset) -> None:
    nameless = workflow.train(recipe.override(["protocol=null"]), dataset, run.path, resume=True)
    quick = {"episodes": 1, "budget": 2, "methods": ["random"]}
    assert evaluate(nameless, **quick).protocol.name == "two-room-custom"
    logged = evaluate(nameless, success="position:3", goal_offset=6, **quick)
    assert logged.protocol.name == "logged-goals/worldloom/TwoRoom-v0"
    assert set(logged.protocol.splits) == {"6 steps away"}
    assert report_path(nameless, logged).is_file()


def test_a_protocol_of_another_world_is_warned_of(run, caplog) -> None:
    quick = {"episodes": 1, "budget": 2, "methods": ["random"]}
    evaluate(run, protocol="two-room@1", **quick)
    assert "was trained on data from" not in caplog.text
    evaluate(run, protocol="four-rooms@1", **quick)
    assert "data from worldloom/TwoRoom-v0, but protocol four-rooms" in caplog.text
    assert "evaluates it in worldloom/FourRooms-v0" in caplog.text


def test_protocols_are_evaluated_together_and_reported_one_by_one(run) -> None:
    titles = [f"two-room-25{rule}@1" for rule in ("", "-strict")]
    first, second = evaluate_together(run, titles, methods=["random"], episodes=2, budget=2)
    assert [results.protocol.name for results in (first, second)] == ["two-room-25-custom", "two-room-25-strict-custom"]
    for results in (first, second):
        assert report_path(run, results).is_file()
        assert results.rows[0].overall.n == 2
    with pytest.raises(ConfigError, match="differ in"):
        evaluate_together(run, [titles[0], "two-room-50@1"], methods=["random"])


@pytest.mark.parametrize("part", HEADS)
def test_a_part_that_is_gone_or_damaged_is_named(run, part) -> None:
    stem = run.heads.stem(part)
    (tensors,) = stem.parent.glob(f"{part}-*.safetensors")
    content = bytearray(tensors.read_bytes())
    content[-1] ^= 1
    tensors.write_bytes(content)
    methods = {"reactive": ReactiveMethod(), "goal-inverse": GoalInverseMethod(), "cloning": CloningMethod()}
    methods["behaviour-prior"] = PlanMethod(prior=1.0)

    def load() -> object:
        return methods[part].build(AgentParts(heads=run.heads), seed=0) if part in methods else getattr(run.heads, part)

    with pytest.raises(CheckpointError, match=part):
        load()
    stem.with_suffix(".json").unlink()
    with pytest.raises(WorldloomError, match=part):
        load()


def test_differences_name_nested_keys_once() -> None:
    ours = {"a": 1, "b": {"c": 2, "d": {"e": 3}}, "f": None}
    assert differences(ours, ours) == []
    assert differences(ours, {"a": 1, "b": {"c": 0, "d": {"e": 4}}, "f": {"g": 1}}) == ["b.c", "b.d.e", "f"]
    assert differences(ours, {"a": 1, "b": {"c": 2, "d": {"e": 3}}}) == []  # absent and None are one
