"""Rounds under secure aggregation: the base comes out as the mean gives it, whoever drops out or is killed; and the
coordinator never sees a single delta."""

import itertools
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from consortium import MODEL, OWNERS, Consortium, Quick, bytes_of, drawn, run_until_killed
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare
from torch import Tensor

from worldloom.core.errors import ConfigError, DataError, TrainingError
from worldloom.federation import (
    Base,
    Ledger,
    Node,
    Records,
    RoundStore,
    fingerprint,
    recompute,
    verify_ledger,
)
from worldloom.federation.record.envelope import SignedMessage, seal, unseal
from worldloom.federation.rounds.secure_node import SecureNode
from worldloom.federation.rounds.secure_rounds import THE_SUM, Transcript, lasting, load_sum, suspended
from worldloom.federation.secure.aggregation_protocol import PRIME, _own_mask, join_secret
from worldloom.federation.secure.privacy import gaussian_epsilon
from worldloom.models import save_tensors
from worldloom.training import held_out_losses

SUMS = {"aggregation": {"name": "mean"}, "secure_aggregation": True}
STEP = 2.0**-24  # of the whole numbers that deltas are written in
IDLE = "encoder.mlp.layers.2.bias"  # before a batch norm: its gradient is rounding alone, which Adam makes steps of

Handler = Callable[[bytes], bytes]


def quick(path: Path, keys: Path | None = None, **changed: Any) -> Quick:
    """Return a consortium of one round under secure aggregation, with the keys of another if they are given."""
    rules = {"rounds": 1, "outer": {"name": "fedavg"}, **SUMS, **changed.pop("rules", {})}
    if keys is not None:
        shutil.copytree(keys / "keys", path / "keys")
    return Quick(path, rules=rules, **changed)


def run(consortium: Consortium, handlers: Mapping[str, Handler] | None = None) -> Base:
    coordinator = consortium.coordinator(handlers)
    try:
        return coordinator.run()
    finally:
        coordinator.close()


def said(consortium: Consortium, kind: str) -> list[Mapping[str, Any]]:
    records = Records(consortium.path / "rounds" / "ledger.jsonl")
    return [entry.body["facts"] for entry in records.entries(kind)]


def what_of(consortium: Consortium, message: bytes) -> str:
    asked = unseal(message, kind="ask", known=consortium.constitution.known(), limit=10**9)
    return str(asked.body["what"])


def gone_at(consortium: Consortium, name: str, *phases: str, times: int = 1000) -> Handler:
    """Return a node that cannot be reached in some phases."""
    node, left = consortium.node(name), [times]

    def handle(message: bytes) -> bytes:
        if what_of(consortium, message) in phases and left[0] > 0:
            left[0] -= 1
            raise OSError("gone")
        return node.handle(message)

    return handle


def mean_of(consortium: Quick, names: tuple[str, ...] = OWNERS, number: int = 0) -> dict[str, Tensor]:
    base = RoundStore(consortium.path / "rounds").base(number).tensors
    deltas = [drawn(name, number, base) for name in names]
    return {key: tensor + torch.stack([delta[key] for delta in deltas]).mean(0) for key, tensor in base.items()}


