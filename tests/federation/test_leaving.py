"""Leaving and coming back, going on alone, the ledgers that members keep, and taking over from a lost coordinator."""

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from consortium import MODEL, OWNERS, Consortium, Quick, points

from worldloom.core.errors import DataError, StorageError, TrainingError
from worldloom.federation import (
    Base,
    Coordinator,
    InProcess,
    MemberStore,
    Records,
    Reply,
    RoundStore,
    initial_base,
    recompute,
    succeed,
    verify_ledger,
)
from worldloom.federation.record.envelope import seal, unseal
from worldloom.models import load_model
from worldloom.training import saved_steps


def kinds(consortium: Consortium, kind: str) -> list[dict]:
    return [dict(entry.body["facts"]) for entry in Records(consortium.path / "rounds" / "ledger.jsonl").entries(kind)]


def test_members_keep_the_ledger_that_they_countersigned_and_the_newest_base(tmp_path: Path) -> None:
    consortium = Consortium(tmp_path)
    coordinator = consortium.coordinator()
    last = coordinator.run()
    coordinator.close()
    whole = (tmp_path / "rounds" / "ledger.jsonl").read_bytes()
    for name in OWNERS:
        store = consortium.node(name).store
        number, base = store.base()
        assert (number, base.fingerprint) == (3, last.fingerprint)
        # All but what the coordinator wrote down after the last answer: that it came.
        assert whole.startswith(store.read())
        assert whole[len(store.read()) :].count(b"\n") == 1
    assert {len(facts["countersigned"]) for facts in kinds(consortium, "checkpoint")} == {3}
    assert verify_ledger(tmp_path / "rounds" / "ledger.jsonl", consortium.constitution).broken is None


def test_a_finished_consortium_that_is_run_again_writes_nothing_more(tmp_path: Path) -> None:
    consortium = Consortium(tmp_path, rules={"rounds": 1})
    for _ in range(2):
        coordinator = consortium.coordinator()
        coordinator.run()
        coordinator.close()
        length = coordinator.ledger.head.length
    assert length == len(Records(tmp_path / "rounds" / "ledger.jsonl").lines())
    assert len(kinds(consortium, "checkpoint")) == 3  # before and after the round, and of the last base


def test_a_ledger_that_was_written_anew_is_not_followed(tmp_path: Path) -> None:
    consortium = Consortium(tmp_path / "first", rules={"rounds": 1})
    coordinator = consortium.coordinator()
    base = coordinator.run()
    coordinator.close()
    node = consortium.node("north")
    before = node.store.read()
    shutil.copytree(tmp_path / "first" / "keys", tmp_path / "second" / "keys")  # and another history
    other = Consortium(tmp_path / "second", rules={"rounds": 1})
    forged = other.coordinator()
    forged.run()
    forged.close()
    lines = Records(tmp_path / "second" / "rounds" / "ledger.jsonl").lines()
    body = {"what": "store", "round": 1, "constitution": consortium.constitution.fingerprint}
    body |= {"ledger": {"begin": 0, "lines": lines}, "base": base.fingerprint}
    answer = node.handle(seal("ask", body, base.tensors, key=consortium.keys["coordinator"]))
    known = {consortium.keys["north"].public: "north"}
    refusal = unseal(answer, kind="refusal", known=known, limit=10**6)
    assert "rewritten" in refusal.body["why"]
    assert node.store.read() == before
    body["ledger"] = {"begin": len(lines) + 9, "lines": []}
    refusal = unseal(
        node.handle(seal("ask", body, base.tensors, key=consortium.keys["coordinator"])),
        kind="refusal",
        known=known,
        limit=10**6,
    )
    assert refusal.body["length"] == before.count(b"\n")


def test_a_base_that_the_ledger_does_not_name_is_not_kept(tmp_path: Path) -> None:
    consortium = Consortium(tmp_path, rules={"rounds": 1})
    coordinator = consortium.coordinator()
    base = coordinator.run()
    coordinator.close()
    store = consortium.node("north").store
    with pytest.raises(DataError, match="does not match the ledger"):
        store.save_base(0, Base.of({name: tensor + 1 for name, tensor in base.tensors.items()}))
    assert store.base()[0] == 1


