import shutil
import subprocess
import threading
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from consortium import MODEL, OWNERS, Consortium, Quick, bytes_of, points, run_until_killed

import worldloom.federation.rounds.round_store as store_module
from worldloom.core.errors import CheckpointError, ConfigError, DataError, StorageError, TrainingError
from worldloom.core.signing import Domain
from worldloom.federation import (
    Base,
    PartitionConfig,
    Records,
    RoundStore,
    check_has_a_pilot,
    initial_base,
    recompute,
    verify_ledger,
)
from worldloom.federation.record.envelope import seal, unseal
from worldloom.federation.secure.privacy import delta_norm, gaussian_epsilon
from worldloom.models import load_model
from worldloom.training import held_out_losses


def run(consortium: Consortium, handlers=None) -> Base:
    coordinator = consortium.coordinator(handlers)
    try:
        return coordinator.run()
    finally:
        coordinator.close()


def reasons(consortium: Consortium) -> list[str]:
    records = Records(consortium.path / "rounds" / "ledger.jsonl")
    return [entry.body["facts"]["reason"] for entry in records.entries("refusal")]


@pytest.fixture(scope="module")
def woven(tmp_path_factory) -> tuple[Consortium, Base]:
    consortium = Consortium(tmp_path_factory.mktemp("woven"))
    return consortium, run(consortium)


def test_a_woven_base_is_better_for_every_owner_than_the_one_it_began_as(woven) -> None:
    consortium, last = woven
    first = RoundStore(consortium.path / "rounds").base(0)
    for name in OWNERS:
        training = consortium.node(name)._training
        before, after = (
            held_out_losses(consortium.training, MODEL, training.frames, training.run, base.tensors)["prediction"]
            for base in (first, last)
        )
        assert after < 0.8 * before


def test_the_ledger_verifies_and_every_base_is_recomputed_bit_for_bit(woven, tmp_path) -> None:
    consortium, last = woven
    ledger = consortium.path / "rounds" / "ledger.jsonl"
    assert verify_ledger(ledger, consortium.constitution).broken is None
    found = recompute(consortium.path / "rounds", consortium.constitution, into=tmp_path / "again")
    assert found[3] == last.fingerprint
    assert {number: facts["fingerprint"] for number, facts in Records(ledger).bases().items()} == found


def test_what_a_member_contributed_can_be_left_out(woven, tmp_path) -> None:
    consortium, last = woven
    rounds = consortium.path / "rounds"
    found = recompute(rounds, consortium.constitution, into=tmp_path / "without", without=["east"])
    assert found[0] == RoundStore(rounds).base(0).fingerprint
    assert found[3] != last.fingerprint
    with pytest.raises(StorageError, match="choose another folder"):
        recompute(rounds, consortium.constitution, into=rounds)


def test_a_contribution_that_was_exchanged_is_found(woven, tmp_path) -> None:
    consortium, _ = woven
    rounds = RoundStore(consortium.path / "rounds")
    kept = rounds.message(1, "east").read_bytes()
    message = unseal(kept, kind="contribution", known=consortium.constitution.known(), limit=10**9)
    tensors = {name: tensor * 2 for name, tensor in message.tensors.items()}
    rounds.message(1, "east").write_bytes(seal("contribution", message.body, tensors, key=consortium.keys["east"]))
    try:
        with pytest.raises(DataError, match="does not match the ledger"):
            recompute(rounds.path, consortium.constitution, into=tmp_path / "again")
    finally:
        rounds.message(1, "east").write_bytes(kept)


def test_nothing_sovereign_is_in_what_a_node_says(woven) -> None:
    consortium, _ = woven
    state = load_model(consortium.path / "east" / "run" / "model").state_dict()
    sovereign = {name: state[name] for name in consortium.partition.split(state).sovereign}
    assert {"normalise_actions.shift", "action_stem.mix.weight", "norm.running_mean"} <= set(sovereign)
    for path in (consortium.path / "rounds" / "contributions").glob("*/east.msg"):
        said = path.read_bytes()
        for name, tensor in sovereign.items():
            assert name.encode() not in said
            values = tensor.flatten().numpy().tobytes()
            assert values[:8] not in said


def like(whole: Consortium, path: Path) -> Consortium:
    """Return another consortium with the same keys, hence the same constitution and messages."""
    shutil.copytree(whole.path / "keys", path / "keys")
    return Consortium(path)


def killed_at(moment: int, function):
    count = iter(range(1000))

    def call(*arguments, **options):
        if next(count) == moment:
            raise KeyboardInterrupt
        return function(*arguments, **options)

    return call


