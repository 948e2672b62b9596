"""No number that another party states stops a consortium or a view of it, whatever message or entry carries it."""

import contextlib
import copy
import hashlib
import io
import json
import tempfile
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from consortium import OWNERS, Consortium
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel
from rich.console import Console
from typer.testing import CliRunner

from forging import contribution
from worldloom.cli.main import app
from worldloom.cli.weave_watch import live, picture, watch, watch_json
from worldloom.core.chain import canonical
from worldloom.core.errors import DataError, WorldloomError
from worldloom.core.signing import Domain
from worldloom.federation import (
    Base,
    Ledger,
    LedgerWatch,
    Node,
    Records,
    Trained,
    model_card,
    ratify,
    read_history,
    read_ledger,
    verify_ledger,
)
from worldloom.federation.record.bodies import ANSWERS, ASKS
from worldloom.federation.record.envelope import SignedMessage, seal, unseal
from worldloom.federation.rounds.release import unmet
from worldloom.reports.consortium_report import render_consortium_report

NASTY = [10**400, -(10**400), 2**63, 2**53, -1, 0, 1, 0.5, 1e308, -1e308, 5e-324, True, "1", None, [], {}]
PRIVATE = {"privacy": {"clip": 1.0, "noise": 0.8, "epsilon_budget": 80.0}}
SECURE = {"secure_aggregation": True, "aggregation": {"name": "mean"}, "weighting": "sqrt-frames", **PRIVATE}
RULES = {"rounds": 1, "inner_steps": 2, "timeout_seconds": 20}
WEIGHED = {**RULES, "weighting": "frames", **PRIVATE}

Change = Callable[[str, dict[str, Any]], dict[str, Any]]
"""Gets what a message is (the kind of an answer, what a request asks) and its body; returns another body."""


def instant(consortium: Consortium, name: str) -> Node:
    """Return a node that neither trains nor judges: its answers come at once, and depend on nothing."""
    node = consortium.node(name)

    def train(title: str, base: Base, steps: int, **_: Any) -> Trained:
        after = {key: tensor + 0.01 for key, tensor in base.tensors.items()}
        return Trained(before=base.tensors, after=after, steps=steps, frames=90)

    node._training.train = train
    node._training.judge = lambda base: {"total": 1.0, "prediction": 0.5}
    return node


def run(consortium: Consortium, *, answers: Change | None = None, asks: Change | None = None) -> dict[str, list[Any]]:
    """Run all rounds; east's answers and the requests to east are changed and signed again; return all bodies."""
    seen: dict[str, list[Any]] = {}
    known = consortium.constitution.known()

    def listening(name: str) -> Callable[[bytes], bytes]:
        node = instant(consortium, name)

        def handle(data: bytes) -> bytes:
            asked = unseal(data, kind="ask", known=known, limit=10**8)
            what = asked.body["what"]
            seen.setdefault(what, []).append(asked.body)
            if asks is not None and name == "east":
                data = again(asked, asks(what, copy.deepcopy(dict(asked.body))), consortium, "coordinator")
            said = opened(node.handle(data), known)
            seen.setdefault(said.kind, []).append(said.body)
            if answers is None or name != "east":
                return said.data
            return again(said, answers(said.kind, copy.deepcopy(dict(said.body))), consortium, name)

        return handle

    with contextlib.closing(consortium.coordinator({name: listening(name) for name in OWNERS})) as coordinator:
        coordinator.run()
    return seen


def opened(data: bytes, known: Mapping[str, str]) -> SignedMessage:
    for kind in ANSWERS:
        with contextlib.suppress(DataError):
            return unseal(data, kind=kind, known=known, limit=10**8)
    raise AssertionError("no node may send a message of another kind")


def again(message: SignedMessage, body: dict[str, Any], consortium: Consortium, signer: str) -> bytes:
    return seal(message.kind, body, message.tensors, key=consortium.keys[signer])


def numeric_fields(model: Any) -> Iterator[tuple[str, ...]]:
    """Yield the path of each number in a model; `*` stands for any key of a mapping or place in a list."""
    for name, field in model.model_fields.items():
        for path in _numbers_in(field.annotation):
            yield (name, *path)


def _numbers_in(annotation: Any) -> Iterator[tuple[str, ...]]:
    origin, inside = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation in (int, float):
        yield ()
    elif isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield from numeric_fields(annotation)
    elif origin is typing.Annotated:
        yield from _numbers_in(inside[0])
    elif origin is typing.Literal and type(inside[0]) is int:
        yield ()
    elif origin in (typing.Union, types.UnionType):
        yield from {path for one in inside for path in _numbers_in(one)}
    elif origin in (dict, Mapping, list, tuple):
        yield from {("*", *path) for one in inside for path in _numbers_in(one)}


