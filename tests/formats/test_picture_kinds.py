"""Pictures that are not bytes with channels last: depth, floats, grey, channels first and stacked frames."""

import io
import json
import struct
import warnings
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import h5py
import minari
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from format_samples import SPEC, make_store, read_all
from gymnasium import spaces
from minari.data_collector import EpisodeBuffer
from PIL import Image

from worldloom.core.errors import ConfigError, DataError
from worldloom.core.types import ObservationSpec
from worldloom.data import decode_picture, read_picture
from worldloom.envs.spaces import ObservationAdapter
from worldloom.formats import convert

DEPTH = np.linspace(300, 4000, 32 * 32).reshape(32, 32)
CAMERA = "observation.images.depth"


def encoded(picture: np.ndarray, kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, format=kind)
    return buffer.getvalue()


def lerobot(root: Path, pictures: list[Any], feature: dict[str, Any]) -> Path:
    """A LeRobot 2.1 dataset with one episode of these pictures."""
    rows = len(pictures)
    features = {
        CAMERA: feature,
        "observation.state": {"dtype": "float32", "shape": [1], "names": None},
        "action": {"dtype": "float32", "shape": [2], "names": None},
    }
    info = {"codebase_version": "v2.1", "fps": 10, "features": features, "video_path": None}
    info["data_path"] = "data/{episode_index}.parquet"
    (root / "meta").mkdir(parents=True)
    (root / "data").mkdir()
    (root / "meta/info.json").write_text(json.dumps(info))
    (root / "meta/episodes.jsonl").write_text(json.dumps({"episode_index": 0, "tasks": [], "length": rows}))
    actions = np.random.default_rng(0).normal(size=(rows, 2)).tolist()
    columns = {"episode_index": [0] * rows, "observation.state": [0.5] * rows, "action": actions, CAMERA: pictures}
    pq.write_table(pa.table(columns), root / "data/0.parquet")
    return root


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_deep_pictures_in_files_are_scaled_as_told_or_refused(kind: str, tmp_path: Path) -> None:
    depth = DEPTH.astype(np.uint16) if kind == "PNG" else DEPTH.astype(np.float32)
    feature = {"dtype": "image", "shape": [32, 32, 1], "names": ["height", "width", "channel"]}
    path = lerobot(tmp_path / "data", [{"bytes": encoded(depth, kind), "path": None}] * 3, feature)
    with pytest.raises(DataError, match=r"row 0 has pictures .* 300 to 4000; expected bytes.*--picture-range LOW:HIGH"):
        read_all("lerobot-v21", path)
    (episode,), notes, spec = read_all("lerobot-v21", path, pictures={"range": (300, 4000)})
    assert episode.pixels is not None
    assert len(np.unique(episode.pixels)) == 256
    assert any("300 becomes 0 and 4000 becomes 255" in note for note in notes)
    assert spec.environment["pictures"]["range"] == (300.0, 4000.0)
    with pytest.raises(ConfigError, match="Leave out --picture-axes"):
        read_all("lerobot-v21", path, pictures={"axes": "hw"})


def test_pictures_of_bytes_in_files_are_not_scaled_and_deep_colours_not_cut(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="Leave out --picture-range"):
        decode_picture(encoded(np.zeros((4, 4), np.uint8), "PNG"), "it", values=(0.0, 9.0))
    # Pillow does not write 16-bit colours.
    header = b"IHDR" + struct.pack(">IIBBBBB", 2, 2, 16, 2, 0, 0, 0)
    content = zlib.compress((b"\0" + bytes(12)) * 2)
    chunks = [header, b"IDAT" + content, b"IEND"]
    png = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk in chunks
    )
    with pytest.raises(DataError, match="16 bits per colour"):
        decode_picture(png, "it")


@pytest.mark.parametrize("dtype", [np.uint16, np.float32])
def test_a_deep_goal_is_scaled_like_the_data_or_refused(dtype: Any, tmp_path: Path) -> None:
    path = tmp_path / "goal.tiff"
    Image.fromarray(DEPTH.astype(dtype)).save(path)
    with pytest.raises(DataError, match="trained on bytes"):
        read_picture(path, (32, 32, 1))
    pixels = read_picture(path, (32, 32, 3), values=(300.0, 4000.0)).pixels
    assert pixels is not None
    assert pixels.shape == (1, 32, 32, 3)
    assert len(np.unique(pixels)) == 256
    Image.fromarray(np.full((32, 32), 7, np.uint8)).save(tmp_path / "bytes.png")
    pixels = read_picture(tmp_path / "bytes.png", (32, 32, 1), values=(300.0, 4000.0)).pixels
    assert pixels is not None
    assert (pixels == 7).all()