@pytest.mark.parametrize("content", ["[]", "5", "null", "{", '{"left": true}', '{"left": true, "why": 5}'])
def test_a_damaged_file_of_an_exit_is_named_and_nothing_is_signed_from_it(tmp_path: Path, content: str) -> None:
    consortium = Quick(tmp_path, rules={"rounds": 1, "outer": {"name": "fedavg"}})
    (tmp_path / "south").mkdir()
    (tmp_path / "south" / "left.json").write_text(content)
    with closing(consortium.coordinator()) as coordinator:
        coordinator.run_round(0)
    assert not kinds(consortium, "exit")
    (said,) = [one["reason"] for one in kinds(consortium, "refusal")]
    assert said.startswith("south refuses: ")
    assert "left.json is" in said


def test_only_the_reason_of_an_exit_is_signed_from_its_file(tmp_path: Path) -> None:
    consortium = Quick(tmp_path, rules={"rounds": 1, "outer": {"name": "fedavg"}})
    left = {"left": True, "why": "south left", "round": 7, "constitution": "0" * 64, "helped": True}
    (tmp_path / "south").mkdir()
    (tmp_path / "south" / "left.json").write_text(json.dumps(left))
    with closing(consortium.coordinator()) as coordinator:
        coordinator.run_round(0)
    assert [one["reason"] for one in kinds(consortium, "exit")] == ["south left"]


def test_an_owner_leaves_with_nobodys_leave_goes_on_alone_and_comes_back(tmp_path: Path) -> None:
    consortium = Consortium(tmp_path, rules={"rounds": 4})
    coordinator = consortium.coordinator()
    coordinator.run_round(0)
    node = consortium.node("south")
    with pytest.raises(DataError, match="expected at most 500"):
        node.leave("because " * 100)
    node.leave("its people voted")
    coordinator.run_round(1)
    coordinator.run_round(2)
    assert [(one["owner"], one["reason"]) for one in kinds(consortium, "exit")] == [
        ("south", "south left the consortium: its people voted")
    ]
    assert {tuple(one["weights"]) for one in kinds(consortium, "round")[1:]} == {("east", "north")}
    run = consortium.node("south")
    stood = run._training.judge(Base.of({}))
    run.train_alone(20)
    run.train_alone(20)
    assert run._training.judge(Base.of({}))["total"] < stood["total"]
    assert run._training.run.metrics()[-1]["step"] == 12 + 40
    consortium.node("south").come_back()
    with pytest.raises(DataError, match="has not left"):
        consortium.node("south").come_back()
    coordinator.run()
    coordinator.close()
    assert verify_ledger(tmp_path / "rounds" / "ledger.jsonl", consortium.constitution).broken is None
    assert [one["owner"] for one in kinds(consortium, "return")] == ["south"]
    assert set(kinds(consortium, "round")[3]["weights"]) == set(OWNERS)
    assert verify_ledger(tmp_path / "rounds" / "ledger.jsonl", consortium.constitution).broken is None


def test_who_left_is_not_waited_for_until_it_is_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    away, exchange = [], InProcess.exchange

    def asked(self: InProcess, requests: Mapping[str, bytes], **options: Any) -> Iterator[Reply]:
        away.append(set(options.get("away", ())))
        return exchange(self, requests, **options)

    monkeypatch.setattr(InProcess, "exchange", asked)
    consortium, runs = Consortium(tmp_path, rules={"rounds": 4}), True

    def south(data: bytes) -> bytes:
        if not runs:
            raise ConnectionError("the node does not run")
        return consortium.node("south").handle(data)

    coordinator = consortium.coordinator({"south": south})
    coordinator.run_round(0)
    consortium.node("south").leave()
    coordinator.run_round(1)
    assert away[0] == set()
    runs = False
    away.clear()
    coordinator.run_round(2)
    assert away == [{"south"}] * len(away) != []
    assert not kinds(consortium, "refusal")
    runs = True
    consortium.node("south").come_back()
    coordinator.run_round(3)
    coordinator.close()
    assert away[-1] == set()
    assert [one["owner"] for one in kinds(consortium, "return")] == ["south"]


