"""A coordinator that forges, drops, or shows two ledgers is found out by the members, with evidence."""

import base64
import functools
import json
import shutil
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from consortium import MODEL, OWNERS, Quick, points
from hypothesis import given
from hypothesis import strategies as st

from forging import rewritten
from worldloom.core.chain import Entry
from worldloom.core.errors import DataError, StorageError, TrainingError
from worldloom.core.files import read_document, read_json
from worldloom.federation import (
    Base,
    Coordinator,
    InProcess,
    Ledger,
    LedgerForked,
    LedgerReader,
    LedgerRefused,
    Node,
    compare_heads,
    initial_base,
    read_ledger,
    recompute,
    verify_ledger,
)
from worldloom.federation.record.envelope import SignedMessage, read_statement, seal, unseal, unseal_answer
from worldloom.federation.record.statements import SignedContribution
from worldloom.federation.rounds.release import unmet

FEDAVG = {"rounds": 2, "outer": {"name": "fedavg"}}


def consortium(path: Path, keys: Path | None = None, **rules: Any) -> Quick:
    if keys is not None:
        shutil.copytree(keys / "keys", path / "keys")
    return Quick(path, rules={**FEDAVG, **rules})


def coordinator(
    who: Quick, nodes: Mapping[str, Node], rounds: str = "rounds", kind: type[Coordinator] = Coordinator
) -> Coordinator:
    return kind(
        who.path / rounds,
        who.constitution,
        key=who.keys["coordinator"],
        transport=InProcess({name: node.handle for name, node in nodes.items()}),
        initial=initial_base(MODEL, points().spec, who.partition, seed=0),
    )


def evidence(node: Node) -> list[dict[str, Any]]:
    paths = sorted(node.store.path.glob("evidence-*.json"))
    return [read_document(path, "worldloom evidence against a coordinator") for path in paths]


def test_a_coordinator_does_not_start_from_a_ledger_that_was_rewritten_without_a_key(tmp_path) -> None:
    who = consortium(tmp_path)
    nodes = {name: who.node(name) for name in OWNERS}
    with closing(coordinator(who, nodes)) as first:
        first.run_round(0)
    rewritten(tmp_path / "rounds" / "ledger.jsonl")
    with pytest.raises(DataError, match="entry 0 is not what coordinator signed"):
        coordinator(who, nodes)
    with pytest.raises(DataError, match="entry 0 is not what coordinator signed"):
        recompute(tmp_path / "rounds", who.constitution, into=tmp_path / "again")


def gathered(lying: Coordinator, number: int, base: Base) -> dict[str, int]:
    """Gather the contributions of the nodes that a coordinator reaches, without a quorum."""
    asked = {"what": "train", "round": number}
    answers = lying._members.exchange(lying._members.nodes(), asked, base, kind="contribution")
    lying._members.collect(answers, number, lambda message: lying._accept(number, base, message))
    return {facts["owner"]: facts["frames"] for facts in lying.ledger.of("contribution", number)}


def chosen(lying: Coordinator, owners: tuple[str, ...], number: int, base: Base) -> dict[str, int]:
    """Use these owners' contributions to the first round, and gather those to later rounds."""
    return gathered(lying, number, base) if number else dict.fromkeys(owners, 100)


class Forges(Coordinator):
    """Hears only the nodes of its transport, and writes what it likes for the other members."""

    def _gather(self, number: int, base: Base) -> dict[str, int]:
        frames = gathered(self, number, base)
        for other in sorted(set(OWNERS) - set(frames)):
            path = self.rounds.delta(number, other)
            path.parent.mkdir(parents=True, exist_ok=True)
            safetensors.torch.save_file({name: torch.ones_like(one) for name, one in base.tensors.items()}, path)
            self.ledger.append("contribution", self.forged(number, other, base), round=number)
            frames[other] = 100
        return frames

    def forged(self, number: int, other: str, base: Base) -> dict[str, Any]:
        facts = {"owner": other, "steps": 12, "frames": 100, "data_class": "open", "spent": {}}
        return {**facts, "bytes": 1000, "message": "ab" * 32}


class Borrows(Forges):
    """Writes what one member signed for another one."""

    def forged(self, number: int, other: str, base: Base) -> dict[str, Any]:
        known = next(iter(self.ledger.of("contribution", number)), super().forged(number, other, base))
        return {**known, "owner": other}