@pytest.mark.parametrize(("what", "moment"), [("_accept", 1), ("_accept", 5), ("_judged", 1), ("_judged", 2)])
def test_a_coordinator_that_is_killed_goes_on_and_ends_with_the_same_base(woven, tmp_path, what, moment) -> None:
    whole, last = woven
    broken = like(whole, tmp_path)
    coordinator = broken.coordinator()
    setattr(coordinator, what, killed_at(moment, getattr(coordinator, what)))
    run_until_killed(coordinator)
    assert run(broken).fingerprint == last.fingerprint


@pytest.mark.parametrize("entry", range(2, 8))
def test_whichever_entry_of_the_ledger_was_the_last_before_a_kill(woven, tmp_path, entry) -> None:
    whole, last = woven
    broken = like(whole, tmp_path)
    coordinator = broken.coordinator()
    coordinator.ledger.append = killed_at(entry, coordinator.ledger.append)
    run_until_killed(coordinator)
    assert run(broken).fingerprint == last.fingerprint
    ledger = tmp_path / "rounds" / "ledger.jsonl"
    assert verify_ledger(ledger, broken.constitution).broken is None
    assert [found.body["round"] for found in Records(ledger).entries("round")] == [0, 1, 2]


def test_a_lost_or_cut_ledger_is_restored_from_a_member_and_not_begun_again(tmp_path) -> None:
    consortium = Quick(tmp_path, rules={"outer": {"name": "fedavg"}})
    nodes = {name: consortium.node(name) for name in OWNERS}
    handlers = {name: node.handle for name, node in nodes.items()}
    with closing(consortium.coordinator(handlers)) as coordinator:
        coordinator.run_round(0)
        coordinator.run_round(1)
    ledger = tmp_path / "rounds" / "ledger.jsonl"
    lines = ledger.read_bytes().splitlines(keepends=True)
    # Without its last three entries, the ledger is a member's copy, or that of a coordinator that was killed.
    for left in (None, *(b"".join(lines[:count]) for count in range(len(lines) - 3))):
        ledger.unlink() if left is None else ledger.write_bytes(left)
        with pytest.raises(DataError, match="the ledger was lost or cut. Restore it from the longest copy"):
            consortium.coordinator(handlers)
        assert ledger.read_bytes() == (left or b"")
    shutil.copy(tmp_path / "north" / "consortium" / "ledger.jsonl", ledger)
    run(consortium, handlers)
    assert verify_ledger(ledger, consortium.constitution).broken is None
    assert [node.fault for node in nodes.values()] == [None, None, None]


def test_a_node_whose_stored_answer_is_damaged_trains_again(tmp_path) -> None:
    consortium = Quick(tmp_path, rules={"rounds": 1, "outer": {"name": "fedavg"}})
    with closing(consortium.coordinator({})) as coordinator:
        base, lines = coordinator.rounds.base(0), coordinator.ledger.lines()
    body = {"what": "train", "round": 0, "constitution": consortium.constitution.fingerprint, "base": base.fingerprint}
    body["ledger"] = {"begin": 0, "lines": lines}
    asked = seal("ask", body, base.tensors, key=consortium.keys["coordinator"])
    answer = consortium.node("north").handle(asked)
    (stored,) = (tmp_path / "north" / "answers").glob("*.msg")
    for damaged in (answer[:-5] + bytes([answer[-5] ^ 1]) + answer[-4:], answer[:100], b""):
        stored.write_bytes(damaged)
        assert consortium.node("north").handle(asked) == answer
        assert stored.read_bytes() == answer


def test_a_node_whose_stored_base_is_damaged_takes_the_next_one(tmp_path) -> None:
    consortium = Quick(tmp_path, rules={"outer": {"name": "fedavg"}})
    stored = tmp_path / "north" / "consortium" / "base.json"
    for number, content in enumerate((None, "[]", "{")):
        if content is not None:
            stored.write_text(content)
        with closing(consortium.coordinator()) as coordinator:
            coordinator.run_round(number)
        assert consortium.node("north").store.base()[0] == number
    assert not reasons(consortium)


def test_a_codec_with_drawn_rounding_works_in_a_round(tmp_path) -> None:
    consortium = Quick(tmp_path, rules={"rounds": 1, "codec": {"name": "int8", "rounding": "stochastic"}})
    run(consortium)
    assert not reasons(consortium)


