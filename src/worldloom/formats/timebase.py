"""Alignment of a camera and a log of actions with different rates to one time base.

Times are seconds on one clock. A *row* of the log is in force from its timestamp to the next row's timestamp; the last
row is in force for one median period. Video files round their times. A row that starts after a frame by less than a
tenth of the shorter median period (of the camera or the log) therefore counts as simultaneous with the frame.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from jaxtyping import Float32, Float64, Int64, UInt8

from worldloom.core.errors import DataError
from worldloom.core.types import Episode
from worldloom.formats.format import Note, Source

SLACK = 0.1  # tolerance, as a share of the shorter median period
_DRIFT = 1.25  # ratio of two durations above which one recording is longer, rather than its clock wrong
STEADY = 1.5  # ratio of the longest to the shortest period above which a rate counts as variable


@dataclass(frozen=True, kw_only=True, eq=False)
class AlignedSteps:
    """N steps without a gap: the camera frame, the row of the log and the time of each step.

    `actions[k]` is the action between steps k and k + 1.
    """

    frames: Int64[np.ndarray, "N"]
    rows: Int64[np.ndarray, "N"]
    times: Float64[np.ndarray, "N"]
    actions: Float32[np.ndarray, "N-1 A"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Log:
    """A log of R rows: actions, vector columns and labels; `times` is None if there are no timestamps."""

    times: Float64[np.ndarray, "R"] | None
    actions: Float32[np.ndarray, "R A"]
    columns: Mapping[str, Float32[np.ndarray, "R _"]]
    labels: Mapping[str, Float32[np.ndarray, "R _"]]
    metadata: dict[str, Any] | None = None  # metadata of the episode, if worldloom wrote it


def aligned_episodes(
    source: Source,
    index: int,
    where: str,
    log: Log,
    *,
    row_times: Float64[np.ndarray, "R"],
    camera_times: Float64[np.ndarray, "F"],
    pixels: Callable[[Int64[np.ndarray, "N"]], UInt8[np.ndarray, "N H W C"]] | None,
    metadata: Callable[[AlignedSteps], dict[str, Any]],
    observed: bool,
    until: float | None = None,
) -> list[Episode]:
    """Split a source episode at its gaps, using the source's options, and return an Episode for each part.

    `pixels` reads the camera frames with the given numbers; it is called once for all parts. `align` describes the
    other arguments.
    """
    options = source.options
    stretches, notes = align(
        camera_times,
        row_times,
        log.actions,
        where=where,
        rate=options.rate,
        how=options.actions,
        gap=options.gap,
        observed=observed,
        until=until,
        episode=index,
    )
    source.notes += notes
    frames = pixels(np.concatenate([stretch.frames for stretch in stretches])) if pixels and stretches else None
    episodes: list[Episode] = []
    first = 0
    for part, stretch in enumerate(stretches):
        last = first + len(stretch.frames)
        episodes += source.episode(
            index,
            where,
            pixels=None if frames is None else np.ascontiguousarray(frames[first:last]),
            columns={name: column[stretch.rows] for name, column in log.columns.items()},
            actions=stretch.actions,
            labels={name: column[stretch.rows] for name, column in log.labels.items()},
            metadata=metadata(stretch) | ({"part": part} if len(stretches) > 1 else {}),
        )
        first = last
    return episodes


def align(
    frame_times: Float64[np.ndarray, "F"],
    row_times: Float64[np.ndarray, "R"],
    actions: Float32[np.ndarray, "R A"],
    *,
    where: str,
    rate: float | None = None,
    how: Literal["hold", "mean"] = "hold",
    gap: float = 4.0,
    observed: bool = False,
    until: float | None = None,
    episode: int | None = None,
) -> tuple[list[AlignedSteps], list[Note]]:
    """Split an episode at its gaps; return the parts in order, and notes about frames and rows that were left out.

    Each camera frame is a step; with `rate`, there are `rate` steps per second from the first frame on, each with the
    nearest frame. `how="hold"` uses the action in force at a frame. `how="mean"` uses the time average of the actions
    until the next step, so that velocities add up to the same distance. A gap longer than `gap` median periods, in
    frames or in rows, ends a part. The last row is in force for one median period, or until the time `until`. Frames
    without a row in force are left out. A frame at the moment at which the last row ends is kept, because it shows the
    result of the last action. With `observed` (rows also contain observations) it is left out, because it has no row.

    Raises:
        DataError: a timestamp is not finite, or more than one timestamp is repeated or swapped.
    """
    kept_frames, notes = _increasing(frame_times, f"{where}: the camera", episode)
    kept_rows, more = _increasing(row_times, f"{where}: the log", episode)
    notes += more
    camera, log = frame_times[kept_frames], row_times[kept_rows]

    def note(kind: Literal["dropped", "skipped", "guessed", "info"], what: str) -> None:
        notes.append(Note(kind=kind, what=f"{where}: {what}.", episode=episode))

    if len(camera) < 2 or len(log) < 1:
        note("skipped", f"{len(camera)} frames and {len(log)} rows are too few for a step")
        return [], notes
    camera_period = float(np.median(np.diff(camera)))
    row_period = float(np.median(np.diff(log))) if len(log) > 1 else camera_period
    slack = SLACK * min(camera_period, row_period)
    for sentence in [*_irregular("camera", camera, gap), *_irregular("log", log, gap)]:
        note("info", sentence)
    if (difference := _clock_error(camera, log, max(camera_period, row_period))) is not None:
        note("guessed", difference)
    stretches: list[AlignedSteps] = []
    in_force = np.zeros(len(camera), bool)
    for rows in _split(log, gap * row_period):
        first, end = log[rows[0]], log[rows[-1]] + row_period
        if until is not None and rows[-1] == len(log) - 1:
            end = until
        inside = (camera >= first - slack) & ((camera < end - slack) if observed else (camera <= end + slack))
        chosen = np.flatnonzero(inside & ~in_force)  # the last frame of a part is not the first of the next
        in_force |= inside
        for part in _split(camera[chosen], gap * camera_period):
            frames, times = chosen[part], camera[chosen[part]]
            if rate is not None:
                frames, times = _resampled(camera, frames, rate)
            if len(times) < 2:
                note("skipped", f"a single frame at {times[0]:.4g} s, between gaps, is too short for a step")
                continue
            repeated = int((np.diff(frames) == 0).sum())
            if repeated:
                note(
                    "info",
                    f"{repeated} of {len(times)} steps repeat a frame, because the camera is slower than the rate",
                )
            held = np.maximum(np.searchsorted(log[rows], times + slack, side="right") - 1, 0)
            used, span = len(np.unique(held)), held[-1] - held[0] + 1
            if how == "hold" and used < 0.9 * (span - 1):
                note("info", f"the log is faster than the steps: {used} of {span} rows are used")
            taken = actions[kept_rows[rows]]
            stretch = AlignedSteps(
                frames=kept_frames[frames],
                rows=kept_rows[rows[held]],
                times=times,
                actions=taken[held[:-1]] if how == "hold" else _mean(log[rows], taken, times, held),
            )
            stretches.append(stretch)
    if not in_force.all():
        note(
            "dropped",
            f"{int((~in_force).sum())} of {len(camera)} frames are left out: they have no action (the camera runs from "
            f"{camera[0]:.4g} s to {camera[-1]:.4g} s, the log from {log[0]:.4g} s to {log[-1]:.4g} s)",
        )
    before, after = int((log < camera[0] - slack).sum()), int((log > camera[-1] + slack).sum())
    outside = max(before - 1, 0) + after  # the last row before the first frame is in force at it
    if outside and stretches:
        note(
            "dropped",
            f"{outside} of {len(log)} rows are left out: they are before or after the video (the camera runs from "
            f"{camera[0]:.4g} s to {camera[-1]:.4g} s, the log from {log[0]:.4g} s to {log[-1]:.4g} s)",
        )
    return stretches, notes


def clock_difference(rows: Float64[np.ndarray, "n"], frames: Float64[np.ndarray, "n"]) -> str | None:
    """Return how the times of rows differ from the times of the frames with the same numbers, as part of a sentence.

    Return None if they differ by at most half a median period of the frames.
    """
    if len(frames) < 2:
        return None
    away, half = rows - frames, float(np.median(np.diff(frames))) / 2
    far = np.flatnonzero(np.abs(away) > half)
    if not len(far):
        return None
    lasts = [float(times[-1] - times[0]) for times in (rows, frames)]
    line = np.polynomial.Polynomial.fit(frames, away, 1)(frames)
    if np.abs(away - np.median(away)).max() <= half:
        side = "after" if away[0] > 0 else "before"
        return f"the log starts {abs(np.median(away)):.4g} s {side} the video, and stays as far apart (a late start)"
    if np.abs(away - line).max() <= half and min(lasts) > 0:
        log, camera = ((len(rows) - 1) / last for last in lasts)
        return (
            f"their rates differ: the log has {log:.4g} rows per second and the video {camera:.4g} frames per second. "
            f"The clocks drift apart by {abs(away[-1] - away[0]):.4g} s in {lasts[1]:.4g} s, by more than half a frame "
            f"from row {far[0]} on"
        )
    return (
        f"their times differ by up to {np.abs(away).max():.4g} s, and by more than half a frame from row {far[0]} on "
        f"(row {rows[far[0]]:.4f} s, frame {frames[far[0]]:.4f} s)"
    )


def _clock_error(camera: Float64[np.ndarray, "F"], log: Float64[np.ndarray, "R"], period: float) -> str | None:
    """Return what the times of a camera and a log suggest about their clocks; None if nothing seems to be wrong.

    Two streams that were recorded together begin and end within two of the longer `period` of each other.
    """
    late, end = float(log[0] - camera[0]), float(log[-1] - camera[-1])
    log_lasts, camera_lasts = (float(times[-1] - times[0]) for times in (log, camera))
    apart = 2 * period
    if min(log_lasts, camera_lasts) <= max(apart, abs(late)):  # too short for a comparison, or without an overlap
        return None
    if abs(late) <= apart < abs(end) and 1 / _DRIFT <= log_lasts / camera_lasts <= _DRIFT:
        share = log_lasts / camera_lasts - 1
        return (
            f"the clocks of the log and the camera may drift apart: both start together, but the log lasts "
            f"{log_lasts:.6g} s and the camera {camera_lasts:.6g} s, which is {abs(end):.4g} s ({abs(share):.2%}) "
            f"{'more' if end > 0 else 'less'}. The times are taken to be right. If both were stopped together, "
            f"multiply the timestamps of the log by {camera_lasts / log_lasts:.6g}"
        )
    if abs(late) > apart >= abs(end - late):
        return (
            f"the clock of the log may start {'late' if late > 0 else 'early'}: the log and the camera last equally "
            f"long, but the log starts {abs(late):.4g} s {'after' if late > 0 else 'before'} the camera. The times are "
            f"taken to be right. If both were started together, subtract {late:.6g} from the timestamps of the log"
        )
    return None


def check_pairs(rows: Float64[np.ndarray, "R"], frames: Float64[np.ndarray, "F"], where: str) -> None:
    """Check that matching rows to frames by time and by number gives the same pairs, if there is a row per frame.

    Raises:
        DataError: there are as many rows as frames, or one fewer, but at different times.
    """
    if len(frames) - len(rows) not in (0, 1) or not (np.diff(rows) > 0).all():
        return
    if (difference := clock_difference(rows, frames[: len(rows)])) is not None:
        raise DataError(
            f"{where}: the log has {len(rows)} rows and the video {len(frames)} frames, but {difference}. If row k "
            f"belongs to frame k, use --pair number. If the times are right, use --pair time"
        )


def unit_of(span: float, seconds: float) -> str | None:
    """Return the unit (ms, us or ns) of timestamps that grow by `span` in `seconds` seconds; None if it may be s."""
    ratio = span / seconds if seconds > 0 else 0.0
    return None if ratio < 100 else ("ms", "us", "ns")[min(max(round(np.log10(ratio) / 3), 1), 3) - 1]


def timestamps(column: pa.Array | pa.ChunkedArray, what: str) -> Float64[np.ndarray, "R"]:
    """Return a column of numbers as float64; missing values become NaN. Error messages begin with `what`.

    Raises:
        DataError: the column is of single or half precision, which is too coarse for the times in it.
    """
    # Unchecked, because Arrow otherwise refuses nanoseconds since 1970; float64 keeps them to 256 ns.
    values: np.ndarray = column.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False)
    finite = values[np.isfinite(values)]
    if len(finite) > 1 and column.type in (pa.float32(), pa.float16()):
        kind = column.type.to_pandas_dtype()
        resolution, period = float(np.spacing(kind(np.abs(finite).max()))), float(np.ptp(finite)) / (len(finite) - 1)
        if resolution > period / 2:
            raise DataError(
                f"{what} has times near {finite[0]:.6g} in {column.type}, whose resolution there is {resolution:.4g}: "
                f"too coarse for rows that are {period:.4g} apart on average. Store the times as float64 or integers, "
                f"or subtract the first before rounding"
            )
    return values


def by_count(frames: int, rows: int, where: str) -> None:
    """Check that a log without timestamps has as many rows as the video has frames, or one fewer.

    Raises:
        DataError: the numbers differ in another way, so that rows cannot be matched with frames.
    """
    if frames - rows not in (0, 1):
        raise DataError(
            f"{where}: the video has {frames} frames and the log {rows} rows without timestamps; expected as many rows "
            f"as frames, or one fewer. Add a timestamp column, or remove the extra rows or frames"
        )


def _increasing(
    times: Float64[np.ndarray, "n"], what: str, episode: int | None
) -> tuple[Int64[np.ndarray, "m"], list[Note]]:
    """Return the indices of increasing timestamps; leave out one repeated or swapped timestamp, with a note."""
    everything = np.arange(len(times))
    if not np.isfinite(times).all():
        row = int(np.flatnonzero(~np.isfinite(times))[0])
        raise DataError(f"{what} has no finite timestamp in row {row}; repair the timestamp or drop the row")
    falls = np.flatnonzero(np.diff(times) <= 0)
    if not len(falls):
        return everything, []
    fall = int(falls[0])
    for row in (fall + 1, fall):
        kept = np.delete(everything, row)
        if (np.diff(times[kept]) > 0).all():
            sentence = f"{what} has one repeated or swapped timestamp; row {row} ({times[row]:.6g} s) is left out."
            return kept, [Note(kind="dropped", what=sentence, episode=episode)]
    raise DataError(
        f"{what} has timestamps that do not increase in {len(falls)} place(s), first from {times[fall]:.6f} s in row "
        f"{fall} to {times[fall + 1]:.6f} s in row {fall + 1}; only one repeated or swapped timestamp can be repaired. "
        f"Sort the rows, or split them into several episodes"
    )


def _irregular(clock: str, times: Float64[np.ndarray, "n"], gap: float) -> list[str]:
    """Return sentences about irregularities of a clock: a variable rate, and gaps."""
    periods = np.diff(times)
    if not len(periods):
        return []
    sentences = []
    median, limit = np.median(periods), gap * np.median(periods)
    steady = periods[periods <= limit]
    if steady.max() > STEADY * steady.min():
        sentences.append(
            f"the rate of the {clock} varies: periods of {steady.min():.4g} s to {steady.max():.4g} s, median "
            f"{median:.4g} s"
        )
    for before in np.flatnonzero(periods > limit):
        sentences.append(
            f"the {clock} has a gap of {periods[before]:.4g} s after {times[before]:.4g} s, which splits the episode"
        )
    return sentences


def _resampled(
    camera: Float64[np.ndarray, "F"], frames: Int64[np.ndarray, "n"], rate: float
) -> tuple[Int64[np.ndarray, "m"], Float64[np.ndarray, "m"]]:
    """Return the nearest of these frames at each step, and the times of the steps."""
    there = camera[frames]
    steps = int((there[-1] - there[0]) * rate + SLACK) + 1
    times = there[0] + np.arange(steps) / rate
    return frames[np.searchsorted((there[1:] + there[:-1]) / 2, times)], times


def _split(times: Float64[np.ndarray, "n"], limit: float) -> list[Int64[np.ndarray, "_"]]:
    if not len(times):
        return []
    return np.split(np.arange(len(times)), 1 + np.flatnonzero(np.diff(times) > limit))


def _mean(
    row_times: Float64[np.ndarray, "R"],
    actions: Float32[np.ndarray, "R A"],
    times: Float64[np.ndarray, "N"],
    held: Int64[np.ndarray, "N"],
) -> Float32[np.ndarray, "N-1 A"]:
    """Return the time average of the actions in force between consecutive times."""
    edges = np.maximum(times, row_times[held]) - row_times[0]  # timestamps within the tolerance count as at the frame
    knots = np.append(row_times - row_times[0], max(edges[-1], row_times[-1] - row_times[0]) + 1.0)
    areas = np.cumsum(np.diff(knots)[:, None] * actions.astype(np.float64), axis=0)
    areas = np.concatenate([np.zeros((1, actions.shape[1])), areas])
    at = np.stack([np.interp(edges, knots, column) for column in areas.T], axis=1)
    lasting = np.diff(edges)[:, None]
    means = np.where(lasting > 0, np.diff(at, axis=0) / np.where(lasting > 0, lasting, 1.0), actions[held[:-1]])
    bounded: np.ndarray = np.clip(means, actions.min(axis=0), actions.max(axis=0)).astype(np.float32)
    return bounded