def put(body: Any, path: tuple[str, ...], value: Any) -> Any:
    """Return a body with another value at a path; what is not there is added."""
    if not path:
        return value
    if not isinstance(body, dict):
        body = {}
    name = next(iter(body), "x") if path[0] == "*" else path[0]
    return {**body, name: put(body.get(name), path[1:], value)}


FIELDS = [
    (side, what, path)
    for side, models in (("answers", ANSWERS), ("asks", ASKS))
    for what, model in models.items()
    for path in numeric_fields(model)
]


def views(rounds: Path, consortium: Consortium, *, report: bool = False) -> None:
    """Use every view of a ledger; none of them may raise."""
    constitution, rules_file = consortium.constitution, consortium.path / "constitution.yaml"
    if not rules_file.is_file():
        rules_file.write_text(json.dumps(constitution.model_dump(mode="json")))
        for name in OWNERS:
            ratify(rules_file, name, consortium.keys[name])
    records = read_ledger(rounds / "ledger.jsonl", constitution)
    text = Console(file=io.StringIO(), width=100)
    for rules in (constitution, None):
        text.print(picture(read_history(records.entries(), rules), now=1e9, width=100))
    LedgerWatch(rounds, constitution).look()
    with contextlib.redirect_stdout(io.StringIO()):
        watch(rounds, constitution, once=True, console=text)
        watch_json(rounds, constitution, once=True)
    with live(rounds, constitution, console=text):
        pass
    model_card(records)
    with contextlib.suppress(WorldloomError):
        unmet(rounds, constitution)
    for options in ([], ["--json"]):
        command = ["weave", "ledger", "show", str(rounds), "--constitution", str(rules_file), *options]
        shown = CliRunner().invoke(app, command, catch_exceptions=False)
        assert shown.exit_code == 0, shown.output
    if report:
        render_consortium_report(rounds, constitution)


def reasons(consortium: Consortium) -> list[str]:
    records = Records(consortium.path / "rounds" / "ledger.jsonl")
    return [
        f"{facts['owner']}: {facts['reason']}" for facts in (one.body["facts"] for one in records.entries("refusal"))
    ]


@pytest.fixture(scope="module")
def conversations(tmp_path_factory) -> dict[str, list[Any]]:
    """The bodies of all messages of rounds in the open, of a secure sum, and of a node that leaves."""
    plain, secure = (
        Consortium(tmp_path_factory.mktemp("numbers"), rules=rules) for rules in (WEIGHED, {**RULES, **SECURE})
    )
    seen = run(plain)
    for kind, bodies in run(secure).items():
        seen.setdefault(kind, []).extend(bodies)
    gone = Consortium(tmp_path_factory.mktemp("numbers"), rules=RULES)
    gone.node("south").leave("a new job")
    for kind, bodies in run(gone).items():
        seen.setdefault(kind, []).extend(bodies)
    return seen


def test_every_message_of_a_consortium_has_a_model_that_it_satisfies(conversations) -> None:
    assert set(conversations) == {*ANSWERS, *ASKS}
    for what, bodies in conversations.items():
        for body in bodies:
            {**ANSWERS, **ASKS}[what].model_validate(dict(body))


def test_every_number_in_a_message_has_a_range() -> None:
    assert len(FIELDS) > 40
    for side, what, path in FIELDS:
        model: Any = {"answers": ANSWERS, "asks": ASKS}[side][what]
        for value in (10**400, -(10**400), 1e308, -1e308, float("inf"), float("nan"), "1", True):
            try:
                model.model_validate(put({}, path, value))
            except ValueError as error:
                wrong = [item["loc"] for item in error.errors()]
                assert any(len(place) == len(path) and place[0] == path[0] for place in wrong), (what, path, value)
            else:
                raise AssertionError((what, path, value))


