"""Summary statistics of a dataset."""

from dataclasses import asdict
from typing import Any

import numpy as np

from worldloom.core.progress import SILENT, Progress
from worldloom.data.dataset import EpisodeDataset

_PAIRS = 2048  # pairs of consecutive frames that are compared
_VERSIONS = 3  # number of latest versions in the summary


def inspect(dataset: EpisodeDataset, *, progress: Progress = SILENT) -> dict[str, Any]:
    """Return a summary as JSON values: sizes, specifications, ranges of values, versions and `moving_share`.

    `moving_share` is the share of steps that change the observation, among at most 2,048 evenly spaced steps.
    """
    spec, columns = dataset.spec, dataset.columns()
    last = dataset.starts + dataset.lengths
    taken = np.delete(columns.actions, last, axis=0)
    versions = dataset.versions()
    pixels = int(np.prod(spec.observation.pixels)) if spec.observation.pixels is not None else 0
    return {
        "path": str(dataset.path),
        "format_version": dataset.format_version,
        "fingerprint": dataset.fingerprint(),
        "episodes": len(dataset),
        "steps": int(dataset.lengths.sum()),
        "frames": dataset.frames,
        "shortest_episode": int(dataset.lengths.min()) if len(dataset) else None,
        "longest_episode": int(dataset.lengths.max()) if len(dataset) else None,
        "bytes_stored": dataset.stored_bytes(),
        "bytes_decoded": dataset.frames * pixels,
        "observation": asdict(spec.observation),
        "action": asdict(spec.action),
        "actions": _ranges(taken),
        "labels": {name: _ranges(column) for name, column in columns.labels.items()},
        "moving_share": _moving_share(dataset, columns.vector, progress),
        "broken_off": sum("truncated_by" in metadata for metadata in dataset.metadata()),
        "environment": spec.environment,
        "versions": len(versions),
        "last_versions": versions[-_VERSIONS:],
    }


def _ranges(values: np.ndarray) -> dict[str, list[float]]:
    if len(values) == 0:
        return {}
    figures = {"min": values.min(axis=0), "max": values.max(axis=0)}
    figures |= {"mean": values.mean(axis=0, dtype=np.float64), "std": values.std(axis=0, dtype=np.float64)}
    return {name: [round(float(value), 6) for value in figure] for name, figure in figures.items()}


def _moving_share(dataset: EpisodeDataset, vector: np.ndarray | None, progress: Progress) -> float | None:
    last = dataset.starts + dataset.lengths
    before = np.delete(np.arange(dataset.frames), last)
    if len(before) == 0:
        return None
    before = before[np.linspace(0, len(before) - 1, min(_PAIRS, len(before))).astype(np.int64)]
    moved = np.zeros(len(before), bool)
    if vector is not None:
        moved |= (vector[before] != vector[before + 1]).any(axis=1)
    if dataset.spec.observation.pixels is not None:
        with progress.task("compare frames", len(before), "pair") as task:
            for first in range(0, len(before), 128):
                rows = before[first : first + 128]
                pair = dataset.pixels(np.concatenate([rows, rows + 1])).reshape(2, len(rows), -1)
                moved[first : first + 128] |= (pair[0] != pair[1]).any(axis=1)
                task.advance(len(rows))
    return float(moved.mean())
