"""What stands in front of an owner's node in a simulation: it hears all that passes, and may sign as the owner."""

from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from worldloom.core.chain import Entry
from worldloom.core.errors import ConfigError, DataError
from worldloom.core.signing import SigningKey
from worldloom.core.yaml_config import parse_yaml
from worldloom.data import EpisodeDataset, load_frames
from worldloom.federation import Handler, Ledger, LocalTraining, PartitionConfig, Records, RoundStore
from worldloom.federation.record.envelope import seal, unseal
from worldloom.training import saved_steps
from worldloom.workflow import ConsortiumConfig, Run, simulate
from worldloom.workflow.simulation import OwnerConfig, run_folder

CONSORTIUM = """
consortium: two rooms
overrides: ["training.batch=8", "training.horizon=2", "training.threads=1", "training.validation_windows=16",
            "model.encoder.channels=[8, 8]", "model.encoder.hidden=16", "model.latent_dim=8",
            "model.predictor.hidden=[16]", "collection.steps=20", "collection.num_envs=4", "inverse.steps=1"]
rounds: 1
inner_steps: 3
own_steps: 1
stems: false
rules: {quality: {max_worse: 10.0}}
owners: {north: {episodes: 6}, east: {episodes: 6}}
"""


@pytest.mark.slow
def test_a_handler_before_a_node_can_sign_what_it_never_learned(tmp_path: Path) -> None:
    passed = []

    def idle(handle: Handler, key: SigningKey) -> Handler:
        def answer(data: bytes) -> bytes:
            said = handle(data)
            passed.append((len(data), len(said)))
            try:
                message = unseal(said, kind="contribution", known={key.public: "east"}, limit=len(said))
            except DataError:
                return said
            return seal("contribution", message.body, {name: 0 * t for name, t in message.tensors.items()}, key=key)

        return answer

    config = parse_yaml(CONSORTIUM, ConsortiumConfig, source="here")
    woven = simulate(config, tmp_path, handlers={"east": idle})
    deltas = {name: load_file(RoundStore(woven.rounds).delta(0, name)) for name in ("north", "east")}
    assert all(bool((tensor == 0).all()) for tensor in deltas["east"].values())
    assert any(bool((tensor != 0).any()) for tensor in deltas["north"].values())
    assert {facts["owner"] for facts in Records(woven.rounds / "ledger.jsonl").of("contribution", 0)} == {
        "north",
        "east",
    }
    assert len(passed) == 4  # asked to train, to judge the base before and after, and to keep the last one


@pytest.mark.slow
def test_shared_statistics_are_those_of_the_pilots_frames_and_need_one(tmp_path: Path) -> None:
    rules = "rules: {partition: {shared: [encoder.*, predictor.*, normalise_actions.*], sovereign: [norm.*]}, "
    text = CONSORTIUM.replace("rules: {", rules)
    config = parse_yaml(text, ConsortiumConfig, source="here")
    with pytest.raises(ConfigError, match=r"'encoder.normalise.scale' is a statistic that is measured on data"):
        simulate(config, tmp_path / "without")
    config = parse_yaml(text + "pilot: east\nalign_steps: 2\n", ConsortiumConfig, source="here")
    woven = simulate(config, tmp_path / "with")
    scales = {name: run.model.state_dict()["encoder.normalise.scale"] for name, run in woven.runs.items()}
    assert torch.equal(scales["north"], scales["east"])
    # An owner that trains alone from the same untrained base has those of its own frames too.
    recipe, logs = config.recipe_of("east", 0), EpisodeDataset.open(tmp_path / "with" / "east" / "data")
    run = run_folder(recipe, logs, tmp_path / "alone", 0)
    partition = PartitionConfig.parse(config.rules["partition"])
    with closing(load_frames(logs, recipe.data)) as frames:
        local = LocalTraining(run, frames, training=recipe.training, model=recipe.model, partition=partition)
        local.train("alone", local.without_statistics(local.untrained(0)), 2)
    assert torch.equal(Run(run).model.state_dict()["encoder.normalise.scale"], scales["east"])


@pytest.mark.slow
def test_a_kill_before_the_ledger_names_the_first_base_leaves_it_the_pilots(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    append = Ledger.append

    def killed(self: Ledger, kind: str, *arguments: Any, **options: Any) -> Entry:
        if kind == "base":  # it is on the disk by then
            raise KeyboardInterrupt
        return append(self, kind, *arguments, **options)

    config = parse_yaml(CONSORTIUM + "pilot: east\nalign_steps: 2\n", ConsortiumConfig, source="here")
    monkeypatch.setattr(Ledger, "append", killed)
    with pytest.raises(KeyboardInterrupt):
        simulate(config, tmp_path / "killed")
    monkeypatch.undo()
    assert (tmp_path / "killed" / "rounds" / "bases").is_dir()
    with (tmp_path / "killed" / "rounds" / "ledger.jsonl").open("ab") as file:
        file.write(b'{"body": {"fa')  # in the middle of the entry
    bases = [RoundStore(simulate(config, tmp_path / name).rounds).base(0) for name in ("killed", "whole")]
    assert bases[0].fingerprint == bases[1].fingerprint


@pytest.mark.slow
def test_other_steps_at_home_are_another_settling_from_the_last_base(tmp_path: Path) -> None:
    config = parse_yaml(CONSORTIUM, ConsortiumConfig, source="here")
    stood = {name: max(saved_steps(run.folder)) for name, run in simulate(config, tmp_path).runs.items()}
    east = config.owners["east"].model_copy(update={"own_steps": 3})
    longer = config.model_copy(update={"owners": {**config.owners, "east": east}})
    runs = simulate(longer, tmp_path).runs
    assert {name: max(saved_steps(run.folder)) - stood[name] for name, run in runs.items()} == {"north": 0, "east": 3}


def test_an_owners_world_is_the_recipes_with_what_is_its_own() -> None:
    owners = {
        "plain": OwnerConfig(),
        "other": OwnerConfig(world={"layout": 3}, factors={"agent_speed": 2.0}),
    }
    config = ConsortiumConfig(consortium="states", recipe="point-hazards-state", owners=owners)
    kwargs = {name: config.recipe_of(name, 0).collection.env_kwargs for name in owners}
    assert kwargs == {"plain": {"layout": 0}, "other": {"layout": 3, "factors": {"agent_speed": 2.0}}}
