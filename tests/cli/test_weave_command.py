"""A consortium at the command line: simulated, killed and taken up, verified, recomputed, and told in a model card."""

import json
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from worldloom.core.errors import ConfigError, DataError
from worldloom.core.signing import SigningKey
from worldloom.data import EpisodeDataset
from worldloom.federation import (
    LedgerForked,
    Node,
    PartitionConfig,
    Release,
    RoundStore,
    card_of,
    initial_base,
    read_constitution,
)
from worldloom.federation.rounds.release import unmet
from worldloom.workflow import NodeConfig, Run
from worldloom.workflow.network import _join_any

CONSORTIUM = """
consortium: two rooms
recipe: two-room
overrides: ["training.batch=16", "training.horizon=2", "training.threads=1", "training.validation_windows=16",
            "model.encoder.channels=[8, 8]", "model.encoder.hidden=16", "model.latent_dim=8",
            "model.predictor.hidden=[16]", "collection.steps=20", "collection.num_envs=4", "inverse.steps=20"]
pilot: north
align_steps: 5
rounds: 2
inner_steps: 6
own_steps: 4
rules: {quality: {max_worse: 10.0}, release: {rounds: 2, contributors: 2, countersigned: 2}}
owners:
  north: {episodes: 8}
  east: {episodes: 6, fine_tune: sovereign, world: {size: 48}, factors: {action_turn: 90}}
  vault: {episodes: 6, data_class: private}
"""


