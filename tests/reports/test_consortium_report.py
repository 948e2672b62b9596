"""The report of a consortium says what its ledger says, in text and pictures, and nothing of it is markup."""

import base64
import itertools
import json
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from worldloom.core.errors import DataError, StorageError
from worldloom.core.files import write_json
from worldloom.federation import Base, Ledger, RoundStore, countersign
from worldloom.reports import find_owners, write_consortium_report
from worldloom.reports.consortium_figures import _apart
from worldloom.reports.consortium_report import render_consortium_report
from worldloom.training import RunFolder


class Page(HTMLParser):
    """Gathers tags, every address that a browser would fetch, the text, and the cells of tables."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.rows: list[list[str]] = []
        self.text = ""
        self.in_cell = False
        self.feed(html)
        self.text = " ".join(self.text.split())

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attributes if name in ("src", "href", "srcset", "poster")]
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
            self.in_cell = True

    def handle_endtag(self, tag: str) -> None:
        self.in_cell = self.in_cell and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.in_cell:
            self.rows[-1][-1] = (self.rows[-1][-1] + data).strip()

    def row(self, *begin: str) -> list[str]:
        (found,) = [row for row in self.rows if row[: len(begin)] == list(begin)]
        return found


def page(chronicle, **options) -> Page:
    return Page(render_consortium_report(chronicle.rounds, chronicle.constitution, **options))


def test_the_report_says_what_the_ledger_says(chronicle) -> None:
    chronicle.two_rounds()
    RoundStore(chronicle.rounds).save(0, Base.of({"weight": torch.zeros(400_000)}), {})
    found = page(chronicle)
    arrow = "\N{RIGHTWARDS ARROW}"
    assert found.row("north", "open") == ["north", "open", "2", "0", "0", "45.0%", f"8.00 {arrow} 3.08", "3.20 MB", "3"]
    assert found.row("south", "open")[2:6] == ["1", "1", "0", "25.0%"]
    assert found.row("vault", "-")[2:6] == ["0", "0", "2", "-"]
    losses = [row for row in found.rows if row[:2] == ["1", f"4.00 {arrow} 3.08"]]
    assert losses == [["1", *(f"{before} {arrow} {after}" for before, after in (
        ("4.00", "3.08"), ("4.12", "3.17"), ("4.25", "3.27"), ("4.38", "3.37"), ("4.19", "3.22")
    ))]]  # fmt: skip
    assert ["1", "50.0%", "50.0%", "left out", "refused"] in found.rows
    assert found.row("9.60 MB in total") == ["9.60 MB in total", "3.20 MB", "3.20 MB", "3.20 MB", "0 B"]
    assert "10 steps of every contribution would have been 96.0 MB: 10 times the 9.60 MB" in found.text
    assert found.row("0 to 1", "vault") == ["0 to 1", "vault", "refused", "it is of private data"]
    assert found.row("1", "south") == ["1", "south", "left out", "with it, held-out losses grow by 40.0%"]
    assert "epsilon is computed at delta 1e-05, with a budget of 8" in found.text
    assert f"All {chronicle.ledger.head.length} entries are complete" in found.text
    assert chronicle.ledger.head.hash in found.text
    assert "| north | open | 2 | 0.45 |" in found.text  # the model card


def test_the_report_asks_the_network_for_nothing_and_its_pictures_are_pictures(chronicle) -> None:
    chronicle.two_rounds()
    RoundStore(chronicle.rounds).save(0, Base.of({"weight": torch.zeros(4)}), {})
    html = render_consortium_report(chronicle.rounds, chronicle.constitution)
    found = Page(html)
    assert len(found.addresses) == 2 * 4, "four pictures, each for light and dark pages"
    for address in found.addresses:
        assert address.startswith("data:image/svg+xml;base64,")
        picture = base64.b64decode(address.partition(",")[2])
        ElementTree.fromstring(picture)
        assert not re.search(rb"""href=["'](?!#|data:)""", picture)
    assert not {"script", "link", "iframe", "object", "embed"} & set(found.tags)
    assert "url(" not in html
    assert "@import" not in html


