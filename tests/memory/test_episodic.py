"""The episodic memory: nothing acknowledged is lost, what is recalled is nearest, and the redundant is forgotten."""

import json
import os
import sqlite3
import subprocess
import sys
from collections import deque
from dataclasses import replace
from pathlib import Path

import lance
import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from worldloom.core.errors import CheckpointError, DataError, StorageError
from worldloom.core.types import ActionSpec, ModelSpec, Observations, ObservationSpec
from worldloom.memory import EpisodicMemory, Memories, MemoryConfig, Where, migrate
from worldloom.memory.forgetting import choose
from worldloom.memory.migrations import Migration
from worldloom.testing import LinearWorld

SPEC = ModelSpec(
    observation=ObservationSpec(pixels=(8, 6, 3), vector=2),
    action=ActionSpec(low=(-1.0,), high=(1.0,)),
    block=2,
    context=1,
    latent_dim=4,
    fingerprint="model-a",
)
ROOT = Path(__file__).parents[2]


def made(path: Path, **config: object) -> EpisodicMemory:
    return EpisodicMemory.create(path, spec=SPEC, config=MemoryConfig.parse(config))


def latents_of(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 4, generator=torch.Generator().manual_seed(seed))


def seen(count: int, seed: int = 0) -> Observations:
    generator = torch.Generator().manual_seed(seed)
    return Observations(
        pixels=torch.randint(0, 256, (count, 8, 6, 3), dtype=torch.uint8, generator=generator),
        vector=torch.randn(count, 2, generator=generator),
    )


def fill(memory: EpisodicMemory, count: int, seed: int = 0, **columns: object) -> np.ndarray:
    """Append memories one stretch long."""
    (episode,) = memory.new_episodes(1)
    return memory.append(latents_of(count, seed), episodes=np.full(count, episode), steps=np.arange(count), **columns)


def test_what_was_appended_is_there_after_a_restart(tmp_path: Path) -> None:
    surprises = np.array([0.5, np.nan, 2.0], np.float32)
    actions = torch.tensor([[0.0, 0.0], [0.1, -0.1], [1.0, -1.0]])
    with made(tmp_path / "m") as memory:
        ids = fill(memory, 3, actions=actions, surprises=surprises, outcomes=["", "it's", "x"], observations=seen(3))
        assert memory.pending == 3
        pending = memory.read()
    with EpisodicMemory.open(tmp_path / "m", spec=SPEC) as memory:
        assert (len(memory), memory.pending) == (3, 0)
        stored = memory.read()
        observations = memory.observations(ids[::-1].copy())
    for name, column in vars(stored).items():
        np.testing.assert_array_equal(column, getattr(pending, name))
    np.testing.assert_array_equal(stored.surprises, surprises)
    assert stored.outcomes.tolist() == ["", "it's", "x"]
    assert torch.equal(torch.from_numpy(stored.actions), actions)
    expected = seen(3)
    assert expected.pixels is not None
    assert expected.vector is not None
    assert observations.pixels is not None
    assert observations.vector is not None
    assert torch.equal(observations.pixels, expected.pixels.flip(0))
    assert torch.equal(observations.vector, expected.vector.flip(0))


