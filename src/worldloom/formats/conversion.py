"""Conversion of datasets between formats: streaming, resumable, and with a report of what was not converted.

At every moment the target contains the first n episodes of the conversion. Reading is deterministic, so a resumed
conversion needs only n to find the missing episodes. *Before* the target episodes of a source episode are written, the
journal beside the target (PATH.convert.jsonl) records how many they are. A resumed conversion therefore starts at the
right source episode and skips only episodes that the target already contains. If the process is killed, the journal may
be behind or ahead of the target; in both cases no episode is lost or repeated.
"""

import json
import logging
import os
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from worldloom.core.errors import ConfigError, DataError, StorageError
from worldloom.core.files import beside, lines_of, read_json, require_writable, storage_errors, write_json, write_text
from worldloom.core.progress import SILENT, Progress, ProgressTask
from worldloom.core.untrusted import refuse_pointer
from worldloom.data import check_episode
from worldloom.formats.format import (
    FORMATS,
    Format,
    Note,
    ReadOptions,
    Sink,
    Source,
    WriteOptions,
    decoded_bytes,
    foreign_errors,
)

_log = logging.getLogger(__name__)
_REASONS = 5  # groups of notes in the error for a conversion that keeps no episode


@dataclass(frozen=True, kw_only=True)
class NoteGroup:
    """A group of notes that differ only in numbers: their count, and the first note as an example."""

    kind: str
    count: int
    example: str