@pytest.mark.parametrize("mode", ["L", "LA", "1", "I;16"])
def test_a_grey_goal_is_refused_if_the_training_pictures_had_colours(mode: str, tmp_path: Path) -> None:
    path, values = tmp_path / "goal.png", (0.0, 255.0) if mode == "I;16" else None
    Image.fromarray(np.arange(32 * 32, dtype=np.uint8).reshape(32, 32)).convert(mode).save(path)
    pixels = read_picture(path, (32, 32, 3), values=values).pixels
    assert pixels is not None
    assert (pixels == pixels[..., :1]).all()
    with pytest.raises(DataError, match=r"is a grey picture, and the model was trained on pictures with colours"):
        read_picture(path, (32, 32, 3), values=values, colours=True)
    Image.open(path).convert("RGB").save(path)
    assert read_picture(path, (32, 32, 3), colours=True).pixels is not None


ARRAYS = {
    "grey": (np.arange(64 * 64).reshape(64, 64) % 256).astype(np.uint8),
    "channels first": (np.arange(3 * 40 * 50).reshape(3, 40, 50) % 256).astype(np.uint8),
    "depth": DEPTH.astype(np.float32),
}
PIXELS = {"grey": (64, 64, 1), "channels first": (40, 50, 3), "depth": (32, 32, 1)}


def array_file(root: Path, name: str, picture: np.ndarray, others: bool) -> tuple[str, Path]:
    """A file of a format with one episode that shows this picture, and its format."""
    rows = np.repeat(picture[None], 4, axis=0)
    actions = np.random.default_rng(0).uniform(-1, 1, (4, 2))
    path = root / "data.hdf5"
    if name == "lerobot-v21":
        feature = {"dtype": str(picture.dtype), "shape": list(picture.shape), "names": None}
        return name, lerobot(root / "data", rows.tolist(), feature)
    with h5py.File(path, "w") as file:
        if name == "robomimic":
            file["data/demo_0/actions"], file["data/demo_0/obs/cam"] = actions, rows
            if others:
                file["data/demo_0/obs/position"] = actions
        else:
            file["ep_len"], file["ep_offset"] = np.array([4]), np.array([0])
            file["action"], file["cam"] = actions, rows
            if others:
                file["proprio"] = actions
    return name, path


@pytest.mark.parametrize("name", ["robomimic", "swm-hdf5", "lerobot-v21"])
@pytest.mark.parametrize("kind", ARRAYS)
def test_arrays_are_read_as_pictures_by_one_rule(name: str, kind: str, tmp_path: Path) -> None:
    name, path = array_file(tmp_path, name, ARRAYS[kind], others=True)
    camera = CAMERA if name == "lerobot-v21" else "cam"
    told = {"camera": camera, "pictures": {"range": (300, 4000)}} if kind == "depth" else {}
    (episode,), notes, spec = read_all(name, path, **told)
    assert spec.observation.pixels == PIXELS[kind]
    assert spec.observation.vector in (1, 2)
    assert episode.pixels is not None
    if kind == "channels first":
        assert np.array_equal(episode.pixels[0], ARRAYS[kind].transpose(1, 2, 0))
        assert any("have the axes chw, which become hwc" in note for note in notes)
    if kind == "depth":
        assert len(np.unique(episode.pixels)) == 256
        (episode,), notes, _ = read_all(name, path, camera=camera, pictures={"range": (1000, 4000)})
        assert any("values of the pictures are outside of the range and are clipped" in note for note in notes)
        (episode,), notes, spec = read_all(name, path)  # not selected: left out, and that is said
        assert spec.observation.pixels is None
        assert any(f"{camera} of shape (32, 32) are left out, because they are float32" in note for note in notes)
        assert sum(camera in note for note in notes) == 1
        with pytest.raises(DataError, match="--picture-axes hwc has 3 letters"):
            read_all(name, path, camera=camera, pictures={"range": (0, 1), "axes": "hwc"})