def test_a_node_that_is_asked_again_says_the_same(woven) -> None:
    consortium, _ = woven
    base = RoundStore(consortium.path / "rounds").base(2)
    lines = Records(consortium.path / "rounds" / "ledger.jsonl").lines()
    body = {"what": "train", "round": 2, "constitution": consortium.constitution.fingerprint}
    body["ledger"] = {"begin": 0, "lines": lines}
    body["base"] = base.fingerprint
    asked = seal("ask", body, base.tensors, key=consortium.keys["coordinator"])
    said = consortium.node("south").handle(asked)
    assert said == RoundStore(consortium.path / "rounds").message(2, "south").read_bytes()


def test_a_base_goes_to_each_member_once_and_is_named_afterwards(tmp_path) -> None:
    consortium = Consortium(tmp_path, rules={"rounds": 2})
    nodes, brought, lost = {name: consortium.node(name) for name in OWNERS}, {name: [] for name in OWNERS}, []
    spoilt = []

    def hears(name: str):
        def handle(message: bytes) -> bytes:
            asked = unseal(message, kind="ask", known=consortium.constitution.known(), limit=10**9)
            brought[name].append((asked.body["what"], asked.body["round"], bool(asked.tensors)))
            if name == "south" and asked.body["what"] == "judge" and not lost:
                lost.append([file.unlink() for file in (tmp_path / "south" / "consortium").glob("received*")])
                nodes[name] = consortium.node(name)
            if name == "east" and asked.body["what"] == "train" and asked.body["round"] == 1 and not spoilt:
                spoilt.append([file.write_bytes(b"{") for file in (tmp_path / "east" / "consortium").glob("received*")])
                nodes[name] = consortium.node(name)
            return nodes[name].handle(message)

        return handle

    last = run(consortium, {name: hears(name) for name in OWNERS})
    expected = [
        ("train", 0, True), ("judge", 0, False), ("judge", 0, True),
        ("train", 1, False), ("judge", 1, False), ("judge", 1, True), ("store", 2, False),
    ]  # fmt: skip
    assert brought["north"] == expected
    # Whose disk lost it, or spoilt it, says so, and is sent it again.
    assert brought["east"] == [*expected[:4], ("train", 1, True), *expected[4:]]
    assert brought["south"] == [*expected[:2], ("judge", 0, True), *expected[2:]]
    assert {name: node.store.base()[1].fingerprint for name, node in nodes.items()} == dict.fromkeys(
        OWNERS, last.fingerprint
    )


def test_a_message_about_another_base_than_it_brings_is_refused(woven) -> None:
    consortium, last = woven
    node, base = consortium.node("north"), RoundStore(consortium.path / "rounds").base(0)
    body = {"what": "judge", "round": 3, "constitution": consortium.constitution.fingerprint, "base": "0" * 64}
    body["ledger"] = {"begin": 0, "lines": []}
    said = []
    for tensors in (base.tensors, {}):
        answer = node.handle(seal("ask", body, tensors, key=consortium.keys["coordinator"]))
        said.append(unseal(answer, kind="refusal", known=consortium.constitution.known(), limit=10**9).body)
    assert "expected 0000" in said[0]["why"]
    assert "lacks" not in said[0]
    assert said[1]["lacks"] is True
    assert node.store.base()[1].fingerprint == last.fingerprint


def test_a_pilots_base_is_one_file_and_fits_its_recipe(tmp_path) -> None:
    consortium = Consortium(tmp_path, rules={"align_steps": 8, "rounds": 1})
    untrained = initial_base(MODEL, points().spec, consortium.partition, seed=0)
    node = consortium.node("east")
    base = node.pilot(untrained)
    base.save_new(tmp_path / "pilot")
    with pytest.raises(StorageError, match="exists already"):
        base.save_new(tmp_path / "pilot")
    like = untrained.tensors
    read = Base.load(tmp_path / "pilot", like=like)
    assert read.fingerprint == base.fingerprint == node.pilot(untrained).fingerprint != untrained.fingerprint
    name = next(iter(like))
    with pytest.raises(DataError, match="Use the same recipe"):
        Base.load(tmp_path / "pilot", like={**like, name: like[name][:-1]})
    with pytest.raises(DataError, match="lacks"):
        Base.load(tmp_path / "pilot", like={**like, "more": like[name]})
    (tmp_path / "pilot.json").write_text("{")
    with pytest.raises(CheckpointError):
        Base.load(tmp_path / "pilot", like=like)


