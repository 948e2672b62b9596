import struct
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import av
import format_samples
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from format_samples import GREY, SPEC, make_episode, make_store
from PIL import Image, ImageFilter

from worldloom.core.errors import ConfigError, DataError
from worldloom.core.types import ActionSpec, ObservationSpec
from worldloom.data import DatasetSpec, EpisodeDataset
from worldloom.formats import FORMATS, WriteOptions, convert
from worldloom.formats.video import FrameStream, frame_times, presentation, write_video

HEIGHT, WIDTH = 32, 48


def shades(count: int) -> np.ndarray:
    """Frames whose brightness is 4 times their number."""
    return np.repeat(4 * np.arange(count, dtype=np.uint8), HEIGHT * WIDTH * 3).reshape(count, HEIGHT, WIDTH, 3)


def numbers(pixels: np.ndarray | None) -> list[int]:
    assert pixels is not None
    return np.rint(pixels[:, 8, 8].mean(axis=-1) / 4).astype(int).tolist()


def film(
    path: Path,
    times: list[float] | None = None,
    *,
    count: int = 12,
    frames: np.ndarray | None = None,
    b_frames: int = 3,
) -> None:
    """A video whose frames stand at these times (default: ten a second)."""
    path.parent.mkdir(exist_ok=True)
    frames = shades(count if times is None else len(times)) if frames is None else frames
    times = [index / 10 for index in range(len(frames))] if times is None else times
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("libx264", rate=10, options={"crf": "1", "bf": str(b_frames)})
        stream.pix_fmt, stream.height, stream.width = "yuv444p", HEIGHT, WIDTH
        stream.codec_context.time_base = Fraction(1, 1000)
        for picture, time in zip(frames, times, strict=True):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = round(time * 1000), Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def log(path: Path, rows: int = 12, *, rate: float = 10.0, start: float = 0.0, **columns: Any) -> None:
    """A table with `action.x`, which is its row, and `action.y`, in CSV or Parquet."""
    everything = {"timestamp": start + np.arange(rows) / rate, "action.x": np.arange(rows, dtype=np.float64)}
    everything |= {"action.y": np.full(rows, 0.5), **columns}
    table = pa.table({name: column for name, column in everything.items() if column is not None})
    if path.suffix == ".csv":
        import pyarrow.csv as csv

        csv.write_csv(table, path)
    else:
        pq.write_table(table, path)


read_all = partial(format_samples.read_all, "folder")


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
@pytest.mark.parametrize("video", [".mp4", ".mkv"])
def test_frames_and_actions_meet(suffix: str, video: str, tmp_path: Path) -> None:
    film(tmp_path / f"run{video}")
    log(tmp_path / f"run{suffix}", **{"observation.height": np.arange(12) * 2.0, "reward": np.ones(12)})
    (episode,), notes, spec = read_all(tmp_path)
    assert numbers(episode.pixels) == list(range(12))
    assert episode.actions[:, 0].tolist() == list(range(11))
    assert episode.vector is not None
    assert episode.vector[:, 0].tolist() == [2.0 * row for row in range(12)]
    assert spec.observation == ObservationSpec(pixels=(HEIGHT, WIDTH, 3), vector=1)
    assert spec.action == ActionSpec(low=(0.0, 0.0), high=(11.0, 1.0))
    assert [note.split(":")[0] for note in notes] == ["dropped", "info", "info"]
    assert "reward" in notes[0]
    assert "without a following frame" in notes[1]
    assert "range of the data" in notes[2]


def test_rates_that_differ_are_aligned_by_time(tmp_path: Path) -> None:
    film(tmp_path / "run.mp4")
    log(tmp_path / "run.csv", 60, rate=50.0)
    (episode,), notes, _ = read_all(tmp_path)
    assert episode.actions[:, 0].tolist() == [5.0 * frame for frame in range(11)]
    assert any("the log is faster than the steps" in note for note in notes)
    (mean,), _, _ = read_all(tmp_path, actions="mean")
    assert mean.actions[:, 0].tolist() == [5.0 * frame + 2.0 for frame in range(11)]
    (slow,), _, _ = read_all(tmp_path, rate=5.0)
    assert numbers(slow.pixels) == [0, 2, 4, 6, 8, 10]
    assert slow.actions[:, 0].tolist() == [0, 10, 20, 30, 40]


def test_presentation_times_count_and_not_numbers(tmp_path: Path) -> None:
    times = [0.0, 0.1, 0.2, 0.5, 0.55, 0.6, 0.7]
    film(tmp_path / "run.mp4", times)
    assert np.allclose(frame_times(tmp_path / "run.mp4"), times, atol=1e-3)
    log(tmp_path / "run.csv", 12)
    (episode,), notes, _ = read_all(tmp_path)
    assert episode.actions[:, 0].tolist() == [0, 1, 2, 5, 5, 6]
    assert any("the rate of the camera varies: periods of 0.05 s to 0.3 s, median 0.1 s" in note for note in notes)