@dataclass(frozen=True, kw_only=True)
class ConversionReport:
    """The result of a conversion: totals over all runs that it took, and notes about everything that was not converted.

    `bytes` is the size of the decoded arrays; `resumed` is the number of episodes that earlier runs wrote; `seconds`
    is the duration of the last run.
    """

    source: str
    source_format: str
    target: str
    target_format: str
    source_episodes: int
    episodes: int
    frames: int
    bytes: int
    resumed: int
    seconds: float
    notes: list[Note] = field(default_factory=list)

    def groups(self) -> list[NoteGroup]:
        """Return the groups of notes, in the order of their first notes."""
        return _groups(self.notes)

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON values, with the notes and their groups."""
        return {**asdict(self), "groups": [asdict(group) for group in self.groups()]}


def detect(path: Path) -> Format:
    """Return the format of the data at `path`.

    Raises:
        StorageError: `path` does not exist.
        DataError: no format matches, or several do (the message lists the formats), or `path` is a pointer of Git LFS.
    """
    if not path.exists():
        raise StorageError(f"{path} does not exist; check the path")
    found = [FORMATS[name] for name in FORMATS if _detects(FORMATS[name], path)]
    if len(found) == 1:
        return found[0]
    if found:
        names = ", ".join(format.name for format in found)
        raise DataError(f"{path} matches several formats ({names}); choose one with --from FORMAT")
    if path.is_file():
        refuse_pointer(path)
    looked = "; ".join(f"{name}: {FORMATS[name].description}" for name in FORMATS)
    raise DataError(f"{path} has no known format. Known formats: {looked}. Check the path, or use --from FORMAT")


def _detects(format: Format, path: Path) -> bool:
    with foreign_errors(path, format.name):
        return format.detects(path)


def convert(
    source_path: str | Path,
    target_path: str | Path,
    *,
    source_format: str | None = None,
    target_format: str | None = None,
    read: ReadOptions | None = None,
    write: WriteOptions | None = None,
    episodes: range | None = None,
    resume: bool = True,
    skip_damaged: bool = False,
    progress: Progress = SILENT,
) -> ConversionReport:
    """Convert a dataset, one source episode at a time; a second call resumes an interrupted conversion.

    The source format is detected unless `source_format` is set; the default target format is worldloom's own dataset.
    `episodes` selects source episodes. The report is saved beside the target as PATH.conversion.json; if the conversion
    is already complete, the saved report is returned. With `skip_damaged`, source episodes that cannot be read are left
    out, with the error in a note, instead of stopping the conversion. A resumed conversion can set `skip_damaged` even
    if the first run did not.

    Raises:
        DataError: the source is damaged, none of its episodes can be converted (the message gives the reasons), the
            target belongs to a different conversion, or the target exists and `resume` is false.
        ConfigError: an option or the name of a format is wrong.
        StorageError: the source does not exist, or the disk is full; written episodes are kept.
    """
    start = time.perf_counter()
    source_path, target_path = Path(source_path), Path(target_path)
    read, write = read or ReadOptions(), write or WriteOptions()
    if os.path.realpath(source_path) == os.path.realpath(target_path):
        raise ConfigError(f"source and target are both {source_path}; choose a different target")
    reader = detect(source_path) if source_format is None else FORMATS[source_format]
    writer = FORMATS[target_format or "worldloom"]
    if writer.create is None:
        writable = ", ".join(name for name in FORMATS if FORMATS[name].writable)
        raise ConfigError(f"format {writer.name!r} cannot be written; choose one of {writable}")
    if not source_path.exists():
        raise StorageError(f"{source_path} does not exist; check the path")
    require_writable(target_path, beside(target_path, ".conversion.json"))
    with reader.open(source_path, read) as source:
        indices = _indices(episodes, len(source), source_path)
        identity = {
            "source": source.fingerprint,
            "source_format": reader.name,
            **{f"read.{key}": value for key, value in read.model_dump(mode="json").items()},
            "target_format": writer.name,
            **{f"write.{key}": value for key, value in write.model_dump(mode="json").items()},
            "episodes": [indices.start, indices.stop, indices.step],
        }
        journal = _Journal(target_path, identity)
        if resume and (done := journal.finished()) is not None:
            _log.info("%s is complete", target_path)
            return done
        opening, new = list(source.notes), not target_path.exists()
        with writer.create(target_path, source.spec, write, resume=resume) as sink:
            resumed = sink.written
            entries = journal.begin(resumed, indices)
            left = indices[len(entries) :]
            skip = resumed - sum(entry.episodes for entry in entries)
            with progress.task("convert", len(left), "episodes") as task:
                entries += _carry(source, sink, left, skip, journal, skip_damaged, task)
            if kept := any(entry.episodes for entry in entries):
                closing = sink.finish()
    if not kept:
        if new:
            _remove(target_path)
            journal.discard()
        raise _nothing_kept(source_path, entries)
    report = ConversionReport(
        source=str(source_path),
        source_format=reader.name,
        target=str(target_path),
        target_format=writer.name,
        source_episodes=len(entries),
        episodes=sum(entry.episodes for entry in entries),
        frames=sum(entry.frames for entry in entries),
        bytes=sum(entry.bytes for entry in entries),
        resumed=resumed,
        seconds=round(time.perf_counter() - start, 3),
        notes=_unique([*opening, *(note for entry in entries for note in entry.notes), *closing]),
    )
    journal.finish(report)
    return report


@dataclass(frozen=True, kw_only=True)
class _Entry:
    """A line of the journal: the results of one source episode."""

    index: int
    episodes: int
    frames: int
    bytes: int
    notes: list[Note]


def _carry(
    source: Source, sink: Sink, indices: range, skip: int, journal: "_Journal", skip_damaged: bool, task: ProgressTask
) -> Iterator[_Entry]:
    """Convert the source episodes `indices`, and yield a journal entry for each.

    The first `skip` episodes that they yield are not written, because the target already contains them.
    """
    frames = 0
    for index in indices:
        entry = _carry_one(source, sink, index, skip, journal, skip_damaged)
        skip = max(0, skip - entry.episodes)
        frames += entry.frames
        task.advance(1, frames=float(frames))
        yield entry
    if skip:
        raise DataError(f"the target has {skip} more episodes than the source yields; choose another path")


def _carry_one(source: Source, sink: Sink, index: int, skip: int, journal: "_Journal", skip_damaged: bool) -> _Entry:
    before = len(source.notes)
    try:
        with foreign_errors(source.path, source.format):
            parts = source.read(index)
        for part in parts:
            check_episode(part, source.spec, f"source episode {index}")
    except DataError as error:
        if not skip_damaged:
            raise
        parts = []
        source.notes.append(Note(kind="skipped", what=str(error), episode=index))
    entry = _Entry(
        index=index,
        episodes=len(parts),
        frames=sum(part.steps + 1 for part in parts),
        bytes=sum(decoded_bytes(part) for part in parts),
        notes=source.notes[before:],
    )
    journal.add(entry)  # before the episodes are written; see the module's docstring
    for part in parts[skip:]:
        sink.write(part)
    return entry


class _Journal:
    """A file of JSON lines beside a target: first the source and options, then one line for each source episode."""

    def __init__(self, target: Path, identity: dict[str, Any]) -> None:
        self._target, self._identity = target, identity
        self._path = beside(target, ".convert.jsonl")
        self._report = beside(target, ".conversion.json")

    def finished(self) -> ConversionReport | None:
        """Return the report of a complete conversion, or None."""
        if not (self._report.exists() and self._target.exists()):
            return None
        saved = read_json(self._report)
        self._expect_same(saved["identity"])
        self._path.unlink(missing_ok=True)
        values = {name: value for name, value in saved["report"].items() if name not in ("notes", "groups")}
        return ConversionReport(**values, notes=[Note(**note) for note in saved["report"]["notes"]])

    def begin(self, written: int, indices: range) -> list[_Entry]:
        """Return the lines of the source episodes that are complete in the target, which has `written` episodes.

        Later lines are removed from the file, because their source episodes will be read again.
        """
        lines = self._lines()
        kept: list[_Entry] = []
        if written:
            if not lines:
                raise DataError(
                    f"{self._target} has {written} episodes of an unknown conversion ({self._path} is missing); "
                    f"choose another path"
                )
            self._expect_same(lines[0])
            total = 0
            for line, index in zip(lines[1:], indices, strict=False):
                entry = _Entry(**{**line, "notes": [Note(**note) for note in line["notes"]]})
                if entry.index != index or total + entry.episodes > written:
                    break
                kept.append(entry)
                total += entry.episodes
        self._report.unlink(missing_ok=True)  # left by a target that was deleted
        write_text(self._path, "\n".join(map(json.dumps, [self._identity, *map(asdict, kept)])) + "\n")
        return kept

    def add(self, entry: _Entry) -> None:
        """Add a line."""
        with storage_errors(self._path), self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(entry)) + "\n")

    def finish(self, report: ConversionReport) -> None:
        """Save the report, and delete the journal."""
        write_json(self._report, {"identity": self._identity, "report": report.to_json()})
        self.discard()

    def discard(self) -> None:
        """Delete the journal."""
        self._path.unlink(missing_ok=True)

    def _lines(self) -> list[dict[str, Any]]:
        """Return the complete lines; the last line may be incomplete after a kill."""
        if not self._path.exists():
            return []
        lines = []
        for line in lines_of(self._path):
            try:
                lines.append(json.loads(line))
            except ValueError:
                break
        return lines

    def _expect_same(self, there: dict[str, Any]) -> None:
        differences = [
            f"{key} was {there.get(key)!r}, is {value!r}"
            for key, value in self._identity.items()
            if there.get(key) != value
        ]
        if differences:
            raise DataError(
                f"{self._target} belongs to a different conversion: {'; '.join(differences)}. Use the old source and "
                f"options to resume that conversion, or choose another target. Changed source files count as a "
                f"different source"
            )


def _indices(episodes: range | None, count: int, path: Path) -> range:
    if episodes is None:
        return range(count)
    if episodes.step < 1 or (len(episodes) and not (episodes[0] >= 0 and episodes[-1] < count)):
        raise ConfigError(
            f"{path} has {count} episodes, numbered from 0; got {episodes}. Use an ascending range of numbers "
            f"below {count}"
        )
    return episodes


def _nothing_kept(source: Path, entries: list[_Entry]) -> DataError:
    """Return an error that names the reasons why each source episode was left out."""
    if not entries:
        return DataError(f"{source} has no episodes to convert; check the path, or select other episodes")
    groups = _groups([note for entry in entries for note in entry.notes if note.kind in ("skipped", "dropped")])
    more = [f" (and {group.count - 1} more like this)" if group.count > 1 else "" for group in groups]
    reasons = "; ".join(
        f"{group.example.rstrip('.')}{rest}" for group, rest in zip(groups[:_REASONS], more, strict=False)
    )
    return DataError(
        f"{source}: none of the {len(entries)} episodes can be converted, so that no dataset was written. {reasons}. "
        f"Correct the files, or choose other columns or options"
    )


def _remove(target: Path) -> None:
    with storage_errors(target):
        if target.is_dir():
            shutil.rmtree(target)
        else:
            target.unlink(missing_ok=True)


def _groups(notes: list[Note]) -> list[NoteGroup]:
    """Group the notes that differ only in numbers, in the order of their first notes."""
    groups: dict[tuple[str, str], list[Note]] = {}
    for note in notes:
        groups.setdefault((note.kind, re.sub(r"-?\d+(\.\d+)?", "#", note.what)), []).append(note)
    return [NoteGroup(kind=kind, count=len(same), example=same[0].what) for (kind, _), same in groups.items()]


def _unique(notes: list[Note]) -> list[Note]:
    return list(dict.fromkeys(notes))