def test_a_pilot_needs_steps_and_goes_before_the_first_base(woven, tmp_path) -> None:
    consortium, last = woven
    with pytest.raises(DataError, match="align_steps, which is 0"):
        consortium.node("north").pilot(last)
    late = Consortium(tmp_path, rules={"align_steps": 4, "rounds": 1})
    run(late)
    with pytest.raises(DataError, match="before the first"):
        late.node("north").pilot(last)


# Shards of one world may be looked at through one scale.
STATISTICS = {"shared": ["encoder.*", "predictor.*", "normalise_actions.*"], "sovereign": ["norm.*", "action_stem.*"]}


def test_statistics_that_are_shared_are_the_pilots_and_no_round_moves_them(tmp_path) -> None:
    consortium = Consortium(tmp_path, rules={"partition": STATISTICS, "align_steps": 8, "rounds": 2})
    untrained = initial_base(MODEL, points().spec, consortium.partition, seed=0)
    pilot = consortium.node("east")
    base, training = pilot.pilot(untrained), pilot._training
    measured = {name: base.tensors[name] for name in training.shared_statistics}
    drawn_from, _ = training.frames.split(consortium.training.validation_share, consortium.training.seed)
    rows = [training.frames.rows(one) for one in drawn_from.tolist()]
    seen = torch.from_numpy(np.concatenate([training.frames.vector[one] for one in rows]))
    normal = (seen - base.tensors["encoder.standardise.shift"]) * base.tensors["encoder.standardise.scale"]
    torch.testing.assert_close(normal.mean(0), torch.zeros(4), atol=1e-4, rtol=0)
    torch.testing.assert_close(normal.std(0, correction=0), torch.ones(4), atol=1e-3, rtol=0)
    assert set(measured) == {
        f"{part}.{name}" for part in ("encoder.standardise", "normalise_actions") for name in ("shift", "scale")
    }  # fmt: skip
    assert not any(torch.equal(untrained.tensors[name], tensor) for name, tensor in measured.items())
    with closing(consortium.coordinator(initial=base)) as coordinator:
        last = coordinator.run()
    assert any(not torch.equal(last.tensors[name], base.tensors[name]) for name in set(last.tensors) - set(measured))
    north = consortium.node("north")._training
    moved = {name: tensor + 1 if name in measured else tensor for name, tensor in last.tensors.items()}
    trained = north.train("after somebody moved them", Base.of(moved), 2)
    for name, tensor in measured.items():
        assert torch.equal(trained.after[name] - trained.before[name], tensor - moved[name])
    for state in (
        base.tensors,
        last.tensors,
        *(load_model(tmp_path / name / "run" / "model").state_dict() for name in OWNERS),
    ):
        for name, tensor in measured.items():
            assert torch.equal(state[name], tensor)


def test_statistics_are_shared_neither_untrained_nor_under_noise(tmp_path) -> None:
    partition = PartitionConfig.parse(STATISTICS)
    with pytest.raises(ConfigError, match=r"'encoder.standardise.scale' is a statistic that is measured.*weave pilot"):
        check_has_a_pilot(MODEL, points().spec, partition)
    check_has_a_pilot(MODEL, points().spec, PartitionConfig())
    noisy = Consortium(tmp_path, rules={"partition": STATISTICS, "privacy": {"clip": 1.0, "noise": 0.5}})
    with pytest.raises(ConfigError, match=r"'encoder.standardise.scale', a statistic"):
        noisy.node("north")


def test_a_node_hears_a_coordinator_alone_and_its_own_constitution(woven) -> None:
    consortium, _ = woven
    node, base = consortium.node("north"), RoundStore(consortium.path / "rounds").base(0)
    body = {"what": "train", "round": 0, "constitution": consortium.constitution.fingerprint}
    with pytest.raises(DataError, match="unknown sender"):
        node.handle(seal("ask", body, base.tensors, key=consortium.keys["east"]))
    for changed, message in (
        ({"constitution": "other"}, "a different constitution"),
        ({"what": "send data"}, "expected a request to"),
    ):
        answer = node.handle(seal("ask", {**body, **changed}, base.tensors, key=consortium.keys["coordinator"]))
        refusal = unseal(answer, kind="refusal", known=consortium.constitution.known(), limit=10**9)
        assert message in refusal.body["why"]


def test_who_does_not_answer_in_time_is_gone_without_and_written_down(tmp_path) -> None:
    consortium = Consortium(tmp_path, rules={"timeout_seconds": 20, "rounds": 1})

    def broken(message: bytes) -> bytes:
        raise OSError("the disk is gone")

    run(consortium, {"east": broken})
    assert reasons(consortium) == ["OSError: the disk is gone"]
    (entry,) = Records(tmp_path / "rounds" / "ledger.jsonl").entries("round")
    assert set(entry.body["facts"]["weights"]) == {"north", "south"}


