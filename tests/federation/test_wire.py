"""What leaves an owner depends on what is shared alone, not on what is sovereign nor on frames that nothing reads."""

import dataclasses
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from consortium import OWNERS, Consortium, points
from wire import Wire

import worldloom.federation.rounds.local
from worldloom.federation import LocalTraining, Node, Records, make_node_keys, make_tls
from worldloom.federation.record.envelope import unseal

NODE = """
import sys
from pathlib import Path

sys.path.insert(0, {here!r})
import test_wire
from consortium import Consortium
from worldloom.federation.transport.flower import join

home, number, address, keys = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3], Path(sys.argv[4])
node = test_wire.altered(Consortium(home, rules=test_wire.RULES), number)
join(node.handle, home=home / "link", server=address, authority=keys / "ca.pem", secret=keys / "north.ssh",
     timeout_seconds=60)
"""
RULES = {"rounds": 1, "inner_steps": 2, "quorum": 1, "cap": 1.0, "timeout_seconds": 90}


def altered(consortium: Consortium, number: int, ends: list[dict[str, torch.Tensor]] | None = None) -> Node:
    """Return north's node, which ends its training with the same shared part, whatever the `number`; `ends` takes it.

    With each number every sovereign tensor is another, and so is every frame of the episodes that training leaves.
    """
    training = consortium.node("north")._training
    source = torch.Generator().manual_seed(number)
    fit = worldloom.federation.rounds.local.fit

    def ends_alike(*arguments, **options):
        model = fit(*arguments, **options)
        state = model.state_dict()
        partition = consortium.partition.split(state)
        shared = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for name, tensor in state.items():
                kept = name in partition.shared
                if tensor.is_floating_point():
                    tensor.copy_(torch.randn(tensor.shape, generator=shared if kept else source))
        if ends is not None:
            ends.append({name: tensor.clone() for name, tensor in state.items()})
        return model

    worldloom.federation.rounds.local.fit = ends_alike
    frames = training.frames
    drawn_from, held_out = frames.split(consortium.training.validation_share, consortium.training.seed)
    assert len(held_out)
    assert not set(drawn_from) & set(held_out)
    random = np.random.default_rng(number)
    vector = frames.vector.copy()
    for episode in held_out:
        rows = frames.rows(int(episode))
        vector[rows] = random.normal(size=vector[rows].shape)
    other = dataclasses.replace(frames, vector=vector)
    local = LocalTraining(
        training.run, other, training=training.training, model=training.model, partition=consortium.partition
    )
    return Node(
        consortium.path / "north",
        local,
        name="north",
        key=consortium.keys["north"],
        constitution=consortium.constitution,
        data_class="open",
    )


@pytest.fixture(autouse=True)
def _fit(monkeypatch: pytest.MonkeyPatch) -> None:
    # A contribution names the head of the ledger, in whose entries is the time.
    monkeypatch.setattr("worldloom.core.chain.time", SimpleNamespace(time=lambda: 0.0))
    monkeypatch.setattr(worldloom.federation.rounds.local, "fit", worldloom.federation.rounds.local.fit)


def keys_of(path: Path, consortium: Consortium) -> None:
    """Give a consortium to come the keys of another."""
    shutil.copytree(consortium.path / "keys", path / "keys")


@pytest.mark.parametrize("codec", ["float32", "int8", "top-k"])
def test_a_contribution_is_the_same_to_the_byte_whatever_is_sovereign(tmp_path, codec, monkeypatch) -> None:
    rules = {**RULES, "codec": {"name": codec}}
    first = Consortium(tmp_path / "0", rules=rules)
    fit, answers, states = worldloom.federation.rounds.local.fit, [], []
    for number in range(2):
        if number:
            keys_of(tmp_path / "1", first)
        consortium = Consortium(tmp_path / str(number), rules=rules)
        monkeypatch.setattr(worldloom.federation.rounds.local, "fit", fit)
        node = altered(consortium, number, states)
        handlers = {name: lambda data: b"" for name in OWNERS}
        coordinator = consortium.coordinator({**handlers, "north": node.handle})
        coordinator._gather(0, coordinator.rounds.base(0))
        answers.append(coordinator.rounds.message(0, "north").read_bytes())
        coordinator.close()
    partition = first.partition.split(states[0])
    for name in partition.sovereign:
        if states[0][name].is_floating_point():
            assert not torch.equal(states[0][name], states[1][name])
    assert answers[0] == answers[1]
    message = unseal(answers[0], kind="contribution", known={first.keys["north"].public: "north"}, limit=10**7)
    assert any(bool(tensor.any()) for tensor in message.tensors.values())


@pytest.mark.slow
def test_on_the_wire_too_it_is_the_same_to_the_byte(tmp_path) -> None:
    pytest.importorskip("flwr", reason="needs pip install 'worldloom[weave]'")
    from worldloom.federation import Coordinator, initial_base
    from worldloom.federation.transport.flower import serve

    keys = tmp_path / "keys"
    tls = make_tls(keys, ("127.0.0.1",))
    public = make_node_keys(keys, "north").read_text()
    script = tmp_path / "node.py"
    script.write_text(NODE.format(here=str(Path(__file__).parent)))
    first = Consortium(tmp_path / "0", rules=RULES)
    sent = []
    for number in range(2):
        if number:
            keys_of(tmp_path / "1", first)
        consortium = Consortium(tmp_path / str(number), rules=RULES)
        port = free_port()
        wire = Wire(keys, port)
        command = [sys.executable, str(script), str(tmp_path / str(number)), str(number), wire.address, str(keys)]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            with serve(tmp_path / f"link-{number}", tls, {"north": public}, port=port) as transport:
                coordinator = Coordinator(
                    consortium.path / "rounds",
                    consortium.constitution,
                    key=consortium.keys["coordinator"],
                    transport=transport,
                    initial=initial_base(first.node("north")._training.model, points().spec, first.partition, seed=0),
                )
                coordinator.run_round(0)
                coordinator.close()
        finally:
            process.kill()
            process.wait()
            wire.close()
        time.sleep(0.5)
        known = {consortium.keys["north"].public: "north"}
        sent.append([data for data in wire.messages() if _is(data, "contribution", known)])
        assert len(list(Records(consortium.path / "rounds" / "ledger.jsonl").entries("contribution"))) == 1
    assert sent[0]
    assert set(sent[0]) == set(sent[1])


def free_port() -> int:
    import socket

    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def _is(data: bytes, kind: str, known: dict[str, str]) -> bool:
    from worldloom.core.errors import DataError

    try:
        unseal(data, kind=kind, known=known, limit=10**7)
    except DataError:
        return False
    return True
