"""A real deployment: coordinator and nodes as processes of their own, over TLS and keys, killed and taken up."""

import json
import os
import signal
import socket
import struct
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from wire import Wire

from worldloom import workflow
from worldloom.core.signing import SigningKey
from worldloom.data import EpisodeDataset
from worldloom.federation import (
    MemberStore,
    PartitionConfig,
    Records,
    RoundStore,
    classify,
    ratify,
    read_constitution,
    recompute,
    verify_ledger,
)
from worldloom.models import load_model
from worldloom.recipes import load_recipe
from worldloom.training import saved_steps
from worldloom.workflow import Run, make_keys

pytest.importorskip("flwr", reason="needs pip install 'worldloom[weave]'")

WORLDLOOM = [str(Path(sys.executable).parent / "worldloom")]
OWNERS = ("north", "east", "south")
TURNS = {"north": 0, "east": 90, "south": 180}
MODEL = [
    "training.batch=16", "training.horizon=2", "training.threads=1", "training.validation_windows=16",
    "model.encoder.channels=[8, 8]", "model.encoder.hidden=16", "model.latent_dim=8", "model.predictor.hidden=[16]",
    "collection.episodes=8", "collection.steps=20", "collection.num_envs=8", "inverse.steps=20",
]  # fmt: skip
ROUNDS, STEPS, ALIGN = 3, 20, 5