@pytest.mark.parametrize("kind", [Forges, Borrows])
def test_forged_contributions_of_members_that_hear_another_ledger_are_found(tmp_path, kind, caplog) -> None:
    who = consortium(tmp_path)
    nodes = {name: who.node(name) for name in OWNERS}
    for view in (("north",), ("east", "south")):
        with closing(coordinator(who, {name: nodes[name] for name in view}, f"rounds-{view[0]}", kind)) as lying:
            lying.run()
        assert verify_ledger(tmp_path / f"rounds-{view[0]}" / "ledger.jsonl", who.constitution).broken is not None
    initial = initial_base(MODEL, points().spec, who.partition, seed=0)
    for name, node in nodes.items():
        assert node.store.base()[1].fingerprint == initial.fingerprint  # nobody took a base that was forged
        assert isinstance(node.fault, LedgerRefused)
        (found,) = evidence(node)
        assert json.loads(found["received"])["body"]["kind"] == "contribution"
        assert found["countersigned"]["length"] == 2
        assert any(f"{name} does not accept the ledger. The evidence is" in one.message for one in caplog.records)
    assert "is not a contribution that a member signed" in str(nodes["north"].fault)


def test_a_base_does_not_change_with_fewer_contributions_than_the_quorum(tmp_path) -> None:
    who = consortium(tmp_path)
    south = who.node("south")

    with closing(coordinator(who, {"south": south})) as lying:
        lying._gather = lambda number, base: gathered(lying, number, base)
        lying.run_round(0)
        assert not lying._members.ask("store", 1, lying.rounds.base(1), kind="receipt")
    assert "is a round of only 1 members; the constitution requires 2" in str(south.fault)
    assert south.store.base()[0] == 0


def test_a_contribution_that_a_member_signed_for_another_ledger_proves_that_there_are_two(tmp_path) -> None:
    who = consortium(tmp_path)
    nodes = {name: who.node(name) for name in OWNERS}
    with closing(coordinator(who, {name: nodes[name] for name in ("north", "east")})) as first:
        first.run_round(0)
        (relayed,) = [dict(one) for one in first.ledger.of("contribution", 0) if one["owner"] == "north"]

    with closing(coordinator(who, {"south": nodes["south"]}, "other")) as second:
        gathered(second, 0, second.rounds.base(0))
        second.ledger.append("contribution", relayed, round=0)
        assert not second._judged(0, second.rounds.base(0))
    south = nodes["south"]
    assert isinstance(south.fault, LedgerForked)
    assert "that north signed for a different ledger: north saw 2 entries" in str(south.fault)
    (found,) = evidence(south)
    assert json.loads(found["received"])["body"]["facts"] == relayed
    # Out of band: each compares the heads that the others signed with its own ledger.
    heads = {name: read_json(node.store.path / "countersigned.json") for name, node in nodes.items()}
    own = read_ledger(nodes["north"].store.ledger, who.constitution)
    told = {name: result for name, _, result in compare_heads(own, list(heads.values()))}
    assert told == {"north": "same", "east": "same", "south": "different"}


def test_two_ledgers_that_differ_in_one_round_do_not_both_continue(tmp_path) -> None:
    who = consortium(tmp_path, rounds=3)
    nodes = {name: who.node(name) for name in OWNERS}
    with closing(coordinator(who, nodes)) as first:
        gathered(first, 0, first.rounds.base(0))
        shutil.copytree(first.rounds.path, tmp_path / "other")
        begin = [entry for entry in first.ledger.entries() if entry.body["kind"] != "contribution"]
        signed = {one["owner"]: one for one in first.ledger.of("contribution", 0)}
    views = {}
    for rounds, owners in (("one", ("north", "east")), ("two", ("south", "east"))):
        shutil.copytree(tmp_path / "other", tmp_path / rounds)
        path = tmp_path / rounds / "ledger.jsonl"
        path.write_text("".join(f"{entry.line()}\n" for entry in begin))
        reached = {owner: nodes[owner] for owner in owners if owner not in views}
        views[owners[-1]] = who
        with closing(coordinator(who, reached, rounds)) as lying:
            for owner in owners:
                lying.ledger.append("contribution", signed[owner], round=0)
            lying._gather = functools.partial(chosen, lying, owners)
            lying.run_round(0)
            if rounds == "one":
                lying.run_round(1)
                again = [dict(one) for one in lying.ledger.of("contribution", 1)]
            else:
                for one in again:
                    lying.ledger.append("contribution", one, round=1)
                assert not lying._judged(1, lying.rounds.base(1))
    assert [nodes[name].fault for name in ("north", "east")] == [None, None]
    assert isinstance(nodes["south"].fault, LedgerForked)


