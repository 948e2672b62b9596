"""Each mutation of a dataset's files ends in the right data or in an error of one line: never in other data."""

import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_samples import SPEC, make_episode, same

from worldloom.core.errors import WorldloomError
from worldloom.data import DataConfig, EpisodeDataset, load_cache, stream_frames

EPISODES = [make_episode(index, 20) for index in range(5)]


def mutated(content: bytes, chance: random.Random) -> bytes:
    """Flip a bit, overwrite up to 8 bytes, change a byte of the footer, or truncate."""
    changed = bytearray(content)
    place = chance.randrange(len(changed))
    match chance.choice(["flip", "flip", "burst", "ones", "footer", "truncate"]):
        case "flip":
            changed[place] ^= 1 << chance.randrange(8)
        case "burst":
            changed[place : place + 8] = chance.randbytes(min(8, len(changed) - place))
        case "ones":
            changed[place : place + 4] = b"\xff" * min(4, len(changed) - place)
        case "footer":
            changed[-1 - chance.randrange(min(40, len(changed)))] = chance.randrange(256)
        case "truncate":
            del changed[place:]
    return bytes(changed)


def read(path: Path, way: int) -> list[Any]:
    dataset = EpisodeDataset.open(path)
    assert dataset.spec == SPEC
    if way == 0:
        return [dataset.episode(index) for index in range(len(dataset))]
    frames = load_cache(dataset, "ram") if way == 1 else stream_frames(dataset, DataConfig(cache_gib=0.0))
    with frames:
        assert frames.pixels is not None
        pixels = frames.pixels[np.arange(dataset.frames)]
        return [dataset.fingerprint(), pixels, frames.vector, frames.actions, *frames.labels.values()]


def outcome(path: Path, way: int) -> tuple[list[Any], str]:
    """Return what is read, or the message of the error."""
    try:
        return read(path, way), ""
    except WorldloomError as error:
        return [], str(error)


def equal(left: list[Any], right: list[Any]) -> bool:
    if len(left) != len(right):
        return False
    return all(
        np.array_equal(one, other) if isinstance(one, np.ndarray | str) else same(one, other)
        for one, other in zip(left, right, strict=True)
    )


@pytest.mark.parametrize(
    "count", [12, pytest.param(100, marks=[pytest.mark.slow, pytest.mark.timeout(900)], id="many")]
)
def test_mutated_files_are_read_right_or_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr("worldloom.data.retries._DAMAGED_ATTEMPTS", 1)
    dataset = EpisodeDataset.create(tmp_path / "d", SPEC)
    dataset.append(EPISODES[:3])
    dataset.append(EPISODES[3:])
    expected = [read(tmp_path / "d", way) for way in range(3)]
    assert equal(expected[0], EPISODES)
    chance = random.Random(17)
    files = sorted(file for folder in ("_versions", "data") for file in (tmp_path / "d" / folder).iterdir())
    refused = 0
    for number in range(count):
        copy = Path(shutil.copytree(tmp_path / "d", tmp_path / f"copy-{number}"))
        file = copy / chance.choice(files).relative_to(tmp_path / "d")
        file.write_bytes(mutated(file.read_bytes(), chance))
        way = number % 3
        found, error = outcome(copy, way)
        assert "\n" not in error
        assert error or equal(found, expected[way]), (number, file)
        refused += bool(error)
        shutil.rmtree(copy)
    assert 0 < refused < count


def test_a_footer_that_asks_for_68_gigabytes_does_not_end_the_process(tmp_path: Path) -> None:
    EpisodeDataset.create(tmp_path / "d", SPEC).append(EPISODES)
    (file,) = (tmp_path / "d" / "data").iterdir()
    content = bytearray(file.read_bytes())
    content[-13] = 0x3F  # the highest byte of the number of global buffers
    file.write_bytes(content)
    code = "import sys; from worldloom.cli.main import main; sys.argv[:1] = ['worldloom', 'data']; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "validate", str(tmp_path / "d"), "--json"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 3, (done.returncode, done.stderr)
    assert "a footer that points outside of the file" in done.stdout
    assert "Traceback" not in done.stderr
    with pytest.raises(WorldloomError, match=file.name):
        EpisodeDataset.open(tmp_path / "d")