@dataclass
class Party:
    """A process of the installed command, with a file for what it says."""

    command: list[str]
    log: Path
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> "Party":
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command, stdout=log, stderr=subprocess.STDOUT, env={**os.environ, "OMP_NUM_THREADS": "1"}
            )
        return self

    def kill(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def said(self) -> str:
        return self.log.read_text(errors="replace")


@dataclass
class Deployment:
    """The folders of all parties; in life each would be on a machine of its own."""

    path: Path
    port: int
    parties: dict[str, Party] = field(default_factory=dict)
    pilot: str = ""  # the fingerprint of its base

    def run(self, *arguments: str) -> str:
        done = subprocess.run([*WORLDLOOM, *arguments], capture_output=True, text=True, check=False, timeout=120)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def prepare(self) -> None:
        keys = self.path / "keys"
        public = {"hub": make_keys(keys, "hub", ("127.0.0.1",))}
        public |= {name: make_keys(keys, name) for name in (*OWNERS, "stranger")}
        rules = {
            "consortium": "three rooms",
            "members": {name: public[name] for name in OWNERS},
            "coordinators": [{"name": "hub", **public["hub"]}, "north"],
            "rounds": ROUNDS,
            "inner_steps": STEPS,
            "align_steps": ALIGN,
            "quorum": 3,
            "cap": 0.5,
            "timeout_seconds": 120,
            "quality": {"max_worse": 10.0},
        }
        constitution = self.path / "constitution.yaml"
        constitution.write_text(json.dumps(rules))
        for name in OWNERS:
            key = keys / f"{name}.pem"
            ratify(constitution, name, SigningKey(key))
            factors = json.dumps({"factors": {"action_turn": TURNS[name]}})
            recipe = load_recipe("two-room").override([*MODEL, f"collection.env_kwargs={factors}"])
            workflow.collect(recipe, self.path / f"{name}-data")
            classify(self.path / f"{name}-data", owner=name, data_class="open", key=key)
        shared = {"constitution": "constitution.yaml", "recipe": "two-room", "overrides": MODEL, "own_steps": 4}
        hub = {**shared, "key": "keys/hub.pem", "home": "hub", "tls": "keys/hub-tls", "port": self.port}
        hub["initial"] = "pilot"
        (self.path / "hub.yaml").write_text(json.dumps(hub))
        self.parties["hub"] = self._party("coordinator", "hub")

    def node(self, name: str, address: str, **more: object) -> Party:
        values = {
            "constitution": "constitution.yaml", "recipe": "two-room", "overrides": MODEL, "own_steps": 4,
            "owner": name, "key": f"keys/{name}.pem", "connection": f"keys/{name}.ssh", "data": f"{name}-data",
            "home": name, "coordinators": [{"address": address, "authority": "keys/hub-tls/ca.pem"}], **more,
        }  # fmt: skip
        file = str(more.get("file", name))
        values.pop("file", None)
        (self.path / f"{file}.yaml").write_text(json.dumps(values))
        self.parties[file] = self._party("node", file)
        return self.parties[file]

    def _party(self, command: str, name: str) -> Party:
        arguments = [*WORLDLOOM, "weave", command, str(self.path / f"{name}.yaml")]
        return Party([*arguments, *(["--threads", "1"] if command == "node" else [])], self.path / f"{name}.log")

    def entries(self, kind: str) -> int:
        path = self.path / "hub" / "rounds" / "ledger.jsonl"
        return sum(1 for _ in Records(path).entries(kind)) if path.is_file() else 0

    def wait(self, done, what: str, seconds: float = 200.0) -> None:
        deadline = time.monotonic() + seconds
        while not done():
            said = "\n".join(
                f"-- {name}\n{party.said()[-3000:]}" for name, party in self.parties.items() if party.process
            )
            assert time.monotonic() < deadline, f"{what} did not come\n{said}"
            time.sleep(0.2)


@pytest.fixture(scope="module")
def deployment(tmp_path_factory):
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    made = Deployment(tmp_path_factory.mktemp("deployment"), port)
    made.prepare()
    wire = Wire(made.path / "keys" / "hub-tls", port)
    made.wire = wire
    try:
        _live_through(made, wire)
        yield made
    finally:
        wire.close()
        for party in made.parties.values():
            if party.process is not None and party.process.poll() is None:
                party.kill()


def _live_through(made: Deployment, wire: Wire) -> None:
    """Run all rounds, with a node and then the coordinator killed on the way, and a stranger at the door."""
    direct = f"127.0.0.1:{made.port}"
    north = made.node("north", wire.address)
    pilot = made.run("weave", "pilot", str(made.path / "north.yaml"), "--out", str(made.path / "pilot"), "--json")
    made.pilot = json.loads(pilot)["base"]
    hub = made.parties["hub"].start()
    north.start()
    east = made.node("east", direct, alone_after_seconds=4, alone_steps=5).start()
    south = made.node("south", direct).start()
    # It states a member's name, and has keys of its own.
    made.node("south", direct, file="stranger", connection="keys/stranger.ssh", home="stranger", timeout_seconds=15)
    stranger = made.parties["stranger"].start()
    training = made.path / "south" / "run"
    made.wait(lambda: (training / "checkpoints").is_dir() or made.entries("contribution") >= 3, "training at south")
    south.kill()
    made.wait(lambda: made.entries("contribution") >= 2, "contributions of the others")
    south.start()
    made.wait(lambda: made.entries("contribution") >= 4, "the second round")
    hub.kill()
    time.sleep(2)
    hub.start()
    for party, what in ((hub, "the coordinator's end"), (north, "north's end"), (east, "east's"), (south, "south's")):
        made.wait(lambda party=party: party.process.poll() is not None, what)
        assert party.process.returncode == 0, party.said()
    made.wait(lambda: stranger.process.poll() is not None, "the stranger's end")


@pytest.mark.slow
def test_the_rounds_are_completed_though_a_node_and_the_coordinator_were_killed(deployment) -> None:
    constitution = read_constitution(deployment.path / "constitution.yaml")
    rounds = deployment.path / "hub" / "rounds"
    assert verify_ledger(rounds / "ledger.jsonl", constitution).broken is None
    records = Records(rounds / "ledger.jsonl")
    told = [entry.body for entry in records.entries("round")]
    assert [body["round"] for body in told] == [0, 1, 2]
    assert all(set(body["facts"]["weights"]) == set(OWNERS) for body in told)
    again = recompute(rounds, constitution, into=deployment.path / "again")
    assert again == {number: facts["fingerprint"] for number, facts in records.bases().items()}
    assert again[0] == deployment.pilot
    # Killed or not, each trained every step of the rounds and its own once.
    for name in OWNERS:
        run = Run.open(deployment.path / name / "run")
        alone = 5 if name == "east" else 0  # it goes on by itself where nobody asks
        more = max(saved_steps(run.folder)) - ALIGN - ROUNDS * STEPS - 4
        assert more > 0 if alone else more == 0
        assert more % max(1, alone) == 0
        assert run.agent("tree search") is not None
    assert "cannot reach a coordinator; it trained 5 steps on its own" in deployment.parties["east"].said()


@pytest.mark.slow
def test_a_node_whose_key_the_constitution_does_not_name_is_refused(deployment) -> None:
    party = deployment.parties["stranger"]
    assert party.process.returncode not in (0, None)
    assert "this node's key is in the constitution" in party.said()
    assert not (deployment.path / "stranger" / "answers").exists()


@pytest.mark.slow
def test_what_a_node_sent_holds_no_sovereign_tensor_and_no_frame(deployment) -> None:
    sent = deployment.wire.sent
    model = load_model(deployment.path / "north" / "run" / "model")
    state = model.state_dict()
    constitution = read_constitution(deployment.path / "constitution.yaml")
    partition = PartitionConfig.parse(constitution.partition).split(state)
    assert len(deployment.wire.messages()) >= ROUNDS * 3  # contributions and verdicts passed here, in the clear
    for name in partition.sovereign:
        tensor = state[name].reshape(-1)
        # A number by itself may occur by chance; of a run of four nobody would believe that.
        for first in range(0, max(1, len(tensor) - 3), 4):
            piece = tensor[first : first + 4].contiguous().numpy().tobytes()
            if len(piece) >= 16 and len(set(struct.unpack(f"{len(piece) // 4}f", piece[: len(piece) // 4 * 4]))) > 1:
                assert piece not in sent, f"a piece of {name} is on the wire"
    dataset = EpisodeDataset.open(deployment.path / "north-data")
    for index in range(len(dataset)):
        episode = dataset.episode(index)
        for frame in episode.pixels[::5]:
            rows = torch.as_tensor(frame).reshape(frame.shape[0], -1)
            busy = [row.numpy().tobytes() for row in rows if len(set(row.tolist())) > 6]
            assert not any(row in sent for row in busy)
        assert episode.actions[:8].tobytes() not in sent


@pytest.mark.slow
def test_the_base_that_members_keep_is_the_one_that_the_coordinator_published(deployment) -> None:
    records = Records(deployment.path / "hub" / "rounds" / "ledger.jsonl")

    constitution = read_constitution(deployment.path / "constitution.yaml")
    for name in OWNERS:
        key = SigningKey(deployment.path / "keys" / f"{name}.pem")
        store = MemberStore(deployment.path / name / "consortium", constitution, key)
        number, base = store.base()
        assert (number, base.fingerprint) == (ROUNDS, records.bases()[ROUNDS]["fingerprint"])
        assert (deployment.path / "hub" / "rounds" / "ledger.jsonl").read_bytes().startswith(store.read())


@pytest.mark.slow
def test_an_owner_leaves_with_everything_that_is_its_own(deployment) -> None:
    into = deployment.path / "gone"
    party = str(deployment.path / "south.yaml")
    deployment.run("weave", "exit", party, "--into", str(into), "--why", "a vote", "--threads", "1")
    assert {path.name for path in into.iterdir()} >= {"run", "consortium", "constitution.yaml"}
    assert Run.open(into / "run").agent("tree search") is not None
    rules = ["--constitution", str(into / "constitution.yaml")]
    assert "complete" in deployment.run("weave", "ledger", "verify", str(into / "consortium"), *rules)
    done = subprocess.run(
        [*WORLDLOOM, "weave", "node", party], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 3
    assert "has left the consortium" in done.stderr
    deployment.run("weave", "return", party)


@pytest.mark.slow
def test_a_member_with_a_seat_takes_over_from_what_its_node_kept(deployment) -> None:
    values = json.loads((deployment.path / "hub.yaml").read_text())
    values |= {"home": "north-hub", "key": "keys/north.pem"}
    (deployment.path / "north-hub.yaml").write_text(json.dumps(values))
    party, seat = str(deployment.path / "north.yaml"), str(deployment.path / "north-hub.yaml")
    said = deployment.run("weave", "succeed", party, "--coordinator", seat)
    assert f"before round {ROUNDS}" in said
    rounds = deployment.path / "north-hub" / "rounds"
    constitution = read_constitution(deployment.path / "constitution.yaml")
    assert verify_ledger(rounds / "ledger.jsonl", constitution).broken is None
    bases = Records(deployment.path / "hub" / "rounds" / "ledger.jsonl").bases()
    assert RoundStore(rounds).base(ROUNDS).fingerprint == bases[ROUNDS]["fingerprint"]