def test_a_node_keeps_its_head_across_a_restart_and_stops_with_evidence(tmp_path) -> None:
    who = consortium(tmp_path)
    with closing(coordinator(who, {name: who.node(name) for name in OWNERS})) as first:
        first.run_round(0)
        true = first.ledger.lines()
    with closing(coordinator(who, {}, "other")) as second:
        base, other = second.rounds.base(0), second.ledger.lines()
    body = {"what": "train", "round": 0, "constitution": who.constitution.fingerprint, "base": base.fingerprint}
    asked = seal("ask", {**body, "ledger": {"begin": 0, "lines": other}}, base.tensors, key=who.keys["coordinator"])
    south = who.node("south")  # after a restart
    answer = unseal(south.handle(asked), kind="refusal", known=who.constitution.known(), limit=10**7)
    assert "entry 0 was rewritten" in answer.body["why"]
    assert str(tmp_path) not in answer.body["why"]
    (found,) = evidence(south)
    assert (found["received"], found["held"]) == (other[0] + "\n", true[0] + "\n")
    assert isinstance(south.fault, LedgerForked)
    assert south.store.read().decode().splitlines() == true[: south.store.records.head.length]


@pytest.mark.parametrize("secure", [False, True])
def test_a_contribution_that_was_dropped_is_reported_by_its_node(tmp_path, secure, caplog) -> None:
    rules = {"aggregation": {"name": "mean"}, "secure_aggregation": True} if secure else {}
    who = consortium(tmp_path, **rules)
    nodes = {name: who.node(name) for name in OWNERS}
    with closing(coordinator(who, nodes)) as drops:
        part = drops._sums if secure else drops
        accept = part._accept

        def without_east(*arguments: Any) -> None:
            message = next(one for one in arguments if isinstance(one, SignedMessage))
            if message.sender != "east" or message.kind == "advertised":
                accept(*arguments)

        part._accept = without_east
        if secure:
            drops._members.collect = quiet(drops._members.collect)
        drops.run()
    assert not drops.ledger.of("refusal", 0)
    said = [one.message for one in caplog.records if "neither the contribution of east" in one.message]
    assert [f"round {number}" in line for number, line in enumerate(said)] == [True, True]
    assert len(evidence(nodes["east"])) == 2
    assert not evidence(nodes["north"])


def quiet(collect: Any) -> Any:
    """Let a coordinator forget whom it left out."""

    def forgets(answers: Any, number: int, accept: Any, **options: Any) -> Any:
        return collect([one for one in answers if isinstance(one[1], SignedMessage)], number, accept, **options)

    return forgets


def test_a_contribution_that_was_refused_with_its_cause_is_told_and_nobody_is_accused(tmp_path, caplog) -> None:
    who = consortium(tmp_path)
    nodes = {name: who.node(name) for name in OWNERS}
    with closing(coordinator(who, nodes)) as late:
        accept = late._accept

        def refuses(number: int, base: Base, message: SignedMessage) -> None:
            if message.sender == "east" and number == 0:
                raise DataError("it came too late")
            accept(number, base, message)

        late._accept = refuses
        late.run()
    said = [one.message for one in caplog.records if "does not count" in one.message]
    assert said == ["round 0: the contribution of east does not count: it came too late"]
    assert not any(evidence(node) for node in nodes.values())


def test_a_loss_that_a_member_did_not_send_is_reported_by_its_node(tmp_path) -> None:
    who = consortium(tmp_path)
    nodes = {name: who.node(name) for name in OWNERS}
    with closing(coordinator(who, nodes)) as lying:
        judged = lying._judged
        lying._judged = lambda number, base: {**judged(number, base), "south": 0.5}
        lying.run()
    assert ["a held-out loss of south" in found["why"] for found in evidence(nodes["south"])] == [True, True]
    assert not evidence(nodes["north"])


