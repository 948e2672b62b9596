"""Each mutation of a foreign file ends in episodes or in an error of one line."""

import random
import shutil
from pathlib import Path

import pytest
from format_samples import make_store

from worldloom.core.errors import WorldloomError
from worldloom.formats import FORMATS, WriteOptions, convert

NAMES = [name for name in FORMATS if name != "worldloom"]


def mutated(content: bytes, chance: random.Random) -> bytes:
    """Flip a bit, overwrite up to 8 bytes, or truncate."""
    changed = bytearray(content)
    place = chance.randrange(len(changed))
    match chance.choice(["flip", "flip", "burst", "footer", "truncate"]):
        case "flip":
            changed[place] ^= 1 << chance.randrange(8)
        case "burst":
            changed[place : place + 8] = chance.randbytes(min(8, len(changed) - place))
        case "footer":
            changed[-1 - chance.randrange(min(64, len(changed)))] = chance.randrange(256)
        case "truncate":
            del changed[place:]
    return bytes(changed)


def outcome(path: Path, target: Path) -> str:
    """Return the message of the error, or "" if the data were converted."""
    try:
        convert(path, target)
    except WorldloomError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("count", [1, pytest.param(40, marks=[pytest.mark.slow, pytest.mark.timeout(900)], id="many")])
@pytest.mark.parametrize("name", NAMES)
def test_a_mutated_file_is_converted_or_refused(tmp_path: Path, name: str, count: int) -> None:
    make_store(tmp_path / "store")
    whole = tmp_path / f"whole{'.h5' if name in ('robomimic', 'swm-hdf5') else ''}"
    convert(tmp_path / "store", whole, target_format=name, write=WriteOptions(lossless=name == "lerobot-v3"))
    chance = random.Random(sum(name.encode()))
    for number in range(count):
        copy = tmp_path / f"copy-{number}" / whole.name
        copy.parent.mkdir()
        if whole.is_dir():
            shutil.copytree(whole, copy)
        else:
            shutil.copy(whole, copy)
        files = [file for file in sorted(copy.rglob("*")) or [copy] if file.is_file() and file.stat().st_size]
        file = chance.choice(files)
        file.write_bytes(mutated(file.read_bytes(), chance))
        assert "\n" not in outcome(copy, copy.parent / "target")
        shutil.rmtree(copy.parent)