@pytest.fixture(scope="module")
def simulated(tmp_path_factory):
    path = tmp_path_factory.mktemp("weave")
    (path / "consortium.yaml").write_text(CONSORTIUM)
    arguments = ["weave", "simulate", str(path / "consortium.yaml"), "--out", str(path / "out"), "--json"]
    command = [str(Path(sys.executable).parent / "worldloom"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=280)
    assert done.returncode == 0, done.stderr
    return path / "out", arguments, json.loads(done.stdout)


def test_each_owner_ends_with_a_run_of_its_own_that_acts(simulated) -> None:
    out, _, told = simulated
    assert set(told["runs"]) == {"north", "east", "vault"}
    assert [one["round"] for one in told["rounds"]] == [0, 1]
    for path in told["runs"].values():
        run = Run.open(path)
        assert run.model.action_stem is not None
        assert run.agent("tree search") is not None
        assert not Path(path).is_relative_to(out / "rounds")


def test_private_data_trains_its_owner_and_never_the_base(simulated) -> None:
    out, _, told = simulated
    assert all(set(one["weights"]) == {"north", "east"} for one in told["rounds"])
    assert {path.stem for path in (out / "rounds" / "contributions" / "00000").glob("*.msg")} == {"east", "north"}
    run = Run.open(told["runs"]["vault"])
    assert run.folder.metrics()[-1]["step"] == 4  # its own steps alone


def test_run_again_it_goes_on_where_it_was(simulated, worldloom) -> None:
    out, arguments, told = simulated
    assert json.loads(worldloom(*arguments).out) == told
    assert RoundStore(out / "rounds").base(2).fingerprint


def test_the_ledger_is_verified_shown_and_told_as_a_card(simulated, worldloom, refused) -> None:
    out, _, _ = simulated
    rounds, rules = str(out / "rounds"), ["--constitution", str(out / "constitution.yaml")]
    verdict = json.loads(worldloom("weave", "ledger", "verify", rounds, *rules, "--json").out)
    shown = json.loads(worldloom("weave", "ledger", "show", rounds, "--json").out)["entries"]
    assert len(shown) == verdict["length"]
    assert [one["facts"]["owner"] for one in shown if one["kind"] == "refusal"] == ["vault", "vault"]
    card = worldloom("weave", "ledger", "card", rounds, *rules).out
    assert card == (out / "model_card.md").read_text()
    assert json.loads(worldloom("weave", "ledger", "card", rounds, *rules, "--json").out) == {"model_card": card}
    assert "| north | open | 2 |" in card
    path = out / "rounds" / "ledger.jsonl"
    kept = path.read_bytes()
    path.write_bytes(kept.replace(b'"frames":', b'"frAmes":', 1))
    try:
        assert "entry 2" in refused(3, "weave", "ledger", "verify", rounds, *rules)
    finally:
        path.write_bytes(kept)


def test_a_simulation_leaves_its_report_and_is_watched_from_its_folder(simulated, worldloom, tmp_path) -> None:
    out, _, told = simulated
    assert told["report"] == str(out / "report.html")
    assert "two rooms: 3 owners trained one model in 2 rounds" in (out / "report.html").read_text()
    rounds, rules = str(out / "rounds"), ["--constitution", str(out / "constitution.yaml")]
    lines = worldloom("weave", "watch", rounds, *rules).out.splitlines()
    assert sum("vault is refused" in line for line in lines) == 2
    assert lines[-1].startswith("two rooms: all 2 rounds are done")
    again = tmp_path / "report.html"
    worldloom("weave", "report", rounds, *rules, "--out", str(again), "--runs", str(out))
    assert again.read_text() == (out / "report.html").read_text()


def test_bases_are_recomputed_with_everybody_and_without_one(simulated, worldloom, tmp_path) -> None:
    out, _, _ = simulated
    asked = ["weave", "recompute", str(out / "rounds"), "--constitution", str(out / "constitution.yaml"), "--json"]
    whole = json.loads(worldloom(*asked, "--into", str(tmp_path / "whole")).out)
    assert whole["2"] == RoundStore(out / "rounds").base(2).fingerprint
    without = json.loads(worldloom(*asked, "--into", str(tmp_path / "without"), "--without", "east").out)
    assert without["0"] == whole["0"]
    assert without["2"] != whole["2"]


def test_a_member_signs_with_its_own_key_alone(simulated, worldloom, refused, tmp_path) -> None:
    out, _, _ = simulated
    path = tmp_path / "constitution.yaml"
    path.write_bytes((out / "constitution.yaml").read_bytes())
    ratify = ["weave", "ratify", str(path), "--member", "north", "--key"]
    assert worldloom(*ratify, str(out / "keys" / "north.pem")).code == 0
    signed = json.loads(worldloom(*ratify, str(out / "keys" / "north.pem"), "--json").out)
    assert Path(signed["signature"]).is_file()
    assert "is not the key of north" in refused(3, *ratify, str(out / "keys" / "east.pem"))
    verify = ["weave", "ledger", "verify", str(out / "rounds"), "--constitution", str(path)]
    assert "not signed by east, vault" in refused(3, *verify)


def test_others_let_their_stems_meet_what_the_pilot_learned_and_a_few_data_move_the_stems_alone(simulated) -> None:
    out, _, told = simulated
    runs = {name: Run.open(path) for name, path in told["runs"].items()}
    assert {name: run.folder.metrics()[-1]["step"] for name, run in runs.items()} == {
        "north": 5 + 12 + 4, "east": 5 + 12 + 4, "vault": 4
    }  # fmt: skip
    base = RoundStore(out / "rounds").base(2).tensors
    ends = {name: run.model.state_dict() for name, run in runs.items()}
    assert all(torch.equal(ends["east"][name], tensor) for name, tensor in base.items())
    assert not all(torch.equal(ends["north"][name], tensor) for name, tensor in base.items())
    # Frames of another size meet the same base.
    assert runs["east"].model.spec.observation.pixels == (48, 48, 3)
    assert runs["north"].model.spec.observation.pixels == (64, 64, 3)
    # The first base is what the pilot made of an untrained one.
    north = runs["north"]
    spec = EpisodeDataset.open(out / "north" / "data").spec
    untrained = initial_base(north.recipe.model, spec, PartitionConfig(), seed=0).tensors
    first = RoundStore(out / "rounds").base(0).tensors
    assert set(first) == set(untrained)
    assert not any(torch.equal(first[name], tensor) for name, tensor in untrained.items())


def test_a_base_is_released_through_the_gates_of_the_constitution_alone(
    simulated, worldloom, refused, tmp_path
) -> None:
    out, _, _ = simulated
    rules = ["--constitution", str(out / "constitution.yaml")]
    into = tmp_path / "released"
    answer = worldloom("weave", "release", str(out / "rounds"), *rules, "--into", str(into), "--json").out
    assert json.loads(answer) == {"released": str(into)}
    assert {path.name for path in into.iterdir()} >= {"base.json", "model_card.md", "ledger.jsonl"}
    asked = ["weave", "release", str(out / "rounds"), *rules, "--into"]
    assert "already exists" in refused(4, *asked, str(into))
    constitution = read_constitution(out / "constitution.yaml")
    strict = constitution.model_copy(update={"release": Release(rounds=3, contributors=3, max_loss=0.0)})
    # The same ledger under stricter gates: of these rules it would not verify, which is said first.
    with pytest.raises(DataError, match="constitution"):
        unmet(out / "rounds", strict)


def test_a_pilot_whose_data_are_private_gives_no_base(tmp_path, refused) -> None:
    path = tmp_path / "consortium.yaml"
    path.write_text(CONSORTIUM.replace("pilot: north", "pilot: vault"))
    assert "this data may not be read" in refused(3, "weave", "simulate", str(path), "--out", str(tmp_path / "out"))
    assert not (tmp_path / "out" / "rounds").exists()


def test_rules_that_contradict_the_owners_are_refused(tmp_path, refused) -> None:
    path = tmp_path / "consortium.yaml"
    simulate = ["weave", "simulate", str(path), "--out", str(tmp_path / "out")]
    path.write_text(CONSORTIUM.replace("rules: {", "rules: {rounds: 3, "))
    assert "are set by keys outside 'rules'" in refused(2, *simulate)
    path.write_text(CONSORTIUM.replace("rules: {", "rules: {cap: 0.2, "))
    assert "cap" in refused(2, *simulate)
    path.write_text(CONSORTIUM.replace("owners:", "owner:"))
    assert "did you mean 'owners'" in refused(2, *simulate)


def test_the_keys_of_a_party_are_made_once_and_what_others_need_is_printed(worldloom, refused, tmp_path) -> None:
    keys = str(tmp_path / "keys")
    told = json.loads(worldloom("weave", "keys", "north", "--out", keys, "--json").out)["north"]
    assert told["key"] == SigningKey(tmp_path / "keys" / "north.pem").public
    assert told["connection"] == (tmp_path / "keys" / "north.ssh.pub").read_text().strip()
    hub = worldloom("weave", "keys", "hub", "--out", keys, "--host", "weave.example").out
    assert hub == f"hub:\n  key: {SigningKey(tmp_path / 'keys' / 'hub.pem').public}\n"
    key = json.loads(worldloom("weave", "key", str(tmp_path / "key.pem"), "--json").out)
    assert key == {"key": SigningKey(tmp_path / "key.pem").public, "path": str(tmp_path / "key.pem")}
    assert (tmp_path / "keys" / "hub-tls" / "server.pem").is_file()
    assert "never overwritten" in refused(4, "weave", "keys", "north", "--out", keys)


def test_data_shape_the_base_once_their_owner_says_so(simulated, worldloom, refused, tmp_path) -> None:
    out, _, _ = simulated
    data = tmp_path / "data"
    shutil.copytree(out / "north" / "data", data)
    key = SigningKey(out / "keys" / "north.pem")
    assert card_of(data, {key.public: "north"}).data_class == "private"
    asked = ["weave", "classify", str(data), "--owner", "north", "--key", str(out / "keys" / "north.pem"), "--as"]
    assert worldloom(*asked, "controlled").out.strip() == str(tmp_path / "data.card.yaml")
    assert card_of(data, {key.public: "north"}).data_class == "controlled"
    card = json.loads(worldloom(*asked, "open", "--json").out)
    assert card == {"card": str(tmp_path / "data.card.yaml")}
    assert card_of(data, {key.public: "north"}).data_class == "open"
    assert "did you mean 'sovereign'" in refused(2, *asked, "sovreign")


PARTY = {
    "owner": "north", "key": "keys/north.pem", "connection": "keys/north.ssh", "constitution": "constitution.yaml",
    "coordinators": [{"address": "localhost:9443", "authority": "ca.pem"}], "data": "north/data", "home": "home",
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "code", "said"),
    [
        ({"owner": "nobody"}, 2, "is not a member"),
        ({"key": "keys/east.pem"}, 3, "east.pem is not the key of"),
        ({"data": "nowhere"}, 4, "nowhere"),
        ({"coordinators": []}, 2, "coordinators"),
        ({"coordinators": [{"address": "localhost", "authority": "ca.pem"}]}, 2, "coordinators"),
        ({"constitution": "none.yaml"}, 4, "none.yaml"),
        ({"ovner": 1}, 2, "did you mean 'owner'"),
    ],
)
def test_a_party_that_states_what_cannot_be_is_refused(simulated, refused, tmp_path, change, code, said) -> None:
    out, _, _ = simulated
    party = out / f"party-{len(list(out.glob('party-*')))}.yaml"
    party.write_text(json.dumps({**PARTY, **change}))
    assert said in refused(code, "weave", "exit", str(party), "--into", str(tmp_path / "gone"))
    assert not (tmp_path / "gone").exists()


