import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import lance
import numpy as np
import pytest
from data_samples import SPEC, make_episode, same
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from worldloom.core.errors import DataError, StorageError
from worldloom.core.types import ActionSpec, Episode, ObservationSpec
from worldloom.data import DatasetSpec, EpisodeDataset, validate
from worldloom.data.layout import table_schema


def make_dataset(path: Path, lengths: list[int], commits: int = 1) -> EpisodeDataset:
    dataset = EpisodeDataset.create(path, SPEC)
    for part in np.array_split(np.arange(len(lengths)), commits):
        dataset.append([make_episode(int(index), lengths[index]) for index in part])
    return dataset


def test_episodes_come_back_as_they_were(tmp_path: Path) -> None:
    lengths = [5, 1, 300]
    make_dataset(tmp_path / "d", lengths, commits=2)
    dataset = EpisodeDataset.open(tmp_path / "d")
    assert dataset.spec == SPEC
    assert dataset.lengths.tolist() == lengths
    assert dataset.frames == 309
    assert all(same(dataset.episode(index), make_episode(index, steps)) for index, steps in enumerate(lengths))
    assert dataset.metadata() == [make_episode(index).metadata for index in range(3)]
    with pytest.raises(IndexError):
        dataset.episode(3)


@pytest.mark.parametrize(
    "spec",
    [
        DatasetSpec(observation=ObservationSpec(vector=3), action=ActionSpec(low=(0.0,), high=(1.0,), discrete=True)),
        DatasetSpec(observation=ObservationSpec(pixels=(3, 4, 1)), action=ActionSpec(low=(-1.0,), high=(1.0,))),
    ],
    ids=["vectors only", "pixels only"],
)
def test_parts_may_be_absent(tmp_path: Path, spec: DatasetSpec) -> None:
    EpisodeDataset.create(tmp_path / "d", spec).append([make_episode(0, spec=spec)])
    dataset = EpisodeDataset.open(tmp_path / "d")
    assert same(dataset.episode(0), make_episode(0, spec=spec))
    assert validate(tmp_path / "d") == []


def test_the_columns_are_what_the_documentation_says(tmp_path: Path) -> None:
    make_dataset(tmp_path / "d", [2, 3])
    rows = lance.dataset(str(tmp_path / "d")).to_table(columns=["episode", "step", "action", "label.position"])
    assert rows["episode"].to_pylist() == [0, 0, 0, 1, 1, 1, 1]
    assert rows["step"].to_pylist() == [0, 1, 2, 0, 1, 2, 3]
    assert [value is None for value in rows["action"].to_pylist()] == [False, False, True, False, False, False, True]
    assert rows.num_columns == 4


def test_opening_pins_a_version(tmp_path: Path) -> None:
    writer = make_dataset(tmp_path / "d", [2])
    reader = EpisodeDataset.open(tmp_path / "d")
    writer.append([make_episode(1)])
    assert (len(reader), len(writer), len(EpisodeDataset.open(tmp_path / "d"))) == (1, 2, 2)
    assert len(EpisodeDataset.open(tmp_path / "d", version=reader.version)) == 1
    assert [entry["frames"] for entry in writer.versions()] == [0, 3, 9]
    with pytest.raises(DataError, match="another process has appended"):
        reader.append([make_episode(2)])
    assert len(EpisodeDataset.open(tmp_path / "d")) == 2


@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.integers(1, 4), min_size=2, max_size=5), st.integers(1, 4))
def test_the_fingerprint_is_of_content_and_order_not_of_commits(
    tmp_path: Path, lengths: list[int], commits: int
) -> None:
    directory = Path(tempfile.mkdtemp(dir=tmp_path))
    whole = make_dataset(directory / "whole", lengths).fingerprint()
    assert make_dataset(directory / "parts", lengths, commits).fingerprint() == whole
    swapped = EpisodeDataset.create(directory / "swapped", SPEC)
    swapped.append([make_episode(index, lengths[index]) for index in reversed(range(len(lengths)))])
    assert swapped.fingerprint() != whole
    assert make_dataset(directory / "shorter", lengths[:-1]).fingerprint() != whole


