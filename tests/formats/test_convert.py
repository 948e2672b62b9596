import json
import random
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from format_samples import SPEC, SPECS, Killed, SplitFormat, SplitSource, differences, kill_at, make_episode, make_store

from worldloom.core.errors import ConfigError, DataError, StorageError
from worldloom.core.types import Episode
from worldloom.data import EpisodeDataset, validate
from worldloom.formats import FORMATS, ReadOptions, WriteOptions, convert, detect, folder, hdf5, store
from worldloom.formats import conversion as engine
from worldloom.formats.format import decoded_bytes, natural

MINE = ["worldloom", "folder", "robomimic", "swm-hdf5"]


@pytest.fixture
def split(monkeypatch: pytest.MonkeyPatch) -> SplitFormat:
    split = SplitFormat()
    monkeypatch.setitem(FORMATS._entries, "split", split.format)
    monkeypatch.setattr(store.StoreSink, "most_episodes", 2)
    return split


def stored(path: Path) -> list[Episode]:
    assert validate(path) == []
    dataset = EpisodeDataset.open(path)
    return [dataset.episode(index) for index in range(len(dataset))]


def assert_same(there: list[Episode], expected: list[Episode]) -> None:
    assert [episode.metadata for episode in there] == [episode.metadata for episode in expected]
    assert [differences(*pair) for pair in zip(there, expected, strict=True)] == [[] for _ in expected]


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("name", sorted(FORMATS))
def test_a_round_trip_changes_nothing(name: str, spec: Any, tmp_path: Path) -> None:
    ours = make_store(tmp_path / "ours", spec=spec)
    there = convert(tmp_path / "ours", tmp_path / "there", target_format=name, write=WriteOptions(lossless=True))
    back = convert(tmp_path / "there", tmp_path / "back")  # the format is found by looking
    assert (there.episodes, there.frames, back.source_format) == (4, ours.frames, name)
    assert there.notes == back.notes == []
    assert_same(stored(tmp_path / "back"), stored(tmp_path / "ours"))
    returned = EpisodeDataset.open(tmp_path / "back").spec
    assert (returned.observation, returned.action, returned.labels) == (spec.observation, spec.action, spec.labels)
    assert spec.environment.items() <= returned.environment.items()
    assert EpisodeDataset.open(tmp_path / "back").fingerprint() == ours.fingerprint()


