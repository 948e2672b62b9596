"""The gates before a base leaves its consortium."""

from pathlib import Path

import pytest
from consortium import MODEL, Consortium, points

from worldloom.core.errors import ConfigError, DataError
from worldloom.federation import Base, Constitution, RoundStore, fingerprint, initial_base, recompute, release
from worldloom.federation.rounds.release import unmet
from worldloom.models import load_tensors


def woven(path: Path, **gates: object) -> Consortium:
    consortium = Consortium(path, rules={"rounds": 1, "inner_steps": 4, "release": gates})
    coordinator = consortium.coordinator()
    coordinator.run()
    coordinator.close()
    return consortium


def test_a_base_that_passes_leaves_with_its_card_and_ledger(tmp_path: Path) -> None:
    consortium = woven(tmp_path / "c", rounds=1, contributors=3, max_loss=1e6, countersigned=3)
    into = release(tmp_path / "c" / "rounds", consortium.constitution, tmp_path / "out")
    base, about = load_tensors(into / "base", kind="shared-base")
    assert about == {"round": 1, "constitution": consortium.constitution.fingerprint}
    assert fingerprint(base) == RoundStore(tmp_path / "c" / "rounds").base(1).fingerprint
    assert fingerprint(base) in (into / "model_card.md").read_text()
    assert (into / "ledger.jsonl").read_bytes() == (tmp_path / "c" / "rounds" / "ledger.jsonl").read_bytes()
    assert [one.name for one in tmp_path.iterdir() if one.name != "c"] == ["out"]
    # Others, under other rules, begin with it.
    following = Consortium(tmp_path / "next", rules={"rounds": 1, "inner_steps": 2, "quorum": 2})
    like = initial_base(MODEL, points().spec, following.partition, seed=0).tensors
    read = Base.load(into / "base", like=like)
    coordinator = following.coordinator(initial=read)
    coordinator.run()
    assert coordinator.ledger.bases()[0]["fingerprint"] == fingerprint(base)
    coordinator.close()


def test_each_gate_that_is_not_passed_is_named_and_nothing_is_written(tmp_path: Path) -> None:
    consortium = woven(tmp_path / "c", rounds=2, contributors=3, max_loss=0.0)
    found = unmet(tmp_path / "c" / "rounds", consortium.constitution)
    assert [any(word in why for why in found) for word in ("1 rounds", "held-out loss", "members contributed")] == [
        True, True, False
    ]  # fmt: skip
    with pytest.raises(DataError, match="may not be released yet: 1 rounds are done; 2 are required"):
        release(tmp_path / "c" / "rounds", consortium.constitution, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_of_an_empty_ledger_nothing_is_released_or_recomputed(tmp_path: Path) -> None:
    consortium = Consortium(tmp_path)
    (tmp_path / "rounds").mkdir()
    (tmp_path / "rounds" / "ledger.jsonl").touch()
    for use in (release, lambda rounds, rules, into: recompute(rounds, rules, into=into)):
        with pytest.raises(DataError, match=r"ledger.jsonl has no base; check the path"):
            use(tmp_path / "rounds", consortium.constitution, tmp_path / "out")


def test_a_ledger_that_no_member_countersigned_since_is_not_enough(tmp_path: Path) -> None:
    consortium = Consortium(tmp_path, rules={"rounds": 1, "inner_steps": 4, "release": {"countersigned": 1}})
    coordinator = consortium.coordinator()
    coordinator.run_round(0)  # and the last base has not been handed over yet
    assert unmet(tmp_path / "rounds", consortium.constitution) == [
        "0 members countersigned a ledger with this base; 1 are required"
    ]
    coordinator.run()
    coordinator.close()
    assert unmet(tmp_path / "rounds", consortium.constitution) == []


def test_gates_that_no_base_can_pass_are_refused(tmp_path: Path) -> None:
    values = Consortium(tmp_path).constitution.model_dump(mode="json")
    with pytest.raises(ConfigError, match=r"release\.contributors: 4 is above the 3"):
        Constitution.parse({**values, "release": {"contributors": 4}})
    with pytest.raises(ConfigError, match="did you mean 'rounds'"):
        Constitution.parse({**values, "release": {"round": 4}})