class Invents(Coordinator):
    """Writes an evaluation that its members' answers do not give."""

    def changed(self, evaluation: dict[str, Any]) -> dict[str, Any]:
        return {**evaluation, "owners": {name: [1.0, 0.01] for name in OWNERS}, "after": 0.01}

    def _publish(self, *arguments: Any, **options: Any) -> None:
        append = self.ledger.append

        def invents(kind: str, facts: Mapping[str, Any], **more: Any) -> Any:
            if kind == "round":
                facts = {**facts, "evaluation": self.changed(dict(facts["evaluation"]))}
            return append(kind, facts, **more)

        self.ledger.append = invents
        try:
            super()._publish(*arguments, **options)
        finally:
            self.ledger.append = append


class Splits(Invents):
    """Sends the record of a round before the base that follows it."""

    def _publish_base(self, number: int, base: Base, result: Any) -> None:
        asked = {"what": "judge", "round": number}
        assert len(list(self._members.exchange(OWNERS, asked, base, kind="verdict"))) == 3
        super()._publish_base(number, base, result)


@pytest.mark.parametrize("kind", [Invents, Splits])
def test_invented_losses_are_reported_after_a_restart_and_if_the_base_comes_later(tmp_path, kind) -> None:
    who = consortium(tmp_path)
    nodes = {name: who.node(name) for name in OWNERS}
    with closing(coordinator(who, nodes, kind=kind)) as lying:
        lying.run_round(0)
    nodes = {name: who.node(name) for name in OWNERS}
    with closing(coordinator(who, nodes, kind=kind)) as lying:
        lying.run_round(1)
    for name, node in nodes.items():
        assert [f"a held-out loss of {name}" in found["why"] for found in evidence(node)] == [True]


def test_a_loss_of_a_member_that_was_not_asked_is_reported(tmp_path) -> None:
    who = consortium(tmp_path)
    nodes = {name: who.node(name) for name in OWNERS}
    with closing(coordinator(who, nodes)) as lying:
        ask = lying._members.ask

        def without_east(what: str, *arguments: Any, **options: Any) -> Any:
            lying._members.nodes = lambda: ["north", "south"] if what == "judge" else list(OWNERS)
            try:
                return ask(what, *arguments, **options)
            finally:
                del lying._members.nodes

        lying._members.ask = without_east
        judged = lying._judged
        lying._judged = lambda number, base: {**judged(number, base), "east": 1.0}
        lying.run()
    assert ["a held-out loss of east" in found["why"] for found in evidence(nodes["east"])] == [True, True]
    assert not evidence(nodes["north"])


@pytest.mark.parametrize(
    "changed",
    [
        {"after": 0.001}, {"before": 0.9}, {"after": True}, {"owners": {"north": [1.0, None]}},
        {"owners": {"stranger": [1.0, 1.0]}}, {"owners": {"north": [True, 1.0]}}, {"owners": {}},
        {"owners": {"north": [-1.0, -1.0]}, "before": -1.0, "after": -1.0},
    ],
)  # fmt: skip
def test_an_evaluation_has_the_medians_of_its_members(tmp_path, changed) -> None:
    who = consortium(tmp_path)
    nodes = {name: who.node(name) for name in OWNERS}

    class Lies(Invents):
        def changed(self, evaluation: dict[str, Any]) -> dict[str, Any]:
            return {**evaluation, **changed}

    with closing(coordinator(who, nodes, kind=Lies)) as lying:
        lying.run_round(0)
        lying._members.ask("store", 1, lying.rounds.base(1), kind="receipt")
    assert all("whose 'evaluation' is not the losses of its members" in str(node.fault) for node in nodes.values())


def test_a_contribution_is_not_left_out_without_a_recorded_reason(tmp_path) -> None:
    who = consortium(tmp_path)
    nodes = {name: who.node(name) for name in OWNERS}
    with closing(coordinator(who, nodes)) as lying:
        trial, publish = lying._trial, lying._publish
        lying._trial = lambda number, base, group: trial(number, base, {one: group[one] for one in ("north", "south")})
        lying._publish = lambda *arguments, **options: publish(*arguments, **{**options, "left_out": ["east"]})
        lying.run_round(0)
        lying._members.ask("store", 1, lying.rounds.base(1), kind="receipt")
    assert "leaves out east without a recorded reason" in str(nodes["east"].fault)


def away_and_back(who: Quick, nodes: Mapping[str, Node]) -> dict[str, Any]:
    """Run three rounds in which east leaves and returns; return the facts of its exit."""
    with closing(coordinator(who, nodes)) as true:
        true.run_round(0)
        nodes["east"].leave("holiday")
        true.run_round(1)
        nodes["east"].come_back()
        true.run_round(2)
        told = [entry.body["kind"] for entry in true.ledger.entries() if entry.body["facts"].get("owner") == "east"]
        assert told == ["contribution", "exit", "contribution", "return"]
        return dict(next(true.ledger.entries("exit")).body["facts"])