def test_a_member_leaves_returns_and_takes_over(simulated, worldloom, tmp_path) -> None:
    out, _, _ = simulated
    party = out / "north.yaml"
    model = json.loads((out / "north" / "run" / "config.json").read_text())["recipe"]["model"]
    overrides = [f"model.{name}={json.dumps(value)}" for name, value in model.items()]
    party.write_text(json.dumps({**PARTY, "home": str(tmp_path / "home"), "overrides": overrides}))
    gone = tmp_path / "gone"
    (tmp_path / "home").mkdir()
    shutil.copytree(out / "north" / "run", tmp_path / "home" / "run")
    left = json.loads(worldloom("weave", "exit", str(party), "--into", str(gone), "--json").out)
    assert left == {"left": str(gone)}
    assert json.loads(worldloom("weave", "return", str(party), "--json").out) == {"returned": "north"}
    shutil.copytree(out / "north" / "consortium", tmp_path / "home" / "consortium")
    seat = tmp_path / "seat.yaml"
    seat.write_text(json.dumps({
        "constitution": str(out / "constitution.yaml"), "key": str(out / "keys" / "coordinator.pem"), "home": "hub",
        "tls": "tls",
    }))  # fmt: skip
    taken = json.loads(worldloom("weave", "succeed", str(party), "--coordinator", str(seat), "--json").out)
    assert taken == {"round": 2, "coordinator": str(seat)}


