"""A file that ends the process that reads it ends a child; the parent names the file."""

import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lance
import pyarrow as pa
import pytest

from worldloom.core import untrusted, untrusted_child
from worldloom.core.errors import DataError
from worldloom.core.untrusted import HarmfulFile, try_files, written

READ = """
import json, os, signal, sys, time
request = json.loads(sys.stdin.readline())
print("file", json.dumps(request["files"][-1]), flush=True)
"""


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    untrusted._child.end()
    yield
    untrusted._child.end()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "a\u00e9\u2028.mp4"
    path.write_bytes(b"not a video")
    return path


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Keep the process that answers each request."""
    answer, processes = untrusted._Child._answer, []

    def keeping(self: untrusted._Child, process: Any, request: Any) -> Any:
        processes.append(process.pid)
        return answer(self, process, request)

    monkeypatch.setattr(untrusted._Child, "_answer", keeping)
    return processes


def child(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, code: str) -> None:
    script = tmp_path / "child.py"
    script.write_text(READ + code)
    monkeypatch.setattr(untrusted, "_CHILD", script)


@pytest.mark.parametrize(
    ("code", "cause"),
    [
        ("os.abort()", "SIGABRT"),
        ("print('memory allocation of 68 bytes failed', file=sys.stderr); os.abort()", "memory allocation of 68 bytes"),
        ("os.kill(os.getpid(), signal.SIGSEGV)", "SIGSEGV"),
        ("os.kill(os.getpid(), signal.SIGKILL)", "SIGKILL .perhaps for lack of memory"),
        ("os._exit(7)", "exit code 7"),
        ("print('refused [\"found a trap\"]')", "found a trap"),
        ("signal.alarm(1); time.sleep(60)", "took more than 300 s"),
    ],
)
def test_however_the_child_ends_the_file_is_named(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, cause: str
) -> None:
    child(monkeypatch, tmp_path, code)
    with pytest.raises(HarmfulFile, match=cause) as caught:
        try_files("video", [file])
    assert str(file) in str(caught.value)
    with pytest.raises(HarmfulFile):  # it is still not known
        try_files("video", [file])


def test_a_child_that_cannot_start_keeps_nobody_from_reading(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(untrusted, "_CHILD", tmp_path / "missing.py")
    try_files("video", [file])
    assert "without a child process" in caplog.text
    monkeypatch.setattr(untrusted.sys, "executable", str(tmp_path / "nothing"))
    file.write_bytes(b"changed")
    try_files("video", [file])


def test_a_file_is_tried_once_until_it_changes(file: Path, asked: list[int]) -> None:
    for _ in range(2):
        try_files("video", [file, file.with_name("missing.mp4")])  # an ordinary error is left to the caller
        assert len(asked) == 1
    untrusted._known.clear()  # as in another process
    try_files("video", [file])
    assert len(asked) == 1
    stat = file.stat()
    file.write_bytes(b"NOT a video")
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    try_files("video", [file])
    assert len(asked) == 2
    assert len(set(asked)) == 1  # one process reads all


def test_a_child_that_was_idle_for_long_or_was_killed_is_replaced(file: Path, asked: list[int]) -> None:
    try_files("video", [file])
    os.kill(asked[0], signal.SIGKILL)
    file.write_bytes(b"changed")
    try_files("video", [file])
    assert asked[0] == asked[1] != asked[2]


def test_a_fork_of_this_process_has_a_child_of_its_own(file: Path, asked: list[int]) -> None:
    try_files("video", [file])
    file.write_bytes(b"changed")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a fork beside threads
        fork = os.fork()
    if not fork:
        try:
            try_files("video", [file])
            untrusted._child.end()
        finally:
            os._exit(len(set(asked)))
    assert os.waitstatus_to_exitcode(os.waitpid(fork, 0)[1]) == 2
    try_files("video", [file])
    assert len(set(asked)) == 1


def test_what_this_process_wrote_is_not_tried(file: Path, asked: list[int]) -> None:
    written(file)
    try_files("video", [file])
    assert not asked


@pytest.mark.parametrize("kind", ["lance", "hdf5", "video", "picture", "parquet"])
def test_the_child_does_not_import_torch_and_limits_its_memory(kind: str, tmp_path: Path) -> None:
    import json

    request = {"kind": kind, "files": [str(tmp_path / "x")], "memory": 2**33, "seconds": 60}
    request |= {"table": str(tmp_path / "x"), "version": None, "known": []}
    code = (
        f"import runpy, sys, resource; child = runpy.run_path({str(untrusted._CHILD)!r}); "
        f"names = child['main'].__globals__; names['read'] = lambda request, read=names['read']: "
        f"(read(request), print(resource.getrlimit(resource.RLIMIT_AS)[0], flush=True)); child['main'](); "
        f"assert 'torch' not in sys.modules and 'worldloom' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], input=json.dumps(request), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stdout.splitlines() if line]
    assert said[-3:] == ['done ""', str(2**33), 'ended [0, ""]']


def test_a_changed_deletion_file_is_read_although_the_data_files_are_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lance.write_dataset(pa.table({"a": range(1000)}), tmp_path / "t.lance")
    lance.dataset(tmp_path / "t.lance").delete("a < 10")
    (deletions,) = (tmp_path / "t.lance" / "_deletions").iterdir()
    known = [str(path) for path in untrusted.table_files(tmp_path / "t.lance") if path != deletions]
    said: list[tuple[str, Any]] = []
    monkeypatch.setattr(untrusted_child, "say", lambda what, told="": said.append((what, told)))
    request = {"table": str(tmp_path / "t.lance"), "version": None, "files": [str(deletions)], "known": known}
    untrusted_child.lance_table(request)
    assert said[-1] == ("file", str(deletions))
    untrusted_child.lance_table({**request, "files": [], "known": [*known, str(deletions)]})
    assert said[-1] == ("file", str(tmp_path / "t.lance"))  # nothing to read but the table itself


def test_a_pipe_is_refused_before_it_is_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "picture.png")
    with pytest.raises(DataError, match="is a pipe or a device"):
        try_files("picture", [tmp_path / "picture.png"])