@pytest.mark.parametrize("number", [1, 3])
def test_an_exit_is_not_repeated_later(tmp_path, number) -> None:
    who = consortium(tmp_path, rounds=4)
    nodes = {name: who.node(name) for name in OWNERS}
    left = away_and_back(who, nodes)
    assert not any(evidence(node) for node in nodes.values())
    with closing(coordinator(who, nodes)) as lying:
        lying.ledger.append("exit", left, round=number)
        assert not lying._judged(3, lying.rounds.base(3))
    assert all("exit" in str(node.fault) for node in nodes.values())


def test_an_exit_that_was_held_back_is_reported_by_its_node(tmp_path) -> None:
    """Other readers cannot know that the member returned."""
    who = consortium(tmp_path)
    nodes = {name: who.node(name) for name in OWNERS}
    with closing(coordinator(who, nodes)) as lying:
        base = lying.rounds.base(0)
        nodes["east"].leave("holiday")
        append, held = lying.ledger.append, []
        lying.ledger.append = lambda kind, facts, **more: (
            held.append(facts) if kind == "exit" else append(kind, facts, **more)
        )
        with pytest.raises(AttributeError):  # the exit has no entry
            lying._judged(0, base)
        lying.ledger.append = append
        lying._members._left = {}
        nodes["east"].come_back()
        assert set(lying._judged(0, base)) == set(OWNERS)
        lying.ledger.append("exit", held[0], round=0)
        lying._judged(0, base)
    assert verify_ledger(tmp_path / "rounds" / "ledger.jsonl", who.constitution).broken is None
    assert ["says that east left, which east did not" in found["why"] for found in evidence(nodes["east"])] == [True]


def test_a_member_that_left_returns_only_by_a_contribution_after_its_exit(tmp_path) -> None:
    who = consortium(tmp_path)
    nodes = {name: who.node(name) for name in OWNERS}
    with closing(coordinator(who, nodes)) as lying:
        base = lying.rounds.base(0)
        lying._gather(0, base)
        (old,) = [dict(one) for one in lying.ledger.of("contribution", 0) if one["owner"] == "east"]
        nodes["east"].leave("holiday")
        lying._judged(0, base)
        true = list(lying.ledger.entries())
        for kind, facts, why in (
            ("return", {"owner": "east"}, "return of east, which did not sign a contribution after an exit"),
            ("return", {"owner": "north"}, "return of north, which did not sign"),
            ("return", {"owner": "nobody\x1b[2J"}, r"return of nobody\x1b[2J, which"),
            ("contribution", old, "is a second contribution of east"),
            ("exit", dict(next(lying.ledger.entries("exit")).body["facts"]), "repeats an earlier exit of east"),
        ):
            assert why in reader(who, true).fit_fault({"kind": kind, "round": 0, "facts": facts})


def test_a_member_that_leaves_twice_in_a_round_for_the_same_reason_stops_nobody(tmp_path) -> None:
    who = consortium(tmp_path)
    nodes = {name: who.node(name) for name in OWNERS}
    with closing(coordinator(who, nodes)) as true:
        nodes["east"].leave()
        assert set(true._judged(0, true.rounds.base(0))) == {"north", "south"}
        nodes["east"].come_back()
        assert set(true._gather(0, true.rounds.base(0))) == set(OWNERS)
        nodes["east"].leave()
        true.run()
    assert verify_ledger(tmp_path / "rounds" / "ledger.jsonl", who.constitution).broken is None
    assert not any(evidence(node) for node in nodes.values())


@pytest.mark.parametrize("kind", ["refusal", "checkpoint", "exit", "return"])
@pytest.mark.parametrize("number", [None, -5, 1, 10**4000])
def test_every_entry_belongs_to_the_round_that_runs(begun, kind, number) -> None:
    who, entries = begun
    facts = {"owner": "north", "reason": "late"}
    assert "expected round 0" in reader(who, entries).fit_fault({"kind": kind, "round": number, "facts": facts})


