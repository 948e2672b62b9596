import re
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from worldloom.core.errors import DataError
from worldloom.formats.timebase import SLACK, AlignedSteps, align, by_count

many = settings(max_examples=60)


def clock(count: int, rate: float, start: float = 0.0) -> np.ndarray:
    return start + np.arange(count) / rate


def counted(rows: int) -> np.ndarray:
    """Actions that name their row."""
    return np.arange(rows, dtype=np.float32)[:, None]


def run(frames: np.ndarray, rows: np.ndarray, **options: Any) -> tuple[list[AlignedSteps], list[tuple[str, str]]]:
    stretches, notes = align(frames, rows, counted(len(rows)), where="log 7", episode=7, **options)
    assert all(note.episode == 7 and note.what.startswith("log 7") for note in notes)
    return stretches, [(note.kind, note.what) for note in notes]


@many
@given(st.integers(2, 40), st.sampled_from([5.0, 24.0, 29.97, 30.0, 59.94]), st.booleans(), st.randoms())
def test_one_clock_gives_every_frame_and_all_actions_but_the_last(
    count: int, rate: float, observed: bool, chance: Any
) -> None:
    rows = clock(count, rate)
    frames = np.round(rows * 1000) / 1000  # as a container with milliseconds has them
    frames += np.array([chance.uniform(-1, 1) for _ in frames]) * (0.5 * SLACK / rate - 0.0005)
    (stretch,), _ = run(np.sort(frames), rows, observed=observed)
    assert stretch.frames.tolist() == stretch.rows.tolist() == list(range(count))
    assert stretch.actions[:, 0].tolist() == list(range(count - 1))


@many
@given(st.integers(1, 40))
def test_a_frame_more_than_rows_closes_the_last_action(rows: int) -> None:
    (stretch,), notes = run(clock(rows + 1, 10), clock(rows, 10))
    assert stretch.frames.tolist() == list(range(rows + 1))
    assert stretch.actions[:, 0].tolist() == list(range(rows))
    assert notes == []
    if rows > 1:  # what is observed in rows is not known at that frame
        (stretch,), notes = run(clock(rows + 1, 10), clock(rows, 10), observed=True)
        assert stretch.frames.tolist() == list(range(rows))
        assert [kind for kind, _ in notes] == ["dropped"]


@many
@given(
    st.integers(3, 60), st.floats(5, 60), st.integers(3, 200), st.floats(5, 200), st.floats(-0.5, 0.5), st.booleans()
)
def test_an_action_is_the_one_in_force_when_its_frame_was_taken(
    count: int, rate: float, rows: int, row_rate: float, start: float, observed: bool
) -> None:
    frames, log = clock(count, rate, start), clock(rows, row_rate)
    stretches, notes = run(frames, log, observed=observed)
    slack = SLACK * min(1 / rate, 1 / row_rate) * 1.001
    used = 0
    for stretch in stretches:
        used += len(stretch.frames)
        assert (np.diff(stretch.frames) == 1).all()
        assert len(stretch.actions) == len(stretch.frames) - 1
        assert np.array_equal(stretch.actions[:, 0], stretch.rows[:-1])
        assert np.array_equal(stretch.times, frames[stretch.frames])
        age = stretch.times - log[stretch.rows]
        assert (age >= -slack).all()
        assert (age <= 1 / row_rate + slack).all()
    text = " ".join(what for _, what in notes)
    assert (used == count) == ("frames are left out" not in text) or "too short" in text


