"""Storage that hangs, forgets to answer or gives half; processes that share a cache, and one that is killed."""

import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import boto3
import numpy as np
import pytest
from data_samples import SPEC, make_episode, same
from s3_server import BUCKET, FaultyProxy, options_for, s3_server

from worldloom.core.errors import DataError, StorageError
from worldloom.data import DataConfig, EpisodeDataset, stream_frames, validate
from worldloom.data.chunks import ChunkCache
from worldloom.data.layout import Unanswered

EPISODES = [make_episode(index, 8) for index in range(6)]
HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def server() -> Iterator[int]:
    with s3_server() as port:
        yield port


@pytest.fixture
def proxy(server: int) -> Iterator[FaultyProxy]:
    proxy = FaultyProxy(server)
    yield proxy
    proxy.close()


@pytest.fixture
def uri(server: int, request: pytest.FixtureRequest) -> str:
    """A dataset of two episodes for this test."""
    name = "".join(letter if letter.isalnum() else "-" for letter in request.node.name)
    uri = f"s3://{BUCKET}/{name}"
    EpisodeDataset.create(uri, SPEC, storage_options=options_for(server)).append(EPISODES[:2])
    return uri


def process(*arguments: str) -> "subprocess.Popen[str]":
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), *sys.path])}
    return subprocess.Popen(
        [sys.executable, str(HERE / "fault_processes.py"), *arguments],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


@pytest.mark.timeout(60)
def test_a_server_that_never_answers_is_given_up() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:  # the system accepts, and nobody ever reads
        options = options_for(listener.getsockname()[1])
        with pytest.raises(StorageError, match=r"could not be opened in [2-9] attempts .* did not answer within 0.5 s"):
            EpisodeDataset.open("s3://bucket/logs", storage_options=options, retry_seconds=2.0, timeout=0.5)


@pytest.mark.timeout(60)
def test_reading_and_appending_end_when_the_server_falls_silent(proxy: FaultyProxy, uri: str, tmp_path: Path) -> None:
    options = options_for(proxy.port)
    dataset, fresh = (
        EpisodeDataset.open(uri, storage_options=options, retry_seconds=1.0, timeout=1.0) for _ in range(2)
    )
    config = DataConfig(cache_dir=str(tmp_path), cache_gib=0.0, retry_seconds=1.0)
    with stream_frames(dataset, config) as frames:
        assert frames.pixels is not None
        proxy.fault = lambda _: "hang"
        with pytest.raises(StorageError, match="retry_seconds"):
            frames.pixels[np.arange(3)]
    for read in (fresh.columns, fresh.fingerprint, lambda: dataset.episode(0), lambda: next(dataset.scan_pixels())):
        with pytest.raises(Unanswered):
            read()
    with pytest.raises(StorageError, match="could not be written in"):
        dataset.append(EPISODES[2:3])
    proxy.fault = lambda _: ""
    assert len(EpisodeDataset.open(uri, storage_options=options)) == 2


@pytest.mark.parametrize("fault", ["503", "cut", "refuse"])
def test_opening_outlives_a_fault_that_passes_and_names_one_that_stays(
    proxy: FaultyProxy, uri: str, fault: str
) -> None:
    left = [fault] * 3
    proxy.fault = lambda _: left.pop() if left else ""
    options = options_for(proxy.port)
    dataset = EpisodeDataset.open(uri, storage_options=options)
    assert not left
    assert same(dataset.episode(1), EPISODES[1])
    proxy.fault = lambda line: fault if "_versions" in line else ""
    with pytest.raises(StorageError):
        EpisodeDataset.open(uri, storage_options=options, retry_seconds=1.0, timeout=2.0)


def test_half_an_object_in_the_store_is_damage_and_named(server: int, uri: str) -> None:
    client = boto3.client(
        "s3",
        endpoint_url=f"http://127.0.0.1:{server}",
        aws_access_key_id="key",
        aws_secret_access_key="secret",
        region_name="us-east-1",
    )
    prefix = uri.removeprefix(f"s3://{BUCKET}/")
    listed = client.list_objects_v2(Bucket=BUCKET, Prefix=f"{prefix}/data/")["Contents"]
    (key,) = [entry["Key"] for entry in listed]
    content = client.get_object(Bucket=BUCKET, Key=key)["Body"].read()
    client.put_object(Bucket=BUCKET, Key=key, Body=content[: len(content) // 2])
    with pytest.raises(DataError, match="is damaged: a file is missing, truncated or changed"):
        EpisodeDataset.open(uri, storage_options=options_for(server))


@pytest.mark.parametrize("fault", ["lost", "refuse", "503"])
def test_an_append_whose_commit_is_not_acknowledged_is_there_once(proxy: FaultyProxy, uri: str, fault: str) -> None:
    options = options_for(proxy.port)
    dataset = EpisodeDataset.open(uri, storage_options=options)
    commits: list[str] = []

    def once(line: str) -> str:
        if line.startswith(("PUT", "POST")) and "_versions" in line:
            commits.append(line)
            return fault if len(commits) == 1 else ""
        return ""

    proxy.fault = once
    dataset.append(EPISODES[2:4])
    assert commits
    dataset.append(EPISODES[4:5])  # and it goes on from the version that was found
    reopened = EpisodeDataset.open(uri, storage_options=options)
    assert len(reopened) == len(dataset) == 5
    assert all(same(reopened.episode(index), EPISODES[index]) for index in range(5))
    assert validate(uri, storage_options=options) == []


@pytest.mark.parametrize("fault", ["lost", "silent"])
def test_an_append_of_which_no_answer_comes_is_found_by_its_files(proxy: FaultyProxy, uri: str, fault: str) -> None:
    options = options_for(proxy.port)
    dataset = EpisodeDataset.open(uri, storage_options=options, retry_seconds=20.0, timeout=1.0)
    carried_out: list[float] = []

    def then_nothing(line: str) -> str:
        if "_versions" not in line:
            return ""
        if line.startswith("PUT"):
            carried_out.append(time.monotonic())
            return fault
        # Lance looks by itself whether a commit is there; for a while it sees nothing either.
        return "refuse" if carried_out and time.monotonic() - carried_out[0] < 1.5 else ""

    proxy.fault = then_nothing
    dataset.append(EPISODES[2:4])
    proxy.fault = lambda _: ""
    for found in (dataset, EpisodeDataset.open(uri, storage_options=options)):
        assert [same(found.episode(index), EPISODES[index]) for index in range(len(found))] == [True] * 4


def test_an_append_whose_answers_stay_lost_says_so_and_is_there_at_most_once(proxy: FaultyProxy, uri: str) -> None:
    options = options_for(proxy.port)
    dataset = EpisodeDataset.open(uri, storage_options=options, retry_seconds=1.0, timeout=3.0)
    proxy.fault = lambda line: "lost" if "_versions" in line else ""
    with pytest.raises(StorageError, match="could not be written"):
        dataset.append(EPISODES[2:4])
    proxy.fault = lambda _: ""
    assert len(EpisodeDataset.open(uri, storage_options=options)) in (2, 4)
    assert validate(uri, storage_options=options) == []


def test_of_two_processes_that_append_at_once_one_is_told_to_open_again(tmp_path: Path) -> None:
    path = tmp_path / "logs"
    EpisodeDataset.create(path, SPEC).append(EPISODES[:1])
    for round_ in range(2):
        writers = [process("append", str(path), str(2 * round_ + number)) for number in (1, 2)]
        for writer in writers:
            assert writer.stdout is not None
            assert writer.stdout.readline() == "ready\n"
        for writer in writers:
            assert writer.stdin is not None
            writer.stdin.write("\n")
            writer.stdin.flush()
        said = sorted(writer.communicate(timeout=60)[0].strip() for writer in writers)
        assert said == ["refused", "taken"]
        assert len(EpisodeDataset.open(path)) == round_ + 2
        assert validate(path) == []


@pytest.mark.slow  # three processes that import the library
def test_processes_that_share_a_cache_read_what_is_stored(tmp_path: Path) -> None:
    path = tmp_path / "logs"
    EpisodeDataset.create(path, SPEC).append([make_episode(index, 20) for index in range(12)])
    budget = 12 * 9 * 180  # of 28 chunks: they evict each other's
    readers = [process("stream", str(path), str(tmp_path / "chunks"), str(budget), str(seed)) for seed in range(3)]
    assert [reader.wait(timeout=100) for reader in readers] == [0, 0, 0]
    for reader in readers:
        reader.communicate()
    assert not list(tmp_path.glob("chunks/*/*.tmp"))
    ChunkCache(tmp_path / "chunks", "any", budget)  # looks at what several left, each of which counts its own
    assert sum(file.stat().st_size for file in tmp_path.glob("chunks/*/*.chunk")) <= budget


def test_a_process_killed_while_it_writes_leaves_whole_chunks(tmp_path: Path) -> None:
    size = 4 << 20
    for _ in range(3):
        writer = process("write-chunks", str(tmp_path))
        assert writer.stdout is not None
        assert writer.stdout.readline() == "ready\n"
        time.sleep(random.uniform(0.01, 0.2))
        writer.send_signal(signal.SIGKILL)
        writer.communicate()
        cache = ChunkCache(tmp_path, "killed", 1 << 30)
        out = np.empty((1, size), np.uint8)
        for chunk in range(8):
            there = chunk in cache
            assert cache.read(chunk, np.array([0]), size, 1, out) is there  # False would mean: there and damaged
            if there:
                assert (out == chunk).all()
    # What was being written is no chunk, and goes after an hour.
    left = tmp_path / "killed" / ".left.tmp"
    left.write_bytes(b"half")
    for file in tmp_path.glob("*/.*.tmp"):
        os.utime(file, (time.time() - 4000, time.time() - 4000))
    ChunkCache(tmp_path, "killed", 1 << 30)
    assert not list(tmp_path.glob("*/.*.tmp"))
