"""What a ledger tells is what happened, whoever wrote it and however far it is."""

import pytest

from worldloom.core.chain import Entry
from worldloom.core.errors import DataError
from worldloom.federation import LedgerWatch, Records, duration, printable, read_history, size


def entries(chronicle) -> list[Entry]:
    return list(Records(chronicle.rounds / "ledger.jsonl").entries())


def entry(kind: str, facts, *, round=0, index: int = 0, time: float = 0.0) -> Entry:
    return Entry(index=index, time=time, previous="", body={"kind": kind, "round": round, "facts": facts})


def test_each_member_waits_contributes_is_refused_or_is_left_out(chronicle) -> None:
    states = []

    def look() -> None:
        story = read_history(entries(chronicle), chronicle.constitution)
        states.append([story.current.state(name) for name in chronicle.owners])

    chronicle.begin()
    look()
    chronicle.contribute(0, "north")
    chronicle.contribute(0, "south")
    chronicle.refuse(0, "vault", "private")
    look()
    chronicle.refuse(0, "east", "no answer")
    chronicle.contribute(0, "east")  # in a later try
    chronicle.refuse(0, "south", "with it, held-out losses grow by 40.0%")
    look()
    assert states == [
        ["waiting"] * 4,
        ["contributed", "waiting", "contributed", "refused"],
        ["contributed", "contributed", "left out", "refused"],
    ]


def test_the_story_sums_what_the_entries_say(chronicle) -> None:
    chronicle.two_rounds()
    story = read_history(entries(chronicle), chronicle.constitution)
    assert story.done
    assert [round.number for round in story.rounds] == [0, 1]  # the last base begins none
    assert story.bytes == 6 * 1_600_000
    assert story.sent("north") == 2 * 1_600_000
    assert story.sent("vault") == 0
    assert (story.budget, story.spent("north"), story.spent("vault")) == (8.0, "3", "")
    assert story.current.weights == {"north": 0.5, "east": 0.5}
    assert story.current.left_out == ("south",)
    assert story.rounds[0].losses["north"] == (8.0, 5.0)
    assert story.rounds[0].median == (8.375, 5.234375)
    assert [(one.owner, one.left_out) for one in story.current.refusals] == [("vault", False), ("south", True)]


def test_all_who_came_are_left_out_where_nothing_is_good_enough(chronicle) -> None:
    chronicle.begin()
    chronicle.contribute(0, "north")
    chronicle.contribute(0, "east")
    chronicle.weave(0, {}, left_out=["north", "east"])
    round = read_history(entries(chronicle), chronicle.constitution).rounds[0]
    assert [round.state(name) for name in chronicle.owners] == ["left out", "left out", "waiting", "waiting"]


def test_a_ledger_of_an_older_form_and_one_without_its_constitution_are_told(chronicle) -> None:
    told = [
        entry("constitution", {"fingerprint": "ab"}, round=None),
        entry("base", {"fingerprint": "cd"}, time=100.0),
        entry(
            "contribution", {"owner": "north", "bytes": 9, "spent": {}, "steps": 1, "data_class": "open"}, time=126.0
        ),
        entry("round", {"evaluation": {"before": 3.0, "after": 2.0}, "weights": {"north": 1.0}, "left_out": []}),
        entry("base", {"fingerprint": "ef"}, round=1),
    ]
    story = read_history(told)
    assert (story.total, story.done, story.members) == (None, False, ("north",))
    assert story.rounds[0].median == (3.0, 2.0)
    assert story.rounds[0].losses == {}
    assert story.rounds[0].contributions["north"].seconds == 26.0
    assert story.spent("north") == ""
    assert "round 1, 1 done" in story.headline()


@pytest.mark.parametrize("kind", ["constitution", "base", "contribution", "refusal", "round", "gossip"])
@pytest.mark.parametrize(
    "facts",
    [None, [], 3, {}, {"owner": 3, "bytes": "x", "spent": 4, "weights": [1], "left_out": 3, "evaluation": "x"},
     {"weights": {"a": None}, "evaluation": {"before": "x", "owners": {"a": 3, "b": [1], "c": [None, True]}}}],
)  # fmt: skip
def test_facts_of_any_form_are_told_without_a_fault(tmp_path, kind, facts) -> None:
    for round in (0, None, "x"):
        story = read_history([entry(kind, facts, round=round)])
        assert story.bytes == 0
        for name in story.members:
            assert story.current.state(name)


def test_another_constitution_is_named(chronicle) -> None:
    with pytest.raises(DataError, match="belongs to constitution abc, but the given one is"):
        read_history([entry("constitution", {"fingerprint": "abc"}, round=None)], chronicle.constitution)


def test_watching_tells_each_event_in_a_line_once(chronicle) -> None:
    watched = LedgerWatch(chronicle.rounds, chronicle.constitution)
    assert watched.look() == []
    chronicle.begin()
    first = watched.look()
    assert first[0].startswith("the ledger begins with constitution")
    assert first[1] == "round 0 begins from base ba5e0"
    chronicle.contribute(0, "north")
    chronicle.contribute(0, "south")
    chronicle.refuse(0, "vault", "it is\n\x1b[2Jprivate")
    chronicle.refuse(0, "south", "losses grow")
    assert watched.look() == [
        "round 0: north contributed 1.60 MB after 0 s, epsilon 1.5 spent",
        "round 0: south contributed 1.60 MB after 0 s, epsilon 1.5 spent",
        "round 0: vault is refused: it is \\x1b[2Jprivate",
        "round 0: south is left out: losses grow",
    ]
    chronicle.weave(0, {"north": 1.0}, left_out=["south"])
    done, begins = watched.look()
    assert done.startswith("round 0 is done: held-out loss 8.38 -> 5.23; east 8.25 -> 5.16, north 8.00 -> 5.00")
    assert done.endswith("left out: south; 3.20 MB uploaded")
    assert begins == "round 1 begins from base ba5e1"
    chronicle.weave(1, {})
    assert watched.look() == [
        "round 1 leaves the base unchanged: held-out loss 4.19 -> 3.22; east 4.12 -> 3.17, north 4.00 -> 3.08, "
        "south 4.25 -> 3.27, vault 4.38 -> 3.37; 0 B uploaded",
        "looms & sons: all 2 rounds are done; 3.20 MB uploaded so far; the last base is ba5e1",
    ]
    assert watched.look() == []


def test_numbers_are_told_as_people_read_them() -> None:
    assert [size(count) for count in (0, 999, 1000, 1_636_110, 999_600, 65.4e6, 6.54e9, 1.2e13)] == [
        "0 B", "999 B", "1.00 kB", "1.64 MB", "1.00 MB", "65.4 MB", "6.54 GB", "12,000 GB",
    ]  # fmt: skip
    assert [duration(seconds) for seconds in (-1, 26.2, 60, 67, 3600, 3910)] == [
        "0 s", "26 s", "1 min", "1 min 07 s", "1 h", "1 h 05 min",
    ]  # fmt: skip
    assert printable("a\x1b]0;x\x07b\u202e c\n d") == "a\\x1b]0;x\\x07b\\u202e c d"