def test_a_gap_gives_two_episodes(tmp_path: Path) -> None:
    film(tmp_path / "run.mp4", [0.0, 0.1, 0.2, 0.3, 1.3, 1.4, 1.5])
    log(tmp_path / "run.csv", 30)
    report = convert(tmp_path, tmp_path.with_name("store"))
    dataset = EpisodeDataset.open(tmp_path.with_name("store"))
    assert (report.source_episodes, len(dataset)) == (1, 2)
    first, second = dataset.episode(0), dataset.episode(1)
    assert (numbers(first.pixels), numbers(second.pixels)) == ([0, 1, 2, 3], [4, 5, 6])
    assert (first.actions[:, 0].tolist(), second.actions[:, 0].tolist()) == ([0, 1, 2], [13, 14])
    assert [part.metadata["part"] for part in (first, second)] == [0, 1]
    assert any("gap of 1 s after 0.3 s, which splits" in note.what for note in report.notes)


@pytest.mark.parametrize(("rows", "steps"), [(12, 11), (11, 11)])
def test_without_timestamps_the_counts_decide(rows: int, steps: int, tmp_path: Path) -> None:
    film(tmp_path / "run.mp4")
    log(tmp_path / "run.csv", rows, timestamp=None)
    (episode,), _, _ = read_all(tmp_path)
    assert numbers(episode.pixels) == list(range(12))
    assert episode.actions[:, 0].tolist() == list(range(steps))


@pytest.mark.parametrize("rows", [10, 13])
def test_counts_that_do_not_fit_are_refused(rows: int, tmp_path: Path) -> None:
    film(tmp_path / "run.mp4")
    log(tmp_path / "run.csv", rows, timestamp=None)
    with pytest.raises(DataError, match=f"video has 12 frames and the log {rows} rows without timestamps"):
        read_all(tmp_path)
    log(tmp_path / "run.csv", rows)  # timestamps decide
    (episode,), _, _ = read_all(tmp_path)
    assert numbers(episode.pixels) == list(range(min(rows + 1, 12)))


def test_stamps_of_another_epoch_or_unit(tmp_path: Path) -> None:
    film(tmp_path / "run.mp4")
    epoch = 1_700_000_000.0
    log(tmp_path / "run.parquet", start=epoch)
    (episode,), notes, _ = read_all(tmp_path)
    assert episode.actions[:, 0].tolist() == list(range(11))
    assert any(note.startswith("repaired") and "start at the first row" in note for note in notes)
    stamps = (epoch * 1e6 + np.arange(12) * 1e5).astype(np.int64)
    for column, options in (
        (pa.array(stamps, pa.timestamp("us")), {}),
        (pa.array(stamps), {"columns": {"unit": "us"}}),
    ):
        log(tmp_path / "run.parquet", timestamp=column)
        (episode,), _, _ = read_all(tmp_path, **options)
        assert episode.actions[:, 0].tolist() == list(range(11))


@pytest.mark.parametrize(("unit", "factor"), [("ms", 1e3), ("us", 1e6), ("ns", 1e9)])
@pytest.mark.parametrize("epoch", [0, 1_700_000_000])
def test_a_unit_that_is_not_stated_is_recognised(unit: str, factor: float, epoch: int, tmp_path: Path) -> None:
    film(tmp_path / "run.mp4")
    # One more than a whole number, because float64 cannot hold every nanosecond since 1970.
    stamps = epoch * int(factor) + np.arange(12) * int(factor / 10) + 1
    log(tmp_path / "run.parquet", timestamp=pa.array(stamps, pa.int64()))
    with pytest.raises(DataError, match=rf"video 1.1 s, so that .* in {unit} rather than .*--columns unit={unit}, or"):
        read_all(tmp_path)
    (episode,), _, _ = read_all(tmp_path, columns={"unit": unit})
    assert episode.actions[:, 0].tolist() == list(range(11))


def test_a_long_log_in_seconds_is_accepted_if_the_unit_is_stated(tmp_path: Path) -> None:
    film(tmp_path / "run.mp4")
    log(tmp_path / "run.csv", 2000)
    with pytest.raises(DataError, match="or --columns unit=s if they are seconds"):
        read_all(tmp_path)
    (episode,), _, _ = read_all(tmp_path, columns={"unit": "s"})
    assert episode.steps == 11


def test_single_precision_cannot_hold_the_time_since_1970(tmp_path: Path) -> None:
    film(tmp_path / "run.mp4")
    stamps = 1_700_000_000 + np.arange(12) / 10
    log(tmp_path / "run.parquet", timestamp=pa.array(stamps, pa.float32()))
    with pytest.raises(DataError, match="times near 1.7e.* in float, whose resolution there is 128: too coarse"):
        read_all(tmp_path)