def test_below_the_quorum_a_round_waits_for_members_and_keeps_what_came(tmp_path) -> None:
    consortium = Consortium(tmp_path, rules={"rounds": 1})

    def gone(message: bytes) -> bytes:
        raise OSError("gone")

    with pytest.raises(TrainingError, match="1 contributions but needs 2"):
        run(consortium, {"east": gone, "south": gone})
    run(consortium, {"south": gone})
    stored = (tmp_path / "rounds" / "contributions" / "00000").glob("*.msg")
    assert {path.stem for path in stored} == {"north", "east"}


def test_a_replayed_contribution_is_refused(tmp_path) -> None:
    consortium = Consortium(tmp_path, rules={"rounds": 2})
    node, said = consortium.node("east"), []

    def replays(message: bytes) -> bytes:
        asked = unseal(message, kind="ask", known=consortium.constitution.known(), limit=10**9)
        if asked.body["what"] == "train":
            said.append(node.handle(message))
            return said[0]
        return node.handle(message)

    run(consortium, {"east": replays})
    (reason,) = reasons(consortium)
    assert reason.startswith("the contribution of east has round 0; expected 1. ")


def test_a_borrowed_contribution_is_refused(tmp_path) -> None:
    consortium = Consortium(tmp_path, rules={"rounds": 1})
    run(consortium, {"south": consortium.node("east").handle})
    said = "south sent a message that east signed; expected one signed by south. "
    assert [reason.partition(said)[0] for reason in reasons(consortium)] == ["", "judge: ", "store: "]


def test_what_private_data_taught_never_shapes_the_base(tmp_path) -> None:
    consortium = Consortium(tmp_path, rules={"rounds": 1}, classes={"east": "private"})
    run(consortium)
    assert "private data" in reasons(consortium)[0]


def test_a_privacy_budget_ends_the_rounds_and_the_ledger_says_what_was_spent(tmp_path) -> None:
    once = gaussian_epsilon(2.0, 1e-5)
    privacy = {"clip": 0.5, "noise": 2.0, "delta": 1e-5, "epsilon_budget": 1.2 * once}
    consortium = Consortium(tmp_path, rules={"privacy": privacy, "quality": {"max_worse": 1e6}})
    with pytest.raises(TrainingError, match="round 1 has 0 contributions"):
        run(consortium)
    records = Records(tmp_path / "rounds" / "ledger.jsonl")
    first = records.of("contribution", 0)
    assert {facts["owner"] for facts in first} == set(OWNERS)
    assert all(facts["spent"]["epsilon"] == pytest.approx(once) for facts in first)
    assert all("budget" in reason for reason in reasons(consortium))


@pytest.mark.parametrize("secure", [False, True])
def test_a_lost_count_of_spent_privacy_does_not_begin_again(tmp_path, secure) -> None:
    privacy = {"clip": 1.0, "noise": 3.0, "delta": 1e-5, "epsilon_budget": 3.0}
    rules = {"rounds": 6, "privacy": privacy, "aggregation": {"name": "mean"}, "secure_aggregation": secure}
    consortium = Quick(tmp_path, rules={"outer": {"name": "fedavg"}, **rules})
    nodes = {name: consortium.node(name) for name in OWNERS}

    def weave() -> list[float]:
        with closing(consortium.coordinator({name: node.handle for name, node in nodes.items()})) as coordinator:
            with pytest.raises(TrainingError):
                coordinator.run()
            found = [entry.body["facts"] for entry in coordinator.ledger.entries("contribution")]
        return [facts["spent"]["epsilon"] for facts in found if facts["owner"] == "north"]

    spent = weave()
    assert spent == sorted(set(spent))
    (tmp_path / "north" / "privacy.json").unlink()
    (tmp_path / "east" / "privacy.json").write_text("[]")
    (tmp_path / "south" / "privacy.json").write_text("{}")
    assert weave() == spent
    assert any("state is invalid" in reason for reason in reasons(consortium))


