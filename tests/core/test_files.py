import errno
import os
from collections import namedtuple
from pathlib import Path

import psutil
import pytest

from worldloom.core.errors import StorageError
from worldloom.core.files import (
    beside,
    exclusive_lock,
    make_private,
    read_json,
    read_whole,
    storage_errors,
    write_atomic,
    write_json,
)


def test_a_failed_write_leaves_the_old_file_and_no_debris(tmp_path: Path) -> None:
    path = tmp_path / "a" / "value.json"
    write_json(path, {"x": 1})

    def fail(temporary: Path) -> None:
        temporary.write_text('{"x": ')
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError):
        write_atomic(path, fail)
    assert read_json(path) == {"x": 1}
    assert [file.name for file in path.parent.iterdir()] == ["value.json"]


def test_a_full_disk_is_named_with_a_remedy(tmp_path: Path) -> None:
    def full(temporary: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(StorageError, match="disk is full.*free some space"):
        write_atomic(tmp_path / "value", full)


def test_nan_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(tmp_path / "value.json", float("nan"))
    assert not list(tmp_path.iterdir())


def test_a_file_that_does_not_fit_into_memory_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "value"
    path.write_bytes(b"x" * 1001)
    assert len(read_whole(path)) == 1001
    monkeypatch.setattr(psutil, "virtual_memory", lambda: namedtuple("Memory", "available")(1000))
    with pytest.raises(StorageError, match="more than the free memory"):
        read_whole(path)


@pytest.mark.parametrize("content", [b'{"x": 1, ', b"\xff\xfe\x00", b"9" * 5000, b"[" * 5000 + b"]" * 5000])
def test_a_cut_or_damaged_file_is_not_read_as_whole(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "cut.json").write_bytes(content)
    with pytest.raises(StorageError, match="not valid JSON"):
        read_json(tmp_path / "cut.json")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="does not exist"):
        read_json(tmp_path / "none.json")


def test_other_errors_pass_through() -> None:
    with pytest.raises(OSError, match="odd"), storage_errors("x"):
        raise OSError(errno.EIO, "odd")


def test_a_file_beside_a_folder_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "logs" / "inner").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "logs")
    assert beside(Path("other"), ".json") == Path("other.json")
    for same in (Path(), Path("inner/.."), tmp_path / "logs"):
        assert beside(same, ".json") == tmp_path / "logs.json"
    with pytest.raises(StorageError, match="/ has no name"):
        beside(Path("/"), ".json")


def test_a_folder_with_content_keeps_its_permissions(tmp_path: Path) -> None:
    make_private(tmp_path / "new")
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o700
    make_private(tmp_path / "new")
    tmp_path.chmod(0o755)
    with pytest.raises(StorageError, match="other users may use"):
        make_private(tmp_path)
    assert tmp_path.stat().st_mode & 0o777 == 0o755


def test_a_folder_of_another_user_is_not_private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").mkdir(mode=0o755)
    user = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: user + 1)
    with pytest.raises(StorageError, match="belongs to the user with the number"):
        make_private(tmp_path / "empty")
    assert (tmp_path / "empty").stat().st_mode & 0o777 == 0o755


def test_every_user_of_a_folder_can_use_its_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, opened = tmp_path / "lock", os.open
    before = os.umask(0o077)
    try:
        with exclusive_lock(path, None):
            pass
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o644

    def as_another_user(name: Path, flags: int, mode: int = 0o777) -> int:
        if flags & os.O_RDWR or (flags & os.O_CREAT and not flags & os.O_EXCL):
            raise PermissionError(errno.EACCES, "Permission denied")
        return opened(name, flags, mode)

    monkeypatch.setattr(os, "open", as_another_user)
    with (
        exclusive_lock(path, None),
        pytest.raises(RuntimeError, match="busy"),
        exclusive_lock(path, RuntimeError("busy")),
    ):
        pass


def test_folders_and_devices_are_not_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("pipe")
    (tmp_path / "folder").mkdir()
    for name, what in (("pipe", "a device"), ("link", "a device"), ("folder", "a folder")):
        with pytest.raises(StorageError, match=f"{name} is {what}, not a file"):
            write_json(tmp_path / name, {})
    assert (tmp_path / "pipe").is_fifo()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "link", "pipe"]
