"""However a file of a run folder is damaged, every use of the folder succeeds or ends in one error of one line.

Files are cut, flipped, removed and replaced. In JSON files, values of other types and sizes replace values, or the keys
are removed; where a file has a checksum, it is computed again, as whoever changes a file on purpose would.
"""

import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from worldloom.core.errors import WorldloomError
from worldloom.data import EpisodeDataset
from worldloom.guardrails import read_rules
from worldloom.models import load_tensors, save_tensors
from worldloom.models.checkpoint import _checksum
from worldloom.workflow import Run, find_runs, plan_once, train
from worldloom.workflow.report_data import report_data

FIXTURES = Path(__file__).parent.parent / "fixtures" / "formats_v1"
RUN = FIXTURES / "run"
FILES = sorted(path.relative_to(RUN) for path in RUN.rglob("*") if path.is_file())
VALUES = [
    "null", "true", '"text"', '"../x"', "-1", "0", "1.5", "9" * 400, "1e999", "NaN", "1000000000000", "[]", "{}",
    "[[[1]]]", '{"a": 1}', "[null]", "[1e308]", '"\\u0000"', "[" * 2000 + "]" * 2000,
]  # fmt: skip


def uses(path: Path, draw: random.Random) -> Iterator[Callable[[], object]]:
    """Yield every quick use of a run, and one of the slow ones."""
    run = Run.open(path)
    yield run.summary
    yield lambda: (run.environment, run.data, run.folder.provenance, run.evaluations())
    yield lambda: list(find_runs(path))
    for name in ("geometry", "distance", "support", "probes", "hierarchy"):
        yield lambda name=name: getattr(run.heads, name)
    rules = read_rules([FIXTURES / "rules" / "rules.yaml"], trusted=None)
    yield lambda: run.bind(rules).margins(run.recipe.method("guarded").calibrated_as)
    for method in ("behaviour cloning", "reactive policy", "tree search", "guarded"):
        yield lambda method=method: run.agent(method)
    yield run.held_out
    yield draw.choice([
        lambda: report_data(run),
        lambda: plan_once(run),
        lambda: train(run.recipe, EpisodeDataset.open(FIXTURES / "dataset"), path, resume=True),
    ])  # fmt: skip


def said(use: Callable[[], object]) -> str:
    try:
        use()
    except WorldloomError as error:
        return str(error)
    return ""


def places(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value[:2]) if isinstance(value, list) else ()
    for key, part in items:
        yield (*place, key)
        yield from places(part, (*place, key))


def changed(content: bytes, place: tuple[Any, ...], text: str | None) -> bytes:
    """Return JSON with the value at a place replaced by `text`, or removed."""
    whole = json.loads(content)
    *parents, last = place
    node = whole
    for key in parents:
        node = node[key]
    if text is None:
        del node[last]
    else:
        node[last] = "@@"
    written = json.dumps(whole).replace('"@@"', str(text))
    if "checksum" in whole and last != "checksum":
        try:
            body = {key: part for key, part in json.loads(written).items() if key != "checksum"}
            written = json.dumps({**body, "checksum": _checksum(body)})
        except RecursionError:
            pass
    return written.encode()


def damages(content: bytes, kind: str, draw: random.Random) -> list[bytes | None]:
    """Return damaged contents; None removes the file."""
    found: list[bytes | None] = [
        None,
        b"",
        content[: len(content) // 2],
        content[:-1],
        b"\xff\x00{",
        b"\0" * len(content),
    ]
    at = draw.randrange(len(content))
    found.append(content[:at] + bytes([content[at] ^ (1 << draw.randrange(8))]) + content[at + 1 :])
    if kind == ".json":
        found += [text.encode() for text in VALUES]
        every = [(place, text) for place in places(json.loads(content)) for text in (None, *VALUES)]
        found += [changed(content, *each) for each in draw.sample(every, min(len(every), 10))]
    if kind == ".jsonl":
        first, rest = content.split(b"\n", 1)
        found += [text.encode() + b"\n" + rest for text in VALUES]
        found += [changed(first, ("step",), text) + b"\n" + rest for text in (None, *VALUES)]
    return draw.sample(found, min(len(found), 6))


@pytest.mark.parametrize("file", FILES, ids=str)
def test_a_damaged_file_is_told_in_one_line(file: Path, tmp_path: Path) -> None:
    draw = random.Random(str(file))
    for content in damages((RUN / file).read_bytes(), file.suffix, draw):
        path = tmp_path / "run"
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(RUN, path)
        if content is None:
            (path / file).unlink()
        else:
            (path / file).write_bytes(content)
        if not (path / "config.json").is_file():
            assert "not a run folder" in said(lambda: Run.open(path))  # noqa: B023
            continue
        for use in uses(path, draw):
            message = said(use)
            assert "\n" not in message
            assert len(message) < 3000


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors: {**tensors, "norm.running_mean": torch.zeros(3)},
        lambda tensors: {**tensors, "other": torch.zeros(3)},
        lambda tensors: dict(list(tensors.items())[1:]),
        lambda tensors: {name: tensor[None] for name, tensor in tensors.items()},
        lambda tensors: {},
    ],
)
def test_tensors_of_other_names_or_shapes_are_told_in_one_line(change: Callable[..., Any], tmp_path: Path) -> None:
    path = Path(shutil.copytree(RUN, tmp_path / "run"))
    for stem, kind in (("model/model", "world-model"), ("heads/distance", "temporal-distance")):
        tensors, metadata = load_tensors(path / stem, kind=kind)
        save_tensors(path / stem, change(tensors), metadata, kind=kind)
    run = Run.open(path)
    for use in (lambda: run.model, lambda: Run.open(path).heads.distance):
        with pytest.raises(WorldloomError, match="do not match the model in its configuration") as refused:
            use()
        assert "\n" not in str(refused.value)