def test_a_node_goes_to_the_next_coordinator_where_one_is_lost(tmp_path) -> None:
    seats = [{"address": f"{name}:1", "authority": "ca.pem"} for name in ("first", "second", "third")]
    config = NodeConfig.parse({**PARTY, "coordinators": seats})
    asked, over = [], threading.Event()

    def join(answer, *, server, **options) -> None:
        asked.append(server)
        if server != "second:1":
            raise ConfigError(f"{server} is not there")
        over.set()

    _join_any(join, config, lambda data: data, over, threading.Event())
    assert asked == ["first:1", "second:1"]
    lost = config.model_copy(update={"coordinators": (config.coordinators[0], config.coordinators[2])})
    with pytest.raises(ConfigError, match="first:1 is not there; third:1 is not there"):
        _join_any(join, lost, lambda data: data, threading.Event(), threading.Event())
    # Who goes on alone meanwhile asks them again and again.
    asked.clear()
    alone = config.model_copy(update={"alone_after_seconds": 5.0, "coordinators": (config.coordinators[0],)})
    with pytest.raises(RuntimeError, match="enough"):
        _join_any(tired(join, 3), alone, lambda data: data, threading.Event(), threading.Event())
    assert asked == ["first:1"] * 3


def test_a_node_that_saw_two_ledgers_ends_with_the_error_and_the_evidence(tmp_path) -> None:
    seats = [{"address": f"{name}:1", "authority": "ca.pem"} for name in ("first", "second")]
    config, node = NodeConfig.parse({**PARTY, "coordinators": seats}), Node.__new__(Node)

    def join(answer, *, server, **options) -> None:
        if server != "first:1":
            raise ConfigError(f"{server} is not there")
        node.fault = LedgerForked("there are two ledgers", tmp_path / "evidence.json")

    with pytest.raises(LedgerForked, match="first:1: there are two ledgers. The evidence is in .*evidence") as found:
        _join_any(join, config, lambda data: data, threading.Event(), threading.Event(), node=node)
    assert found.value.evidence == tmp_path / "evidence.json"


def tired(join, times: int):
    def joins(*arguments, **options) -> None:
        nonlocal times
        times -= 1
        if times < 0:
            raise RuntimeError("enough")
        join(*arguments, **options)

    return joins