def test_who_lacks_a_part_of_the_ledger_is_heard_though_another_leaves_meanwhile(tmp_path: Path) -> None:
    consortium = Consortium(tmp_path, rules={"rounds": 2})
    coordinator = consortium.coordinator()
    coordinator.run_round(0)
    consortium.node("east").leave()
    kept = consortium.node("south").store.ledger
    kept.write_bytes(b"".join(kept.read_bytes().splitlines(keepends=True)[:-2]))  # of a backup, say
    assert set(coordinator._judged(1, coordinator.rounds.base(1))) == {"north", "south"}
    coordinator.close()


def test_what_is_learned_alone_moves_the_base_only_through_the_next_round(tmp_path: Path) -> None:
    consortium = Consortium(tmp_path, rules={"rounds": 2})
    coordinator = consortium.coordinator()
    coordinator.run_round(0)
    node = consortium.node("south")
    node.train_alone(10)
    coordinator.run()
    coordinator.close()
    ends = [one["learning_rate"] for one in node._training.run.metrics() if "learning_rate" in one]
    rate = node._training.training.learning_rate_at
    # 12 steps of the first round, 10 alone at the rates of the second, and 12 of the second at its own.
    assert ends == pytest.approx([rate(11), rate(21), rate(23)])


def test_a_member_takes_over_from_a_coordinator_that_is_lost(tmp_path: Path) -> None:
    rules = {"rounds": 4, "outer": {"name": "fedavg"}}
    consortium = Consortium(tmp_path / "lost", rules=rules, seats=("north",))
    coordinator = consortium.coordinator()
    coordinator.run_round(0)
    coordinator.run_round(1)
    coordinator._gather(2, coordinator.rounds.base(2))  # and then it is gone, with what came
    coordinator.close()
    store = consortium.node("north").store
    kept = store.base()
    with pytest.raises(DataError, match="not the key of a coordinator"):
        succeed(store, tmp_path / "no", consortium.constitution, consortium.keys["east"])
    path = tmp_path / "north takes over"
    assert succeed(store, path, consortium.constitution, consortium.keys["north"]) == 2
    with pytest.raises(StorageError, match="already exists"):
        succeed(store, path, consortium.constitution, consortium.keys["north"])
    nodes = {name: consortium.node(name).handle for name in OWNERS}
    second = Coordinator(
        path,
        consortium.constitution,
        key=consortium.keys["north"],
        transport=InProcess(nodes),
        initial=initial_base(MODEL, points().spec, consortium.partition, seed=0),
    )
    second.run()
    second.close()
    records = Records(path / "ledger.jsonl")
    assert [entry.body["facts"]["coordinator"] for entry in records.entries("succession")] == ["north"]
    assert RoundStore(path).base(2).fingerprint == kept[1].fingerprint
    assert verify_ledger(path / "ledger.jsonl", consortium.constitution).broken is None
    assert sorted(records.bases()) == [0, 1, 2, 3, 4]
    again = recompute(path, consortium.constitution, into=tmp_path / "again")
    assert again == {number: records.bases()[number]["fingerprint"] for number in (2, 3, 4)}
    # The one that was lost comes back with its own ledger: nobody follows it any more.
    late = consortium.coordinator()
    late.run_round(2)
    assert late._members.ask("store", 2, late.rounds.base(2), kind="receipt") == {}
    with pytest.raises(TrainingError, match="round 3 has 0 contributions"):
        late.run_round(3)
    assert any("rewritten" in str(facts["reason"]) for facts in kinds(consortium, "refusal"))
    late.close()


