"""The commands that read a ledger verify every signature, and compare what members have seen."""

import json

from forging import rewritten
from worldloom.core.chain import ChainHead
from worldloom.core.files import write_json
from worldloom.federation import countersign


def test_a_ledger_rewritten_without_a_key_is_refused_wherever_it_is_read(
    chronicle, worldloom, refused, tmp_path
) -> None:
    chronicle.two_rounds()
    rounds = str(chronicle.rounds)
    assert worldloom("weave", "ledger", "show", rounds, "--json").code == 0  # with the constitution beside the folder
    rewritten(chronicle.rounds / "ledger.jsonl")
    into = ["--into", str(tmp_path / "new")]
    rules = ["--constitution", str(chronicle.rules)]
    for command in (
        ["ledger", "show", rounds],
        ["ledger", "show", rounds, *rules],
        ["ledger", "verify", rounds, *rules],
        ["ledger", "card", rounds, *rules],
        ["watch", rounds, "--once"],
        ["watch", rounds, *rules],
        ["watch", rounds, "--once", "--json"],
        ["recompute", rounds, *rules, *into],
        ["release", rounds, *rules, *into],
        ["report", rounds, *rules, "--out", str(tmp_path / "report.html")],
    ):
        assert "entry 0 is not what chair signed" in refused(3, "weave", *command)
    assert "does not exist, and without a constitution" in refused(4, "weave", "ledger", "show", str(tmp_path / "x"))


def test_heads_are_compared_on_the_command_line(chronicle, worldloom, refused, tmp_path) -> None:
    chronicle.begin()
    heads = {
        "north": chronicle.ledger.head,
        "east": ChainHead(length=2, hash="ab" * 32),
        "south": ChainHead(length=99, hash="cd" * 32),
    }
    for name, head in heads.items():
        write_json(tmp_path / f"{name}.json", countersign(head, chronicle.keys[name]))
    command = ["weave", "ledger", "compare", str(chronicle.rounds)]
    rules = ["--constitution", str(chronicle.rules)]
    told = json.loads(
        worldloom(*command, str(tmp_path / "north.json"), str(tmp_path / "south.json"), *rules, "--json").out
    )
    assert told["heads"] == [
        {"member": "north", "length": 2, "result": "same"},
        {"member": "south", "length": 99, "result": "ahead"},
    ]
    assert "There are two ledgers" in refused(3, *command, str(tmp_path / "east.json"), *rules)