def test_only_coordinators_write_entries_and_only_about_members(begun) -> None:
    who, entries = begun
    facts = {"owner": "nobody", "reason": "late"}
    assert "names no member" in reader(who, entries).fit_fault({"kind": "refusal", "round": 0, "facts": facts})
    path = who.path / "by-a-member.jsonl"
    path.write_text("".join(f"{entry.line()}\n" for entry in entries))
    with Ledger(path, who.keys["north"]) as ledger:
        ledger.append("refusal", {"owner": "north", "reason": "late"}, round=0)
    assert "signed by north, which is not a coordinator" in verify_ledger(path, who.constitution).why


def test_evidence_of_unsigned_lines_leaves_room_for_that_of_two_ledgers(tmp_path, caplog) -> None:
    who = consortium(tmp_path)
    nodes = {name: who.node(name) for name in OWNERS}
    with closing(coordinator(who, nodes)) as first:
        first.run_round(0)
        base = first._published(1)
    with closing(coordinator(who, {}, "other")) as second:
        other = second.ledger.lines()
    north = nodes["north"]
    body = {"what": "judge", "round": 1, "constitution": who.constitution.fingerprint, "base": base.fingerprint}

    def receives(begin: int, lines: list[str]) -> None:
        asked = seal("ask", {**body, "ledger": {"begin": begin, "lines": lines}}, {}, key=who.keys["coordinator"])
        unseal(north.handle(asked), kind="refusal", known=who.constitution.known(), limit=10**7)

    for place in range(20):
        receives(north.store.records.head.length, [f'{{"junk":{place}}}'])
    assert len(evidence(north)) == 10
    assert "No evidence is stored, because there is enough already" in caplog.text
    receives(0, other)
    found = next(one for one in evidence(north) if one["held"] is not None)
    assert north.fault is not None
    assert north.fault.evidence is not None
    assert found["received"] == other[0] + "\n"
    # The request proves also what the coordinator sent without signing it as an entry.
    junk = next(one for one in evidence(north) if one["held"] is None)
    request = base64.b64decode(junk["request"])
    said = read_statement(request, kind="ask", known=who.constitution.known(), limit=10**7)
    assert f"{said.body['ledger']['lines'][0]}\n" == junk["received"]


def test_a_round_accounts_for_every_contribution(tmp_path) -> None:
    who = consortium(tmp_path)
    south = who.node("south")
    with closing(coordinator(who, {"south": south, "north": who.node("north"), "east": who.node("east")})) as lying:
        lying._gather(0, lying.rounds.base(0))
        facts = {"weights": {"north": 0.5, "east": 0.5}, "notes": {}, "left_out": [], "evaluation": None}
        lying.ledger.append("round", facts, round=0)
        lines = lying.ledger.lines()
    with pytest.raises(
        LedgerRefused, match="is a round of east, north; the members that signed contributions are east, north, south"
    ):
        south.store.follow(0, lines)


def test_a_contribution_is_not_replayed_into_another_consortium_with_the_same_base(tmp_path) -> None:
    first = consortium(tmp_path / "first")
    with closing(coordinator(first, {name: first.node(name) for name in OWNERS})) as true:
        true.run_round(0)
        stored = true.rounds.message(0, "east").read_bytes()
    second = consortium(tmp_path / "second", first.path, quorum=1, cap=1.0)
    with closing(coordinator(second, {"north": second.node("north")})) as other:
        base = other.rounds.base(0)
        assert base.fingerprint == true.rounds.base(0).fingerprint
        message = unseal(stored, kind="contribution", known=second.constitution.known(), limit=10**9)
        with pytest.raises(DataError, match="for a different constitution"):
            other._accept(0, base, message)
        old = {name: value for name, value in message.body.items() if name not in ("format", "constitution", "seen")}
        resigned = seal("contribution", old, message.tensors, key=second.keys["east"])
        with pytest.raises(DataError, match="the contribution of east is invalid: format: Field required"):
            unseal_answer(resigned, kind="contribution", sender="east", known=second.constitution.known(), limit=10**9)


def test_a_contribution_from_another_ledger_of_the_same_consortium_is_refused(tmp_path) -> None:
    who = consortium(tmp_path)
    with closing(coordinator(who, {"north": who.node("north"), "east": who.node("east")})) as first:
        first.run_round(0)
        stored = first.rounds.message(0, "east").read_bytes()
    with closing(coordinator(who, {}, "other")) as second:
        message = unseal(stored, kind="contribution", known=who.constitution.known(), limit=10**9)
        with pytest.raises(DataError, match="east has seen a different ledger: it has 2 entries"):
            second._accept(0, second.rounds.base(0), message)


