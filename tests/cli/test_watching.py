"""The rounds as a terminal and a pipe show them, live and when they are over."""

import io
import json
import logging
import threading
import time

import pytest
from rich.console import Console

from worldloom.cli.weave_watch import live, picture, watch
from worldloom.core.errors import DataError, StorageError
from worldloom.federation import Records, read_history


def pipe() -> Console:
    return Console(file=io.StringIO(), width=100, highlight=False)


def terminal() -> Console:
    return Console(file=io.StringIO(), width=100, height=50, force_terminal=True, highlight=False)


def shown(chronicle, *, width: int = 100, now: float = 0.0) -> str:
    story = read_history(Records(chronicle.rounds / "ledger.jsonl").entries(), chronicle.constitution)
    console = Console(file=io.StringIO(), width=width)
    console.print(picture(story, now=now or time.time(), width=width))
    return console.file.getvalue()


def test_the_table_says_who_is_waited_for_and_for_how_long(chronicle) -> None:
    chronicle.begin()
    chronicle.contribute(0, "north")
    chronicle.refuse(0, "vault", "[bold]it is private[/bold] " + "x" * 500)
    text = shown(chronicle, now=time.time() + 65)
    assert "looms & sons: round 0, 0 of 2 done; 1.60 MB uploaded so far" in text
    assert "round 0: waiting for 2 of 4" in text
    assert "contributed 1.60 MB after 0 s" in text
    assert "waiting, 1 min 05 s" in text
    assert "refused: [bold]it is private[/bold]" in text  # as it was said, without markup
    assert len(text.splitlines()) < 20
    assert "epsilon of 8" in text


def test_past_rounds_show_each_members_loss_as_many_as_fit(chronicle) -> None:
    chronicle.two_rounds()
    wide, narrow = shown(chronicle), shown(chronicle, width=40)
    for text in (wide, narrow):
        assert "4.00 \N{RIGHTWARDS ARROW} 3.08" in text
    assert "8.00 \N{RIGHTWARDS ARROW} 5.00" in wide
    assert "8.00 \N{RIGHTWARDS ARROW} 5.00" not in narrow
    assert all(len(line) <= 40 for line in narrow.splitlines())
    assert "all 2 rounds are done" in wide
    assert "left out: with it, held-out losses grow by 40.0%" in wide


def test_a_pipe_gets_a_line_for_each_event_and_the_end_ends_it(chronicle) -> None:
    chronicle.begin()
    console = pipe()
    watching = threading.Thread(
        target=watch, args=(chronicle.rounds, chronicle.constitution), kwargs={"console": console}
    )
    watching.start()
    time.sleep(0.2)
    for number in range(2):
        chronicle.contribute(number, "north")
        chronicle.weave(number, {"north": 1.0})
    watching.join(timeout=20)
    assert not watching.is_alive()
    lines = console.file.getvalue().splitlines()
    assert len(lines) == len(list(Records(chronicle.rounds / "ledger.jsonl").entries()))
    assert lines[-1].startswith("looms & sons: all 2 rounds are done")
    assert "\x1b" not in console.file.getvalue()


def test_once_ends_at_once_and_asks_for_a_ledger(chronicle, tmp_path) -> None:
    chronicle.begin()
    console = pipe()
    watch(chronicle.rounds, chronicle.constitution, once=True, console=console)
    assert console.file.getvalue().splitlines()[-1] == "round 0 begins from base ba5e0"
    with pytest.raises(StorageError, match="does not exist"):
        watch(tmp_path / "nowhere", chronicle.constitution, once=True, console=console)


def test_the_view_of_a_coordinators_own_rounds_ends_with_them(chronicle) -> None:
    chronicle.begin()
    console = pipe()
    with live(chronicle.rounds, chronicle.constitution, console=console):
        chronicle.contribute(0, "north")
    lines = console.file.getvalue().splitlines()
    assert lines == [
        "looms & sons: round 0, 0 of 2 done; 0 B uploaded so far",  # what was before, in one line
        "round 0: north contributed 1.60 MB after 0 s, epsilon 1.5 spent",
    ]
    screen = terminal()
    with live(chronicle.rounds, chronicle.constitution, console=screen):
        chronicle.weave(0, {"north": 1.0})
    assert "round 1: waiting for 4 of 4" in screen.file.getvalue()


def test_the_view_never_stops_the_work(chronicle, caplog) -> None:
    chronicle.begin()
    with caplog.at_level(logging.WARNING), live(chronicle.rounds, chronicle.constitution, console=pipe()):
        with (chronicle.rounds / "ledger.jsonl").open("ab") as file:
            file.write(b"garbage\n")
        done = True
    assert done
    assert "entry 2 is not an entry of a chain" in caplog.text
    with (
        pytest.raises(DataError, match="entry 2"),
        live(chronicle.rounds, chronicle.constitution, console=pipe()),
    ):
        pass


def test_the_commands_show_and_report_a_finished_folder(chronicle, worldloom, refused, tmp_path) -> None:
    chronicle.two_rounds()
    rules = ["--constitution", str(chronicle.rules)]
    lines = worldloom("weave", "watch", str(chronicle.rounds), *rules).out.splitlines()
    assert lines[-1].startswith("looms & sons: all 2 rounds are done")
    assert worldloom("weave", "watch", str(chronicle.rounds), *rules, "--once").out.splitlines() == lines
    followed = worldloom("weave", "watch", str(chronicle.rounds), *rules, "--json").out.splitlines()
    assert [json.loads(line) for line in followed] == [{"event": line, "done": True} for line in lines]
    state = json.loads(worldloom("weave", "watch", str(chronicle.rounds), *rules, "--once", "--json").out)
    assert (state["done"], state["total"], len(state["rounds"])) == (True, 2, 2)
    assert "does not exist" in refused(4, "weave", "watch", str(tmp_path), "--once", "--json")
    out = tmp_path / "report.html"
    report = ["weave", "report", str(chronicle.rounds), *rules, "--out", str(out)]
    assert worldloom(*report).out == f"report: {out}\n"
    assert json.loads(worldloom(*report, "--json").out) == {"report": str(out)}
    assert "looms &amp; sons: 4 owners trained one model in 2 rounds" in out.read_text()
    assert "no run of a member" in refused(4, *report, "--runs", str(tmp_path))