def test_killed_writers_lose_nothing_that_was_acknowledged() -> None:
    """Ten kills here; benchmarks/results/memory-kills.json holds two hundred."""
    command = [sys.executable, str(ROOT / "benchmarks" / "memory_kills.py"), "--kills", "4", "--seed", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(done.stdout)
    assert all(row["acknowledged"] > 0 and row["reads beside"] >= 0 and not row["wrong"] for row in rows.values())


@given(
    seed=st.integers(0, 2**31),
    stored=st.integers(0, 30),
    waiting=st.integers(0, 10),
    k=st.integers(1, 8),
    since=st.none() | st.floats(0, 40),
    outcome=st.none() | st.sampled_from(["", "it's", "nowhere"]),
)
def test_recall_is_an_exact_search_among_what_is_meant(
    tmp_path_factory: pytest.TempPathFactory,
    seed: int,
    stored: int,
    waiting: int,
    k: int,
    since: float | None,
    outcome: str | None,
) -> None:
    count = stored + waiting
    latents = latents_of(count + 2, seed)
    times = np.arange(count, dtype=np.float64)
    outcomes = np.array(["it's" if row % 3 == 0 else "" for row in range(count)], dtype=str)
    with made(tmp_path_factory.mktemp("memory") / "m") as memory:
        for rows in (slice(0, stored), slice(stored, count)):
            length = len(times[rows])
            zeros = np.zeros(length, np.int64)
            memory.append(
                latents[rows] if length else latents[:0],
                episodes=zeros,
                steps=zeros,
                times=times[rows],
                outcomes=outcomes[rows].tolist(),
            )
            if rows.start == 0:
                memory.flush()
        where = Where(since=since, outcome=outcome)
        found = memory.recall(latents[count:], k, where=where)
        read = memory.read(where)
    meant = (times >= (since or 0)) & (np.full(count, True) if outcome is None else outcomes == outcome)
    np.testing.assert_array_equal(read.ids, np.flatnonzero(meant))
    for query, ids, distances in zip(latents[count:], found.ids, found.distances, strict=True):
        gaps = (latents[:count][torch.from_numpy(meant)] - query).norm(dim=1).numpy()
        expected = np.flatnonzero(meant)[np.argsort(gaps, kind="stable")][:k]
        np.testing.assert_array_equal(ids[: len(expected)], expected)
        np.testing.assert_allclose(distances[: len(expected)], np.sort(gaps)[:k], rtol=1e-4, atol=1e-5)
        assert (ids[len(expected) :] == -1).all()
        assert np.isinf(distances[len(expected) :]).all()


def test_the_index_finds_what_exact_search_finds(tmp_path: Path) -> None:
    latents, queries = latents_of(3000), latents_of(50, seed=1)
    with made(tmp_path / "m", index_from=1024, flush_every=500, probes=16) as memory:
        zeros = np.zeros(500, np.int64)
        for some in latents.split(500):
            memory.append(some, episodes=zeros, steps=zeros)
        memory.flush()
        assert memory.indexed == 3000
        found = memory.recall(queries, 10)
    exact = torch.cdist(queries, latents).topk(10, dim=1, largest=False).indices.numpy()
    hits = np.mean([len(set(a) & set(b)) for a, b in zip(found.ids.tolist(), exact.tolist(), strict=True)]) / 10
    assert hits >= 0.95


def test_readers_see_what_was_written_since_when_they_look_again(tmp_path: Path) -> None:
    with made(tmp_path / "m") as writer:
        fill(writer, 2, observations=seen(2))
        with EpisodicMemory.open(tmp_path / "m", spec=SPEC) as reader:
            assert (len(reader), reader.pending) == (2, 2)
            fill(writer, 3, observations=seen(3, seed=1))
            writer.flush()
            # What waited when the reader looked has moved on; its pictures are still found.
            assert reader.pictures(np.array([0, 1])).shape == (2, 8, 6, 3)
            assert len(reader) == 2
            assert reader.refresh()
            assert (len(reader), reader.pending) == (5, 0)
            assert not reader.refresh()


def test_one_process_writes_at_a_time(tmp_path: Path) -> None:
    with made(tmp_path / "m"):
        with pytest.raises(StorageError, match="another process writes"):
            EpisodicMemory.open(tmp_path / "m", spec=SPEC, writable=True)
        with (
            EpisodicMemory.open(tmp_path / "m", spec=SPEC) as reader,
            pytest.raises(StorageError, match="open for reading"),
        ):
            fill(reader, 1)
    EpisodicMemory.open(tmp_path / "m", spec=SPEC, writable=True).close()
    with pytest.raises(StorageError, match="already contains a memory"):
        made(tmp_path / "m")


def test_ids_and_episodes_are_never_drawn_twice(tmp_path: Path) -> None:
    with made(tmp_path / "m") as memory:
        assert fill(memory, 200).tolist() == list(range(200))
        memory.prune(100)
    with EpisodicMemory.open(tmp_path / "m", spec=SPEC, writable=True) as memory:
        (episode,) = memory.new_episodes(1)
        assert episode == 1
        assert fill(memory, 1).tolist() == [200]
    # A journal that was lost takes nothing along that the table knows.
    for file in (tmp_path / "m").glob("journal.sqlite*"):
        file.unlink()
    with EpisodicMemory.open(tmp_path / "m", spec=SPEC, writable=True) as memory:
        assert memory.new_episodes(1).tolist() == [3]
        assert fill(memory, 1).tolist() == [201]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"latents": torch.full((2, 4), torch.nan)}, "not finite"),
        ({"latents": torch.zeros(2, 3)}, "of 4"),
        ({"actions": torch.zeros(2, 5)}, "action blocks"),
        ({"outcomes": ["a"]}, "1 outcomes for 2"),
        ({"observations": Observations(vector=torch.zeros(2, 2))}, "expects pixels"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_kept(
    tmp_path: Path, columns: dict[str, object], message: str
) -> None:
    with made(tmp_path / "m") as memory:
        given_columns = {"latents": latents_of(2), "episodes": np.zeros(2, np.int64), "steps": np.arange(2), **columns}
        with pytest.raises(DataError, match=message):
            memory.append(**given_columns)
        assert len(memory) == 0
        assert fill(memory, 1).tolist() == [0]


def test_latents_of_another_model_are_refused_and_can_be_made_anew(tmp_path: Path) -> None:
    world = LinearWorld()
    path = tmp_path / "m"
    observations = Observations(vector=torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]))
    older = replace(world.spec, fingerprint="older", latent_dim=5)
    steps = np.arange(3)
    with EpisodicMemory.create(path, spec=older) as memory:
        memory.append(
            torch.zeros(3, 5),
            episodes=np.zeros(3, np.int64),
            steps=steps,
            observations=observations,
            outcomes=["", "", "there"],
        )
    with pytest.raises(CheckpointError, match=f"worldloom memory reencode {path} RUN"):
        EpisodicMemory.open(path, spec=world.spec)
    with EpisodicMemory.open(path, spec=None, writable=True) as memory:
        memory.reencode(world, batch=2)
    with EpisodicMemory.open(path, spec=world.spec) as memory:
        memories = memory.read()
        assert observations.vector is not None
        assert torch.equal(torch.from_numpy(memories.latents), observations.vector)
        assert memories.ids.tolist() == [0, 1, 2]
        assert memories.outcomes.tolist() == ["", "", "there"]
        assert torch.equal(memory.observations(memories.ids).vector, observations.vector)