def test_a_member_that_reports_less_spent_privacy_than_before_is_refused_and_no_reader_takes_it(tmp_path) -> None:
    privacy = {"clip": 1.0, "noise": 3.0, "delta": 1e-5}
    rules = {"rounds": 2, "privacy": privacy, "outer": {"name": "fedavg"}}
    consortium = Quick(tmp_path, rules=rules)
    nodes = {name: consortium.node(name) for name in OWNERS}
    with closing(consortium.coordinator({name: node.handle for name, node in nodes.items()})) as coordinator:
        coordinator.run_round(0)
        spend = nodes["east"]._spend
        nodes["east"]._spend = lambda *of: {**spend(*of), "epsilon": 0.5}
        base = coordinator.rounds.base(1)
        assert set(coordinator._gather(1, base)) == {"north", "south"}
        coordinator._members.check_spent = lambda *of: None
        (answer,) = coordinator._members.exchange(["east"], {"what": "train", "round": 1}, base, kind="contribution")
        coordinator._accept(1, base, answer[1])
    (reason,) = reasons(consortium)
    assert reason.startswith("east reports a spent epsilon of 0.5, but has reported 1.271 before")
    why = verify_ledger(tmp_path / "rounds" / "ledger.jsonl", consortium.constitution).why
    assert why == "is a contribution of east that reports less spent privacy than an earlier one"


def test_what_leaves_under_privacy_is_clipped_and_noisy_and_without_it_is_refused(tmp_path) -> None:
    privacy = {"clip": 0.05, "noise": 0.01, "delta": 1e-5}
    consortium = Consortium(tmp_path, rules={"rounds": 1, "privacy": privacy, "quality": {"max_worse": 1e6}})
    node = consortium.node("east")

    def plain(message: bytes) -> bytes:
        answer = node.handle(message)
        try:
            said = unseal(answer, kind="contribution", known=consortium.constitution.known(), limit=10**9)
        except DataError:
            return answer
        return seal("contribution", {**said.body, "spent": {}}, said.tensors, key=consortium.keys["east"])

    run(consortium, {"east": plain})
    promised = "{'clip': 0.05, 'noise': 0.01, 'delta': 1e-05}"
    (reason,) = reasons(consortium)
    assert reason.startswith(
        f"the privacy settings of east are not those of the constitution; expected {promised}, got {{}}. "
    )
    rounds = RoundStore(tmp_path / "rounds")
    delta = safetensors.torch.load_file(rounds.delta(0, "north"))
    count = sum(tensor.numel() for tensor in delta.values())
    assert delta_norm(delta) < 0.05 + 2 * 0.05 * 0.01 * count**0.5


def test_a_poisoned_contribution_is_left_out_by_the_others_held_out_losses(tmp_path) -> None:
    rules = {"rounds": 1, "aggregation": {"name": "mean"}, "outer": {"name": "fedavg"}, "quality": {"max_worse": 0.05}}
    consortium = Consortium(tmp_path, rules=rules)
    node = consortium.node("east")

    def poisons(message: bytes) -> bytes:
        answer = node.handle(message)
        try:
            said = unseal(answer, kind="contribution", known=consortium.constitution.known(), limit=10**9)
        except DataError:
            return answer
        tensors = {name: -100 * tensor for name, tensor in said.tensors.items()}
        return seal("contribution", said.body, tensors, key=consortium.keys["east"])

    run(consortium, {"east": poisons})
    (entry,) = Records(tmp_path / "rounds" / "ledger.jsonl").entries("round")
    assert entry.body["facts"]["left_out"] == ["east"]
    assert entry.body["facts"]["evaluation"]["after"] < entry.body["facts"]["evaluation"]["before"]


def test_int8_with_error_feedback_weaves_as_well_with_far_fewer_bytes(woven, tmp_path) -> None:
    whole, last = woven
    small = Consortium(tmp_path, rules={"codec": {"name": "int8"}})
    base = run(small)
    sizes = []
    for each in (whole, small):
        known, total = each.constitution.known(), 0
        for path in each.path.glob("rounds/contributions/*/*.msg"):
            message = unseal(path.read_bytes(), kind="contribution", known=known, limit=10**9)
            total += bytes_of(message.tensors)
        sizes.append(total)
    assert sizes[1] < 0.45 * sizes[0]  # the scales of rows weigh much beside so small a model
    training = small.node("north")._training
    first, second = (
        held_out_losses(small.training, MODEL, training.frames, training.run, each.tensors)["total"]
        for each in (last, base)
    )
    assert abs(second / first - 1) < 0.1
    assert (tmp_path / "north" / "codec" / "residual-00002.json").is_file()