def test_reasons_of_others_are_text_and_not_markup(chronicle) -> None:
    chronicle.begin()
    bad = "<script>alert(1)</script><img src='http://evil/x'>\x1b[2J"
    chronicle.refuse(0, "vault", bad)
    chronicle.refuse(0, "south", bad + "$x_")
    chronicle.contribute(0, "north")
    chronicle.weave(0, {"north": 1.0})
    found = page(chronicle)
    assert "script" not in found.tags
    assert found.tags.count("b") == 1  # the mark of the verdict
    assert all(address.startswith("data:") for address in found.addresses)
    assert "<script>alert(1)</script><img src='http://evil/x'>\\x1b[2J" in found.text
    assert "\x1b" not in found.text


def test_a_report_of_a_moment_leaves_out_what_is_not_there(chronicle) -> None:
    for step in (chronicle.begin, lambda: chronicle.contribute(0, "north")):
        step()
        found = page(chronicle)
        assert "no round is done yet" in found.text
        assert "no member has evaluated a base yet" in found.text
    assert "the folder has no base" in found.text
    assert "0 of 2 rounds done" in found.text


def test_an_entry_that_is_being_written_waits_for_the_next_report(chronicle) -> None:
    chronicle.two_rounds()
    with (chronicle.rounds / "ledger.jsonl").open("ab") as file:
        file.write(b'{"body":{"fac')
    assert f"All {chronicle.ledger.head.length} entries are complete" in page(chronicle).text


def test_without_privacy_the_report_says_so_and_has_no_part_of_it(new_chronicle) -> None:
    chronicle = new_chronicle(privacy=None)
    chronicle.two_rounds()
    found = page(chronicle)
    assert "there is no differential privacy" in found.text
    assert "Epsilon" not in found.text


def test_no_report_is_written_of_a_ledger_that_does_not_verify(chronicle, tmp_path) -> None:
    chronicle.two_rounds()
    path = chronicle.rounds / "ledger.jsonl"
    path.write_bytes(path.read_bytes().replace(b'"frames":90', b'"frames":91', 1))
    out = tmp_path / "report.html"
    out.write_text("old")
    with pytest.raises(DataError, match="does not verify: entry 2 was changed"):
        write_consortium_report(out, chronicle.rounds, chronicle.constitution)
    assert out.read_text() == "old"
    with pytest.raises(StorageError, match="does not exist"):
        write_consortium_report(out, tmp_path, chronicle.constitution)


def test_what_members_countersigned_is_named_and_held_against_the_ledger(chronicle) -> None:
    chronicle.begin()
    seen = countersign(chronicle.ledger.head, chronicle.keys["east"])
    write_json(chronicle.rounds / "checkpoints" / "east.json", seen)
    (chronicle.rounds / "other.json").write_text("[" * 10_000)
    chronicle.contribute(0, "north")
    assert "east saw 2 entries (east.json)" in page(chronicle).text
    path = chronicle.rounds / "ledger.jsonl"
    chronicle.ledger.close()
    path.unlink()
    chronicle.ledger = Ledger(path, chronicle.keys["chair"], durable=False)  # its operator writes all of it anew
    chronicle.two_rounds()
    with pytest.raises(DataError, match="rewritten"):
        page(chronicle)


def test_the_runs_of_owners_are_shown_where_they_are(chronicle, tmp_path) -> None:
    chronicle.two_rounds()
    for name in ("north", "vault"):
        run = RunFolder.create(tmp_path / "homes" / name / "run", {}, {})
        lines = [{"step": step, "loss": 1 / step, "effective_rank": 5.25} for step in (1, 2, 20)]
        (run.path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    runs = find_owners(tmp_path / "homes", chronicle.constitution)
    assert set(runs) == {"north", "vault"}
    found = page(chronicle, runs=runs)
    assert found.row("vault", "20")[2:5] == ["5.25", "-", "-"]
    assert len(found.addresses) == 2 * 5


@given(st.dictionaries(st.text(), st.floats(0, 1), min_size=1, max_size=12))
def test_labels_keep_apart_within_the_picture_and_in_order(wanted) -> None:
    places = _apart(wanted, 0.065)
    ordered = sorted(wanted, key=lambda name: wanted[name])
    found = [places[name] for name in ordered]
    assert all(after - before > 0.0649 for before, after in itertools.pairwise(found))
    assert min(found) >= 0
    assert max(found) <= 1 + 1e-9


def test_labels_with_room_stay_where_they_are() -> None:
    assert _apart({"a": 0.1, "b": 0.5, "c": 0.52}, 0.1) == pytest.approx({"a": 0.1, "b": 0.46, "c": 0.56})
