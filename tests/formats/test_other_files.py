"""A file gives away no other file of its reader, and starts no program."""

import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
from format_samples import read_all

from worldloom.core.errors import DataError
from worldloom.data import decode_picture, read_picture
from worldloom.formats.video import frame_shape

SECRET = b"-----BEGIN PRIVATE KEY-----"


def by_external_link(data: h5py.Group, secret: Path) -> None:
    with h5py.File(secret.with_suffix(".h5"), "w") as other:
        other["values"] = np.zeros((4, 2))
    data["demo_0/obs/leak"] = h5py.ExternalLink(str(secret.with_suffix(".h5")), "values")


def by_external_storage(data: h5py.Group, secret: Path) -> None:
    data["demo_0/obs"].create_dataset("leak", (4, 2), np.uint8, external=[(str(secret), 0, 8)])


def by_a_virtual_dataset(data: h5py.Group, secret: Path) -> None:
    by_external_link(data, secret)
    del data["demo_0/obs/leak"]
    layout = h5py.VirtualLayout((4, 2), np.float64)
    layout[:] = h5py.VirtualSource(str(secret.with_suffix(".h5")), "values", (4, 2))
    data["demo_0/obs"].create_virtual_dataset("leak", layout)


@pytest.mark.parametrize("way", [by_external_link, by_external_storage, by_a_virtual_dataset])
def test_an_hdf5_file_that_takes_values_from_another_file_is_refused(
    way: Callable[[h5py.Group, Path], None], tmp_path: Path
) -> None:
    secret = tmp_path / "secret.pem"
    secret.write_bytes(SECRET)
    with h5py.File(tmp_path / "log.hdf5", "w") as file:
        demo = file.create_group("data/demo_0")
        demo["obs/position"], demo["actions"] = np.zeros((4, 2)), np.zeros((4, 2))
        way(file["data"], secret)
    with pytest.raises(DataError, match=r"/data/demo_0/obs/leak' takes its values from another file, '.*secret"):
        read_all("robomimic", tmp_path / "log.hdf5")


def test_a_virtual_dataset_of_the_same_file_is_read(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "log.hdf5", "w") as file:
        demo = file.create_group("data/demo_0")
        demo["obs/position"], demo["actions"] = np.zeros((4, 2)), np.zeros((4, 2))
        layout = h5py.VirtualLayout((4, 2), np.float64)
        layout[:] = h5py.VirtualSource(file["data/demo_0/obs/position"])
        demo.create_virtual_dataset("obs/again", layout)
    episodes, _, _ = read_all("robomimic", tmp_path / "log.hdf5")
    assert len(episodes) == 1


def test_a_picture_in_postscript_starts_no_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    called = tmp_path / "called"
    program = tmp_path / "gs"
    program.write_text(f"#!/bin/sh\ntouch {called}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    content = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n"
    path = tmp_path / "goal.png"
    path.write_bytes(content)
    with pytest.raises(DataError, match="is not a picture"):
        read_picture(path, (8, 8, 3))
    with pytest.raises(DataError, match="does not decode"):
        decode_picture(content, "cell 3")
    assert not called.exists()


def test_a_picture_of_very_many_pixels_is_not_decoded() -> None:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 9000, 9000, 8, 0, 0, 0, 0))
    content = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(9001 * 9000))) + chunk(b"IEND", b"")
    with pytest.raises(DataError, match="cell 3 does not decode .*9000x9000 pixels"):
        decode_picture(content, "cell 3")


@pytest.mark.parametrize(
    "content",
    [
        b"ffconcat version 1.0\nfile secret.mp4\n",
        b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nsecret.mp4\n#EXT-X-ENDLIST\n",
    ],
)
@pytest.mark.parametrize("name", ["run.mp4", "run.mkv", "run.m3u8"])
def test_a_playlist_is_no_video(content: bytes, name: str, tmp_path: Path) -> None:
    import av

    with av.open(str(tmp_path / "secret.mp4"), "w") as out:
        stream = out.add_stream("libx264", rate=10)
        stream.width = stream.height = 32
        stream.pix_fmt = "yuv420p"
        for packet in [*stream.encode(av.VideoFrame(32, 32, "yuv420p")), *stream.encode()]:
            out.mux(packet)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match="cannot be read as a video"):
        frame_shape(tmp_path / name)
