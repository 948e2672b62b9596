"""No round runs against rules that contradict themselves, or that a member has not signed."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

from worldloom.core.chain import ChainHead
from worldloom.core.errors import ConfigError, DataError
from worldloom.core.signing import SigningKey, make_key
from worldloom.federation import (
    Constitution,
    Ledger,
    check_model,
    check_rules,
    countersign,
    make_node_keys,
    ratify,
    read_constitution,
)
from worldloom.federation.rules.constitution import ratification_path

_SUMS = {"secure_aggregation": True, "aggregation": {"name": "mean"}, "quorum": 3}
_PRIVACY = {"clip": 1.0, "noise": 1.0, "epsilon_budget": 8.0}


def _values(**changed: Any) -> dict[str, Any]:
    members = {name: {"key": f"{index:064x}"} for index, name in enumerate(("acme", "bolt", "core"))}
    rules = {"consortium": "Looms", "members": members, "coordinators": ["acme"], "rounds": 3, "inner_steps": 10}
    return {**rules, "quorum": 2, "cap": 0.5, **changed}


def _signed(folder: Path) -> tuple[Path, dict[str, SigningKey]]:
    keys = {}
    for name in ("acme", "bolt", "core"):
        make_key(folder / f"{name}.pem")
        keys[name] = SigningKey(folder / f"{name}.pem")
    path = folder / "looms.yaml"
    path.write_text(yaml.safe_dump(_values(members={name: {"key": key.public} for name, key in keys.items()})))
    for name, key in keys.items():
        ratify(path, name, key)
    return path, keys


def test_rules_that_all_signed_are_read(tmp_path: Path) -> None:
    path, keys = _signed(tmp_path)
    rules = read_constitution(path)
    assert rules.coordinator_keys() == {"acme": keys["acme"].public}
    assert rules.known() == {key.public: name for name, key in keys.items()}


def test_a_consortium_has_only_as_many_members_as_an_entry_of_the_ledger_has_room_for(tmp_path: Path) -> None:
    names = [f"{place:03d}".ljust(64, "x") for place in range(151)]
    members = {name: {"key": f"{place:064x}"} for place, name in enumerate(names)}
    with pytest.raises(ConfigError, match="members: .*at most 150"):
        Constitution.parse(_values(members=members, coordinators=[names[0]]))
    del members[names.pop()]
    Constitution.parse(_values(members=members, coordinators=[names[0]]))
    make_key(tmp_path / "key.pem")
    key, digest, figure = SigningKey(tmp_path / "key.pem"), "0" * 64, -1.2345678901234567e-300
    note = {"norm": figure, "factor": figure}
    pairs = {"before": figure, "after": figure, "owners": {name: [figure, figure] for name in names}}
    with Ledger(tmp_path / "ledger.jsonl", key) as ledger:
        head = ChainHead(length=10**9, hash=digest)
        ledger.append("checkpoint", {"countersigned": [countersign(head, key) for _ in names]}, round=0)
        weights = {"weights": dict.fromkeys(names, figure), "left_out": [], "notes": dict.fromkeys(names, note)}
        ledger.append("round", {**weights, "evaluation": pairs}, round=0)
        answers = {what: dict.fromkeys(names, digest) for what in ("advertise", "share", "mask")}
        ledger.append("survivors", {"attempt": 9, **answers}, round=0)


def _of(members: int, quorum: int, **changed: Any) -> dict[str, Any]:
    named = {f"m{index}": {"key": f"{index:064x}"} for index in range(members)}
    return {"members": named, "coordinators": ["m0"], "quorum": quorum, **changed}


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"aggregation": {"name": "nosuch"}}, "aggregation: unknown"),
        ({"aggregation": {"name": "clipped-mean", "limt": 1}}, "aggregation: .*limt"),
        ({"aggregation": {"name": "krum"}}, "aggregation: krum with bad=1 needs at least 5 owners, but there are 3"),
        (_of(6, 4, aggregation={"name": "krum"}), "needs at least 5 owners, but a round may have only the quorum of 4"),
        (_of(6, 5, aggregation={"name": "krum", "kept": 6}), "krum with bad=1 keeps at most 5 of 6 deltas, not kept=6"),
        (_of(6, 5, aggregation={"name": "krum", "kept": 1}), "1 weights of at most 0.5 each .* cannot sum to 1"),
        ({"aggregation": {"name": "trimmed-mean"}}, "trim=0.2 drops no value of 3 owners, so it is a plain mean"),
        ({"outer": {"name": "diloco", "learning_rate": -5}}, "outer: .*learning_rate"),
        ({"outer": {"name": "diloco", "learning_rate": 1e30}}, "outer: .*learning_rate"),
        ({"codec": {"name": "int8", "rounding": "up"}}, "codec: .*rounding"),
        ({"partition": {"nosuch": []}}, "partition: .*nosuch"),
        ({"partition": {"shared": []}}, "no tensor is shared"),
        ({"partition": {"shared": ["encoder.*"], "sovereign": ["*"]}}, "no tensor is shared"),
        ({"privacy": {**_PRIVACY, "epsilon_budget": 1e-9}}, "not even one round fits into the budget"),
    ],
)
def test_what_a_constitution_names_is_checked_before_anybody_trains(changed: dict[str, Any], why: str) -> None:
    check_rules(Constitution.parse(_values()))
    with pytest.raises(ConfigError, match=why):
        check_rules(Constitution.parse(_values(**changed)))


def test_an_aggregation_that_suits_its_members_is_accepted() -> None:
    for aggregation in ({"name": "krum"}, {"name": "krum", "kept": 2}, {"name": "trimmed-mean"}):
        check_rules(Constitution.parse(_values(**_of(6, 5, aggregation=aggregation))))


def test_a_connection_key_that_no_node_can_use_is_named_before_anybody_signs(tmp_path: Path) -> None:
    good = make_node_keys(tmp_path, "acme").read_text()
    for keys, why in (
        ({"acme": "ssh-rsa AAAA"}, "members.acme.connection: acme's public key is invalid"),
        ({"acme": good, "core": good}, "members.core.connection: acme has the same public key"),
    ):
        values = _values()
        for name, key in keys.items():
            values["members"][name] = {**values["members"][name], "connection": key}
        with pytest.raises(ConfigError, match=why):
            check_rules(Constitution.parse(values))
    values = _values()
    values["members"]["acme"]["connection"] = good
    check_rules(Constitution.parse(values))


def test_rules_that_work_but_not_as_intended_are_named(caplog: pytest.LogCaptureFixture) -> None:
    privacy = {**_PRIVACY, "epsilon_budget": 5.0}
    check_rules(Constitution.parse(_values(privacy=privacy, release={"rounds": 4, "max_loss": 0.0})))
    said = [record.message for record in caplog.records]
    assert [line.partition(":")[0] for line in said] == ["privacy", "release.rounds", "release.max_loss"]
    assert "no member can contribute to all 3 rounds" in said[0]


def test_a_model_is_checked_before_anybody_trains_it() -> None:
    base = {"encoder.w": torch.empty(1000, 1000, device="meta")}
    small = _values(largest_megabytes=5.0)
    check_model(Constitution.parse(small), base)
    with pytest.raises(ConfigError, match="largest_megabytes: 5 is too small for this model, whose messages have 8 MB"):
        check_model(Constitution.parse({**small, **_SUMS}), base)
    with pytest.raises(ConfigError, match=r"partition.shared: no tensor of the model is shared"):
        check_model(Constitution.parse(small), {})


def test_who_has_not_signed_is_named(tmp_path: Path) -> None:
    path, _ = _signed(tmp_path)
    ratification_path(path, "bolt").unlink()
    ratification_path(path, "core").unlink()
    with pytest.raises(DataError, match="not signed by bolt, core"):
        read_constitution(path)
    assert read_constitution(path, require=["acme"]).quorum == 2
    with pytest.raises(DataError, match="not signed by bolt;"):
        read_constitution(path, require=["acme", "bolt"])


def test_a_changed_rule_is_found_even_by_one_signature(tmp_path: Path) -> None:
    path, keys = _signed(tmp_path)
    path.write_text(path.read_text().replace("cap: 0.5", "cap: 0.9"))
    with pytest.raises(DataError, match="was changed after acme signed"):
        read_constitution(path, require=[])
    ratify(path, "acme", keys["acme"])
    with pytest.raises(DataError, match="was changed after bolt signed"):
        read_constitution(path, require=["acme"])


def test_a_stranger_and_a_false_key_do_not_sign(tmp_path: Path) -> None:
    path, keys = _signed(tmp_path)
    with pytest.raises(DataError, match="not the key of acme"):
        ratify(path, "acme", keys["bolt"])
    with pytest.raises(DataError, match="'dora' is not a member"):
        ratify(path, "dora", keys["bolt"])
    ratification_path(path, "acme").write_bytes(ratification_path(path, "bolt").read_bytes())
    with pytest.raises(DataError, match="a different member or key"):
        read_constitution(path)
    ratify(path, "acme", keys["acme"])
    ratification_path(path, "dora").write_bytes(ratification_path(path, "bolt").read_bytes())
    with pytest.raises(DataError, match="signed by non-members dora"):
        read_constitution(path)


@given(count=st.integers(1, 12), quorum=st.integers(1, 14), cap=st.floats(0.01, 1.0))
def test_a_cap_that_no_quorum_can_keep_is_refused(count: int, quorum: int, cap: float) -> None:
    members = {f"m{index}": {"key": f"{index:064x}"} for index in range(count)}
    values = _values(members=members, coordinators=["m0"], quorum=quorum, cap=cap)
    if quorum <= count and quorum * cap >= 1:
        assert Constitution.parse(values).cap == cap
    elif quorum > count or quorum * cap < 1 - 1e-6:
        with pytest.raises(ConfigError, match="quorum|cap"):
            Constitution.parse(values)


def test_a_third_for_each_of_three_is_the_whole() -> None:
    assert Constitution.parse(_values(quorum=3, cap=1 / 3)).quorum == 3


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"quorum": 4}, "4 is above the 3 members"),
        ({"cap": 0.3}, "all 3 members, at most 0.3"),
        ({"cap": 0.4}, "a quorum of 2 members"),
        ({"secure_aggregation": True, "aggregation": {"name": "krum"}}, "the coordinator can still check"),
        ({"secure_aggregation": True}, "clipped-mean.*the coordinator can still check"),
        ({**_SUMS, "codec": {"name": "int8"}}, "codec: the output of 'int8'.*Choose float32"),
        ({**_SUMS, "codec": {"name": "top-k", "share": 0.1}}, "codec: the output of 'top-k'"),
        ({**_SUMS, "quorum": 2}, "coordinator 'acme' is a member.*raise the quorum to 3"),
        (
            {
                **_SUMS,
                "members": {name: {"key": f"{key:064x}"} for key, name in enumerate(("acme", "bolt"))},
                "quorum": 2,
            },
            "with 2 members.*at least 3",
        ),
        ({"classes": ["open", "controlled"]}, "only under differential privacy"),
        ({"classes": ["controlled"], "privacy": {**_PRIVACY, "noise": 0}}, "only under differential privacy"),
        ({"privacy": {**_PRIVACY, "delta": 0.999}}, "privacy.delta: .*0.001"),
        ({"classes": ["sovereign"]}, "classes"),
        ({"coordinators": ["dora"]}, "'dora' is not a member"),
        ({"coordinators": ["acme", "acme"]}, "twice"),
        ({"coordinators": [{"name": "hub", "key": f"{1:064x}"}]}, "twice"),
        ({"codec": {}}, "codec"),
        ({"quorun": 2}, "quorum"),
        ({"members": {"../up": {"key": f"{1:064x}"}}}, "members"),
    ],
)
def test_rules_that_contradict_themselves_are_refused(changed: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Constitution.parse(_values(**changed))


def test_what_is_consistent_is_accepted() -> None:
    Constitution.parse(_values(**_SUMS))
    outside = [{"name": "hub", "key": "a" * 64}]
    Constitution.parse(_values(**{**_SUMS, "quorum": 2}, coordinators=outside))
    Constitution.parse(_values(classes=["controlled"], privacy=_PRIVACY))


@given(count=st.integers(3, 12), quorum=st.integers(1, 12))
def test_a_sum_takes_a_quorum_and_over_half_of_the_members(count: int, quorum: int) -> None:
    members = {f"m{index}": {"key": f"{index:064x}"} for index in range(count)}
    rules = Constitution.parse(_values(members=members, coordinators=["m0"], quorum=min(quorum, count), cap=1.0))
    assert 2 * rules.threshold > count
    assert min(quorum, count) <= rules.threshold <= count


def test_the_fingerprint_is_of_the_rules_and_of_the_order_of_succession() -> None:
    rules = Constitution.parse(_values(coordinators=["acme", {"name": "hub", "key": "a" * 64}]))
    assert Constitution.parse(rules.model_dump(mode="json")).fingerprint == rules.fingerprint
    other = Constitution.parse(_values(coordinators=[{"name": "hub", "key": "a" * 64}, "acme"]))
    assert list(other.coordinator_keys()) == ["hub", "acme"]
    assert other.fingerprint != rules.fingerprint