@pytest.mark.parametrize(
    ("rate", "start", "message"),
    [
        (5.0, 0.0, "the log has 5 rows per second and the video 10 .* more than half a frame from row 1 on"),
        (9.0, 0.0, "the log has 9 rows per second and the video 10 .* more than half a frame from row 5 on"),
        (10.0, 0.3, "the log starts 0.3 s after the video, and stays as far apart .a late start"),
        (10.0, -0.2, "the log starts 0.2 s before the video"),
    ],
)
@pytest.mark.parametrize("rows", [12, 11])
def test_a_row_for_each_frame_at_other_times_is_settled_by_an_option(
    rate: float, start: float, message: str, rows: int, tmp_path: Path
) -> None:
    film(tmp_path / "run.mp4")
    log(tmp_path / "run.csv", rows, rate=rate, start=start)
    with pytest.raises(
        DataError, match=rf"{rows} rows and the video 12 frames, but .*{message}.*--pair number.*--pair time"
    ):
        read_all(tmp_path)
    (episode,), _, _ = read_all(tmp_path, pair="number")
    assert numbers(episode.pixels) == list(range(12))
    assert episode.actions[:, 0].tolist() == list(range(11))
    (episode, *_), _, _ = read_all(tmp_path, pair="time")
    assert episode.actions[0, 0] == max(0, -start * rate)


def test_small_differences_of_clocks_are_no_difference(tmp_path: Path) -> None:
    film(tmp_path / "run.mp4")
    log(tmp_path / "run.csv", start=0.04)  # less than half a frame
    assert read_all(tmp_path)[0]
    with pytest.raises(ConfigError, match="'pair' needs videos"):
        read_all(tmp_path, camera="none", pair="number")


def test_columns_may_be_named_and_lists(tmp_path: Path) -> None:
    film(tmp_path / "run.mp4")
    log(
        tmp_path / "run.parquet",
        t=np.arange(12) / 10,
        timestamp=None,
        cmd=pa.array([[float(row), -1.0, 2.0] for row in range(12)]),
        pose=pa.FixedSizeListArray.from_arrays(pa.array(np.arange(24.0)), 2),
    )
    columns = {"timestamp": "t", "action": "cmd", "observation": "pose", "label": "action.y"}
    (episode,), notes, spec = read_all(tmp_path, columns=columns, action_low=[-9, -9, -9], action_high=[99, 99, 99])
    assert episode.actions[3].tolist() == [3.0, -1.0, 2.0]
    assert episode.vector is not None
    assert episode.vector[2].tolist() == [4.0, 5.0]
    assert spec.labels == {"action.y": 1}
    assert spec.action == ActionSpec(low=(-9.0,) * 3, high=(99.0,) * 3)
    assert not any("range of the data" in note for note in notes)
    with pytest.raises(ConfigError, match="no column 'cdm' for action; did you mean 'cmd'"):
        read_all(tmp_path, columns={"action": "cdm"})
    with pytest.raises(ConfigError, match="unknown column role 'actions'; did you mean 'action'"):
        read_all(tmp_path, columns={"actions": "cmd"})


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"action.x": ["a"] * 12}, "column 'action.x' is string, for example 'a'; expected numbers"),
        ({"action.x": [[1.0]] * 11 + [[1.0, 2.0]]}, "lists of column 'action.x' have 1 to 2 values .row 11 differs"),
        ({"action.x": [{"x": 1.0}] * 12}, "column 'action.x' is struct"),
        ({"timestamp": ["noon"] * 12}, "timestamps have type string; expected numbers"),
        ({"action.x": None, "action.y": None}, "no numeric column 'action' or 'actions'; it has timestamp"),
        ({"timestamp": [0.0, 0.1, 0.2, 0.1, 0.0, *np.arange(7) / 10]}, "do not increase in 3 place.s., first from 0.2"),
        ({"timestamp": [0.0, None, *np.arange(2, 12) / 10]}, "no finite timestamp in row 1"),
    ],
)
def test_a_surprising_table_is_refused(columns: dict[str, Any], message: str, tmp_path: Path) -> None:
    film(tmp_path / "run.mp4")
    log(tmp_path / "run.parquet", **columns)
    with pytest.raises(DataError, match=message) as caught:
        read_all(tmp_path)
    assert "run.parquet" in str(caught.value)


def test_a_table_that_differs_from_the_first(tmp_path: Path) -> None:
    for name in ("a", "b"):
        film(tmp_path / f"{name}.mp4")
        log(tmp_path / f"{name}.parquet")
    log(tmp_path / "b.parquet", **{"action.y": None})
    with pytest.raises(DataError, match=r"b.parquet has no column 'action.y', but the first table has"):
        read_all(tmp_path)
    log(tmp_path / "b.parquet", **{"action.y": [[1.0, 2.0]] * 12})
    with pytest.raises(DataError, match=r"b.parquet: actions have 3 values; expected 2, as in the first table"):
        read_all(tmp_path)


@pytest.mark.parametrize("bad", [np.nan, np.inf, None])
def test_an_action_that_is_not_finite_skips_its_episode(bad: float | None, tmp_path: Path) -> None:
    for name in ("a", "b"):
        film(tmp_path / f"{name}.mp4")
        log(tmp_path / f"{name}.csv", **{"action.x": [0.0] * 5 + [bad if name == "a" else 1.0] + [0.0] * 6})
    episodes, notes, spec = read_all(tmp_path)
    assert [episode.metadata["name"] for episode in episodes] == ["b"]
    (skipped,) = [note for note in notes if note.startswith("skipped")]
    assert "a.csv is skipped: actions has a value that is not finite (missing, NaN or infinite) at step 5" in skipped
    assert spec.action.high == (1.0, 1.0)
    log(tmp_path / "a.csv", **{"action.x": [0.0] * 11 + [bad]})  # the last action is not used
    assert len(read_all(tmp_path)[0]) == 2