def test_weights_that_a_coordinator_invents_are_found_when_bases_are_recomputed(tmp_path) -> None:
    who = consortium(tmp_path)
    with closing(coordinator(who, {name: who.node(name) for name in OWNERS})) as lying:
        append = lying.ledger.append

        def invents(kind: str, facts: Mapping[str, Any], **options: Any) -> Any:
            if kind == "round":
                facts = {**facts, "weights": {"north": 0.5, "east": 0.25, "south": 0.25}}
            return append(kind, facts, **options)

        lying.ledger.append = invents
        lying.run()
    with pytest.raises(DataError, match="the weights of round 0 in the ledger are not the weights"):
        recompute(tmp_path / "rounds", who.constitution, into=tmp_path / "again")


def test_recomputed_bases_do_not_replace_those_of_a_coordinator(tmp_path) -> None:
    who = consortium(tmp_path)
    with closing(coordinator(who, {name: who.node(name) for name in OWNERS})) as true:
        true.run_round(0)
    coordinator(who, {}, "other").close()
    with pytest.raises(StorageError, match="other contains the rounds of a coordinator; choose another folder"):
        recompute(tmp_path / "rounds", who.constitution, into=tmp_path / "other")
    for _ in range(2):
        recompute(tmp_path / "rounds", who.constitution, into=tmp_path / "again")
    (tmp_path / "other" / "ledger.jsonl").unlink()
    base = (tmp_path / "other" / "bases" / "00000.json").read_bytes()
    for into in ("other", "keys"):
        with pytest.raises(StorageError, match=f"{into} has other content; choose an empty folder"):
            recompute(tmp_path / "rounds", who.constitution, into=tmp_path / into)
    assert (tmp_path / "other" / "bases" / "00000.json").read_bytes() == base


def test_a_member_that_answers_after_a_kill_does_not_change_a_round_that_is_recorded(tmp_path) -> None:
    who = consortium(tmp_path)
    nodes = {name: who.node(name) for name in OWNERS}
    with closing(coordinator(who, {name: nodes[name] for name in ("north", "east")})) as killed:
        append = killed.ledger.append

        def dies(kind: str, *arguments: Any, **options: Any) -> Any:
            if kind == "base":
                raise KeyboardInterrupt
            return append(kind, *arguments, **options)

        killed.ledger.append = dies
        with pytest.raises(KeyboardInterrupt):
            killed.run_round(0)
    with closing(coordinator(who, nodes)) as again:
        again.run()
        assert {one["owner"] for one in again.ledger.of("contribution", 0)} == {"north", "east"}
    assert verify_ledger(tmp_path / "rounds" / "ledger.jsonl", who.constitution).broken is None
    recompute(tmp_path / "rounds", who.constitution, into=tmp_path / "again")


@pytest.fixture(scope="module")
def begun(tmp_path_factory) -> tuple[Quick, list[Entry]]:
    """A consortium, and the entries of a ledger up to its first contribution."""
    who = consortium(tmp_path_factory.mktemp("begun"))
    with closing(coordinator(who, {"north": who.node("north")})) as first:
        with pytest.raises(TrainingError):
            first.run()
        entries = list(first.ledger.entries())
    return who, entries[: 1 + next(one.index for one in entries if one.body["kind"] == "contribution")]


def reader(who: Quick, entries: list[Entry]) -> LedgerReader:
    found = LedgerReader("ledger", who.constitution)
    assert not any(found.add(entry) for entry in entries)
    return found


VALUES = st.recursive(
    st.none() | st.integers() | st.text(max_size=3) | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)


@given(data=st.data())
def test_no_fact_of_a_contribution_is_changed_without_the_key_of_its_member(begun, data) -> None:
    who, entries = begun
    facts = dict(entries[-1].body["facts"])
    name = data.draw(st.sampled_from(sorted(facts)))
    facts[name] = data.draw(VALUES.filter(lambda value: value != facts[name]))
    body = {"kind": "contribution", "round": 0, "facts": facts}
    assert "is not a contribution that a member signed" in reader(who, entries[:-1]).fit_fault(body)


NAMES = (
    "fingerprint", "previous", "weights", "left_out", "evaluation", "attempt", "mask", "base", "owner", "statements",
    "unmask", "advertise", "share", "word", "reason",
)  # fmt: skip
KINDS = ("base", "contribution", "round", "session", "survivors", "sum", "succession", "refusal", "exit", "return")


