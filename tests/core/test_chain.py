"""A chain keeps what was written, and shows every change."""

import json
import multiprocessing
import os
import resource
import shutil
import signal
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from worldloom.core.chain import Chain, ChainHead, Tail, canonical, entries, verify
from worldloom.core.errors import DataError, StorageError


def written(path: Path, count: int = 5) -> ChainHead:
    with Chain(path, durable=False) as chain:
        for number in range(count):
            chain.append({"said": f"entry {number}", "value": number / 3})
        return chain.head


def test_what_was_appended_is_read_in_order_and_goes_on_after_a_restart(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    written(path, 3)
    with Chain(path) as chain:
        chain.append({"said": "later"})
    found = list(entries(path))
    assert [entry.index for entry in found] == [0, 1, 2, 3]
    assert found[-1].body == {"said": "later"}
    assert found[3].previous == found[2].hash
    assert verify(path).broken is None
    assert verify(path).head == ChainHead(length=4, hash=found[-1].hash)


@settings(max_examples=150)
@given(st.floats(0, 1, exclude_max=True), st.integers(0, 7))
def test_one_flipped_bit_is_found_and_its_entry_named(tmp_path_factory, share: float, bit: int) -> None:
    path = tmp_path_factory.mktemp("chain") / "log.jsonl"
    kept = written(path)
    content = bytearray(path.read_bytes())
    place = int(share * len(content))
    number = content[:place].count(b"\n")
    content[place] ^= 1 << bit
    path.write_bytes(content)
    verdict = verify(path, kept=kept)
    assert verdict.broken == number
    assert verdict.why


@given(st.permutations(range(5)), st.integers(0, 5))
def test_what_was_taken_out_or_moved_is_found(tmp_path_factory, order: list[int], count: int) -> None:
    path = tmp_path_factory.mktemp("chain") / "log.jsonl"
    kept = written(path)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[number] for number in order[:count]))
    same = count == 5 and order == sorted(order)
    assert (verify(path, kept=kept).broken is None) == same


