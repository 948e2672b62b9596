"""Validation of datasets: a list of all problems, not only the first one."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from worldloom.core.errors import DataError
from worldloom.core.progress import SILENT, Progress
from worldloom.core.untrusted import HarmfulFile
from worldloom.data import layout
from worldloom.data.dataset import TIMEOUT, decode_columns, open_table
from worldloom.data.layout import floats_of, lance_errors
from worldloom.data.retries import each_with_timeout, with_timeout
from worldloom.data.spec import DatasetSpec

_RESTORE = "restore the dataset from a copy, or collect it again into another directory"
_REPAIR = "repair the episode at its source, and write the dataset again"


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A problem of a dataset: its place, a description and a remedy."""

    where: str
    what: str
    remedy: str


def validate(
    path: str | Path, *, storage_options: dict[str, str] | None = None, progress: Progress = SILENT
) -> list[Problem]:
    """Read every value of the latest version and return all problems found, in order.

    Raises:
        StorageError: `path` is not a dataset, or the storage does not answer.
        DataError: the dataset cannot be opened, or its format version is not supported.
    """
    try:
        table = open_table(path, storage_options=storage_options)
    except HarmfulFile as error:
        return [Problem(where=f"file {error.file}", what=f"reading it in a child process {error.why}", remedy=_RESTORE)]
    try:
        spec, _ = layout.spec_of(table.schema, str(path))
    except layout.ChangedSpec as error:
        return [Problem(where=str(path), what=str(error), remedy=_RESTORE)]
    with lance_errors(str(path), "read"):
        rows = with_timeout(table.count_rows, str(path), TIMEOUT)
    problems: list[Problem] = []
    expected = 0
    seen: dict[str, int] = {}
    with progress.task("validate", rows, "frames") as task:
        for found in _episodes(table, str(path)):
            if isinstance(found, Problem):
                problems.append(found)
                continue
            number = found["episode"][0].as_py()
            if number > expected:
                what = f"missing: episode {expected - 1} is followed by episode {number}"
                lost = f"episode {expected}" if number == expected + 1 else f"episodes {expected} to {number - 1}"
                problems.append(Problem(where=lost, what=what, remedy=_RESTORE))
            elif number < expected:
                what = (
                    f"it follows episode {expected - 1}, out of order; perhaps two processes appended at the same time"
                )
                problems.append(Problem(where=f"episode {number}", what=what, remedy=_REPAIR))
            expected = number + 1
            problems += _check(found, number, spec, seen)
            task.advance(len(found))
    return problems


def _episodes(table: Any, path: str) -> Iterator[pa.Table | Problem]:
    """Yield the rows of each episode, or a problem for a damaged file.

    An episode is a run of rows with the same number; a run is split at each step 0.
    """
    rest: pa.Table | None = None
    for fragment in table.get_fragments():
        try:
            with lance_errors(path, "read"):
                for batch in each_with_timeout(iter(fragment.to_batches(batch_size=1024)), path, TIMEOUT):
                    part = pa.Table.from_batches([batch])
                    rest = part if rest is None else pa.concat_tables([rest, part])
                    number, step = rest["episode"].to_numpy(), rest["step"].to_numpy()
                    first = 0
                    for cut in 1 + np.flatnonzero((np.diff(number) != 0) | (step[1:] == 0)):
                        yield rest.slice(first, cut - first)
                        first = int(cut)
                    rest = rest.slice(first)
        except DataError as error:
            if rest is not None and len(rest):
                yield rest
            names = ", ".join(file.path for file in fragment.data_files())
            yield Problem(where=f"file {names}", what=f"unreadable: {error.__cause__}", remedy=_RESTORE)
            rest = None
    if rest is not None and len(rest):
        yield rest


def _check(rows: pa.Table, number: int, spec: DatasetSpec, seen: dict[str, int]) -> list[Problem]:
    """Return the problems of one episode; `seen` maps digests of the arrays of earlier episodes to their numbers."""
    problems: list[Problem] = []

    def report(what: str, remedy: str = _REPAIR) -> None:
        problems.append(Problem(where=f"episode {number}", what=what, remedy=remedy))

    steps = rows["step"].to_numpy()
    missing = np.setdiff1d(np.arange(steps.max() + 1), steps)
    if len(missing):
        report(f"missing steps: {_some(missing)}", _RESTORE)
    elif not np.array_equal(steps, np.arange(len(rows))):
        report("its steps are out of order or repeated")
    if len(rows) < 2:
        report("it has only one frame; expected at least two")
    columns = decode_columns(rows, spec)
    no_action = floats_of(rows["action"])[1]
    if not no_action[-1]:
        report("truncated: its last frame, which has no action, is missing", _RESTORE)
    if no_action[:-1].any():
        report(f"no action at steps {_some(steps[:-1][no_action[:-1]])}")
    inside = layout.within_bounds(columns.actions, spec) | no_action
    finite = np.isfinite(columns.actions).all(axis=1)
    if not finite.all():
        report(f"actions are not finite at steps {_some(steps[~finite])}")
    if not (inside | ~finite).all():
        report(
            f"actions out of bounds at steps {_some(steps[~inside & finite])}; expected low {spec.action.low} to high "
            f"{spec.action.high}"
        )
    named = {"vector": columns.vector, **{f"label {name!r}": column for name, column in columns.labels.items()}}
    for name, column in named.items():
        if column is not None and not np.isfinite(column).all():
            report(f"{name} is not finite at steps {_some(steps[~np.isfinite(column).all(axis=1)])}")
    pixels = frames = None
    if spec.observation.pixels is not None:
        pixels = np.empty((len(rows), *spec.observation.pixels), np.uint8)
        try:
            layout.decode_frames(rows["pixels"].combine_chunks(), pixels)
        except layout.BadFrame as error:
            report(f"the frame at step {steps[error.index]} {error.reason}", _RESTORE)
        else:
            frames = pixels
            if "frame_digest" in rows.column_names:
                frames = layout.frame_digests(pixels)
                wrong = (frames != layout.digests_of(rows["frame_digest"])).any(axis=1)
                if wrong.any():
                    report(
                        f"it was changed after it was written, in the frames at steps {_some(steps[wrong])}", _RESTORE
                    )
    metadata = rows["metadata"][0].as_py()
    if not _is_json_object(metadata):
        report("its metadata is missing or is not a JSON object", _RESTORE)
    if problems:
        return problems
    arrays = layout.arrays_digest(frames, columns.vector, columns.actions[:-1], columns.labels)
    if layout.episode_digest(arrays, metadata) != rows["digest"][0].as_py():
        report("it was changed after it was written: its digest does not match", _RESTORE)
    if arrays in seen:
        report(f"it is identical to episode {seen[arrays]}", "remove one of the two, and check the seeds of both")
    seen.setdefault(arrays, number)
    return problems


def _is_json_object(text: str | None) -> bool:
    try:
        return isinstance(json.loads(text or ""), dict)
    except json.JSONDecodeError:
        return False


def _some(steps: np.ndarray) -> str:
    shown = ", ".join(str(step) for step in steps[:5])
    return shown if len(steps) <= 5 else f"{shown} and {len(steps) - 5} more"
