"""A small file cannot take all memory: what it would grow to is an error that says what to do."""

import os
from collections import namedtuple
from pathlib import Path
from typing import Any

import lance
import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from format_samples import make_store, read_all

from worldloom.core.errors import DataError, StorageError
from worldloom.core.untrusted import HarmfulFile, table_files, try_files
from worldloom.data import room_for
from worldloom.formats import WriteOptions, convert, lerobot_layout


@pytest.mark.parametrize("kind", ["folder", "lerobot-v21", "lerobot-v3", "swm-lance"])
def test_pictures_that_do_not_fit_into_memory_are_an_error_that_names_the_size(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_store(tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "there", target_format=kind, write=WriteOptions(lossless="v3" not in kind))
    read_all(kind, tmp_path / "there")
    monkeypatch.setattr(psutil, "virtual_memory", lambda: namedtuple("Memory", "available")(1000))
    with pytest.raises(DataError, match=r"pictures of 16x24 need 0\.0 GB, more than the free memory.*--size HxW"):
        read_all(kind, tmp_path / "there")


def test_what_numpy_cannot_allocate_is_the_same_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise MemoryError

    picture = np.zeros((2, 2, 3), np.uint8)
    assert room_for(5, picture, "log").shape == (5, 2, 2, 3)
    monkeypatch.setattr(np, "empty", full)
    with pytest.raises(DataError, match="log: 5 pictures of 2x2 need"):
        room_for(5, picture, "log")


def test_a_file_for_which_there_is_no_memory_is_not_called_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise pa.ArrowMemoryError("malloc of size 9 failed")

    make_store(tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "there", target_format="folder")
    monkeypatch.setattr(pq, "read_table", full)
    with pytest.raises(DataError, match=r"there needs more memory than is free \(malloc of size 9 failed\)"):
        convert(tmp_path / "there", tmp_path / "back")


def test_a_parquet_file_whose_rows_grow_far_beyond_its_size_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"text": ["x" * 2**19] * 600}), path)
    assert path.stat().st_size < 2**16
    with pytest.raises(HarmfulFile, match="600 rows need more than"):
        try_files("parquet", [path])


def test_a_lance_table_whose_rows_grow_far_beyond_its_size_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.lance"
    lance.write_dataset(pa.table({"zeros": [b"\0" * 1000] * 100_000}), path, data_storage_version="2.1")
    assert sum(file.stat().st_size for file in table_files(path)) < 2**16
    with pytest.raises(HarmfulFile, match="100,000 rows need more than"):
        try_files("lance", table_files(path), table=path)


def test_more_episodes_than_memory_is_for_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_store(tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "there", target_format="lerobot-v3")
    monkeypatch.setattr(lerobot_layout, "_MOST_EPISODES", 1)
    with pytest.raises(DataError, match="rows, one per episode; at most 1 are read"):
        read_all("lerobot-v3", tmp_path / "there")


def test_a_line_of_any_length_is_not_read_whole(tmp_path: Path) -> None:
    make_store(tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "there", target_format="lerobot-v21")
    os.truncate(tmp_path / "there" / "meta" / "episodes.jsonl", 2**27)
    with pytest.raises(StorageError, match=r"line 5 of .*episodes.jsonl is longer than"):
        read_all("lerobot-v21", tmp_path / "there")