@pytest.mark.parametrize(
    ("column", "values"), [("action.x", [np.nan] * 3 + [1.0] * 9), ("observation.x", [1.7e308, -1.7e308] * 6)]
)
def test_a_conversion_that_keeps_no_episode_is_an_error(column: str, values: list[float], tmp_path: Path) -> None:
    for name in ("a", "b"):
        film(tmp_path / "logs" / f"{name}.mp4")
        log(tmp_path / "logs" / f"{name}.parquet", **{column: values})
    why = r"none of the 2 episodes can be converted.*a\.parquet is skipped: .* is not finite.*b\.parquet is skipped"
    for target in (name for name in FORMATS if FORMATS[name].writable):
        with pytest.raises(DataError, match=why):  # and no warning of NumPy
            convert(tmp_path / "logs", tmp_path / "ours", target_format=target)
        assert [path.name for path in tmp_path.iterdir()] == ["logs"], target
    log(tmp_path / "logs" / "b.parquet", **{column: [1.0] * 12, "label.x": np.arange(12.0)})
    log(tmp_path / "logs" / "a.parquet", **{column: [1.0] * 12, "label.x": np.arange(12.0)})
    assert convert(tmp_path / "logs", tmp_path / "ours").episodes == 2


def test_what_is_missing_or_empty_is_noted(tmp_path: Path) -> None:
    for name in ("a", "b", "c", "d"):
        film(tmp_path / f"{name}.mp4")
        log(tmp_path / f"{name}.csv")
    (tmp_path / "b.csv").unlink()
    (tmp_path / "c.mp4").unlink()
    log(tmp_path / "d.csv", 0)
    episodes, notes, _ = read_all(tmp_path)
    assert [episode.metadata["name"] for episode in episodes] == ["a"]
    skipped = [note.removeprefix(f"skipped: {tmp_path}/") for note in notes if note.startswith("skipped")]
    assert skipped == [
        "b is skipped: it has no table.",
        "c is skipped: it has no video.",
        "d.csv is skipped: it has no rows.",
    ]


def test_damaged_files_are_named(tmp_path: Path) -> None:
    film(tmp_path / "run.mp4", frames=np.random.default_rng(0).integers(0, 256, (12, HEIGHT, WIDTH, 3), np.uint8))
    log(tmp_path / "run.parquet")
    video, table = (tmp_path / "run.mp4").read_bytes(), (tmp_path / "run.parquet").read_bytes()
    for content in (video[: len(video) // 2], b"", b"no video" * 100):
        (tmp_path / "run.mp4").write_bytes(content)
        with pytest.raises(DataError, match=r"run.mp4 .*(cannot be read as a video|is truncated|decodes only)"):
            read_all(tmp_path)
    (tmp_path / "run.mp4").write_bytes(video)
    for content in (table[: len(table) // 2], b""):
        (tmp_path / "run.parquet").write_bytes(content)
        with pytest.raises(DataError, match=r"run.parquet (cannot be read as a table|is empty)"):
            read_all(tmp_path)


def test_a_csv_that_breaks_off_in_a_row_is_refused(tmp_path: Path) -> None:
    film(tmp_path / "run.mp4")
    log(tmp_path / "run.csv")
    text = (tmp_path / "run.csv").read_text()
    (tmp_path / "run.csv").write_text(text[: text.rindex(",")])
    with pytest.raises(DataError, match="run.csv cannot be read as a table .*columns"):
        read_all(tmp_path)


def test_a_video_whose_index_comes_first_and_that_is_cut(tmp_path: Path) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (12, HEIGHT, WIDTH, 3), np.uint8)
    with av.open(str(tmp_path / "run.mp4"), "w", options={"movflags": "faststart"}) as container:
        stream: Any = container.add_stream("libx264", rate=10, options={"crf": "1"})
        stream.pix_fmt, stream.height, stream.width = "yuv444p", HEIGHT, WIDTH
        for picture in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    whole = (tmp_path / "run.mp4").read_bytes()
    (tmp_path / "run.mp4").write_bytes(whole[: int(0.6 * len(whole))])
    log(tmp_path / "run.csv")
    with pytest.raises(DataError, match=r"run.mp4"):
        read_all(tmp_path)


def test_a_matroska_file_that_is_cut_loses_nothing_silently(tmp_path: Path) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (12, HEIGHT, WIDTH, 3), np.uint8)
    write_video(tmp_path / "run.mkv", frames, fps=10.0, crf=1, lossless=True)
    whole = (tmp_path / "run.mkv").read_bytes()
    (tmp_path / "run.mkv").write_bytes(whole[: int(0.6 * len(whole))])
    log(tmp_path / "run.csv")
    (episode,), notes, _ = read_all(tmp_path)  # such a file does not say how many frames it had
    assert episode.pixels is not None
    assert np.array_equal(episode.pixels, frames[:6])
    assert any("6 of 12 rows are left out: they are before or after the video" in note for note in notes)
    log(tmp_path / "run.csv", timestamp=None)
    with pytest.raises(DataError, match="6 frames and the log 12 rows"):
        read_all(tmp_path)


def test_a_video_of_ours_that_is_cut_is_refused(tmp_path: Path) -> None:
    make_store(tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "there", target_format="folder", write=WriteOptions(lossless=True))
    video = tmp_path / "there" / "000002.mkv"
    video.write_bytes(video.read_bytes()[: int(0.6 * video.stat().st_size)])
    with pytest.raises(DataError, match=r"000002.mkv is truncated: it has . frames, expected 10"):
        convert(tmp_path / "there", tmp_path / "back")


def test_a_frame_size_that_changes_is_refused(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "run.mkv"), "w") as container:
        stream: Any = container.add_stream("mjpeg", rate=10)
        stream.pix_fmt, stream.height, stream.width = "yuvj444p", HEIGHT, WIDTH
        clock = 0
        for side in (1, 2):
            encoder = av.CodecContext.create("mjpeg", "w")
            encoder.pix_fmt, encoder.height, encoder.width = "yuvj444p", HEIGHT * side, WIDTH * side
            encoder.time_base = Fraction(1, 10)
            for _ in range(6):
                picture = np.zeros((HEIGHT * side, WIDTH * side, 3), np.uint8)
                frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format="yuvj444p")
                frame.pts, frame.time_base = clock, Fraction(1, 10)
                clock += 1
                for packet in encoder.encode(frame):
                    packet.stream = stream
                    container.mux(packet)
    log(tmp_path / "run.csv")
    with pytest.raises(DataError, match=r"changes its frame size from \(32, 48\) to \(64, 96\) .* at frame 6"):
        read_all(tmp_path)


