"""A member's copy of the ledger: each entry is checked once, and what happens to the file meanwhile is noticed."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from worldloom.core.errors import DataError, StorageError
from worldloom.core.signing import SigningKey, make_key
from worldloom.federation import Constitution, Ledger, MemberStore
from worldloom.federation.record import ledger as ledger_module
from worldloom.federation.record.ledger import constitution_facts
from worldloom.federation.rounds.member_store import EntriesMissing, LedgerForked


class Looms:
    """A consortium of two, and ledgers that its coordinator could write."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.keys = folder, dict[str, SigningKey]()
        for name in ("acme", "bolt"):
            make_key(folder / f"{name}.pem")
            self.keys[name] = SigningKey(folder / f"{name}.pem")
        members = {name: {"key": key.public} for name, key in self.keys.items()}
        values = {"consortium": "Looms", "members": members, "coordinators": ["acme"], "rounds": 9, "inner_steps": 5}
        self.rules = Constitution.parse({**values, "quorum": 2, "cap": 0.5})

    def lines(self, *entries: str, after: tuple[str, ...] = ()) -> list[str]:
        """Return a ledger of a base and refusals, which goes on from the lines of another."""
        path = self.folder / f"{len(list(self.folder.iterdir()))}.jsonl"
        path.write_text("".join(f"{line}\n" for line in after))
        with Ledger(path, self.keys["acme"], durable=False) as ledger:
            if not after:
                ledger.append("constitution", constitution_facts(self.rules))
            for entry in entries:
                if not ledger.bases():
                    ledger.append("base", {"fingerprint": entry}, round=0)
                else:
                    ledger.append("refusal", {"owner": "acme", "reason": entry}, round=0)
            return ledger.lines()

    def store(self) -> MemberStore:
        return MemberStore(self.folder / "bolt", self.rules, self.keys["bolt"])


@pytest.fixture
def looms(tmp_path: Path) -> Looms:
    return Looms(tmp_path)


def test_entries_that_were_checked_are_not_checked_again(looms: Looms, monkeypatch: pytest.MonkeyPatch) -> None:
    checked: list[int] = []
    fault: Callable[..., str] = ledger_module._fault

    def counted(entry: Any, *arguments: Any) -> str:
        checked.append(entry.index)
        return fault(entry, *arguments)

    monkeypatch.setattr(ledger_module, "_fault", counted)
    lines, store = looms.lines("a", "b", "c", "d"), looms.store()
    assert store.follow(0, lines[:3])["length"] == 3
    assert store.follow(3, lines[3:])["length"] == 5
    assert store.follow(0, lines)["length"] == 5
    assert store.names(0, "a")
    assert not store.names(1, "a")
    assert store.read().decode().splitlines() == lines
    assert checked == list(range(5))
    assert looms.store().names(0, "a")  # after a restart all are checked once more
    assert checked == [*range(5), *range(5)]


def test_a_file_that_changed_meanwhile_is_not_believed(looms: Looms) -> None:
    lines, other = looms.lines("a", "b"), looms.lines("a", "x")
    store = looms.store()
    store.follow(0, lines)
    for content in (other, [*lines[:2], lines[2].replace('"b"', '"x"')], lines[:2]):
        store.ledger.write_text("".join(f"{line}\n" for line in content))
        for ask in (lambda: store.names(1, "x"), store.read, lambda: looms.store().read()):
            with pytest.raises(DataError, match="does not verify: entry"):
                ask()
        with pytest.raises(DataError):
            store.follow(len(content), [])
    assert store.follow(2, lines[2:])["length"] == 3  # what was cut off is taken again, and nothing else
    store.ledger.unlink()
    with pytest.raises(DataError, match="rewritten"):
        store.follow(0, other)
    assert store.follow(0, lines)["length"] == 3


def test_after_a_write_that_failed_what_comes_is_checked_anew(looms: Looms, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any) -> None:
        raise StorageError("the disk is full")

    lines = looms.lines("a", "b")
    fork = looms.lines("x", after=tuple(lines[:2]))
    store = looms.store()
    store.follow(0, lines[:2])
    monkeypatch.setattr("worldloom.federation.rounds.member_store.write_atomic", full)
    with pytest.raises(StorageError):
        store.follow(2, lines[2:])
    monkeypatch.undo()
    assert store.records.head.length == 2
    assert store.follow(2, fork[2:])["length"] == 3  # of the first nothing was countersigned
    with pytest.raises(LedgerForked):
        store.follow(2, lines[2:])
    with pytest.raises(DataError, match="entry 3 is not an entry of a chain"):
        store.follow(3, ["{}"])
    assert store.follow(3, [])["length"] == 3


def test_a_copy_with_a_sparse_end_is_not_read_whole(looms: Looms) -> None:
    store = looms.store()
    store.follow(0, looms.lines("a", "b"))
    os.truncate(store.ledger, 2**42)  # a line of 4 TB
    for read in (store.read, looms.store().read, lambda: store.records):
        with pytest.raises(DataError, match="entry 3 has 66561 characters; expected at most 66560"):
            read()


@pytest.mark.parametrize("damage", [lambda text: text[:-9], lambda text: text[:-200] + b"x" + text[-199:]])
def test_a_damaged_copy_is_received_again_and_nobody_is_accused(looms: Looms, damage: Callable[[bytes], bytes]) -> None:
    lines, other = looms.lines("a", "b", "c"), looms.lines("a", "b", "x")
    looms.store().follow(0, lines)
    for store in (looms.store(), looms.store()):
        store.ledger.write_bytes(damage(store.ledger.read_bytes()))
        with pytest.raises(EntriesMissing, match="only 3 entries"):
            store.follow(4, [])
        with pytest.raises(DataError, match="all later entries are missing"):
            store.follow(3, [])
        assert store.follow(0, lines)["length"] == 4
    assert not list(store.path.glob("evidence-*.json"))
    store.ledger.write_bytes(damage(store.ledger.read_bytes()))
    with pytest.raises(LedgerForked):
        store.follow(0, other)


def test_a_head_that_another_member_signed_is_not_taken_for_the_own_one(looms: Looms) -> None:
    lines, store = looms.lines("a", "b"), looms.store()
    MemberStore(looms.folder / "acme", looms.rules, looms.keys["acme"]).follow(0, lines[:2])
    store.follow(0, lines)
    shutil.copy(looms.folder / "acme" / "countersigned.json", store.path)
    for read in (store.read, lambda: store.follow(3, [])):
        with pytest.raises(DataError, match=r"countersigned.json .* is signed with the key of another member"):
            read()


def test_of_no_ledger_nothing_is_countersigned(looms: Looms) -> None:
    store = looms.store()
    with pytest.raises(DataError, match="the message has no ledger"):
        store.follow(0, [])
    assert store.seen is None