@pytest.mark.parametrize("part", ["pixels", "vector", "actions", "label", "metadata"])
def test_the_fingerprint_sees_every_part(tmp_path: Path, part: str) -> None:
    episode = make_episode(0)
    assert episode.pixels is not None
    assert episode.vector is not None
    parts = {
        "pixels": episode.pixels.copy(),
        "vector": episode.vector.copy(),
        "actions": episode.actions.copy(),
        "labels": {name: column.copy() for name, column in episode.labels.items()},
        "metadata": dict(episode.metadata),
    }
    if part == "metadata":
        parts["metadata"]["note"] = "other"
    else:
        array = parts["labels"]["speed"] if part == "label" else parts[part]
        array[-1] = array[-2]
    for name, one in {"one": episode, "other": Episode(**parts)}.items():
        EpisodeDataset.create(tmp_path / name, SPEC).append([one])
    prints = [EpisodeDataset.open(tmp_path / name).fingerprint() for name in ("one", "other")]
    assert prints[0] != prints[1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pixels": np.zeros((6, 3, 3, 3), np.uint8)}, "pixels of shape"),
        ({"vector": np.zeros((6, 3), np.float32)}, "3 values in its vector"),
        ({"actions": np.zeros((5, 1), np.float32)}, "actions of 1 values"),
        ({"actions": np.full((5, 2), 4, np.float32)}, "action .* at step 0; expected low"),
        ({"labels": {"position": np.zeros((6, 2), np.float32)}}, "has labels"),
        ({"metadata": {"policy": object()}}, "metadata must be JSON"),
        ({"metadata": {"value": float("nan")}}, "metadata must be JSON"),
    ],
)
def test_an_episode_that_does_not_fit_is_refused_with_the_whole_append(
    tmp_path: Path, change: dict[str, object], message: str
) -> None:
    dataset = make_dataset(tmp_path / "d", [5])
    good = make_episode(1)
    fields = {"pixels": good.pixels, "vector": good.vector, "actions": good.actions, "labels": good.labels}
    with pytest.raises(DataError, match=message):
        dataset.append([good, Episode(**{**fields, **change})])
    assert len(EpisodeDataset.open(tmp_path / "d")) == 1


def test_a_dataset_is_not_created_twice(tmp_path: Path) -> None:
    make_dataset(tmp_path / "d", [5])
    with pytest.raises(DataError, match="already contains a dataset"):
        EpisodeDataset.create(tmp_path / "d", SPEC)
    assert len(EpisodeDataset.open(tmp_path / "d")) == 1


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="no dataset exists at"):
        EpisodeDataset.open(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("version", "message"), [("3", "has version 3 .* expected version 1 or 2"), (None, "not a worldloom")]
)
def test_another_format_is_refused(tmp_path: Path, version: str | None, message: str) -> None:
    schema = table_schema(SPEC)
    metadata = {**schema.metadata, b"version": version.encode()} if version else {}
    lance.write_dataset(schema.with_metadata(metadata).empty_table(), str(tmp_path / "d"))
    for action in (EpisodeDataset.open, validate):
        with pytest.raises(DataError, match=message):
            action(tmp_path / "d")