@pytest.mark.parametrize("name", ["robomimic", "swm-hdf5"])
def test_a_deep_picture_as_the_only_observation_names_file_column_and_option(name: str, tmp_path: Path) -> None:
    name, path = array_file(tmp_path, name, DEPTH.astype(np.float32), others=False)
    with pytest.raises(DataError, match=r"data.hdf5: .*cam.* values, such as 300 to 4000; .*--picture-range"):
        read_all(name, path)


def test_a_column_that_is_asked_for_as_numbers_is_no_picture(tmp_path: Path) -> None:
    name, path = array_file(tmp_path, "robomimic", ARRAYS["grey"], others=True)
    _, _, spec = read_all(name, path, vector=["cam"])
    assert spec.observation == ObservationSpec(vector=4096)


@pytest.mark.parametrize(
    ("space", "pixels"),
    [
        (spaces.Box(0, 255, (3, 64, 60), np.uint8), (64, 60, 3)),
        (spaces.Box(0, 255, (4, 84, 84), np.uint8), (84, 84, 4)),
        (spaces.Box(0, 255, (84, 84), np.uint8), (84, 84, 1)),
        (spaces.Box(0, 255, (84, 80, 12), np.uint8), (84, 80, 12)),
        (spaces.Box(0, 1, (64, 64, 3), np.float32), (64, 64, 3)),
        (spaces.Box(0, 255, (3, 64, 64), np.float64), (64, 64, 3)),
    ],
)
def test_a_world_and_its_minari_log_show_the_same(
    space: spaces.Box, pixels: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    space.seed(0)
    seen = np.stack([space.sample() for _ in range(5)])
    action = spaces.Box(-1, 1, (2,), np.float32)
    buffer = EpisodeBuffer(
        observations=list(seen), actions=[np.zeros(2, np.float32)] * 4, rewards=[0.0] * 4, infos={},
        terminations=[False] * 4, truncations=[False] * 3 + [True],
    )  # fmt: skip
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    with warnings.catch_warnings():  # that there is no environment
        warnings.simplefilter("ignore", UserWarning)
        minari.create_dataset_from_buffers(
            "pictures-v0", [buffer], observation_space=space, action_space=action, jpeg_encoding=False
        )
    adapter = ObservationAdapter(space)
    (episode,), _, spec = read_all("minari", tmp_path / "pictures-v0")
    assert spec.observation.pixels == adapter.spec.pixels == pixels
    watched = adapter(seen).pixels
    assert watched is not None
    assert np.array_equal(watched.numpy(), episode.pixels)


def test_our_own_files_keep_any_number_of_channels(tmp_path: Path) -> None:
    spec = replace(SPEC, observation=ObservationSpec(pixels=(8, 9, 2)), labels={})
    make_store(tmp_path / "ours", (3, 2), spec)
    for name in ("robomimic", "swm-hdf5", "minari"):
        convert(tmp_path / "ours", tmp_path / name, target_format=name)
        assert read_all(name, tmp_path / name)[2].observation == spec.observation


def test_a_video_of_depth_is_refused(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "one.mkv"), "w") as out:
        stream = out.add_stream("ffv1", rate=10)
        stream.height, stream.width, stream.pix_fmt = 32, 32, "gray16le"
        for _ in range(4):
            out.mux(stream.encode(av.VideoFrame.from_ndarray(DEPTH.astype(np.uint16), format="gray16le")))
        out.mux(stream.encode())
    (tmp_path / "one.csv").write_text("action\n1\n2\n3\n4\n")
    with pytest.raises(DataError, match=r"one.mkv has 16 bits of grey.*--camera none"):
        read_all("folder", tmp_path)
    with pytest.raises(ConfigError, match="'pictures' is not supported here"):
        read_all("folder", tmp_path, pictures={"range": (0, 9)})


def test_pictures_of_phones_are_turned_as_their_orientation_says(tmp_path: Path) -> None:
    shown = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
    for orientation, stored in ((3, np.rot90(shown, 2)), (5, shown.transpose(1, 0, 2)), (6, np.rot90(shown, 1))):
        exif = Image.Exif()
        exif[0x0112] = orientation
        path = tmp_path / f"{orientation}.png"
        Image.fromarray(np.ascontiguousarray(stored)).save(path, exif=exif)
        assert np.array_equal(decode_picture(path.read_bytes(), "picture"), shown)
        pixels = read_picture(path, (20, 30, 3)).pixels
        assert pixels is not None
        assert np.array_equal(pixels[0].numpy(), shown)