def test_another_size_in_another_video(tmp_path: Path) -> None:
    for name, side in (("a", 1), ("b", 2)):
        frames = np.zeros((12, HEIGHT * side, WIDTH * side, 3), np.uint8)
        write_video(tmp_path / f"{name}.mp4", frames, fps=10.0, crf=1, lossless=False)
        log(tmp_path / f"{name}.csv")
    with pytest.raises(DataError, match="b.mp4 has frames of shape .64, 96, 3.*--size HxW"):
        read_all(tmp_path)
    episodes, _, spec = read_all(tmp_path, size=(16, 24))
    assert spec.observation.pixels == (16, 24, 3)
    assert [episode.pixels.shape for episode in episodes if episode.pixels is not None] == [(12, 16, 24, 3)] * 2


def rooms() -> np.ndarray:
    """Flat colours and hard edges, as the two rooms have."""
    frames = np.full((20, 64, 64, 3), 235, np.uint8)
    frames[:, :, 30:34], frames[:, 20:28, 30:34] = 40, 235
    for index, frame in enumerate(frames):
        frame[10 + index : 16 + index, 4 + 2 * index : 10 + 2 * index] = (220, 40, 60)
    return frames


def natural() -> np.ndarray:
    """A window that moves over a smooth colourful picture."""
    noise = np.random.default_rng(0).integers(0, 256, (160, 200, 3), np.uint8)
    smooth = np.asarray(Image.fromarray(noise).filter(ImageFilter.GaussianBlur(8)), np.float64)
    smooth = (255 * (smooth - smooth.min()) / (smooth.max() - smooth.min())).astype(np.uint8)
    return np.stack([smooth[index : index + 96, 2 * index : 2 * index + 128] for index in range(20)])


@pytest.mark.parametrize(("frames", "least"), [(rooms(), 40.0), (natural(), 40.0)], ids=["rooms", "natural"])
def test_the_stated_quality_of_video(frames: np.ndarray, least: float, tmp_path: Path) -> None:
    defaults = WriteOptions()
    write_video(tmp_path / "a.mp4", frames, fps=10.0, crf=defaults.crf, lossless=False)
    back = FrameStream(tmp_path / "a.mp4").read(np.arange(len(frames)))
    errors = np.square(frames.astype(np.float64) - back).mean(axis=(1, 2, 3))
    assert 10 * np.log10(255**2 / errors.max()) >= least
    write_video(tmp_path / "a.mkv", frames, fps=10.0, crf=defaults.crf, lossless=True)
    assert np.array_equal(FrameStream(tmp_path / "a.mkv").read(np.arange(len(frames))), frames)


def test_pictures_may_be_left_out(tmp_path: Path) -> None:
    film(tmp_path / "run.mp4")
    log(tmp_path / "run.csv", observation=np.arange(12.0))
    (episode,), notes, spec = read_all(tmp_path, camera="none")
    assert (episode.pixels, spec.observation) == (None, ObservationSpec(vector=1))
    assert episode.actions[:, 0].tolist() == list(range(11))
    assert notes[0] == f"dropped: {tmp_path}: 1 videos are left out."