def test_no_base_is_taken_that_the_ledger_does_not_name_for_its_round(tmp_path: Path) -> None:
    consortium = Consortium(tmp_path, rules={"rounds": 2}, seats=("north",))
    coordinator = consortium.coordinator()
    coordinator.run_round(0)
    base, lines = coordinator.rounds.base(1), coordinator.ledger.lines()
    coordinator.close()
    other = Base.of({name: tensor + 1 for name, tensor in base.tensors.items()})
    node = consortium.node("south")
    before = node.store.base()[0]
    for what in ("train", "store"):
        for number, tensors, ledger, why in (
            (1, base, None, "ledger: Field required"),
            (1, other, {"begin": 0, "lines": lines}, "does not match the ledger"),
            (2, base, {"begin": 0, "lines": lines}, "does not match the ledger"),
            (3, base, {"begin": 0, "lines": lines}, "does not match the ledger"),
        ):
            body = {"what": what, "round": number, "constitution": consortium.constitution.fingerprint}
            body["base"] = tensors.fingerprint
            body |= {} if ledger is None else {"ledger": ledger}
            for key in ("coordinator", "north"):  # who has a seat may ask, and no more than that
                answer = node.handle(seal("ask", body, tensors.tensors, key=consortium.keys[key]))
                known = {consortium.keys["south"].public: "south"}
                assert why in unseal(answer, kind="refusal", known=known, limit=10**6).body["why"]
    assert node.store.base()[0] == before


def test_settling_happens_once_and_begins_with_the_base_whatever_was_done_alone(tmp_path: Path) -> None:
    consortium = Consortium(tmp_path, rules={"rounds": 1})
    coordinator = consortium.coordinator()
    base = coordinator.run()
    coordinator.close()
    node = consortium.node("south")
    assert not node.train_alone(5, still=lambda: False)
    assert node.train_alone(5)
    node.fine_tune(8, frozen=True)
    state = load_model(node._training.run.model_directory).state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in base.tensors.items())
    node.fine_tune(8, frozen=True)
    assert max(saved_steps(node._training.run)) == 12 + 5 + 8
    node.fine_tune(0)
    state = load_model(node._training.run.model_directory).state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in base.tensors.items())


def test_settling_for_longer_than_the_rounds_is_a_training_of_its_own(tmp_path: Path) -> None:
    consortium = Consortium(tmp_path, rules={"rounds": 1})
    coordinator = consortium.coordinator()
    coordinator.run()
    coordinator.close()
    node = consortium.node("south")
    training, begin = node.own.training, max(saved_steps(node.own.run))
    steps = 2 * training.steps
    node.fine_tune(steps)
    rates = {row["step"]: row["learning_rate"] for row in node.own.run.metrics() if "learning_rate" in row}
    of_its_own = training.model_copy(update={"steps": steps})
    assert rates[begin + steps] == pytest.approx(of_its_own.learning_rate_at(steps - 1))
    assert rates[begin + steps] > 0 == training.learning_rate_at(steps - 1)


def test_a_successor_needs_the_base_that_the_ledger_names(tmp_path: Path) -> None:
    consortium = Consortium(tmp_path / "c", rules={"rounds": 2}, seats=("north",))
    coordinator = consortium.coordinator()
    coordinator.run_round(0)
    store = consortium.node("north").store
    store.follow(0, coordinator.ledger.lines())  # and the base did not come any more
    coordinator.close()
    with pytest.raises(DataError, match="is not the base of round 1 in the ledger"):
        succeed(store, tmp_path / "new", consortium.constitution, consortium.keys["north"])
    assert not (tmp_path / "new").exists()


def test_keeping_refuses_what_does_not_verify_and_stays_as_it_was(tmp_path: Path) -> None:
    consortium = Consortium(tmp_path, rules={"rounds": 1})
    coordinator = consortium.coordinator()
    coordinator.run()
    coordinator.close()
    lines = Records(tmp_path / "rounds" / "ledger.jsonl").lines()
    store = MemberStore(tmp_path / "new", consortium.constitution, consortium.keys["north"])
    store.follow(0, lines[:4])
    before = store.read()
    with pytest.raises(DataError, match="entry 4"):
        store.follow(4, [lines[4].replace('"round":0', '"round":1', 1), *lines[5:]])
    assert store.read() == before
    with pytest.raises(DataError, match="no base"):
        store.base()