@settings(max_examples=15)
@given(
    st.sampled_from(FIELDS), st.sampled_from(NASTY) | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
)
@example(("answers", "contribution", ("frames",)), 10**400)
@example(("answers", "contribution", ("frames",)), 0)
@example(("answers", "contribution", ("spent", "epsilon")), 10**400)
@example(("answers", "verdict", ("losses", "*")), 10**400)
@example(("answers", "verdict", ("losses", "*")), 5e-324)
@example(("answers", "verdict", ("losses", "*")), 1.7e308)
@example(("answers", "advertised", ("frames",)), 10**400)
@example(("answers", "masked", ("spent", "epsilon")), 10**400)
@example(("asks", "train", ("round",)), 10**400)
@example(("asks", "judge", ("round",)), None)
def test_no_number_in_a_message_stops_a_round_or_a_view(field: tuple[str, str, tuple[str, ...]], value: Any) -> None:
    side, what, path = field

    def change(found: str, body: dict[str, Any]) -> dict[str, Any]:
        return put(body, path, value) if found == what else body

    secure = what in ("advertised", "shared", "masked", "unmasked", "advertise", "share", "mask", "unmask")
    with tempfile.TemporaryDirectory() as folder:
        consortium = Consortium(Path(folder), rules={**RULES, **SECURE} if secure else WEIGHED)
        run(consortium, **{side: change})  # and it ends, with the others
        rounds = consortium.path / "rounds"
        assert verify_ledger(rounds / "ledger.jsonl", consortium.constitution).broken is None
        assert max(Records(rounds / "ledger.jsonl").bases()) == 1
        run(consortium)  # it starts again
        views(rounds, consortium)


@pytest.mark.parametrize("path", [("frames",), ("spent", "epsilon")])
def test_a_number_out_of_range_is_a_refusal_with_its_cause(tmp_path, path) -> None:
    consortium = Consortium(tmp_path, rules=WEIGHED)
    run(consortium, answers=lambda kind, body: put(body, path, 10**400) if kind == "contribution" else body)
    (said,) = {why for why in reasons(consortium) if why.startswith("east")}
    assert f"the contribution of east is invalid: {'.'.join(path)}: " in said


def test_a_loss_out_of_range_is_a_refusal_that_leaves_the_contribution(tmp_path) -> None:
    consortium = Consortium(tmp_path, rules=WEIGHED)
    run(consortium, answers=lambda kind, body: put(body, ("losses", "total"), 10**400) if kind == "verdict" else body)
    (said,) = reasons(consortium)
    assert said.startswith("east: judge: the verdict of east is invalid: losses.total: ")
    records = Records(tmp_path / "rounds" / "ledger.jsonl")
    assert read_history(records.entries(), consortium.constitution).rounds[0].state("east") == "contributed"


@pytest.mark.parametrize(
    "rules", [{"codec": {"name": "float32"}}, {"codec": {"name": "int8"}}, {"outer": {"name": "fedavg"}}]
)
def test_a_delta_out_of_range_is_a_refusal_with_its_cause(tmp_path, rules) -> None:
    consortium = Consortium(tmp_path, rules={**RULES, "aggregation": {"name": "mean"}, **rules})
    node = instant(consortium, "east")

    def boasts(data: bytes) -> bytes:
        said = opened(node.handle(data), consortium.constitution.known())
        if said.kind != "contribution":
            return said.data
        grown = {
            name: torch.full_like(part, 3e38) if part.is_floating_point() else part.fill_(127)
            for name, part in said.tensors.items()
        }
        return seal(said.kind, said.body, grown, key=consortium.keys["east"])

    handlers = {name: instant(consortium, name).handle for name in OWNERS} | {"east": boasts}
    with contextlib.closing(consortium.coordinator(handlers)) as coordinator:
        coordinator.run()
    assert any("east: tensor" in why and "at most 1.27e+30" in why for why in reasons(consortium))


@pytest.mark.parametrize("shape", [[2**63, 0], [2**64 - 1, 0], [2**62, 2**62, 0], [10**400, 0], [-1, 0], [0.5, 0]])
def test_a_size_out_of_range_of_a_tensor_is_an_invalid_message(tmp_path, shape) -> None:
    consortium = Consortium(tmp_path, rules=RULES)
    text = json.dumps({"a": {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}}).encode()
    payload = len(text).to_bytes(8, "little") + text
    values = {"kind": "contribution", "body": {}, "size": len(payload), "digest": hashlib.sha256(payload).hexdigest()}
    header = canonical({**values, "key": consortium.keys["east"].public}).encode("ascii")
    said = len(header).to_bytes(4, "little") + header
    signature = bytes.fromhex(consortium.keys["east"].sign(said, Domain.MESSAGE))
    data = Domain.MESSAGE.value + said + signature + payload
    with pytest.raises(DataError, match="the tensors in a message from east cannot be read"):
        unseal(data, kind="contribution", known=consortium.constitution.known(), limit=10**6)