@pytest.mark.parametrize("fps", [29.97, 240.0, 700.0])
def test_a_fast_clock_survives_the_rounding_of_a_container(fps: float, tmp_path: Path) -> None:
    make_store(tmp_path / "ours", [40])
    write = WriteOptions(lossless=True, fps=fps)
    convert(tmp_path / "ours", tmp_path / "there", target_format="folder", write=write)
    convert(tmp_path / "there", tmp_path / "back")
    ours, back = EpisodeDataset.open(tmp_path / "ours"), EpisodeDataset.open(tmp_path / "back")
    assert ours.fingerprint() == back.fingerprint()


def test_video_brings_back_all_but_pixels_and_says_so(tmp_path: Path) -> None:
    make_store(tmp_path / "ours")
    report = convert(tmp_path / "ours", tmp_path / "there", target_format="folder")
    assert [(note.kind, "H.264" in note.what) for note in report.notes] == [("info", True)]
    convert(tmp_path / "there", tmp_path / "back")
    ours, back = EpisodeDataset.open(tmp_path / "ours"), EpisodeDataset.open(tmp_path / "back")
    assert np.array_equal(ours.columns().actions, back.columns().actions)
    assert np.array_equal(ours.columns().vector, back.columns().vector)
    assert ours.metadata() == back.metadata()
    assert ours.spec.action == back.spec.action
    assert not FORMATS["folder"].lossless_pixels


def test_what_a_video_cannot_hold(tmp_path: Path) -> None:
    four = DatasetSpec(observation=ObservationSpec(pixels=(8, 8, 4)), action=GREY.action)
    with pytest.raises(DataError, match="1 or 3 channels; the dataset has 4"):
        FORMATS["folder"].create(tmp_path / "t", four, WriteOptions(), resume=True)
    sink = FORMATS["folder"].create(tmp_path / "t", SPEC, WriteOptions(), resume=True)
    with pytest.raises(DataError, match="episode 0 has pixels of shape"):
        sink.write(make_episode(0, spec=GREY))