def test_a_disk_that_is_full_ends_the_round_and_loses_nothing(woven, tmp_path, monkeypatch) -> None:
    consortium, last = woven
    shutil.copytree(consortium.path / "keys", tmp_path / "keys")
    broken = Consortium(tmp_path)
    coordinator = broken.coordinator()
    whole, left = store_module.write_atomic, [3]

    def full(path: Path, write) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise StorageError(f"{path}: no space left on device")
        whole(path, write)

    monkeypatch.setattr(store_module, "write_atomic", full)
    with pytest.raises(StorageError, match="no space left"):
        coordinator.run()
    coordinator.close()
    monkeypatch.setattr(store_module, "write_atomic", whole)
    again = broken.coordinator()
    ended = again.run()
    again.close()
    assert ended.fingerprint == last.fingerprint
    assert verify_ledger(tmp_path / "rounds" / "ledger.jsonl", broken.constitution).broken is None


@pytest.mark.parametrize("pages", [4, 5, 7, 10])
def test_wherever_a_real_disk_is_full_the_error_says_so(woven, tmp_path, pages) -> None:
    consortium, last = woven
    shutil.copytree(consortium.path / "keys", tmp_path / "keys")
    broken, rounds = Consortium(tmp_path), tmp_path / "rounds"
    rounds.mkdir()
    small = ["mount", "-t", "tmpfs", "-o", f"size={4 * pages}k", "tmpfs", str(rounds)]
    if subprocess.run(small, check=False, capture_output=True).returncode:
        pytest.skip("needs the right to mount a small disk")
    try:
        with pytest.raises(StorageError, match="the disk is full; free some space"):
            run(broken)
        for thread in threading.enumerate():  # the nodes go on with what they were asked
            if thread.name == "worldloom-nodes":
                thread.join()
        subprocess.run(["mount", "-o", "remount,size=4m", str(rounds)], check=True)
        assert run(broken).fingerprint == last.fingerprint
        assert verify_ledger(rounds / "ledger.jsonl", broken.constitution).broken is None
    finally:
        subprocess.run(["umount", str(rounds)], check=True)


def test_a_node_of_another_model_refuses_and_the_round_goes_on_without_it(tmp_path) -> None:
    consortium = Consortium(tmp_path, rules={"rounds": 1})
    node = consortium.node("south")
    node._training.model = MODEL.override(["latent_dim=5"])
    coordinator = consortium.coordinator({"south": node.handle})
    coordinator.run()
    coordinator.close()
    records = Records(tmp_path / "rounds" / "ledger.jsonl")
    (refusal,) = [entry.body["facts"] for entry in records.entries("refusal")]
    assert refusal["owner"] == "south"
    assert "of the same model" in refusal["reason"]
    assert {tuple(entry.body["facts"]["weights"]) for entry in records.entries("round")} == {("east", "north")}


def test_another_constitution_or_key_does_not_go_on_in_the_folder(woven, tmp_path) -> None:
    consortium, _ = woven
    other = Consortium(consortium.path, rules={"quorum": 3})
    with pytest.raises(DataError, match="a different constitution"):
        other.coordinator()
    consortium.keys = {**consortium.keys, "coordinator": consortium.keys["east"]}
    with pytest.raises(DataError, match="not the key of a coordinator"):
        consortium.coordinator()


def nested(depth: int) -> list:
    inner: list = []
    for _ in range(depth):
        inner = [inner]
    return inner


@pytest.mark.parametrize("spent", [{"x": nested(20)}, {"x": nested(900)}, {"x": 1.0}, {"epsilon": "much"}])
def test_what_a_member_says_of_its_privacy_cannot_spoil_the_ledger(tmp_path, spent) -> None:
    consortium = Consortium(tmp_path, rules={"rounds": 1, "inner_steps": 4})
    node = consortium.node("south")

    def boasts(message: bytes) -> bytes:
        answer = node.handle(message)
        try:
            known = {consortium.keys["south"].public: "south"}
            said = unseal(answer, kind="contribution", known=known, limit=10**7)
        except DataError:
            return answer
        return forged(consortium, "south", "contribution", {**said.body, "spent": spent}, said.tensors)

    run(consortium, {"south": boasts})
    assert any("south" in why or "header" in why for why in reasons(consortium))
    assert verify_ledger(tmp_path / "rounds" / "ledger.jsonl", consortium.constitution).broken is None
    records = Records(tmp_path / "rounds" / "ledger.jsonl")
    assert {tuple(entry.body["facts"]["weights"]) for entry in records.entries("round")} == {("east", "north")}