def test_the_report_is_saved_and_groups_what_repeats(tmp_path: Path, split: SplitFormat) -> None:
    report = convert(tmp_path, tmp_path / "t", source_format="split")
    everything = SplitSource.everything()
    assert (report.source_episodes, report.episodes, report.resumed) == (12, len(everything), 0)
    assert report.frames == sum(episode.steps + 1 for episode in everything)
    assert report.bytes == sum(
        part.nbytes
        for episode in everything
        for part in (episode.pixels, episode.vector, episode.actions, *episode.labels.values())
        if part is not None
    )
    groups = [(group.kind, group.count, group.example) for group in report.groups()]
    assert groups == [("dropped", 1, "Rewards are left out."), ("skipped", 4, "Episode 0 is empty.")]
    saved = json.loads((tmp_path / "t.conversion.json").read_text())["report"]
    assert saved == json.loads(json.dumps(report.to_json()))
    assert not (tmp_path / "t.convert.jsonl").exists()
    assert convert(tmp_path, tmp_path / "t", source_format="split") == report  # complete: nothing is read again
    assert split.sources[-1].reads == []


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize(
    ("name", "owner", "method", "when"),
    [
        ("worldloom", EpisodeDataset, "append", 1),
        ("worldloom", EpisodeDataset, "append", 5),
        ("worldloom", store.StoreSink, "begin", 1),
        ("worldloom", engine._Journal, "begin", 1),
        ("worldloom", engine._Journal, "add", 1),
        ("worldloom", engine._Journal, "add", 6),
        ("worldloom", engine._Journal, "finish", 1),
        ("robomimic", hdf5, "write_atomic", 5),
        ("robomimic", hdf5, "write_atomic", 13),  # twelve parts, then the whole
        ("swm-hdf5", hdf5.PartsSink, "_clean", 1),
        ("swm-hdf5", hdf5.PartsSink, "finish", 1),
        ("folder", folder, "write_video", 5),
        ("folder", folder, "write_parquet", 5),
        ("folder", folder.FolderSink, "finish", 1),
    ],
)
def test_a_kill_anywhere_neither_loses_nor_repeats_an_episode(
    name: str,
    owner: Any,
    method: str,
    when: int,
    after: bool,
    tmp_path: Path,
    split: SplitFormat,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write = WriteOptions(lossless=True)
    with monkeypatch.context() as patch:
        patch.setattr(store.StoreSink, "close", lambda self: None)
        kill_at(patch, owner, method, when, after)
        with pytest.raises(Killed):
            convert(tmp_path, tmp_path / "t", source_format="split", target_format=name, write=write)
    report = convert(tmp_path, tmp_path / "t", source_format="split", target_format=name, write=write)
    assert report.episodes == 12
    assert [note.what for note in report.notes if note.kind == "skipped"] == [
        f"Episode {index} is empty." for index in (0, 3, 6, 9)
    ]
    if name != "worldloom":
        convert(tmp_path / "t", tmp_path / "back")
    assert_same(stored(tmp_path / ("t" if name == "worldloom" else "back")), SplitSource.everything())
    assert not [path.name for path in tmp_path.iterdir() if "parts" in path.name]


def test_parts_that_were_half_deleted_are_no_beginning(
    tmp_path: Path, split: SplitFormat, monkeypatch: pytest.MonkeyPatch
) -> None:
    def half(path: Path, **_: Any) -> None:
        if path.exists():
            (path / "000000.h5").unlink()
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(hdf5.shutil, "rmtree", half)
        with pytest.raises(Killed):
            convert(tmp_path, tmp_path / "t", source_format="split", target_format="robomimic")
    (tmp_path / "t").unlink()
    sink = FORMATS["robomimic"].create(tmp_path / "t", SPEC, WriteOptions(), resume=True)
    with sink:
        assert sink.written == 0
        sink.write(make_episode(0))
    with FORMATS["robomimic"].create(tmp_path / "t", SPEC, WriteOptions(), resume=True) as sink:
        assert sink.written == 1


def test_a_lost_or_torn_journal_line_is_made_good(
    tmp_path: Path, split: SplitFormat, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(store.StoreSink, "close", lambda self: None)
        kill_at(patch, EpisodeDataset, "append", 4, after=True)
        with pytest.raises(Killed):
            convert(tmp_path, tmp_path / "t", source_format="split")
    journal = tmp_path / "t.convert.jsonl"
    lines = journal.read_text().splitlines(keepends=True)
    journal.write_text("".join(lines[:3]) + lines[3][:10])
    report = convert(tmp_path, tmp_path / "t", source_format="split")
    assert report.resumed == 8
    assert_same(stored(tmp_path / "t"), SplitSource.everything())
    assert split.sources[-1].reads == list(range(2, 12))


def test_resuming_begins_where_it_stopped(tmp_path: Path, split: SplitFormat, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        kill_at(patch, SplitSource, "read", 9, after=False)  # what waits is committed on leaving
        with pytest.raises(Killed):
            convert(tmp_path, tmp_path / "t", source_format="split")
    convert(tmp_path, tmp_path / "t", source_format="split")
    assert split.sources[-1].reads == [8, 9, 10, 11]
    assert_same(stored(tmp_path / "t"), SplitSource.everything())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["worldloom", "robomimic", "folder"])
def test_sigkill_at_random_moments(name: str, tmp_path: Path, split: SplitFormat) -> None:
    chance = random.Random(name)
    script = [sys.executable, str(Path(__file__).with_name("convert_slowly.py")), str(tmp_path), str(tmp_path / "t")]
    killed = 0
    for _ in range(3):
        process = subprocess.Popen([*script, name, "0.05"], stdout=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.readline()  # the imports take longer than the work
        time.sleep(chance.uniform(0.05, 0.35))
        process.send_signal(signal.SIGKILL)
        process.stdout.close()
        if process.wait() == 0:
            break
        killed += 1
    write = WriteOptions(lossless=True)
    convert(tmp_path, tmp_path / "t", source_format="split", target_format=name, write=write)
    if name != "worldloom":
        convert(tmp_path / "t", tmp_path / "back")
    assert_same(stored(tmp_path / ("t" if name == "worldloom" else "back")), SplitSource.everything())
    assert killed


def test_another_conversion_is_never_mixed_in(tmp_path: Path, split: SplitFormat) -> None:
    make_store(tmp_path / "ours")
    with pytest.raises(DataError, match="of an unknown conversion"):
        convert(tmp_path, tmp_path / "ours", source_format="split")
    convert(tmp_path, tmp_path / "t", source_format="split")
    for call in (
        lambda: convert(tmp_path, tmp_path / "t", source_format="split", read=ReadOptions(size=(4, 4))),
        lambda: convert(tmp_path / "ours", tmp_path / "t"),
    ):
        with pytest.raises(DataError, match="a different conversion"):
            call()
    with pytest.raises(DataError, match="already contains"):
        convert(tmp_path, tmp_path / "t", source_format="split", resume=False)
    for name in ("folder", "robomimic"):
        convert(tmp_path, tmp_path / name, source_format="split", target_format=name)
        with pytest.raises(DataError, match="already exists"):
            convert(tmp_path, tmp_path / name, source_format="split", target_format=name, resume=False)
    assert_same(stored(tmp_path / "t"), SplitSource.everything())


def test_an_interrupted_conversion_of_a_changed_source_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = make_store(tmp_path / "ours")
    monkeypatch.setattr(store.StoreSink, "most_episodes", 1)
    with monkeypatch.context() as patch:
        kill_at(patch, store.StoreSource, "read", 3, after=False)
        with pytest.raises(Killed):
            convert(tmp_path / "ours", tmp_path / "t")
    ours.append([make_episode(99)])
    with pytest.raises(DataError, match="source was .*, is .* Changed source files"):
        convert(tmp_path / "ours", tmp_path / "t")


def test_some_episodes_only(tmp_path: Path, split: SplitFormat) -> None:
    report = convert(tmp_path, tmp_path / "t", source_format="split", episodes=range(1, 12, 4))
    assert (report.source_episodes, report.episodes) == (3, 1 + 2 + 0)
    with pytest.raises(ConfigError, match="12 episodes"):
        convert(tmp_path, tmp_path / "u", source_format="split", episodes=range(5, 13))


def test_damage_ends_the_conversion_or_is_noted(
    tmp_path: Path, split: SplitFormat, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = SplitSource.read

    def read(self: SplitSource, index: int) -> list[Episode]:
        if index == 5:
            raise DataError("file x is cut; restore it")
        return original(self, index)

    monkeypatch.setattr(SplitSource, "read", read)
    with pytest.raises(DataError, match="file x is cut"):
        convert(tmp_path, tmp_path / "t", source_format="split")
    assert len(EpisodeDataset.open(tmp_path / "t")) == 4  # what came before is kept
    report = convert(tmp_path, tmp_path / "t", source_format="split", skip_damaged=True)
    assert [note.episode for note in report.notes if "file x is cut" in note.what] == [5]
    assert (report.resumed, report.episodes) == (4, 10)


def test_an_action_out_of_bounds_is_named(tmp_path: Path, split: SplitFormat, monkeypatch: pytest.MonkeyPatch) -> None:
    bad = make_episode(0)
    bad.actions[2, 0] = 7.0
    monkeypatch.setattr(SplitSource, "read", lambda self, index: [bad])
    with pytest.raises(DataError, match="source episode 0 has action .* at step 2"):
        convert(tmp_path, tmp_path / "t", source_format="split")


def test_looking_for_a_format(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="does not exist"):
        detect(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").write_text("hello")
    with pytest.raises(DataError, match="no known format") as caught:
        detect(tmp_path / "empty")
    assert all(FORMATS[name].description in str(caught.value) for name in FORMATS)
    for name in MINE:
        make_store(tmp_path / f"for {name}")
        convert(tmp_path / f"for {name}", tmp_path / name, target_format=name)
        assert detect(tmp_path / name).name == name
    both = tmp_path / "both"
    (tmp_path / "folder").rename(both)
    (tmp_path / "swm-hdf5").rename(both / "data.h5")
    with pytest.raises(DataError, match=r"several formats \(folder, swm-hdf5\); choose one with --from"):
        detect(both)
    assert convert(both, tmp_path / "chosen", source_format="folder").episodes == 4


def test_what_cannot_be_asked_for(tmp_path: Path, split: SplitFormat) -> None:
    make_store(tmp_path / "ours")
    with pytest.raises(ConfigError, match="both"):
        convert(tmp_path / "ours", tmp_path / "ours")
    with pytest.raises(ConfigError, match="cannot be written; choose one of "):
        convert(tmp_path / "ours", tmp_path / "t", target_format="split")
    with pytest.raises(ConfigError, match="unknown format 'robomimc'; did you mean 'robomimic'"):
        convert(tmp_path / "ours", tmp_path / "t", target_format="robomimc")
    for options in ({"rate": 3.0}, {"gap": 2.0}, {"actions": "mean"}, {"columns": {"unit": "ms"}}):
        for name in ("worldloom", "robomimic", "swm-hdf5"):
            with pytest.raises(ConfigError, match=f"option '{next(iter(options))}' is not supported"):
                FORMATS[name].open(tmp_path / "ours", ReadOptions.parse(options))
    assert not (tmp_path / "t").exists()


def test_one_source_episode_is_in_memory_at_a_time(
    tmp_path: Path, split: SplitFormat, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store.StoreSink, "most_episodes", 1)
    original, given, alive = SplitSource.read, list[weakref.ref[Episode]](), list[int]()

    def read(self: SplitSource, index: int) -> list[Episode]:
        alive.append(sum(episode() is not None for episode in given))
        parts = original(self, index)
        given.extend(map(weakref.ref, parts))
        return parts

    monkeypatch.setattr(SplitSource, "read", read)
    convert(tmp_path, tmp_path / "t", source_format="split")
    assert alive == [0] * 12


def test_a_damaged_store_is_said_to_be_damaged(tmp_path: Path) -> None:
    make_store(tmp_path / "ours")
    next((tmp_path / "ours" / "data").iterdir()).unlink()
    with pytest.raises(DataError, match="is damaged: a file is missing"):
        convert(tmp_path / "ours", tmp_path / "t")


def test_commits_are_made_by_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    episode = make_episode(0)
    monkeypatch.setattr(store.StoreSink, "most_bytes", 3 * decoded_bytes(episode))
    sink = FORMATS["worldloom"].create(tmp_path / "t", SPEC, WriteOptions(), resume=True)
    with sink:
        sizes = []
        for index in range(7):
            sink.write(make_episode(index))
            sizes.append(len(EpisodeDataset.open(tmp_path / "t")))
    assert sizes == [0, 0, 3, 3, 3, 6, 6]
    assert len(EpisodeDataset.open(tmp_path / "t")) == 7


def test_names_sort_as_people_count() -> None:
    names = ["demo_10", "demo_9", "demo_0", "b2a", "b10"]
    assert sorted(names, key=natural) == ["b2a", "b10", "demo_0", "demo_9", "demo_10"]
    odd = ["demo_²", "demo_" + "9" * 5000, "demo_7"]
    assert sorted(odd, key=natural) == ["demo_7", "demo_" + "9" * 5000, "demo_²"]


def test_frames_are_resized_by_averaging_areas(tmp_path: Path) -> None:
    make_store(tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "r", target_format="robomimic")
    convert(tmp_path / "r", tmp_path / "small", read=ReadOptions(size=(8, 8)))
    convert(tmp_path / "ours", tmp_path / "same", read=ReadOptions(size=(8, 8)))
    assert EpisodeDataset.open(tmp_path / "same").fingerprint() == EpisodeDataset.open(tmp_path / "small").fingerprint()
    for small, whole in zip(stored(tmp_path / "small"), stored(tmp_path / "ours"), strict=True):
        assert small.pixels is not None
        assert whole.pixels is not None
        means = whole.pixels.astype(np.float64).reshape(len(whole.pixels), 8, 2, 8, 3, 3).mean(axis=(2, 4))
        assert np.abs(small.pixels - means).max() <= 1.0


@pytest.mark.parametrize("name", ["swm-hdf5", "swm-lance"])
def test_hidden_files_in_a_folder_are_ignored(name: str, tmp_path: Path) -> None:
    make_store(tmp_path / "ours")
    suffix = {"swm-hdf5": ".h5", "swm-lance": ".lance"}[name]
    convert(tmp_path / "ours", tmp_path / "there" / f"data{suffix}", target_format=name)
    (tmp_path / "there" / f"._data{suffix}").write_bytes(b"\0\5\26\7")
    for report in (tmp_path / "there").glob("*.json"):
        report.unlink()
    assert detect(tmp_path / "there").name == name
    assert convert(tmp_path / "there", tmp_path / "back").episodes == 4


def test_a_pointer_of_git_lfs_is_no_unknown_format(tmp_path: Path) -> None:
    (tmp_path / "can.hdf5").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 12\n", "utf-8")
    with pytest.raises(DataError, match="can.hdf5 is a pointer of Git LFS"):
        detect(tmp_path / "can.hdf5")