def test_a_chain_that_was_written_anew_shows_against_a_kept_head(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    kept = written(path)
    path.unlink()
    with Chain(path) as chain:
        for number in range(9):
            chain.append({"said": f"something else {number}"})
    assert verify(path).broken is None
    verdict = verify(path, kept=kept)
    assert verdict.broken == 4
    assert "kept head" in verdict.why


def test_nothing_is_appended_to_what_was_tampered_with(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    written(path)
    path.write_bytes(path.read_bytes().replace(b"entry 2", b"entry X"))
    with pytest.raises(DataError, match="entry 2 was changed"):
        Chain(path)
    with pytest.raises(DataError, match="entry 2 was changed"):
        list(entries(path))


def test_an_entry_that_was_never_finished_is_cut_off(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "log.jsonl"
    written(path)
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"body":{"said"')
    assert verify(path).broken == 5
    with Chain(path) as chain:
        assert chain.head.length == 5
    assert path.read_bytes() == whole
    assert "removed an unfinished last entry" in caplog.text


def test_a_last_entry_that_lacks_only_its_newline_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    written(path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with Chain(path) as chain:
        assert chain.head.length == 5
    assert path.read_bytes() == whole


@pytest.mark.parametrize("before", [b"", b"whole"])
@pytest.mark.parametrize("end", [b"\x00" * 1000, b'{"weights": [1, 2, 3]}', b"a text"])
def test_a_file_of_something_else_is_neither_cut_nor_continued(tmp_path: Path, before: bytes, end: bytes) -> None:
    path = tmp_path / "log.jsonl"
    if before:
        written(path)
        before = path.read_bytes()
    path.write_bytes(before + end)
    with pytest.raises(DataError, match="another program wrote it"):
        Chain(path)
    assert path.read_bytes() == before + end


def test_a_tampered_chain_keeps_its_torn_end(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    written(path)
    content = path.read_bytes().replace(b"entry 2", b"entry X") + b'{"body":{"said"'
    path.write_bytes(content)
    with pytest.raises(DataError, match="entry 2 was changed"):
        Chain(path)
    assert path.read_bytes() == content


def append_for_ever(path: str, told) -> None:
    with Chain(path, durable=False) as chain:
        while True:
            entry = chain.append({"filler": "x" * 3000})
            told.send(entry.index)


def test_a_killed_writer_loses_nothing_that_was_acknowledged(tmp_path: Path) -> None:
    path, context = tmp_path / "log.jsonl", multiprocessing.get_context("spawn")
    last = -1
    for _ in range(3):
        ours, theirs = context.Pipe(duplex=False)
        child = context.Process(target=append_for_ever, args=(str(path), theirs))
        child.start()
        theirs.close()
        for _ in range(20):
            last = ours.recv()
        time.sleep(0.01)
        os.kill(child.pid, signal.SIGKILL)
        try:
            while True:
                last = ours.recv()
        except EOFError:
            pass
        child.join()
        with Chain(path) as chain:
            assert chain.head.length >= last + 1


def test_what_the_disk_refused_in_the_middle_of_an_entry_does_not_come_back_later(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    with Chain(path) as chain:
        chain.append({"said": "first"})
        before = path.read_bytes()
        most = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 20, most[1]))
        try:
            with pytest.raises(OSError, match="too large"):
                chain.append({"said": "second"})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, most)
        assert path.read_bytes() == before
        chain.append({"said": "third"})
    assert [entry.body["said"] for entry in entries(path)] == ["first", "third"]


def test_an_entry_nested_without_end_is_named(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    written(path, 2)
    with path.open("ab") as file:
        file.write(b"[" * 100_000 + b"]" * 100_000 + b"\n")
    verdict = verify(path)
    assert verdict.broken == 2
    assert verdict.why == "is not an entry of a chain"


def test_a_tail_gives_each_entry_once_and_waits_for_one_that_is_half_written(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    tail = Tail(path)
    assert tail.new() == []
    written(path, 5)
    whole = path.read_bytes()
    path.write_bytes(b"")
    given: list[int] = []
    for cut in range(0, len(whole), 7):
        with path.open("ab") as file:
            file.write(whole[cut : cut + 7])
        given += [entry.index for entry in tail.new()]
        assert len(given) == whole[: cut + 7].count(b"\n")
    assert given == [0, 1, 2, 3, 4]
    assert tail.new() == []


def test_a_tail_outlives_an_end_that_was_torn_off_and_written_again(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    written(path, 2)
    tail = Tail(path)
    with path.open("ab") as file:
        file.write(b'{"body":{"torn')
    assert len(tail.new()) == 2
    with Chain(path, durable=False) as chain:
        chain.append({"said": "third"})
    assert [entry.body["said"] for entry in tail.new()] == ["third"]


def test_a_tail_names_what_does_not_follow_and_what_is_gone(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    written(path, 3)
    lines = path.read_bytes().splitlines(keepends=True)
    tail = Tail(path)
    assert len(tail.new()) == 3
    with path.open("ab") as file:
        file.write(lines[1])
    with pytest.raises(DataError, match="entry 3 does not follow"):
        tail.new()
    path.write_bytes(lines[0])
    with pytest.raises(DataError, match="became shorter"):
        tail.new()
    path.unlink()
    with pytest.raises(StorageError, match="does not exist"):
        tail.new()


def test_a_sparse_end_is_not_read_whole(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    written(path, 2)
    tail = Tail(path)
    assert len(tail.new()) == 2
    os.truncate(path, 2**42)  # an entry of 4 TB
    with pytest.raises(DataError, match="entry 2 is longer than"):
        tail.new()
    with pytest.raises(DataError, match="entry 2 is longer than"):
        Chain(path, durable=False)


def test_one_process_writes_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    with Chain(path), pytest.raises(StorageError, match="another process"):
        Chain(path)


def test_a_chain_whose_lock_file_is_tidied_away_is_still_locked(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    with Chain(path) as chain:
        chain.append({"said": "first"})
        for other in tmp_path.iterdir():
            if other != path:
                other.unlink()
        with pytest.raises(StorageError, match="another process"):
            Chain(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda path: path.unlink(), "deleted, moved or replaced"),
        (lambda path: path.rename(path.with_suffix(".1")), "deleted, moved or replaced"),
        (lambda path: shutil.copy(path, path.with_suffix(".2")).replace(path), "deleted, moved or replaced"),
        (lambda path: path.write_bytes(path.read_bytes() + b"a line\n"), "changed .* it has [0-9]+ bytes; expected"),
        (lambda path: os.truncate(path, 10), "changed .* it has 10 bytes; expected"),
    ],
    ids=["deleted", "renamed", "replaced by a copy", "appended to", "cut"],
)
def test_nothing_is_recorded_in_a_file_that_another_program_touched(tmp_path: Path, change, message: str) -> None:
    path = tmp_path / "log.jsonl"
    with Chain(path) as chain:
        chain.append({"said": "first"})
        change(path)
        left = {each: each.read_bytes() for each in tmp_path.iterdir()}
        for _ in range(2):
            with pytest.raises(StorageError, match=message):
                chain.append({"said": "second"})
        assert chain.head.length == 1
        assert {each: each.read_bytes() for each in tmp_path.iterdir()} == left


def test_a_closed_chain_says_so(tmp_path: Path) -> None:
    with Chain(tmp_path / "log.jsonl") as chain:
        chain.append({"said": "first"})
    with pytest.raises(StorageError, match="was closed"):
        chain.append({"said": "second"})


def test_what_json_does_not_hold_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    with Chain(path) as chain:
        for body in ({"value": float("nan")}, {"value": object()}, {"value": b"x"}):
            with pytest.raises(DataError, match="plain JSON values"):
                chain.append(body)
        assert chain.head.length == 0
    assert path.read_bytes() == b""


@given(
    st.dictionaries(st.text(), st.one_of(st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.text()))
)
def test_canonical_text_is_one_for_equal_values(value: dict) -> None:
    text = canonical(value)
    assert text.isascii()
    assert canonical(json.loads(text)) == text
    assert canonical(dict(reversed(list(value.items())))) == text