@many
@given(st.integers(4, 40), st.integers(2, 12), st.integers(1, 5), st.integers(0, 2**32))
def test_the_mean_of_velocities_goes_the_same_way(frames: int, faster: int, size: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    log = np.cumsum(rng.uniform(0.5, 1.5, frames * faster)) / (10.0 * faster)
    log -= log[0]
    camera = np.sort(rng.uniform(0, log[-1], frames))
    assume((np.diff(camera) > 1e-3).all())
    actions = rng.normal(size=(len(log), size)).astype(np.float32)
    stretches, _ = align(camera, log, actions, where="x", how="mean", gap=1e6)
    (stretch,) = stretches
    fine = np.linspace(stretch.times[0], stretch.times[-1], 200_001)[:-1]  # the same integral, by sums
    held = actions[np.searchsorted(log, fine, side="right") - 1]
    way = held.mean(axis=0) * (stretch.times[-1] - stretch.times[0])
    moved = (stretch.actions * np.diff(stretch.times)[:, None]).sum(axis=0)
    slack = SLACK * min(np.median(np.diff(camera)), np.median(np.diff(log)))
    assert np.abs(moved - way).max() <= 1e-3 + slack * (frames + 1) * 2 * np.abs(actions).max()
    assert (stretch.actions >= actions.min(axis=0)).all()
    assert (stretch.actions <= actions.max(axis=0)).all()


def test_a_closing_frame_that_is_late_may_be_waited_for() -> None:
    frames, rows = np.array([0, 0.1, 0.2, 0.35]), clock(3, 10)
    assert run(frames, rows)[0][0].actions[:, 0].tolist() == [0, 1]
    assert run(frames, rows, until=0.35)[0][0].actions[:, 0].tolist() == [0, 1, 2]
    assert run(frames, rows, until=0.35, observed=True)[0][0].actions[:, 0].tolist() == [0, 1]


def test_hold_and_mean_by_hand() -> None:
    camera, log = clock(4, 10), clock(8, 20)
    (held,), notes = run(camera, log)
    assert held.actions[:, 0].tolist() == [0, 2, 4]
    clocks = "the camera runs from 0 s to 0.3 s, the log from 0 s to 0.35 s"
    outside = ("dropped", f"log 7: 1 of 8 rows are left out: they are before or after the video ({clocks}).")
    assert notes == [("info", "log 7: the log is faster than the steps: 4 of 7 rows are used."), outside]
    (mean,), notes = run(camera, log, how="mean")
    assert mean.actions[:, 0].tolist() == [0.5, 2.5, 4.5]
    assert notes == [outside]
    (slow,), _ = run(clock(6, 10), clock(3, 5))
    assert slow.actions[:, 0].tolist() == [0, 0, 1, 1, 2]


@many
@given(st.integers(4, 50), st.sampled_from([10.0, 25.0, 30.0]), st.floats(2.0, 60.0))
def test_a_target_rate_takes_the_nearest_frame(count: int, camera_rate: float, rate: float) -> None:
    camera = clock(count, camera_rate, start=0.25)
    assume((count - 1) / camera_rate * rate > 1.2)
    log = clock(count * 4 + 50, camera_rate * 4)
    (stretch,), notes = run(camera, log, rate=rate)
    assert np.allclose(np.diff(stretch.times), 1 / rate)
    assert stretch.times[0] == camera[0]
    assert camera[-1] - stretch.times[-1] < 1.05 / rate
    off = np.abs(camera[stretch.frames] - stretch.times)
    assert (off <= 0.5 / camera_rate + SLACK / rate + 1e-9).all()
    repeats = int((np.diff(stretch.frames) == 0).sum())
    assert any("repeat a frame" in what for _, what in notes) == (repeats > 0)


@pytest.mark.parametrize("which", ["camera", "log"])
@pytest.mark.parametrize("periods", [3.5, 4.5, 100.0])
def test_a_gap_splits_and_is_noted(which: str, periods: float) -> None:
    whole = clock(60, 10)
    holey = np.concatenate([whole[:20], whole[20:40] + (periods - 1) / 10])
    frames, rows = (holey, clock(300, 10)) if which == "camera" else (clock(300, 10), holey)
    stretches, notes = run(frames, rows)
    gaps = [what for kind, what in notes if kind == "info" and "gap" in what]
    if periods < 4:
        assert (len(stretches), gaps) == (1, [])
        return
    assert len(stretches) == 2
    assert gaps == [f"log 7: the {which} has a gap of {periods / 10:.4g} s after 1.9 s, which splits the episode."]
    for stretch in stretches:  # no step spans the gap
        assert np.diff(stretch.times).max() < 0.1001
        assert np.diff(rows[stretch.rows]).max() < 0.1001


@many
@given(st.lists(st.floats(0.01, 0.3), min_size=5, max_size=60), st.integers(0, 59), st.booleans())
def test_no_step_spans_a_gap_and_every_frame_is_used_or_counted(periods: list[float], place: int, in_log: bool) -> None:
    periods[place % len(periods)] = 5.0
    holey, even = np.cumsum(periods), clock(600, 30)
    frames, rows = (even, holey) if in_log else (holey, even)
    stretches, notes = run(frames, rows)
    for stretch in stretches:
        assert np.diff(stretch.times).max() <= 4 * np.median(np.diff(frames)) + 1e-9
        gaps = np.flatnonzero(np.diff(rows) > 4 * np.median(np.diff(rows)) + 1e-9)
        assert not ((stretch.rows[0] <= gaps) & (gaps < stretch.rows[-1])).any()
    used = sum(len(stretch.frames) for stretch in stretches)
    short = sum("a single frame" in what for _, what in notes)
    lost = [int(what.split()[2]) for kind, what in notes if kind == "dropped" and "frames are left" in what]
    assert used + short + sum(lost) == len(frames)


def test_a_variable_rate_is_noted() -> None:
    frames = np.array([0, 0.1, 0.2, 0.4, 0.5])
    (stretch,), notes = run(frames, clock(10, 10))
    assert stretch.actions[:, 0].tolist() == [0, 1, 2, 4]
    assert notes[0] == ("info", "log 7: the rate of the camera varies: periods of 0.1 s to 0.2 s, median 0.1 s.")


@pytest.mark.parametrize(
    ("stamps", "left_out"),
    [
        ([0, 1, 2, 2, 3, 4], 3),  # repeated
        ([0, 1, 3, 2, 4, 5], 3),  # swapped
        ([0, 1, 9, 2, 3, 4], 2),  # one far ahead
        ([0, 1, 2, -5, 3, 4], 3),  # one far back
        ([7, 1, 2, 3, 4, 5], 0),
        ([0, 1, 2, 3, 4, 0], 5),
    ],
)
@pytest.mark.parametrize("which", ["camera", "log"])
def test_one_bad_stamp_is_left_out(stamps: list[float], left_out: int, which: str) -> None:
    bad = np.array(stamps, np.float64)
    other = clock(12, 1.0)
    frames, rows = (bad, other) if which == "camera" else (other, bad)
    stretches, notes = run(frames, rows)
    kind, what = notes[0]
    assert kind == "dropped"
    assert f"the {which} has one repeated or swapped timestamp; row {left_out} " in what
    used = stretches[0].frames if which == "camera" else stretches[0].rows
    assert left_out not in used
    assert set(range(1, 5)) - {left_out} <= set(used.tolist())


@many
@given(st.lists(st.integers(0, 8), min_size=3, max_size=12))
def test_stamps_are_repaired_by_one_or_refused(stamps: list[int]) -> None:
    bad = np.array(stamps, np.float64)
    falls = int((np.diff(bad) <= 0).sum())
    repairable = any((np.diff(np.delete(bad, row)) > 0).all() for row in range(len(bad)))
    if falls and not repairable:
        with pytest.raises(DataError, match="log 7: the log has timestamps that do not increase .* in row"):
            run(clock(20, 1.0), bad)
        return
    _, notes = run(clock(20, 1.0), bad)
    assert any("repeated or swapped" in what for _, what in notes) == bool(falls)


def test_a_stamp_that_is_missing_is_refused() -> None:
    with pytest.raises(DataError, match="the log has no finite timestamp in row 2"):
        run(clock(5, 10), np.array([0, 0.1, np.nan, 0.3]))


def test_clocks_that_do_not_meet_give_nothing_but_a_note() -> None:
    stretches, notes = run(clock(5, 10), clock(5, 10, start=100.0))
    assert stretches == []
    assert [kind for kind, _ in notes] == ["dropped"]
    stretches, notes = run(clock(1, 10), clock(5, 10))
    assert stretches == []
    assert notes == [("skipped", "log 7: 1 frames and 5 rows are too few for a step.")]


@many
@given(st.integers(1, 50), st.integers(-3, 3))
def test_counts_without_timestamps(rows: int, more: int) -> None:
    if more in (0, 1):
        by_count(rows + more, rows, "video")
        return
    with pytest.raises(DataError, match=f"video has {rows + more} frames and the log {rows} rows"):
        by_count(rows + more, rows, "video")


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (
            clock(404, 20.0) * 1.01,
            r"may drift apart: both start together.* 20\.3515 s .* 19\.9 s, .*0\.45.*more.*0\.97",
        ),
        (clock(397, 20.0) * 0.95, r"may drift apart: .* less\..*multiply the timestamps of the log by 1\.05"),
        (clock(398, 20.0, 0.5), r"may start late: .* 0\.5 s after the camera.* subtract 0\.5 from"),
        (clock(398, 20.0, -0.5), r"may start early: .* 0\.5 s before the camera.* subtract -0\.5 from"),
    ],
)
def test_clocks_of_different_rates_that_may_be_wrong_are_named(rows: np.ndarray, said: str) -> None:
    _, notes = run(clock(200, 10.0), rows)
    ((_, what),) = [note for note in notes if note[0] == "guessed"]
    assert re.search(said, what), what


@pytest.mark.parametrize("rows", [clock(398, 20.0), clock(401, 20.0), clock(800, 20.0), clock(500, 20.0, -2.0)])
def test_a_log_that_agrees_with_the_camera_or_is_longer_is_no_clock_error(rows: np.ndarray) -> None:
    assert not [what for kind, what in run(clock(200, 10.0), rows)[1] if kind == "guessed"]