def test_frames_asked_for_backwards_are_refused_and_not_waited_for(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", np.zeros((4, 32, 32, 3), np.uint8), fps=10.0, crf=18, lossless=False)
    with pytest.raises(AssertionError, match="sort their numbers"):
        FrameStream(tmp_path / "a.mp4").read(np.array([2, 1]))


def turn(path: Path, *matrix: int) -> None:
    """Write the rotation part (a, b, c, d) of the display matrix into a track header, as a phone does."""
    content = bytearray(path.read_bytes())
    at = content.find(b"tkhd")
    start = at + 4 + 4 + (32 if content[at + 4] else 20) + 16
    a, b, c, d = (value * 65536 for value in matrix)
    content[start : start + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(bytes(content))


@pytest.mark.parametrize(
    ("matrix", "shown"),
    [
        ((0, 1, -1, 0), lambda frame: np.rot90(frame, -1)),
        ((-1, 0, 0, -1), lambda frame: np.rot90(frame, 2)),
        ((0, -1, 1, 0), np.rot90),
        ((-1, 0, 0, 1), lambda frame: frame[:, ::-1]),
        ((0, 1, 1, 0), lambda frame: frame.transpose(1, 0, 2)),
    ],
)
def test_the_display_matrix_of_a_phone_is_applied(matrix: tuple[int, ...], shown: Any, tmp_path: Path) -> None:
    frames = np.zeros((12, HEIGHT, WIDTH, 3), np.uint8)
    frames[:, : HEIGHT // 2, :, 0], frames[:, :, : WIDTH // 4, 1] = 200, 120
    film(tmp_path / "run.mp4", frames=frames)
    turn(tmp_path / "run.mp4", *matrix)
    log(tmp_path / "run.csv")
    (episode,), notes, spec = read_all(tmp_path)
    expected = shown(frames[0])
    assert spec.observation.pixels == expected.shape
    assert episode.pixels is not None
    assert np.abs(episode.pixels[0].astype(int) - expected).max() < 6
    assert any("turned or mirrored, as the display matrix" in note for note in notes)
    (small,), _, _ = read_all(tmp_path, size=(16, 20))
    assert small.pixels is not None
    corners = expected[:: len(expected) - 1, :: expected.shape[1] - 1]
    assert np.abs(small.pixels[0, ::15, ::19].astype(int) - corners).max() < 30


def test_an_oblique_display_matrix_is_refused(tmp_path: Path) -> None:
    film(tmp_path / "run.mp4")
    turn(tmp_path / "run.mp4", 1, 1, -1, 1)
    log(tmp_path / "run.csv")
    with pytest.raises(DataError, match="does not turn by a multiple of 90 degrees"):
        read_all(tmp_path)


def trim(path: Path, start: float) -> None:
    """Start the presentation at `start` seconds (negative: later than the file) without encoding again."""
    whole = path.rename(path.with_stem("whole"))
    with av.open(str(whole)) as source, av.open(str(path), "w", options={"movflags": "faststart"}) as target:
        given = source.streams.video[0]
        stream = target.add_stream_from_template(given)
        for packet in source.demux(given):
            if packet.dts is not None and packet.pts is not None and given.time_base is not None:
                shift = round(start / float(given.time_base))
                packet.pts, packet.dts, packet.stream = packet.pts - shift, packet.dts - shift, stream
                target.mux(packet)
    whole.unlink()


@pytest.mark.parametrize("frames_between", [0, 2])
def test_an_edit_list_hides_frames_and_starts_the_clock(frames_between: int, tmp_path: Path) -> None:
    film(tmp_path / "run.mp4", b_frames=frames_between)
    trim(tmp_path / "run.mp4", 0.4)
    log(tmp_path / "run.csv", 8)
    (episode,), notes, _ = read_all(tmp_path)
    assert numbers(episode.pixels) == list(range(4, 12))
    assert episode.actions[:, 0].tolist() == list(range(7))
    assert any("4 frames are left out, because its edit list hides them" in note for note in notes)
    content = (tmp_path / "run.mp4").read_bytes()
    (tmp_path / "run.mp4").write_bytes(content[: -len(content) // 20])  # an edit list excuses no truncation
    with pytest.raises(DataError, match="truncated"):
        read_all(tmp_path)


@pytest.mark.parametrize("frames_between", [0, 2])
def test_an_edit_list_delays_the_video(frames_between: int, tmp_path: Path) -> None:
    film(tmp_path / "run.mp4", b_frames=frames_between)
    trim(tmp_path / "run.mp4", -0.5)
    shown = presentation(tmp_path / "run.mp4")
    assert np.allclose(shown.times, 0.5 + np.arange(12) / 10)
    assert shown.hidden == 0
    log(tmp_path / "run.csv", 17)
    (episode,), _, _ = read_all(tmp_path)
    assert episode.actions[:, 0].tolist() == list(range(5, 16))


ROWS = [(k / 10, k / 4, -k / 4) for k in range(12)]


@pytest.mark.parametrize(
    ("separator", "decimal", "named"),
    [(";", ",", "semicolons as separators and decimal commas"), (";", ".", "semicolons"), ("\t", ".", "tabs")],
)
def test_tables_of_spreadsheets_are_read(separator: str, decimal: str, named: str, tmp_path: Path) -> None:
    film(tmp_path / "run.mp4")
    rows = [
        ["timestamp", "action.x", "action.y"],
        *[[str(value).replace(".", decimal) for value in row] for row in ROWS],
    ]
    (tmp_path / "run.csv").write_text("\ufeff" + "\r\n".join(separator.join(row) for row in rows), "utf-8")
    (episode,), notes, _ = read_all(tmp_path)
    assert episode.actions.tolist() == [[x, y] for _, x, y in ROWS[:-1]]
    assert any(note.startswith("guessed") and named in note for note in notes)


def test_a_column_of_text_is_refused_with_the_text(tmp_path: Path) -> None:
    film(tmp_path / "run.mp4")
    (tmp_path / "run.csv").write_text("timestamp,action.x\n0.0,1.0\n0.1,2.0.0\n")
    with pytest.raises(DataError, match=r"column 'action.x' is string, for example '2\.0\.0'; expected numbers"):
        read_all(tmp_path)


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
def test_another_encoding_is_named(encoding: str, tmp_path: Path) -> None:
    film(tmp_path / "run.mp4")
    (tmp_path / "run.csv").write_text("timestamp,action.größe\n0.0,1.0\n0.1,2.0\n", encoding)
    with pytest.raises(DataError, match="run.csv is not encoded as UTF-8 .* Latin-1"):
        read_all(tmp_path)


def test_suffixes_in_capitals_and_linked_folders(tmp_path: Path) -> None:
    real = tmp_path / "real"
    real.mkdir()
    film(real / "run.mp4")
    log(real / "run.parquet", **{"observation.utm": 5e6 + 0.01 * np.arange(12)})
    (real / "run.parquet").rename(real / "run.PARQUET")
    (tmp_path / "linked").symlink_to(real)
    (episode,), notes, _ = read_all(tmp_path / "linked")
    assert episode.steps == 11
    assert any("observation.utm loses precision" in note for note in notes)
    assert convert(tmp_path / "linked", tmp_path / "store").episodes == 1


def test_an_integer_key_in_a_table_is_a_choice(tmp_path: Path) -> None:
    film(tmp_path / "run.mp4")
    log(tmp_path / "run.csv", **{"action.x": None, "action.y": None, "action": np.arange(12) % 3})
    (episode,), _, spec = read_all(tmp_path)
    assert (spec.action.discrete, spec.action.size) == (True, 3)
    assert episode.actions.argmax(axis=1).tolist() == [step % 3 for step in range(11)]
    (episode,), _, _ = read_all(tmp_path, columns={"action": "action"})
    assert episode.actions[:, 0].tolist() == [step % 3 for step in range(11)]


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("timestamp,action.x,action.x,note", "several columns named action.x; rename"),
        ("timestamp,action.x,note,note", "several columns named note; rename"),
        ("0.0,1.5,-2,3e-1", "run.csv has no header: its first row is 0.0, 1.5, -2, 3e-1. Write a first row"),
    ],
)
def test_headers_that_are_not_clear_are_named(header: str, message: str, tmp_path: Path) -> None:
    film(tmp_path / "run.mp4", count=3)
    (tmp_path / "run.csv").write_text(f"{header}\n0.0,1.0,2.0,3.0\n0.1,1.0,2.0,3.0\n0.2,2.0,2.0,3.0\n", "utf-8")
    with pytest.raises(DataError, match=message):
        read_all(tmp_path)


def test_parquet_with_two_columns_of_one_name_is_named(tmp_path: Path) -> None:
    film(tmp_path / "run.mp4", count=3)
    columns = [pa.array([0.0, 0.1, 0.2])] * 3
    pq.write_table(pa.Table.from_arrays(columns, names=["timestamp", "action.x", "action.x"]), tmp_path / "run.parquet")
    with pytest.raises(DataError, match="several columns named action.x"):
        read_all(tmp_path)


@pytest.mark.parametrize("header", ["timestamp, action.x ,  action.y", '"timestamp", "action.x", "action.y"'])
def test_blanks_in_a_header_are_ignored(header: str, tmp_path: Path) -> None:
    film(tmp_path / "run.mp4", count=3)
    (tmp_path / "run.csv").write_text(f"{header}\n0.0, 1.0, 5.0\n0.1, 2.0, 6.0\n0.2, 3.0, 7.0\n", "utf-8")
    (episode,), _, _ = read_all(tmp_path)
    assert episode.actions.tolist() == [[1, 5], [2, 6]]


def test_a_table_of_several_episodes_is_refused(tmp_path: Path) -> None:
    film(tmp_path / "run.mp4")
    log(tmp_path / "run.csv", timestamp=None, episode_index=np.repeat([0, 1, 2], 4))
    with pytest.raises(DataError, match="run.csv has rows of 3 episodes, according to its column 'episode_index'"):
        read_all(tmp_path)
    assert len(read_all(tmp_path, columns={"label": "episode_index"})[0]) == 1
    log(tmp_path / "run.csv", episode_index=np.full(12, 7))
    assert len(read_all(tmp_path)[0]) == 1


def test_a_column_that_is_not_finite_is_named(tmp_path: Path) -> None:
    film(tmp_path / "run.mp4")
    log(tmp_path / "run.parquet", **{"observation.arm": np.ones(12), "observation.force": np.full(12, np.nan)})
    episodes, notes, _ = read_all(tmp_path)
    assert episodes == []
    assert any("skipped: observation.force has a value that is not finite" in note for note in notes)


def test_a_number_that_stands_for_a_missing_value_is_noted(tmp_path: Path) -> None:
    film(tmp_path / "run.mp4")
    height, flag, level = np.linspace(0.2, 0.9, 12), np.repeat([0.0, 1.0], 6), np.linspace(0.0, 1.0, 12)
    level[3:5] = -1
    dark, far = np.where(np.arange(12) % 5 == 2, -1, 40 + height), np.where(np.arange(12) == 4, -9999, height)
    arms = pa.FixedSizeListArray.from_arrays(np.stack([height, far], axis=1).ravel(), 2)
    log(tmp_path / "run.parquet", **{"observation.arms": arms, "observation.dark": dark, "label.level": level})
    said = [note for note in read_all(tmp_path)[1] if "stands for a missing value" in note]
    assert [note.split(": ", 2)[2].split(". If")[0] for note in said] == [
        "observation.arms[1] is -9999 in 1 of 12 rows, far from its other values (0.2 to 0.9)",
        "observation.dark is -1 in 2 of 12 rows, far from its other values (40.2 to 40.9)",
        "label 'level' is -1 in 2 of 12 rows, far from its other values (0 to 1)",
    ]
    log(tmp_path / "run.parquet", **{"observation.height": height, "observation.flag": flag})
    assert not any("stands for a missing value" in note for note in read_all(tmp_path)[1])


@pytest.mark.timeout(25)
def test_the_time_for_thousands_of_columns_is_not_quadratic(tmp_path: Path) -> None:
    columns = {f"action.{number}": np.arange(12.0) for number in range(5000)}
    log(tmp_path / "run.parquet", **{"action.x": None, "action.y": None, "observation.x": np.arange(12.0), **columns})
    (episode,), _, _ = read_all(tmp_path, camera="none")
    assert episode.actions.shape == (11, 5000)


def test_of_several_videos_in_a_file_the_first_is_read_and_that_is_said(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "run.mkv"), "w") as container:
        streams: list[Any] = [container.add_stream("libx264", rate=10, options={"crf": "1"}) for _ in range(2)]
        for stream in streams:
            stream.pix_fmt, stream.height, stream.width = "yuv444p", HEIGHT, WIDTH
        for number, picture in enumerate(shades(12)):
            for stream, shown in zip(streams, (picture, picture[::-1] // 2), strict=True):
                frame = av.VideoFrame.from_ndarray(shown, format="rgb24")
                frame.pts, frame.time_base = number, Fraction(1, 10)
                container.mux(stream.encode(frame))
        for stream in streams:
            container.mux(stream.encode())
    log(tmp_path / "run.csv")
    (episode,), notes, _ = read_all(tmp_path)
    assert numbers(episode.pixels) == list(range(12))
    assert any(note.startswith("guessed") and "the first of 2 videos in the file is read" in note for note in notes)