def test_thumbnails_show_but_do_not_encode(tmp_path: Path) -> None:
    spec = replace(SPEC, observation=ObservationSpec(pixels=(64, 48, 3)))
    config = MemoryConfig(frames="thumbnail")
    with EpisodicMemory.create(tmp_path / "m", spec=spec, config=config) as memory:
        pixels = torch.full((1, 64, 48, 3), 9, dtype=torch.uint8)
        memory.append(
            latents_of(1),
            episodes=np.zeros(1, np.int64),
            steps=np.zeros(1, np.int64),
            observations=Observations(pixels=pixels),
        )
        assert memory.pictures(np.array([0])).shape == (1, 32, 24, 3)
        with pytest.raises(DataError, match="frames='thumbnail'"):
            memory.observations(np.array([0]))
        with pytest.raises(DataError, match="no memory with id 7"):
            memory.pictures(np.array([7]))


def crowded(count: int, seed: int) -> Memories:
    """A life spent in one corner: first a wide way through the world, then nine tenths at home."""
    generator = np.random.default_rng(seed)
    wide = generator.uniform(-10, 10, (count // 10, 4))
    home = generator.normal(0, 0.3, (count - len(wide), 4))
    latents = np.concatenate([wide, home]).astype(np.float32)
    return Memories(
        ids=np.arange(count),
        times=np.arange(count, dtype=np.float64),
        episodes=np.zeros(count, np.int64),
        steps=np.arange(count),
        latents=latents,
        actions=np.zeros((count, 2), np.float32),
        surprises=generator.uniform(0, 1, count).astype(np.float32),
        outcomes=np.array([""] * count, dtype=str),
    )


@given(seed=st.integers(0, 2**31), keep=st.integers(100, 500))
def test_forgetting_keeps_the_world_covered(seed: int, keep: int) -> None:
    memories = crowded(1000, seed)
    kept = choose(memories, keep, np.random.default_rng(0))
    assert kept.sum() == keep
    latents = torch.from_numpy(memories.latents)

    def hole(mask: np.ndarray) -> float:
        """How far the loneliest forgotten memory is from what is kept."""
        return float(torch.cdist(latents[torch.from_numpy(~mask)], latents[torch.from_numpy(mask)]).min(dim=1)[0].max())

    newest = memories.ids >= 1000 - keep
    assert hole(kept) < hole(newest)


def test_the_newest_the_most_surprising_and_what_had_an_outcome_are_kept() -> None:
    memories = crowded(1000, 0)
    outcomes = np.array(["reached" if row % 100 == 50 else "" for row in range(1000)], dtype=str)
    memories = replace(memories, outcomes=outcomes)
    kept = choose(memories, 400, np.random.default_rng(0))
    assert kept[-40:].all()
    assert kept[np.argsort(-memories.surprises)[:20]].all()
    assert kept[outcomes == "reached"].all()


def test_a_full_memory_forgets_down_to_nine_tenths(tmp_path: Path) -> None:
    with made(tmp_path / "m", capacity=200, flush_every=50) as memory:
        for seed in range(20):
            fill(memory, 25, seed)
        assert len(memory) <= 220
        memory.flush()
        assert len(memory) <= 200
        before = len(memory)
        assert (before - memory.prune(100), len(memory)) == (100, 100)
        ids = memory.read().ids
        assert len(set(ids.tolist())) == 100
        assert ids[-1] == 499


def versioned(path: Path, version: int | str) -> None:
    """Write a memory's table anew, as if of another version."""
    table = lance.dataset(path / "records.lance").to_table()
    metadata = {**table.schema.metadata, b"version": str(version).encode()}
    lance.write_dataset(table.replace_schema_metadata(metadata), path / "records.lance", mode="overwrite")


def step_to(version: int, was: str, now: str) -> Migration:
    """A migration that lengthens outcomes: enough to see which were applied, and in which order."""

    def step(table: lance.LanceDataset) -> pa.RecordBatchReader:
        rows = table.to_table()
        outcomes = pa.array([each.replace(was, now) for each in rows["outcome"].to_pylist()], pa.string())
        rows = rows.set_column(rows.schema.get_field_index("outcome"), rows.schema.field("outcome"), outcomes)
        return rows.replace_schema_metadata({**table.schema.metadata, b"version": str(version).encode()}).to_reader()

    return step


def test_an_older_format_is_migrated_step_by_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m"
    with made(path) as memory:
        fill(memory, 2, outcomes=["a", ""], observations=seen(2))
    monkeypatch.setattr("worldloom.memory.records.VERSION", 3)
    with pytest.raises(DataError, match=f"'worldloom memory migrate {path}'"):
        EpisodicMemory.open(path, spec=SPEC)
    steps = {1: step_to(2, "a", "ab"), 2: step_to(3, "ab", "abc")}
    assert migrate(path, steps) == [1, 2, 3]
    with EpisodicMemory.open(path, spec=SPEC) as memory:
        assert memory.read().outcomes.tolist() == ["abc", ""]
        assert memory.observations(np.array([0, 1])).pixels is not None
    assert migrate(path, steps) == [3]


def test_a_migration_that_fails_leaves_what_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m"
    with made(path) as memory:
        fill(memory, 2)
    monkeypatch.setattr("worldloom.memory.records.VERSION", 2)

    def step(table: lance.LanceDataset) -> pa.RecordBatchReader:
        rows = table.to_table()

        def batches():
            yield from rows.slice(0, 1).to_batches()
            raise OSError(28, "No space left on device")

        return pa.RecordBatchReader.from_batches(rows.schema, batches())

    with pytest.raises(StorageError, match="full"):
        migrate(path, {1: step})
    monkeypatch.setattr("worldloom.memory.records.VERSION", 1)
    with EpisodicMemory.open(path, spec=SPEC) as memory:
        assert len(memory) == 2


def test_versions_that_cannot_be_read_say_so(tmp_path: Path) -> None:
    path = tmp_path / "m"
    made(path).close()
    versioned(path, 9)
    with pytest.raises(DataError, match="version 9.*install the version of worldloom that wrote the memory"):
        EpisodicMemory.open(path, spec=SPEC)
    with pytest.raises(DataError, match="cannot convert it to version"):
        migrate(path)
    for version in ("", "²", "9" * 5000, "-1"):
        versioned(path, version)
        with pytest.raises(DataError, match="not a worldloom memory"):
            EpisodicMemory.open(path, spec=SPEC)


def test_damage_is_told_and_what_is_whole_stays(tmp_path: Path) -> None:
    path = tmp_path / "m"
    with made(path) as memory:
        fill(memory, 50)
    with pytest.raises(StorageError, match="there is no memory at"):
        EpisodicMemory.open(tmp_path / "nothing", spec=SPEC)
    assert not (tmp_path / "nothing").exists()
    journal = path / "journal.sqlite"
    whole = journal.read_bytes()
    journal.write_bytes(b"this is no database, but long enough to look like a file of one" * 20)
    with pytest.raises(DataError, match=r"journal.*is damaged"):
        EpisodicMemory.open(path, spec=SPEC)
    journal.write_bytes(whole)
    (data,) = (path / "records.lance" / "data").glob("*.lance")
    data.write_bytes(data.read_bytes()[:-40])
    with pytest.raises(DataError, match=r"is damaged.*create a new memory"):
        EpisodicMemory.open(path, spec=SPEC).read()
    lance.write_dataset(pa.table({"id": [1]}), tmp_path / "other" / "records.lance")
    with pytest.raises(DataError, match="not a worldloom memory"):
        EpisodicMemory.open(tmp_path / "other", spec=SPEC)


def test_a_full_disk_refuses_the_append_and_keeps_the_rest(tmp_path: Path) -> None:
    path = tmp_path / "m"
    with made(path) as memory:
        fill(memory, 2, observations=seen(2))
        journal = memory._journal
        assert journal is not None
        database: sqlite3.Connection = journal._database
        (pages,) = database.execute("PRAGMA page_count").fetchone()
        database.execute(f"PRAGMA max_page_count = {pages + 1}")
        with pytest.raises(StorageError, match="full; free some space"):
            deque(fill(memory, 2, seed, observations=seen(2, seed)) for seed in range(100))
        kept = memory.read().ids
        database.execute(f"PRAGMA max_page_count = {pages + 1000}")
        assert fill(memory, 1).tolist() == [kept[-1] + 1]
    with EpisodicMemory.open(path, spec=SPEC) as memory:
        assert memory.read().ids.tolist() == list(range(len(kept) + 1))


def test_no_other_user_can_read_a_memory(tmp_path: Path) -> None:
    path = tmp_path / "m"
    path.mkdir(mode=0o755)
    with made(path) as memory:
        fill(memory, 3)
        assert path.stat().st_mode & 0o077 == 0
        files = list(path.glob("journal.sqlite*"))
        assert len(files) > 1
        assert [file.stat().st_mode & 0o077 for file in files] == [0] * len(files)
    for shared, mode in ((path, 0o755), (path / "journal.sqlite", 0o640)):
        before = shared.stat().st_mode
        shared.chmod(mode)
        for writable in (False, True):
            with pytest.raises(StorageError, match=f"other users may use .* {mode:03o}.*run: chmod -R go= "):
                EpisodicMemory.open(path, spec=SPEC, writable=writable)
        shared.chmod(before)
    with EpisodicMemory.open(path, spec=SPEC) as memory:
        assert len(memory) == 3


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="needs POSIX users")
def test_a_directory_that_cannot_be_written_can_be_read(tmp_path: Path) -> None:
    path = tmp_path / "m"
    with made(path) as memory:
        fill(memory, 3)
    user = 65534 if os.geteuid() == 0 else os.geteuid()
    for folder, _, files in os.walk(path):
        for name in files:
            os.chown(Path(folder) / name, user, -1)
            (Path(folder) / name).chmod(0o400)
        os.chown(folder, user, -1)
        Path(folder).chmod(0o500)
    for parent in path.parents:
        if parent.stat().st_uid == os.geteuid() and parent != Path("/"):
            parent.chmod(parent.stat().st_mode | 0o055)
    script = f"""
import os
from worldloom.core.types import ActionSpec, ModelSpec, ObservationSpec
from worldloom.core.errors import StorageError
from worldloom.memory import EpisodicMemory
import lance
if os.geteuid() == 0:
    os.setuid(65534)
with EpisodicMemory.open({str(path)!r}, spec=None) as memory:
    print(len(memory))
try:
    EpisodicMemory.open({str(path)!r}, spec=None, writable=True)
except StorageError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=60)
    for folder, _, _ in os.walk(path):
        Path(folder).chmod(0o700)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("3\n")
    assert "no permission" in done.stdout


def test_a_memory_whose_creation_was_interrupted_is_created_again(tmp_path: Path, monkeypatch) -> None:
    import lance

    def interrupted(_: object, target: Path, **__: object) -> None:
        (target / "_versions").mkdir(parents=True)
        (target / "data").mkdir()
        raise OSError("LanceError(IO): No space left on device")

    with monkeypatch.context() as full:
        full.setattr(lance, "write_dataset", interrupted)
        with pytest.raises(StorageError):
            EpisodicMemory.open_or_create(tmp_path / "memory", spec=SPEC)
    with EpisodicMemory.open_or_create(tmp_path / "memory", spec=SPEC) as memory:
        assert len(memory) == 0


def test_a_journal_with_a_query_of_its_own_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m"
    with made(path) as memory:
        fill(memory, 50)
    with sqlite3.connect(path / "journal.sqlite") as database:
        database.execute("DROP TABLE pending")
        endless = "WITH RECURSIVE r(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM r) SELECT x FROM r"
        database.execute(f"CREATE VIEW pending AS {endless}")
    database.close()
    for writable in (False, True):
        with pytest.raises(DataError, match="has the view 'pending', which worldloom does not write"):
            EpisodicMemory.open(path, spec=SPEC, writable=writable)