def forged(consortium: Consortium, name: str, kind: str, body: dict, tensors) -> bytes:
    """Return a message that a member signs, whatever it says."""
    import json
    import struct

    whole = seal(kind, {}, tensors, key=consortium.keys[name])
    (length,) = struct.unpack_from("<I", whole, 8)
    values = json.loads(whole[12 : 12 + length])
    header = json.dumps({**values, "body": body}, sort_keys=True, separators=(",", ":")).encode("ascii")
    said = struct.pack("<I", len(header)) + header
    signature = consortium.keys[name].sign(said, Domain.MESSAGE)
    return whole[:8] + said + bytes.fromhex(signature) + whole[12 + length + 64 :]


@pytest.mark.parametrize("change", [
    {"losses": {"total": "nan"}}, {"losses": {"total": 0}}, {"losses": {"total": -1.0}}, {"losses": 3},
    {"countersigned": {"x": 1}}, {"countersigned": None},
])  # fmt: skip
def test_a_verdict_that_is_none_ends_no_round(tmp_path, change) -> None:
    consortium = Consortium(tmp_path, rules={"rounds": 1, "inner_steps": 4})
    node = consortium.node("south")

    def judges(message: bytes) -> bytes:
        answer = node.handle(message)
        try:
            known = {consortium.keys["south"].public: "south"}
            said = unseal(answer, kind="verdict", known=known, limit=10**7)
        except DataError:
            return answer
        return seal("verdict", {**said.body, **change}, {}, key=consortium.keys["south"])

    run(consortium, {"south": judges})
    records = Records(tmp_path / "rounds" / "ledger.jsonl")
    (facts,) = [entry.body["facts"] for entry in records.entries("round")]
    assert set(facts["evaluation"]["owners"]) == {"east", "north"}
    assert verify_ledger(tmp_path / "rounds" / "ledger.jsonl", consortium.constitution).broken is None


def test_a_long_request_does_not_fill_the_log_of_a_node(tmp_path, caplog) -> None:
    consortium = Quick(tmp_path)
    body = {"constitution": consortium.constitution.fingerprint, "what": "x" * 10**6}
    answer = consortium.node("north").handle(seal("ask", body, {}, key=consortium.keys["coordinator"]))
    refusal = unseal(answer, kind="refusal", known=consortium.constitution.known(), limit=10**9)
    assert len(refusal.body["why"]) == 1000
    assert max(len(record.message) for record in caplog.records) < 1100


@pytest.mark.parametrize("secure", [False, True])
def test_a_contribution_with_a_head_before_its_base_is_refused_and_the_ledger_stays_valid(tmp_path, secure) -> None:
    sums = {"aggregation": {"name": "mean"}, "secure_aggregation": True} if secure else {}
    consortium = Quick(tmp_path, rules={"rounds": 2, "outer": {"name": "fedavg"}, **sums})
    east, kind = consortium.node("east"), "advertised" if secure else "contribution"

    def older(message: bytes) -> bytes:
        answer = east.handle(message)
        try:
            said = unseal(answer, kind=kind, known=consortium.constitution.known(), limit=10**9)
        except DataError:
            return answer
        first = next(Records(tmp_path / "rounds" / "ledger.jsonl").entries())
        seen = {"length": 1, "hash": first.hash}
        return seal(kind, {**said.body, "seen": seen}, said.tensors, key=consortium.keys["east"])

    run(consortium, {"east": older})
    assert verify_ledger(tmp_path / "rounds" / "ledger.jsonl", consortium.constitution).broken is None
    assert all("east signed a contribution after it had seen 1 entries" in reason for reason in reasons(consortium))
    assert len(reasons(consortium)) == 2


def test_losses_that_are_not_numbers_are_a_refusal_with_the_cause(tmp_path) -> None:
    consortium = Quick(tmp_path, rules={"rounds": 1}, loss=lambda base: float("nan"))
    base = initial_base(MODEL, points().spec, consortium.partition, seed=0)
    with closing(consortium.coordinator({})) as coordinator:
        lines = coordinator.ledger.lines()
    body = {"what": "judge", "round": 0, "constitution": consortium.constitution.fingerprint, "base": base.fingerprint}
    asked = seal(
        "ask", {**body, "ledger": {"begin": 0, "lines": lines}}, base.tensors, key=consortium.keys["coordinator"]
    )
    answer = consortium.node("north").handle(asked)
    refusal = unseal(answer, kind="refusal", known=consortium.constitution.known(), limit=10**6)
    assert refusal.body["why"] == "the held-out loss with this base is nan, so the base is of no use"