@pytest.mark.parametrize("damage", ["deleted", "cut", "emptied"])
def test_a_damaged_file_is_found_on_opening_and_by_validate(tmp_path: Path, damage: str) -> None:
    dataset = make_dataset(tmp_path / "d", [5, 6, 7], commits=3)
    victim = tmp_path / "d" / "data" / dataset._table.get_fragments()[1].data_files()[0].path
    content = victim.read_bytes()
    if damage == "deleted":
        victim.unlink()
    else:
        victim.write_bytes(content[: len(content) // 2] if damage == "cut" else b"")
    with pytest.raises(DataError, match=r"damaged.*Restore the dataset from a copy"):
        EpisodeDataset.open(tmp_path / "d")
    problems = validate(tmp_path / "d")
    assert victim.name in problems[0].where
    assert [problem.where for problem in problems[1:]] == ["episode 1"]
    assert all(problem.remedy for problem in problems)
    victim.write_bytes(content)
    assert len(EpisodeDataset.open(tmp_path / "d")) == 3


def test_a_cut_manifest_is_named(tmp_path: Path) -> None:
    make_dataset(tmp_path / "d", [5])
    for manifest in (tmp_path / "d" / "_versions").glob("*.manifest"):
        manifest.write_bytes(manifest.read_bytes()[:10])
    for action in (EpisodeDataset.open, validate):
        with pytest.raises(DataError, match="damaged"):
            action(tmp_path / "d")


def test_a_file_is_no_dataset(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file", tmp_path / "file" / "d"):
        with pytest.raises(StorageError, match="or a parent of it is a file"):
            EpisodeDataset.open(path)


def test_errors_of_the_storage_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = make_dataset(tmp_path / "d", [5])

    def raising(text: str) -> None:
        def fail(*args: object, **kwargs: object) -> None:
            raise OSError(text)

        monkeypatch.setattr(lance.fragment, "write_fragments", fail)

    raising("LanceError(IO): No space left on device (os error 28), /lance/writer.rs:254:9")
    with pytest.raises(StorageError, match=r"the disk is full; free some space"):
        dataset.append([make_episode(1)])
    raising("LanceError(IO): Permission denied (os error 13), /lance/writer.rs:254:9")
    with pytest.raises(StorageError, match="no permission"):
        dataset.append([make_episode(1)])
    monkeypatch.undo()
    dataset.append([make_episode(1)])
    assert len(EpisodeDataset.open(tmp_path / "d")) == 2


FULL_DISK = """
import sys
from data_samples import SPEC, make_episode
from worldloom.core.errors import StorageError
from worldloom.data import EpisodeDataset, load_cache, validate
from pathlib import Path
disk = Path(sys.argv[1])
dataset = EpisodeDataset.create(disk / "d", SPEC)
kept = 0
try:
    for index in range(10_000):
        dataset.append([make_episode(index, 500)])
        kept += 1
except StorageError as error:
    assert "disk is full" in str(error), error
assert 0 < kept < 10_000
dataset = EpisodeDataset.open(disk / "d")
assert len(dataset) == kept and validate(disk / "d") == []
try:
    load_cache(dataset, "mmap")
    raise SystemExit("the cache was expected not to fit")
except StorageError as error:
    assert "disk is full" in str(error), error
assert not list(disk.glob("d.cache/*.frames")), "half a cache was left"
print("kept", kept)
"""


def test_a_disk_that_is_really_full(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = f"mount -t tmpfs -o size=1m none {disk}"
    if shutil.which("unshare") is None or subprocess.run(["unshare", "-rm", "sh", "-c", mount], check=False).returncode:
        pytest.skip("no small disk can be mounted here")
    command = f'{mount} && "{sys.executable}" -c "$0" {disk}'
    result = subprocess.run(
        ["unshare", "-rm", "sh", "-c", command, FULL_DISK],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("kept")


WRITER = """
import sys
from data_samples import SPEC, make_episode
from worldloom.data import EpisodeDataset
dataset = EpisodeDataset.open(sys.argv[1])
print("ready", flush=True)
while True:
    first = len(dataset)
    dataset.append([make_episode(index, 40) for index in range(first, first + 3)])
    print(len(dataset), flush=True)
"""


def test_a_writer_killed_at_any_moment_leaves_whole_episodes_and_all_that_it_acknowledged(tmp_path: Path) -> None:
    path = tmp_path / "d"
    EpisodeDataset.create(path, SPEC)
    chance = random.Random()  # another moment in each run is the point
    for _ in range(3):
        command = [sys.executable, "-c", WRITER, str(path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parent) as writer:
            assert writer.stdout is not None
            assert writer.stdout.readline() == "ready\n"
            time.sleep(0.02 + 0.4 * chance.random())
            os.kill(writer.pid, signal.SIGKILL)
            acknowledged = [int(line) for line in writer.stdout.read().split("\n")[:-1]]
        dataset = EpisodeDataset.open(path)
        assert len(dataset) % 3 == 0
        assert len(dataset) >= max(acknowledged, default=0)
    assert validate(path) == []
    assert all(same(dataset.episode(index), make_episode(index, 40)) for index in range(len(dataset)))
