"""Small datasets in our own store, and foreign files, for the tests of formats."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from worldloom.core.types import ActionSpec, Episode, ObservationSpec
from worldloom.data import DatasetSpec, EpisodeDataset
from worldloom.formats import FORMATS, Format, Note, ReadOptions, Source

SPEC = DatasetSpec(
    observation=ObservationSpec(pixels=(16, 24, 3), vector=3),
    action=ActionSpec(low=(-2.0, -1.0), high=(1.0, 5.0)),
    labels={"position": 2, "speed": 1},
    environment={"id": "somewhere", "seed": 3},
)
VECTORS = DatasetSpec(
    observation=ObservationSpec(vector=2), action=ActionSpec(low=(0.0, 0.0), high=(1.0, 1.0), discrete=True)
)
GREY = DatasetSpec(observation=ObservationSpec(pixels=(8, 9, 1)), action=ActionSpec(low=(-1.0,), high=(1.0,)))
SPECS = {"all parts": SPEC, "vectors only": VECTORS, "one grey camera": GREY}


def make_episode(index: int, steps: int = 6, spec: DatasetSpec = SPEC) -> Episode:
    """An episode whose content depends on the arguments alone."""
    generator = np.random.default_rng([index, steps])
    low, high = np.array(spec.action.low), np.array(spec.action.high)
    pixels = vector = None
    if spec.observation.pixels is not None:
        pixels = generator.integers(0, 256, (steps + 1, *spec.observation.pixels), np.uint8)
    if spec.observation.vector:
        vector = generator.normal(size=(steps + 1, spec.observation.vector)).astype(np.float32)
    return Episode(
        pixels=pixels,
        vector=vector,
        actions=(low + (high - low) * generator.random((steps, len(low)))).astype(np.float32),
        labels={
            name: generator.normal(size=(steps + 1, size)).astype(np.float32) for name, size in spec.labels.items()
        },
        metadata={"index": index, "note": "ü", "masks": ["train" if index % 2 else "valid"]},
    )


def make_store(path: Path, lengths: Sequence[int] = (6, 1, 9, 4), spec: DatasetSpec = SPEC) -> EpisodeDataset:
    dataset = EpisodeDataset.create(path, spec)
    dataset.append([make_episode(index, steps, spec) for index, steps in enumerate(lengths)])
    return dataset


def differences(left: Episode, right: Episode, *, but: Sequence[str] = ()) -> list[str]:
    """The names of the parts that differ."""
    pairs: dict[str, tuple[Any, Any]] = {
        name: (getattr(left, name), getattr(right, name)) for name in ("pixels", "vector", "actions")
    }
    pairs |= {name: (left.labels.get(name), right.labels.get(name)) for name in {*left.labels, *right.labels}}
    found = [
        name
        for name, (a, b) in pairs.items()
        if (a is None) != (b is None) or (a is not None and not (a.dtype == b.dtype and np.array_equal(a, b)))
    ]
    found += ["metadata"] if left.metadata != right.metadata else []
    return [name for name in found if name not in but]


def read_all(name: str, path: Path, **options: Any) -> tuple[list[Episode], list[str], DatasetSpec]:
    """The episodes, the notes and the spec of a foreign dataset."""
    with FORMATS[name].open(path, ReadOptions(**options)) as source:
        episodes = [episode for index in range(len(source)) for episode in source.read(index)]
        return episodes, [f"{note.kind}: {note.what}" for note in source.notes], source.spec


class Killed(BaseException):
    """Stands for SIGKILL: nothing that runs on leaving may tidy up."""


def kill_at(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, when: int, after: bool) -> None:
    """Make the `when`-th call of a method the last one, before or after it has done its work."""
    original: Callable[..., Any] = getattr(owner, name)
    calls = 0

    def killing(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == when and not after:
            raise Killed
        result = original(*args, **kwargs)
        if calls == when:
            raise Killed
        return result

    monkeypatch.setattr(owner, name, killing)


def smooth_pixels(frames: int) -> np.ndarray:
    """A pattern without noise that drifts: uint8 (frames, 64, 64, 3)."""
    y, x = np.mgrid[0:64, 0:64]
    channels = [128 + 100 * np.sin((x + 3 * t) / 9) * np.cos((y + s) / 11) for t in range(frames) for s in (0, 9, 20)]
    return np.stack(channels).reshape(frames, 3, 64, 64).transpose(0, 2, 3, 1).astype(np.uint8)


class SplitSource(Source):
    """Twelve source episodes; episode i gives i % 3 Episodes, and a note where it gives none."""

    format = "split"

    def __init__(self, delay: float) -> None:
        self.path = Path("made up")
        self.spec, self.fingerprint, self.notes, self._delay = SPEC, "split", [], delay
        self.notes.append(Note(kind="dropped", what="Rewards are left out."))
        self.reads: list[int] = []

    def begin(self) -> None:
        pass

    def __len__(self) -> int:
        return 12

    def read(self, index: int) -> list[Episode]:
        time.sleep(self._delay)
        self.reads.append(index)
        if index % 3 == 0:
            self.notes.append(Note(kind="skipped", what=f"Episode {index} is empty.", episode=index))
        return [make_episode(10 * index + part, 2 + part) for part in range(index % 3)]

    @classmethod
    def everything(cls) -> list[Episode]:
        source = cls(0.0)
        return [episode for index in range(len(source)) for episode in source.read(index)]


class SplitFormat:
    """A format that is made up for the tests; it remembers what it opened."""

    def __init__(self, delay: float = 0.0) -> None:
        self.delay = delay
        self.sources: list[SplitSource] = []
        self.format = Format(name="split", description="made up", detects=lambda path: False, open=self._open)

    def _open(self, path: Path, options: ReadOptions) -> Source:
        self.sources.append(SplitSource(self.delay))
        return self.sources[-1]
