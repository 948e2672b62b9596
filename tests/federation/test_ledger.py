"""What was written in a ledger stays: a flipped bit, a stranger and a history written anew are found."""

import base64
import functools
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forging import contribution
from worldloom.core.chain import Chain
from worldloom.core.errors import DataError, StorageError
from worldloom.core.signing import SigningKey, make_key
from worldloom.federation import (
    Constitution,
    Ledger,
    Records,
    countersign,
    model_card,
    read_ledger,
    verify_ledger,
)
from worldloom.federation.record.envelope import seal
from worldloom.federation.record.ledger import constitution_facts
from worldloom.federation.record.statements import checked, exit_facts


class World:
    """A consortium of two, with a stranger beside it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.keys = folder, dict[str, SigningKey]()
        for name in ("acme", "bolt", "stranger"):
            make_key(folder / f"{name}.pem")
            self.keys[name] = SigningKey(folder / f"{name}.pem")
        members = {name: {"key": self.keys[name].public} for name in ("acme", "bolt")}
        values = {"consortium": "Looms", "members": members, "coordinators": ["acme"], "rounds": 3, "inner_steps": 5}
        self.rules = Constitution.parse({**values, "quorum": 1, "cap": 1.0})
        self.path = self.write(folder / "ledger.jsonl")
        self.verify = functools.partial(verify_ledger, constitution=self.rules)

    def write(self, path: Path, frames: int = 90) -> Path:
        with Ledger(path, self.keys["acme"], durable=False) as ledger:
            ledger.append("constitution", constitution_facts(self.rules))
            ledger.append("base", {"fingerprint": "ab"}, round=0)
            facts = self.contribution(ledger, "bolt", frames=frames, spent={"epsilon": 1.5})
            ledger.append("contribution", facts, round=0)
            ledger.append("refusal", {"owner": "acme", "reason": "late | 9 s"}, round=0)
            evaluation = {"before": 2.0, "after": 0.375, "owners": {"bolt": [2.0, 0.5], "acme": [None, 0.25]}}
            ledger.append("round", {"evaluation": evaluation, "weights": {"bolt": 0.25}, "left_out": []}, round=0)
            ledger.append("base", {"fingerprint": "ef", "previous": "ab"}, round=1)
        return path

    def contribution(self, ledger: Ledger, name: str, **changed: Any) -> dict[str, Any]:
        """Return the facts of a member's contribution to the first round."""
        return contribution(self.rules, self.keys[name], name, 0, "ab", ledger.head, **changed)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


def _append(path: Path, key: SigningKey, kind: str, facts: dict[str, Any]) -> None:
    with Ledger(path, key, durable=False) as ledger:
        ledger.append(kind, facts, round=1)


def test_a_whole_ledger_verifies_and_is_read(world: World) -> None:
    verdict = world.verify(world.path)
    assert (verdict.length, verdict.broken) == (6, None)
    records = Records(world.path)
    assert [facts["owner"] for facts in records.of("contribution", 0)] == ["bolt"]
    assert records.of("contribution", 1) == []
    assert {number: facts["fingerprint"] for number, facts in records.bases().items()} == {0: "ab", 1: "ef"}
    assert records.spent("bolt") == {"epsilon": 1.5}
    assert records.spent("acme") == {}