def test_a_sum_that_is_not_finite_is_a_refusal_of_its_member_with_the_cause(tmp_path) -> None:
    """A delta that an earlier version let in: the quality gate has no say, because nobody judges."""
    consortium = Consortium(tmp_path, rules={**RULES, "aggregation": {"name": "mean"}, "outer": {"name": "fedavg"}})
    nodes = {name: instant(consortium, name) for name in OWNERS}
    for node in nodes.values():
        node._training.judge = lambda base: {}
    coordinator = consortium.coordinator({name: node.handle for name, node in nodes.items()})
    base = coordinator.rounds.base(0)
    coordinator._gather(0, base)
    huge = {name: torch.full_like(tensor, 3e38) for name, tensor in base.tensors.items()}
    coordinator.rounds.save_delta(0, "east", huge)
    coordinator.run()
    coordinator.close()
    (said,) = [why for why in reasons(consortium) if ": judge: " not in why]
    assert said.startswith("east: the next base cannot be computed with it: DataError: tensor")
    (facts,) = [one.body["facts"] for one in Records(tmp_path / "rounds" / "ledger.jsonl").entries("round")]
    assert set(facts["weights"]) == {"north", "south"}
    assert facts["left_out"] == ["east"]


def test_a_recorded_number_that_no_member_may_sign_is_found_at_the_start(tmp_path) -> None:
    consortium = Consortium(tmp_path, rules=WEIGHED)
    coordinator = consortium.coordinator({name: instant(consortium, name).handle for name in OWNERS})
    coordinator._gather(0, coordinator.rounds.base(0))
    facts = {**coordinator.ledger.of("contribution", 0)[0], "owner": "east", "frames": 10**400}
    coordinator.ledger.append("contribution", facts, round=0)
    coordinator.close()
    with pytest.raises(DataError, match=r"entry \d+ is not a contribution that a member signed"):
        run(consortium)


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of each value in nested mappings and lists, and of the mappings and lists themselves."""
    yield path
    for key, part in value.items() if isinstance(value, dict) else enumerate(value if isinstance(value, list) else ()):
        yield from leaves(part, (*path, key))


def changed(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    if not path:
        return new
    value = copy.copy(value)
    value[path[0]] = changed(value[path[0]], path[1:], new)
    return value


@pytest.fixture(scope="module")
def told(tmp_path_factory) -> tuple[Consortium, list[dict[str, Any]]]:
    """A consortium, and its entries without those that countersign others."""
    consortium = Consortium(tmp_path_factory.mktemp("told"), rules={**WEIGHED, "rounds": 2})
    run(consortium)
    bodies = [dict(entry.body) for entry in Records(consortium.path / "rounds" / "ledger.jsonl").entries()]
    bodies.append({"kind": "refusal", "round": 1, "facts": {"owner": "east", "reason": "late"}})
    return consortium, [body for body in bodies if body["kind"] != "checkpoint"]


@settings(max_examples=25)
@given(st.data())
def test_no_view_raises_on_a_ledger_that_verifies(told, data) -> None:
    _look_at_a_changed_ledger(told, data, report=False)


@pytest.mark.slow
@settings(max_examples=25)
@given(st.data())
def test_no_report_raises_on_a_ledger_that_verifies(told, data) -> None:
    _look_at_a_changed_ledger(told, data, report=True)


def _look_at_a_changed_ledger(told: tuple[Consortium, list[dict[str, Any]]], data: Any, *, report: bool) -> None:
    consortium, bodies = told
    entries = [(body["kind"], body["round"], json.loads(json.dumps(body["facts"]))) for body in bodies]
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(1, len(entries) - 1))  # the first one names the constitution
        kind, number, facts = entries[place]
        value = data.draw(st.sampled_from(NASTY))
        path = data.draw(st.sampled_from([("round",), *leaves(facts)]))
        if path == ("round",):
            entries[place] = (kind, value if type(value) is int or value is None else number, facts)
        elif path:
            entries[place] = (kind, number, changed(facts, path, value))
    with tempfile.TemporaryDirectory() as folder:
        rounds = Path(folder)
        with Ledger(rounds / "ledger.jsonl", consortium.keys["coordinator"], durable=False) as ledger:
            base = ""
            for kind, number, facts in entries:
                if kind == "base":
                    base = facts.get("fingerprint", base)
                if kind == "contribution":  # its member signs it again, for this ledger
                    with contextlib.suppress(DataError, KeyError, TypeError):
                        stated = {name: facts[name] for name in ("steps", "frames", "data_class", "spent")}
                        owner, key = facts["owner"], consortium.keys[facts["owner"]]
                        facts = contribution(consortium.constitution, key, owner, number, base, ledger.head, **stated)
                ledger.append(kind, facts, round=number)
        if verify_ledger(rounds / "ledger.jsonl", consortium.constitution).broken is None:
            views(rounds, consortium, report=report)