@given(
    st.sampled_from(KINDS), st.one_of(st.none(), st.integers(-2, 3)), st.dictionaries(st.sampled_from(NAMES), VALUES)
)
def test_whatever_a_coordinator_signs_is_judged_without_an_exception(begun, kind, number, facts) -> None:
    who, entries = begun
    assert isinstance(reader(who, entries).fit_fault({"kind": kind, "round": number, "facts": facts}), str)


@pytest.mark.parametrize(
    ("kind", "facts", "why"),
    [
        ("refusal", {"owner": "east", "reason": "x", "said_by": []}, "names an accuser that is not a member"),
        ("session", {"attempt": 10**6}, "is session 1000000 of its round; expected session 0"),
        ("session", {"attempt": False}, "is session False of its round"),
        ("session", {}, "is session"),
        ("return", {"owner": "north", "junk": 1}, "contains more than the name of its member"),
    ],
)
def test_entries_that_would_stop_a_successor_are_refused(begun, kind, facts, why) -> None:
    who, entries = begun
    assert why in reader(who, entries).fit_fault({"kind": kind, "round": 0, "facts": facts})


@pytest.mark.parametrize("weight", [0.51, -0.1, True, "0.5", None])
def test_no_weight_of_a_round_exceeds_the_cap(tmp_path, weight) -> None:
    who = consortium(tmp_path)
    with closing(coordinator(who, {name: who.node(name) for name in OWNERS})) as first:
        first._gather(0, first.rounds.base(0))
        entries = list(first.ledger.entries())
    weights = {"north": weight, "east": 0.25, "south": 0.25}
    body = {"kind": "round", "round": 0, "facts": {"weights": weights, "left_out": [], "evaluation": None}}
    assert "a weight that is not a number from 0 to the cap, 0.5" in reader(who, entries).fit_fault(body)
    body["facts"]["weights"] = {**weights, "north": 0.5}
    assert not reader(who, entries).fit_fault(body)


def test_data_of_a_class_that_may_not_shape_the_base_is_found_by_every_reader(tmp_path) -> None:
    who = Quick(tmp_path, rules=FEDAVG, classes={"east": "private"})
    nodes = {name: who.node(name) for name in OWNERS}
    with closing(coordinator(who, nodes)) as lax:
        base = lax.rounds.base(0)
        asked = {"what": "train", "round": 0}
        ((_, message),) = lax._members.exchange(["east"], asked, base, kind="contribution")
        assert isinstance(message, SignedMessage)
        lax.ledger.append(
            "contribution", SignedContribution.of([message.statement], 0, who.constitution).facts, round=0
        )
    why = verify_ledger(tmp_path / "rounds" / "ledger.jsonl", who.constitution).why
    assert why == "is a contribution of east from private data, which may not train the base"


def test_a_loss_that_the_ledger_lacks_is_logged_and_does_not_pass_a_release(tmp_path, caplog) -> None:
    who = consortium(tmp_path, release={"max_loss": 2.0})
    nodes = {name: who.node(name) for name in OWNERS}

    class Chooses(Invents):
        def changed(self, evaluation: dict[str, Any]) -> dict[str, Any]:
            return {"before": 1.0, "after": 1.0, "owners": {"north": [1.0, 1.0]}}

    with closing(coordinator(who, nodes, kind=Chooses)) as lying:
        lying.run()
    said = [one.message for one in caplog.records if "lacks a held-out loss that east sent" in one.message]
    assert [line.partition(":")[0] for line in said] == ["round 0", "round 0", "round 1", "round 1"]
    assert not any(evidence(node) for node in nodes.values())
    missing = unmet(tmp_path / "rounds", who.constitution)
    assert missing == ["the held-out loss is known of 1 members; 2 are required"]


def test_a_session_with_a_number_far_beyond_the_recorded_ones_is_not_joined(tmp_path) -> None:
    who = consortium(tmp_path, aggregation={"name": "mean"}, secure_aggregation=True)
    node = who.node("north")
    with closing(coordinator(who, {"north": node})) as lying:
        base = lying.rounds.base(0)
        asked = {"what": "advertise", "round": 0, "attempt": 10**6}
        ((_, answer),) = lying._members.exchange(["north"], asked, base, kind="advertised")
    assert "session 1000000 of round 0 is not the next one: the ledger records 0 sessions" in str(answer)