def near(found: Base | Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    tensors = found.tensors if isinstance(found, Base) else found
    for key, tensor in expected.items():
        torch.testing.assert_close(tensors[key], tensor, rtol=0, atol=4 * STEP)


@pytest.fixture(scope="module")
def woven(tmp_path_factory) -> tuple[Consortium, Base]:
    consortium = Consortium(tmp_path_factory.mktemp("secure"), rules=SUMS)
    return consortium, run(consortium)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[Quick, Base]:
    consortium = quick(tmp_path_factory.mktemp("whole"))
    return consortium, run(consortium)


def test_sums_weave_nearly_the_base_that_plain_means_give(woven, tmp_path) -> None:
    secure, last = woven
    shutil.copytree(secure.path / "keys", tmp_path / "keys")
    plain = Consortium(tmp_path, rules={"aggregation": {"name": "mean"}})
    expected = run(plain)
    first = {number: RoundStore(each.path / "rounds").base(1) for number, each in enumerate((secure, plain))}
    near(first[0], first[1].tensors)
    for key in set(expected.tensors) - {IDLE}:
        torch.testing.assert_close(last.tensors[key], expected.tensors[key], rtol=0, atol=2e-6)
    training = plain.node("north")._training
    one, other = (
        held_out_losses(plain.training, MODEL, training.frames, training.run, base.tensors)["total"]
        for base in (last, expected)
    )
    assert one == pytest.approx(other, rel=1e-4)


def test_the_ledger_verifies_and_every_base_is_recomputed_bit_for_bit(woven, tmp_path) -> None:
    consortium, last = woven
    ledger = consortium.path / "rounds" / "ledger.jsonl"
    assert verify_ledger(ledger, consortium.constitution).broken is None
    found = recompute(consortium.path / "rounds", consortium.constitution, into=tmp_path / "again")
    assert found[3] == last.fingerprint
    assert {number: facts["fingerprint"] for number, facts in Records(ledger).bases().items()} == found
    assert [facts["attempt"] for facts in said(consortium, "session")] == [0, 0, 0]


def test_nobody_can_be_left_out_of_a_past_sum(woven, tmp_path) -> None:
    consortium, _ = woven
    with pytest.raises(DataError, match="the single contribution of east is not known"):
        recompute(consortium.path / "rounds", consortium.constitution, into=tmp_path / "without", without=["east"])
    found = recompute(consortium.path / "rounds", consortium.constitution, into=tmp_path / "all", without=["nobody"])
    assert len(found) == 4


@pytest.mark.parametrize("what", ["advertise", "share", "mask", "unmask", "sum"])
def test_whatever_was_changed_of_what_is_kept_is_found(whole, tmp_path, what) -> None:
    consortium, _ = whole
    shutil.copytree(consortium.path / "rounds", tmp_path / "rounds")
    if what == "sum":
        total = load_sum(tmp_path / "rounds", 0)
        save_tensors(tmp_path / "rounds" / "sums" / "00000", {k: v * 2 for k, v in total.items()}, kind="secure-sum")
    else:
        path = tmp_path / "rounds" / "sessions" / "00000-000" / what / "east.msg"
        kinds = {"advertise": "advertised", "share": "shared", "mask": "masked", "unmask": "unmasked"}
        message = unseal(path.read_bytes(), kind=kinds[what], known=consortium.constitution.known(), limit=10**9)
        path.write_bytes(seal(message.kind, {**message.body, "more": 1}, message.tensors, key=consortium.keys["east"]))
    with pytest.raises(DataError, match="not match the ledger|is not the sum of the stored contributions"):
        recompute(tmp_path / "rounds", consortium.constitution, into=tmp_path / "again")


def test_a_member_that_drops_out_after_sharing_is_not_in_the_sum_and_the_round_goes_on(tmp_path) -> None:
    consortium = quick(tmp_path)
    found = run(consortium, {"east": gone_at(consortium, "east", "mask")})
    near(found, mean_of(consortium, ("north", "south")))
    (facts,) = said(consortium, "round")
    assert facts["weights"] == {"north": 0.5, "south": 0.5}
    assert [(each["owner"], each["reason"]) for each in said(consortium, "refusal")] == [
        ("east", "mask: OSError: gone")
    ]
    recompute(tmp_path / "rounds", consortium.constitution, into=tmp_path / "again")


def test_a_member_that_drops_out_after_masking_is_in_the_sum(tmp_path) -> None:
    consortium = quick(tmp_path)
    near(run(consortium, {"east": gone_at(consortium, "east", "unmask")}), mean_of(consortium))


def test_a_member_that_was_never_there_is_gone_without(tmp_path) -> None:
    consortium = quick(tmp_path)
    found = run(consortium, {"east": gone_at(consortium, "east", "advertise", "judge")})
    near(found, mean_of(consortium, ("north", "south")))


@pytest.mark.parametrize("phase", ["advertise", "share", "mask"])
def test_below_the_threshold_a_round_fails_and_runs_again_in_a_new_session(tmp_path, phase) -> None:
    consortium = quick(tmp_path)
    away = {name: gone_at(consortium, name, phase) for name in ("east", "south")}
    with pytest.raises(TrainingError, match="when more members are connected"):
        run(consortium, away)
    assert not said(consortium, "sum")
    near(run(consortium), mean_of(consortium))
    sessions = said(consortium, "session")
    assert [facts["attempt"] for facts in sessions] == [0, 1, 2, 3]
    assert len({facts["session"] for facts in sessions}) == 4


def test_below_the_threshold_at_the_end_the_same_session_is_opened_when_members_are_back(tmp_path) -> None:
    consortium = quick(tmp_path)
    away = {name: gone_at(consortium, name, "unmask") for name in ("east", "south")}
    with pytest.raises(TrainingError, match="when east, south are connected"):
        run(consortium, away)
    near(run(consortium, {"north": gone_at(consortium, "north", "unmask")}), mean_of(consortium))
    assert [facts["attempt"] for facts in said(consortium, "session")] == [0]


def test_a_sum_whose_secrets_are_lost_for_good_leaves_the_base_as_it_is(tmp_path) -> None:
    consortium = quick(tmp_path, rules={"rounds": 2})
    handlers = {}
    for name in ("east", "south"):
        node = consortium.node(name)

        def loses(message: bytes, node: Node = node) -> bytes:
            asked = unseal(message, kind="ask", known=consortium.constitution.known(), limit=10**9)
            if (asked.body["what"], asked.body["round"]) == ("unmask", 0):
                (node.path / "secure" / "session.json").unlink(missing_ok=True)
            return node.handle(message)

        handlers[name] = loses
    found = run(consortium, handlers)
    first = RoundStore(tmp_path / "rounds").base(0)
    assert RoundStore(tmp_path / "rounds").base(1).fingerprint == first.fingerprint
    assert any("can never be unmasked" in facts["reason"] for facts in said(consortium, "refusal"))
    near(found, mean_of(consortium, number=1))
    recompute(tmp_path / "rounds", consortium.constitution, into=tmp_path / "again")


def killed_at(moment: int, function):
    count = itertools.count()

    def call(*arguments, **options):
        if next(count) == moment:
            raise KeyboardInterrupt
        return function(*arguments, **options)

    return call


def test_whichever_entry_of_the_ledger_was_the_last_before_a_kill(whole, tmp_path) -> None:
    consortium, last = whole
    entries = len(list(Records(consortium.path / "rounds" / "ledger.jsonl").entries()))
    # constitution, base; session, three contributions, survivors, sum, two checkpoints, round, base; a checkpoint
    assert entries == 13
    for entry in range(entries - 2):  # the first two are there before the round
        broken = quick(tmp_path / str(entry), consortium.path)
        coordinator = broken.coordinator()
        coordinator.ledger.append = killed_at(entry, coordinator.ledger.append)
        run_until_killed(coordinator)
        assert run(broken).fingerprint == last.fingerprint
        ledger = broken.path / "rounds" / "ledger.jsonl"
        assert verify_ledger(ledger, broken.constitution).broken is None
        # Once the survivors are written down (the fifth entry of the round) no other session is begun.
        attempts = [facts["attempt"] for facts in said(broken, "session")]
        assert attempts == ([0, 1] if 1 <= entry <= 4 else [0])
        assert len(said(broken, "round")) == 1
        recompute(broken.path / "rounds", broken.constitution, into=broken.path / "again")


@pytest.mark.slow
@pytest.mark.parametrize("after", [False, True])
def test_a_coordinator_that_is_killed_at_any_answer_goes_on_and_reuses_nothing(whole, tmp_path, after) -> None:
    consortium, last = whole
    for moment in range(12):  # three answers in each of four phases
        broken = quick(tmp_path / str(moment), consortium.path)
        heard: list[bytes] = []
        handlers = {name: recorded(broken.node(name), heard) for name in OWNERS}
        coordinator = broken.coordinator(handlers)
        accept, count = coordinator._sums._accept, itertools.count()

        def dies(*arguments, accept=accept, count=count, moment=moment) -> None:
            now = next(count) == moment
            if now and not after:
                raise KeyboardInterrupt
            accept(*arguments)
            if now:
                raise KeyboardInterrupt

        coordinator._sums._accept = dies
        run_until_killed(coordinator)
        assert run(broken, handlers).fingerprint == last.fingerprint
        known = broken.constitution.known()
        keys: dict[tuple[str, int], set[str]] = {}
        for answer in heard:
            try:
                message = unseal(answer, kind="advertised", known=known, limit=10**9)
            except DataError:
                continue
            keys.setdefault((message.sender, message.body["attempt"]), set()).add(message.body["keys"]["mask"])
        assert all(len(each) == 1 for each in keys.values())
        assert len(set().union(*keys.values())) == len(keys)


def recorded(node: Node, heard: list[bytes]) -> Handler:
    def handle(message: bytes) -> bytes:
        answer = node.handle(message)
        heard.append(answer)
        return answer

    return handle


def test_a_node_that_is_killed_after_every_phase_goes_on_from_its_disk(whole, tmp_path) -> None:
    consortium, last = whole
    broken = quick(tmp_path, consortium.path)
    handlers = {name: lambda message, name=name: broken.node(name).handle(message) for name in OWNERS}
    assert run(broken, handlers).fingerprint == last.fingerprint


@pytest.mark.parametrize("method", ["_write", "_answer_path"])
def test_a_node_that_is_killed_within_a_phase_counts_as_dropped_or_goes_on(tmp_path, monkeypatch, method) -> None:
    whole = getattr(SecureNode, method)
    for moment in range(6):
        broken = quick(tmp_path / str(moment))
        count = itertools.count()

        def dies(self, *arguments, count=count, moment=moment):
            if self.name == "east" and next(count) == moment:
                raise OSError("killed")
            return whole(self, *arguments)

        monkeypatch.setattr(SecureNode, method, dies)
        found = run(broken)
        (facts,) = said(broken, "round")
        near(found, mean_of(broken, tuple(facts["weights"])))
        assert {"north", "south"} <= set(facts["weights"])
        recompute(broken.path / "rounds", broken.constitution, into=broken.path / "again")


@pytest.mark.parametrize("phase", ["share", "mask", "unmask"])
def test_an_answer_that_is_lost_on_the_way_is_said_again_or_gone_without(tmp_path, phase) -> None:
    consortium = quick(tmp_path)
    node, lost = consortium.node("east"), [True]

    def loses(message: bytes) -> bytes:
        answer = node.handle(message)
        if what_of(consortium, message) == phase and lost.pop() if lost else False:
            raise OSError("lost")
        return answer

    others = {"south": gone_at(consortium, "south", "unmask")} if phase == "unmask" else {}
    found = run(consortium, {"east": loses, **others})
    near(found, mean_of(consortium, OWNERS if phase == "unmask" else ("north", "south")))


def test_a_node_keeps_no_secret_once_the_sum_is_opened_and_nobody_else_reads_it_before(tmp_path) -> None:
    consortium = quick(tmp_path)
    seen, node = [], consortium.node("east")

    def watched(message: bytes) -> bytes:
        answer = node.handle(message)
        if (what := what_of(consortium, message)) not in ("judge", "store"):
            text = (node.path / "secure" / "session.json").read_text()
            seen.append((what, '"masker": null' not in text, any((node.path / "secure").glob("delta*"))))
        return answer

    run(consortium, {"east": watched})
    assert seen == [("advertise", True, True), ("share", True, True), ("mask", True, True), ("unmask", False, False)]
    assert (node.path / "secure").stat().st_mode & 0o777 == 0o700


class Probe:
    """A consortium that has gone through the phases before `unmask`, and whose coordinator may now ask for anything."""

    def __init__(self, path: Path) -> None:
        self.consortium = quick(path, rules={"rounds": 2})
        self.asked: dict[tuple[str, str], SignedMessage] = {}
        self.nodes = {name: self.consortium.node(name) for name in OWNERS}
        away = {name: self._stops(name) for name in OWNERS}
        with pytest.raises(TrainingError):
            run(self.consortium, away)

    def _stops(self, name: str) -> Handler:
        def handle(message: bytes) -> bytes:
            asked = unseal(message, kind="ask", known=self.consortium.constitution.known(), limit=10**9)
            self.asked[asked.body["what"], name] = asked
            if asked.body["what"] == "unmask":
                raise OSError("later")
            return self.nodes[name].handle(message)

        return handle

    def ask(self, name: str, what: str, tensors: Mapping[str, Tensor] | None = None, **changed: Any) -> SignedMessage:
        before = self.asked.get((what, name), self.asked["unmask", name])
        body = {**before.body, "what": what, **changed}
        if tensors is not None:
            body["base"] = fingerprint(tensors)
        key = self.consortium.keys["coordinator"]
        answer = self.nodes[name].handle(seal("ask", body, before.tensors if tensors is None else tensors, key=key))
        for kind in ("advertised", "shared", "masked", "unmasked", "refusal"):
            try:
                return unseal(answer, kind=kind, known=self.consortium.constitution.known(), limit=10**9)
            except DataError:
                continue
        raise AssertionError

    def refused(self, *arguments: Any, **changed: Any) -> str:
        message = self.ask(*arguments, **changed)
        assert message.kind == "refusal", message.kind
        return str(message.body["why"])


def test_a_node_refuses_to_unmask_too_few_others_or_twice(tmp_path) -> None:
    probe = Probe(tmp_path)
    assert "fewer than the threshold of 2" in probe.refused("east", "unmask", survivors=["east"])
    assert "cannot be the survivors" in probe.refused("east", "unmask", survivors=["north", "south"])
    assert "cannot be the survivors" in probe.refused("east", "unmask", survivors=["east", "mallory"])
    assert "survivors: Input should be a valid list" in probe.refused("east", "unmask", survivors="east")
    answer = probe.ask("east", "unmask", survivors=["east", "north"])
    assert set(answer.body["seeds"]) == {"east", "north"}
    assert set(answer.body["keys"]) == {"south"}  # of each a share of one secret, never of both
    for survivors in (["east", "south"], ["east", "north", "south"]):
        assert "could reveal its delta" in probe.refused("east", "unmask", survivors=survivors)
    assert probe.ask("east", "unmask", survivors=["east", "north"]).digest == answer.digest


def test_a_coordinator_that_names_other_survivors_to_each_never_has_both_secrets_of_a_member(tmp_path) -> None:
    probe = Probe(tmp_path)
    lists = {"north": ["east", "north", "south"], "east": ["east", "south"], "south": ["north", "south"]}
    answers = {name: probe.ask(name, "unmask", survivors=there).body for name, there in lists.items()}
    for owner in OWNERS:
        held = [sum(owner in answer[part] for answer in answers.values()) for part in ("seeds", "keys")]
        assert min(held) < probe.consortium.constitution.threshold


def test_a_node_answers_each_phase_once(tmp_path) -> None:
    probe = Probe(tmp_path)
    for what, changed in (
        ("share", {"roster": {}}),
        ("mask", {"inbox": {}}),
        ("mask", {"inbox": {"north": probe.asked["mask", "east"].body["inbox"]["north"]}}),
    ):
        assert "could reveal its delta" in probe.refused("east", what, **changed)
    first = probe.ask("east", "mask")
    assert probe.ask("east", "mask").digest == first.digest


def test_who_helped_to_open_a_sum_goes_into_no_other_of_that_round(tmp_path) -> None:
    probe = Probe(tmp_path)
    base = probe.asked["advertise", "east"].tensors
    probe.ask("east", "unmask")
    assert "could reveal single contributions" in probe.refused("east", "advertise", attempt=1)
    # Nor with a base that is a little different, from which nearly the same is learned.
    other = {name: tensor + 1e-6 for name, tensor in base.items()}
    changed = {"attempt": 1, "base": fingerprint(other)}
    assert "could reveal single contributions" in probe.refused("east", "advertise", other, **changed)
    with Ledger(tmp_path / "rounds" / "ledger.jsonl", probe.consortium.keys["coordinator"]) as ledger:
        nobody = {"weights": {}, "notes": {}, "left_out": [], "evaluation": None}
        ledger.append("round", nobody, round=0)
        ledger.append("base", {"fingerprint": fingerprint(base), "previous": fingerprint(base)}, round=1)
        told = {"begin": 0, "lines": ledger.lines()}
    assert probe.ask("east", "advertise", round=1, attempt=0, ledger=told).kind == "advertised"
    assert "could reveal single contributions" in probe.refused("east", "advertise", attempt=1)


def test_a_node_goes_back_to_no_older_session_and_into_no_round_that_was_not_agreed(tmp_path) -> None:
    probe = Probe(tmp_path)
    assert probe.ask("east", "advertise", attempt=1).kind == "advertised"
    assert "cannot join session" in probe.refused("east", "advertise")
    for what in ("share", "mask", "unmask"):
        assert "is not in session 0" in probe.refused("east", what)
    assert "a round below 2" in probe.refused("east", "advertise", round=2)
    assert "expected 0000" in probe.refused("east", "advertise", attempt=2, base="0" * 64)
    assert "attempt: Input should be a valid integer" in probe.refused("east", "advertise", attempt="2")


def test_a_node_never_sends_a_bare_delta_under_secure_aggregation(tmp_path) -> None:
    probe = Probe(tmp_path)
    assert "expected a request to advertise, share, mask, unmask, judge" in probe.refused("east", "train")


def test_keys_and_frames_are_those_that_their_owner_signed(tmp_path) -> None:
    probe = Probe(tmp_path)
    known = probe.consortium.constitution.known()
    roster = probe.asked["share", "east"].body["roster"]
    fresh = probe.ask("east", "advertise", attempt=1)
    assert fresh.kind == "advertised"
    north = unseal(bytes.fromhex(roster["north"]), kind="advertised", known=known, limit=10**9)
    forged = seal("advertised", {**north.body, "frames": 10**9}, {}, key=probe.consortium.keys["coordinator"])
    for entry, why in (
        (forged.hex(), "unknown sender"),
        (roster["south"], "north sent a message that south signed"),
        ("z", "hex"),
    ):
        assert why in probe.refused("east", "share", attempt=1, roster={"north": entry})
    assert "has attempt 0; expected 1" in probe.refused("east", "share", attempt=1)


def rows(consortium: Quick) -> dict[tuple[int, str], np.ndarray]:
    """Return the masked rows that the coordinator keeps, by round and owner."""
    found = {}
    for path in (consortium.path / "rounds" / "sessions").glob("*/mask/*.msg"):
        message = unseal(path.read_bytes(), kind="masked", known=consortium.constitution.known(), limit=10**9)
        found[message.body["round"], message.sender] = message.tensors["masked"].numpy().view("<u8")
    return found


def without_own_masks(consortium: Quick, number: int) -> dict[str, np.ndarray]:
    """Return the rows of a round with the own masks taken off that the coordinator has learned."""
    rounds, known = RoundStore(consortium.path / "rounds"), consortium.constitution.known()
    base = rounds.base(number)
    shapes = {name: tuple(shape) for name, shape in base.shapes.items()}
    session = Transcript(consortium.constitution, number, 0, base.fingerprint, shapes).session
    answers = [
        unseal(path.read_bytes(), kind="unmasked", known=known, limit=10**9)
        for path in (rounds.path / "sessions" / f"{number:05d}-000" / "unmask").glob("*.msg")
    ]
    points = {name: point for point, name in enumerate(session.names, 1)}
    found = {}
    for owner in OWNERS:
        shares = {points[answer.sender]: int(answer.body["seeds"][owner], 16) for answer in answers}
        seed = join_secret(shares).to_bytes(32, "big")
        found[owner] = rows(consortium)[number, owner] - _own_mask(seed, session)
    return found


def flat(delta: Mapping[str, Tensor]) -> np.ndarray:
    return np.concatenate([delta[name].double().reshape(-1).numpy() for name in sorted(delta)])


def related(one: np.ndarray, other: np.ndarray) -> float:
    return abs(float(np.corrcoef(one.astype(float), other)[0, 1]))


def test_nothing_that_the_coordinator_sees_tells_a_single_delta_while_the_sum_is_there(tmp_path) -> None:
    rules = {"rounds": 3, "outer": {"name": "diloco"}}
    hidden, bare = quick(tmp_path / "hidden", rules=rules), quick(tmp_path / "bare", rules=rules)
    like = hidden.coordinator()
    base = like.rounds.base(0).tensors
    like.close()
    count = sum(tensor.numel() for tensor in base.values())
    source = torch.Generator().manual_seed(5)
    secret = {name: (4 * torch.randn(t.shape, generator=source)).round(decimals=3) for name, t in base.items()}
    rest = {name: torch.randn(t.shape, generator=source) for name, t in base.items()}
    none = {name: torch.zeros_like(t) for name, t in base.items()}
    # In one world two members learned much, in opposite directions, and in the other nothing: the sum is the same.
    hidden.given = {"north": secret, "east": {n: -t for n, t in secret.items()}, "south": rest}
    bare.given = {"north": none, "east": none, "south": rest}
    heard: list[bytes] = []
    run(hidden, {name: recorded(hidden.node(name), heard) for name in OWNERS})
    run(bare)

    limit = 5 / np.sqrt(count)
    target = flat(secret)
    # All bases, momenta and sums are the same to the last bit; and of them none tells what differs.
    for folder in ("bases", "momenta", "sums"):
        kept = [sorted((each.path / "rounds" / folder).glob("*.safetensors")) for each in (hidden, bare)]
        assert [path.name for path in kept[0]] == [path.name for path in kept[1]]
        for path in kept[0]:
            values = flat(safetensors.torch.load_file(path))
            assert not values.any() or related(values, target) < limit
    assert related(flat(load_sum(hidden.path / "rounds", 0)), flat(rest)) > 0.999
    # What it received: no message but a masked one brings tensors, and those are uniform numbers.
    known = hidden.constitution.known()
    for answer in heard:
        kinds = ("advertised", "shared", "masked", "unmasked", "verdict", "receipt")
        kind = next(kind for kind in kinds if has(answer, kind, known))
        message = unseal(answer, kind=kind, known=known, limit=10**9)
        assert bytes_of(message.tensors) == (8 * count if kind == "masked" else 0)
    stripped = [row for number in range(3) for row in without_own_masks(hidden, number).values()]
    seen = [*rows(hidden).values(), *stripped]
    assert len(seen) == 18
    for row in seen:
        assert related(row, target) < limit
        assert related(row.view("<i8"), target) < limit
    for each in (list(rows(hidden).values()), stripped):
        counts = np.bincount(np.concatenate(each).view(np.uint8), minlength=256)
        assert chisquare(counts).pvalue > 1e-6
    # The same measures find a delta that is not masked.
    open_row = np.rint(target / STEP).astype("<i8")
    assert related(open_row, target) > 0.999
    assert chisquare(np.bincount(open_row.view(np.uint8), minlength=256)).pvalue < 1e-6


def has(answer: bytes, kind: str, known: Mapping[str, str]) -> bool:
    try:
        unseal(answer, kind=kind, known=known, limit=10**9)
    except DataError:
        return False
    return True


def test_a_sum_that_makes_the_base_worse_leaves_it_as_it_is_and_is_written_down(tmp_path) -> None:
    consortium = quick(tmp_path, rules={"quality": {"max_worse": 0.05}})
    first = {}
    consortium.loss = lambda base: 1.0 if not first or base.fingerprint == first["known"] else 2.0
    coordinator = consortium.coordinator()
    first["known"] = coordinator.rounds.base(0).fingerprint
    last = coordinator.run()
    coordinator.close()
    assert last.fingerprint == first["known"]
    (facts,) = said(consortium, "round")
    assert facts["weights"] == {}
    assert facts["left_out"] == sorted(OWNERS)
    (refusal,) = said(consortium, "refusal")
    assert (refusal["owner"], "grow by 100.0%" in refusal["reason"]) == ("the sum of all", True)
    assert recompute(tmp_path / "rounds", consortium.constitution, into=tmp_path / "again")[1] == first["known"]


def test_what_private_data_taught_is_refused_before_it_is_masked(tmp_path) -> None:
    consortium = quick(tmp_path, classes={"east": "private"})
    near(run(consortium), mean_of(consortium, ("north", "south")))
    (refusal,) = said(consortium, "refusal")
    assert "private data" in refusal["reason"]
    assert {facts["owner"] for facts in said(consortium, "contribution")} == {"north", "south"}


def test_a_wrong_share_is_found_and_the_sum_is_opened_by_the_others(tmp_path) -> None:
    consortium = quick(tmp_path)
    node = consortium.node("east")

    def lies(message: bytes) -> bytes:
        answer = node.handle(message)
        if what_of(consortium, message) != "unmask":
            return answer
        told = unseal(answer, kind="unmasked", known=consortium.constitution.known(), limit=10**9)
        seeds = {owner: f"{(int(share, 16) + 1) % PRIME:x}" for owner, share in told.body["seeds"].items()}
        return seal("unmasked", {**told.body, "seeds": seeds}, {}, key=consortium.keys["east"])

    near(run(consortium, {"east": lies}), mean_of(consortium))
    (facts,) = said(consortium, "sum")
    assert set(facts["unmask"]) == {"north", "south"}


def lying(consortium: Consortium, phase: str, change: Callable[[dict[str, Any]], Any]) -> Handler:
    """Return the node of east, which changes its answers in a phase before it signs them."""
    node, kinds = consortium.node("east"), {"advertise": "advertised", "share": "shared", "mask": "masked"}

    def lies(message: bytes) -> bytes:
        answer = node.handle(message)
        if what_of(consortium, message) != phase or b'"refusal"' in answer[:200]:
            return answer
        told = unseal(answer, kind=kinds[phase], known=consortium.constitution.known(), limit=10**9)
        body = dict(told.body)
        change(body)
        return seal(told.kind, body, told.tensors, key=consortium.keys["east"])

    return lies


@pytest.mark.parametrize("shares", [{"north", "south"}, {"north"}])
def test_a_member_whose_shares_nobody_can_use_is_left_out_of_the_next_sums(tmp_path, shares) -> None:
    consortium = quick(tmp_path, rules={"rounds": 3})

    def change(body: dict[str, Any]) -> None:
        body["shares"] = {owner: "00" * 150 if owner in shares else text for owner, text in body["shares"].items()}

    run(consortium, {"east": lying(consortium, "share", change)})
    first, second, third = (set(facts["weights"]) for facts in said(consortium, "sum"))
    assert first == ({"north", "south"} if len(shares) == 2 else {"east", "south"})
    assert second == {"north", "south"}  # east is suspended
    assert third in ({"north", "south"}, {"east", "south"})  # and tried again
    assert any(facts.get("said_by") == "north" and facts["owner"] == "east" for facts in said(consortium, "refusal"))
    assert verify_ledger(consortium.path / "rounds" / "ledger.jsonl", consortium.constitution).broken is None


def test_a_member_with_a_wrong_commitment_costs_one_sum_and_is_suspended(tmp_path) -> None:
    consortium = quick(tmp_path, rules={"rounds": 2})
    found = run(consortium, {"east": lying(consortium, "share", lambda body: body.update(commitment="0" * 64))})
    (facts,) = said(consortium, "sum")
    assert set(facts["weights"]) == {"north", "south"}
    near(found, mean_of(consortium, ("north", "south"), 1))
    assert {facts["owner"] for facts in said(consortium, "refusal") if facts.get("broken")} == {"east"}


def test_a_member_that_accuses_several_others_is_suspended_itself(tmp_path) -> None:
    path = tmp_path / "ledger.jsonl"

    def complaint(by: str, owner: str) -> dict[str, Any]:
        return {"owner": owner, "reason": "mask", "said_by": by}

    class Told(Records):
        def __init__(self, told: list[tuple[int, dict[str, Any]]]) -> None:
            super().__init__(path)
            self._told = told

        def entries(self, kind: str | None = None) -> Any:
            return [SimpleNamespace(body={"round": number, "facts": facts}) for number, facts in self._told]

    told = [(0, complaint("east", "north"))]
    assert suspended(Told(told), 0) == suspended(Told(told), 1) == {"north"}
    assert suspended(Told(told), 2) == set()
    told.append((1, complaint("east", "south")))
    assert suspended(Told(told), 2) == {"east"}
    told += [(2, complaint("south", "east")), (5, {"owner": "east", "reason": "", "broken": True})]
    assert suspended(Told(told), 9) == {"east"}
    assert suspended(Told(told), 10) == set()


@pytest.mark.parametrize(
    ("phase", "change"),
    [
        ("advertise", {"keys": None}),
        ("advertise", {"round": 3}),
        ("share", {"shares": {"north": "00"}}),
        ("share", {"commitment": 7}),
        ("mask", {"weight": 5.0}),
        ("mask", {"spent": None}),
        ("mask", "tensors"),
        ("unmask", {"seeds": []}),
    ],
)
def test_an_answer_that_is_not_as_expected_is_refused_and_gone_without(tmp_path, phase, change) -> None:
    consortium = quick(tmp_path)
    node = consortium.node("east")

    def wrong(message: bytes) -> bytes:
        answer = node.handle(message)
        if what_of(consortium, message) != phase:
            return answer
        kinds = {"advertise": "advertised", "share": "shared", "mask": "masked", "unmask": "unmasked"}
        told = unseal(answer, kind=kinds[phase], known=consortium.constitution.known(), limit=10**9)
        tensors = {"masked": torch.zeros(3, dtype=torch.int64)} if change == "tensors" else told.tensors
        body = told.body if change == "tensors" else {**told.body, **change}
        return seal(told.kind, body, tensors, key=consortium.keys["east"])

    found = run(consortium, {"east": wrong})
    near(found, mean_of(consortium, OWNERS if phase == "unmask" else ("north", "south")))
    assert {facts["owner"] for facts in said(consortium, "refusal")} == {"east"}


@pytest.mark.parametrize(("weighting", "power"), [("frames", 1.0), ("sqrt-frames", 0.5)])
def test_frames_weigh_and_the_cap_holds_even_for_those_who_last(tmp_path, weighting, power) -> None:
    frames = {"north": 400, "east": 100, "south": 100}
    consortium = quick(tmp_path, frames=frames, rules={"weighting": weighting, "cap": 0.6})
    found = run(consortium, {"south": gone_at(consortium, "south", "mask")})
    (facts,) = said(consortium, "round")
    weights = facts["weights"]
    assert set(weights) == {"north", "east"}
    assert weights["north"] == pytest.approx(min(0.6, 4**power / (4**power + 1)))
    base = RoundStore(tmp_path / "rounds").base(0).tensors
    for key, tensor in base.items():
        moved = sum(weight * drawn(name, 0, base)[key] for name, weight in weights.items())
        torch.testing.assert_close(found.tensors[key], tensor + moved, rtol=0, atol=4 * STEP)


@given(
    weights=st.lists(st.floats(1e-3, 1e6), min_size=2, max_size=7),
    least=st.integers(2, 7),
    spare=st.floats(0, 1),
    data=st.data(),
)
def test_lasting_weights_keep_the_cap_whoever_lasts_and_change_no_more_than_they_must(
    weights: list[float], least: int, spare: float, data: st.DataObject
) -> None:
    least = min(least, len(weights))
    cap = 1 / least + spare * (1 - 1 / least)
    given_weights = {f"m{index}": weight for index, weight in enumerate(weights)}
    found = lasting(given_weights, cap, least)
    there = data.draw(st.permutations(sorted(found)))[: data.draw(st.integers(least, len(found)))]
    total = sum(found[owner] for owner in there)
    assert max(found[owner] / total for owner in there) <= cap + 1e-9
    order = sorted(given_weights, key=lambda owner: given_weights[owner])
    assert max(found.values()) == 1
    assert all(found[one] <= found[other] for one, other in itertools.pairwise(order))
    # Those below the level stand to each other as they were given.
    below = [owner for owner in order if found[owner] < 1]
    for one, other in itertools.pairwise(below):
        assert found[one] / found[other] == pytest.approx(given_weights[one] / given_weights[other])
    # And weights that keep the cap for all who may last are not changed.
    rest = sorted(weights)[: least - 1]
    if max(weights) <= cap * (max(weights) + sum(rest)) * (1 - 1e-9):
        assert found == pytest.approx({owner: weight / max(weights) for owner, weight in given_weights.items()})


def test_lasting_weights_of_too_few_or_of_nothing_are_refused() -> None:
    for wrong in ({"a": 1.0}, {"a": 1.0, "b": 0.0}):
        with pytest.raises(ConfigError, match="at least 2 weights, all above 0"):
            lasting(wrong, 0.6, 2)


def test_each_member_adds_its_share_of_the_noise_and_pays_for_that_of_the_sum_once_a_round(tmp_path) -> None:
    privacy = {"clip": 0.5, "noise": 4.0, "delta": 1e-5}
    consortium = quick(tmp_path, rules={"privacy": privacy, "quality": {"max_worse": 1e6}})
    # The first two sessions fail after masking: no sum of them is ever opened, and one payment covers all three.
    away = {name: gone_at(consortium, name, "mask", times=2) for name in ("north", "south")}
    run(consortium, away)
    once = gaussian_epsilon(4.0, 1e-5)
    facts = said(consortium, "contribution")[-3:]
    assert [each["attempt"] for each in facts] == [2, 2, 2]
    for each in facts:
        assert each["spent"]["epsilon"] == pytest.approx(once)
        assert each["spent"]["share"] == 0.5
        assert each["spent"]["in_sum"] == pytest.approx(4.0)
    noise = flat(load_sum(tmp_path / "rounds", 0))
    # Three members with half of the variance each; their deltas of norm 0.5 are nothing beside it.
    assert noise.std() == pytest.approx(4.0 * 0.5 * np.sqrt(1.5), rel=0.15)


def test_a_member_pays_more_where_its_weight_outgrows_the_noise_of_the_others(tmp_path) -> None:
    privacy = {"clip": 0.5, "noise": 4.0, "delta": 1e-5}
    frames = {"north": 300, "east": 100, "south": 100}
    rules = {"privacy": privacy, "quality": {"max_worse": 1e6}, "weighting": "frames", "cap": 0.75}
    consortium = quick(tmp_path, frames=frames, rules=rules)
    run(consortium)
    spent = {facts["owner"]: facts["spent"] for facts in said(consortium, "contribution")}
    # Of north and one other with a third of its weight: sqrt((1 + 1/9) / 2) of the noise.
    assert spent["north"]["in_sum"] == pytest.approx(4.0 * np.sqrt((1 + 1 / 9) / 2))
    assert spent["east"]["in_sum"] == pytest.approx(4.0)
    assert spent["north"]["epsilon"] > spent["east"]["epsilon"]


def test_a_spent_budget_ends_the_rounds_before_anything_leaves(tmp_path) -> None:
    once = gaussian_epsilon(4.0, 1e-5)
    privacy = {"clip": 0.5, "noise": 4.0, "delta": 1e-5, "epsilon_budget": 1.2 * once}
    consortium = quick(tmp_path, rules={"rounds": 2, "privacy": privacy, "quality": {"max_worse": 1e6}})
    with pytest.raises(TrainingError, match="round 1 has no sum"):
        run(consortium)
    assert len(said(consortium, "contribution")) == 3
    assert all("budget" in facts["reason"] for facts in said(consortium, "refusal"))


def test_a_sum_that_was_opened_and_lost_holds_up_no_round(tmp_path) -> None:
    consortium = quick(tmp_path, rules={"rounds": 2})
    coordinator = consortium.coordinator({"south": gone_at(consortium, "south", "advertise", "share", "mask")})
    coordinator._sums.gather(0, coordinator.rounds.base(0))
    coordinator.close()
    # What the coordinator wrote since it asked is lost with its disk; and now south is back.
    lines = Records(tmp_path / "rounds" / "ledger.jsonl").lines()
    shutil.rmtree(tmp_path / "rounds" / "sessions")
    shutil.rmtree(tmp_path / "rounds" / "sums")
    (tmp_path / "rounds" / "ledger.jsonl").write_text("".join(f"{line}\n" for line in lines[:3]))
    last = run(consortium)
    refusals = [facts["reason"] for facts in said(consortium, "refusal") if facts["owner"] == THE_SUM]
    assert refusals == [
        "east, north helped to unmask a sum that is lost, and cannot help with a second one. The base does not change"
    ]
    records = Records(tmp_path / "rounds" / "ledger.jsonl")
    assert records.bases()[0]["fingerprint"] == records.bases()[1]["fingerprint"] != last.fingerprint
    assert verify_ledger(tmp_path / "rounds" / "ledger.jsonl", consortium.constitution).broken is None


def test_a_damaged_stored_answer_is_named_and_not_sent(tmp_path: Path) -> None:
    consortium = quick(tmp_path)
    north = consortium.node("north")

    def asked_twice(message: bytes) -> bytes:
        answer = north.handle(message)
        if what_of(consortium, message) == "share":
            (tmp_path / "north" / "secure" / "shared.msg").write_bytes(answer[:-1] + bytes([answer[-1] ^ 1]))
            return north.handle(message)
        return answer

    run(consortium, {"north": asked_twice})
    (refusal,) = said(consortium, "refusal")
    assert "the stored answer of north to the request to share is damaged" in refusal["reason"]


def test_a_damaged_answer_in_the_coordinators_folder_is_asked_for_again(tmp_path: Path, caplog) -> None:
    consortium = quick(tmp_path)
    handlers = {name: consortium.node(name).handle for name in OWNERS}
    coordinator = consortium.coordinator({**handlers, "south": gone_at(consortium, "south", "unmask")})
    coordinator._sums._ledger.append = dies_at("sum", coordinator._sums._ledger.append)
    run_until_killed(coordinator)
    (stored,) = (tmp_path / "rounds" / "sessions").glob("*/unmask/north.msg")
    stored.write_bytes(stored.read_bytes()[:-1])
    run(consortium, handlers)
    assert f"{stored} is damaged" in caplog.text
    assert said(consortium, "sum")


def dies_at(kind: str, append: Callable[..., Any]) -> Callable[..., Any]:
    def dies(what: str, *arguments: Any, **options: Any) -> Any:
        if what == kind:
            raise KeyboardInterrupt
        return append(what, *arguments, **options)

    return dies