@given(st.data())
def test_any_flipped_bit_is_found_and_its_entry_named(world: World, data: st.DataObject) -> None:
    content = bytearray(world.path.read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    content[place] ^= 1 << data.draw(st.integers(0, 7))
    other = world.folder / "flipped.jsonl"
    other.write_bytes(bytes(content))
    assert world.verify(other).broken == world.path.read_bytes()[:place].count(b"\n")


def test_a_chain_made_anew_without_the_key_is_found(world: World, tmp_path: Path) -> None:
    entries = list(Records(world.path).entries())
    with Chain(tmp_path / "forged.jsonl", durable=False) as chain:
        for entry in entries:
            facts = {**entry.body["facts"], **({"frames": 91} if entry.index == 2 else {})}
            chain.append({**entry.body, "facts": facts})
    verdict = world.verify(tmp_path / "forged.jsonl")
    # The hash of the first entry has its time in it, so the signature of the second is the first not to fit.
    assert (verdict.broken, verdict.why) == (1, "is not what acme signed")


def test_a_stranger_and_a_member_in_the_place_of_a_coordinator_are_found(world: World, tmp_path: Path) -> None:
    for place, kind in enumerate(("base", "checkpoint", "return", "exit")):
        path = world.write(tmp_path / f"a{place}.jsonl")
        _append(path, world.keys["bolt"], kind, {"owner": "bolt"})
        verdict = world.verify(path)
        assert verdict.broken == 6
        assert "not a coordinator" in verdict.why
    path = world.write(tmp_path / "b.jsonl")
    _append(path, world.keys["stranger"], "exit", {})
    verdict = world.verify(path)
    assert verdict.broken == 6
    assert world.keys["stranger"].public in verdict.why


def test_that_a_member_left_only_the_member_can_say(world: World, tmp_path: Path) -> None:
    def word(name: str = "bolt", **other: Any) -> bytes:
        said = {"round": 1, "constitution": world.rules.fingerprint, "left": True, "why": "enough", **other}
        return seal("refusal", said, {}, key=world.keys[name])

    facts = exit_facts(word(), "bolt", 1, world.rules)
    assert facts is not None
    with Ledger(world.write(tmp_path / "left.jsonl"), world.keys["acme"], durable=False) as ledger:
        ledger.append("exit", facts, round=1)
    assert world.verify(tmp_path / "left.jsonl").broken is None
    other_words = [word("acme"), word(left=False), word(constitution="of another one"), word(round=2), b"", word()[:-1]]
    assert [exit_facts(other, "bolt", 1, world.rules) for other in other_words] == [None] * len(other_words)
    forged = [{"owner": "bolt", "reason": "enough"}, {**facts, "owner": "acme"}, {**facts, "reason": "it was told to"}]
    forged += [{**facts, "word": base64.b64encode(other).decode()} for other in other_words]
    for number, wrong in enumerate(forged):
        with Ledger(world.write(tmp_path / f"{number}.jsonl"), world.keys["acme"], durable=False) as ledger:
            ledger.append("exit", wrong, round=1)
        verdict = world.verify(tmp_path / f"{number}.jsonl")
        assert verdict.broken == 6, wrong
        assert "is an exit" in verdict.why


def test_a_countersigned_checkpoint_shows_a_history_written_anew_or_cut(world: World, tmp_path: Path) -> None:
    head = world.verify(world.path).head
    stored = json.loads(json.dumps(countersign(head, world.keys["bolt"])))
    assert checked(stored, world.rules) == head
    seen = [countersign(head, world.keys["bolt"])]
    assert world.verify(world.path, checkpoints=seen).broken is None
    anew = world.write(tmp_path / "anew.jsonl", frames=9)
    assert world.verify(anew).broken is None  # by itself it is as good as the true one
    assert "rewritten" in world.verify(anew, checkpoints=seen).why
    cut = tmp_path / "cut.jsonl"
    cut.write_bytes(b"".join(world.path.read_bytes().splitlines(keepends=True)[:4]))
    assert (world.verify(cut).broken, world.verify(cut, checkpoints=seen).broken) == (None, 4)


def test_a_false_checkpoint_is_refused(world: World, tmp_path: Path) -> None:
    head = world.verify(world.path).head
    seen = countersign(head, world.keys["bolt"])
    for false in (countersign(head, world.keys["stranger"]), {**seen, "length": 5}, {**seen, "signature": 3}, {}):
        with pytest.raises(DataError, match="is not signed with a key"):
            world.verify(world.path, checkpoints=[false])
    path = world.write(tmp_path / "with.jsonl")
    true = countersign(world.verify(path).head, world.keys["bolt"])
    _append(path, world.keys["acme"], "checkpoint", {"countersigned": [true]})
    assert world.verify(path).broken is None
    _append(path, world.keys["acme"], "checkpoint", {"countersigned": [seen]})
    why = "contains a checkpoint of a different ledger: bolt countersigned 6 entries"
    assert (world.verify(path).broken, world.verify(path).why) == (7, why)


def test_a_ledger_of_other_rules_does_not_verify(world: World) -> None:
    other = Constitution.parse({**world.rules.model_dump(mode="json"), "rounds": 4})
    assert verify_ledger(world.path, other).broken == 0


def test_a_ledger_that_somebody_else_changes_while_it_is_open_is_not_gone_on_with(world: World, tmp_path: Path) -> None:
    path = world.write(tmp_path / "open.jsonl")
    with Ledger(path, world.keys["acme"], durable=False) as ledger:
        assert ledger.bases()[1]["fingerprint"] == "ef"
        whole = path.read_bytes()
        path.write_bytes(whole.replace(b'"ef"', b'"eg"'))
        for ask in (ledger.bases, lambda: ledger.append("base", {"fingerprint": "ab"}, round=2)):
            with pytest.raises(DataError, match="entry 5 was changed"):
                ask()
        path.write_bytes(b"".join(whole.splitlines(keepends=True)[:-1]))
        with pytest.raises(DataError, match="was changed by another process"):
            ledger.lines()
        path.write_bytes(whole)
        ledger.append("base", {"fingerprint": "gh"}, round=2)
        assert ledger.bases() == Records(path).bases()
        copy = tmp_path / "copy.jsonl"
        copy.write_bytes(path.read_bytes())
        copy.replace(path)  # entries would go into the file that no longer has a name
        with pytest.raises(StorageError, match="deleted, moved or replaced"):
            ledger.append("base", {"fingerprint": "ij"}, round=3)


def test_an_entry_larger_than_any_that_is_written_does_not_verify(world: World, tmp_path: Path) -> None:
    path = world.write(tmp_path / "large.jsonl")
    with Chain(path, durable=False) as chain:
        chain.append({"kind": "refusal", "facts": {"data": "0" * 2**17}})
    assert (world.verify(path).broken, world.verify(path).why[:4]) == (6, "has ")
    with path.open("ab") as file:
        file.truncate(2**33)  # sparse: a line of 8 GB
    assert world.verify(path).broken == 6
    whole = world.write(tmp_path / "sparse.jsonl")
    with whole.open("ab") as file:
        file.truncate(2**33)
    assert (world.verify(whole).broken, world.verify(whole).why[:4]) == (6, "has ")


def test_data_is_not_written_in_a_ledger(world: World, tmp_path: Path) -> None:
    with Ledger(tmp_path / "l.jsonl", world.keys["acme"]) as ledger:
        with pytest.raises(DataError, match="fingerprint of the data instead"):
            ledger.append("contribution", {"pixels": [0.5] * 40_000})
        with pytest.raises(DataError, match="unknown kind"):
            ledger.append("gossip", {})
        assert ledger.head.length == 0


def test_the_card_says_who_contributed_and_is_not_written_from_a_false_ledger(world: World, tmp_path: Path) -> None:
    card = model_card(read_ledger(world.path, world.rules))
    assert "`ef` (round 1)" in card
    assert "| bolt | open | 1 | 0.25 | epsilon 1.5 |" in card
    assert "- Round 0: after 0.375, before 2, owners (acme None to 0.25, bolt 2 to 0.5)" in card
    assert "- Round 0: acme: late \\| 9 s" in card
    false = tmp_path / "false.jsonl"
    false.write_bytes(world.path.read_bytes().replace(b'"frames":90', b'"frames":91'))
    with pytest.raises(DataError, match="entry 2"):
        read_ledger(false, world.rules)
