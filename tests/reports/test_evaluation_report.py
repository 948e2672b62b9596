import base64
import io
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from worldloom.core.errors import DataError, StorageError
from worldloom.evaluation import EpisodeResult, Protocol, Recording, Results, Row, evaluate
from worldloom.reports import DistanceMap, LatentMap, PredictedPaths, ReportData, write_report
from worldloom.reports.evaluation_report import render_report
from worldloom.reports.figures import binned, latent_space, training_curves
from worldloom.reports.film import choose, episodes_video

HEADINGS = ("Success by distance", "Episodes", "Prediction against the world", "What the latents encode")


class Links(HTMLParser):
    """Gathers every address that a browser would fetch, and the text that a reader sees."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.tags: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attributes if name in ("src", "href", "srcset", "poster")]

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def read(html: str) -> Links:
    links = Links()
    links.feed(html)
    return links


@pytest.fixture(scope="module")
def everything() -> ReportData:
    generator = np.random.default_rng(0)
    positions = generator.uniform(0, 20, (300, 2))
    latents = np.concatenate([positions, generator.normal(size=(300, 6))], axis=1)
    true = generator.uniform(0, 20, (5, 9, 2))
    return ReportData(
        metrics=[
            {"step": step, "loss": 2.0, "loss/prediction": 1 / step, "effective_rank": 5.0, "open_loop/position/4": 1.0}
            for step in range(1, 5)
        ],
        latents=LatentMap(latents=latents, positions=positions, unit="units"),
        distance=DistanceMap(
            positions=positions,
            distances={"straight": np.linalg.norm(positions - 5, axis=1)},
            goal=np.array([5.0, 5.0]),
            picture=np.zeros((16, 20, 3), np.uint8),
            unit="units",
        ),
        paths=PredictedPaths(true=true, predicted=true + 0.1, pictures=np.zeros((5, 16, 20, 3), np.uint8)),
        baselines=["still"],
    )


@pytest.fixture
def results(protocol: Protocol, agents: dict[str, Any]) -> Results:
    return evaluate(
        protocol.customise(budget=11, episodes=32),
        {"homing": agents["homing"], "still": agents["still"]},
        provenance={"commit": "abc123"},
        model="c0ffee",
    )


def test_a_full_report_asks_the_network_for_nothing(results: Results, everything: ReportData, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    write_report(path, results, everything)
    html = path.read_text(encoding="utf-8")
    links = read(html)
    assert links.addresses
    assert all(address.startswith("data:") for address in links.addresses)
    assert not {"script", "link", "iframe"} & set(links.tags)
    assert "url(" not in html
    assert "@import" not in html
    pictures = [address for address in links.addresses if address.startswith("data:image/svg+xml")]
    assert len(pictures) == 2 * 5, "five figures, each for light and dark pages"
    for picture in pictures:
        svg = base64.b64decode(picture.partition(",")[2])
        ElementTree.fromstring(svg)
        assert not re.search(rb"""href=["'](?!#|data:)""", svg)
    assert sum(address.startswith("data:video/mp4") for address in links.addresses) == 1
    assert "Not shown" not in html


def test_missing_parts_are_explained_in_a_line_each(results: Results) -> None:
    results = replace(results, recordings=())
    data = ReportData(absent={"latents": "this world has no position label."})
    links = read(render_report(results, data))
    text = " ".join(links.text)
    assert text.count("Not shown:") == 5
    assert "Not shown: this world has no position label." in text
    assert "Not shown: no episode with pixels was recorded." in text
    for heading in HEADINGS:
        assert heading in text
    assert "video" not in links.tags


def test_the_page_says_what_was_found_and_how(results: Results) -> None:
    results = replace(results, recordings=())
    data = ReportData(baselines=["still"])
    text = " ".join(" ".join(read(render_report(results, data)).text).split())
    rows = {row.split: row.overall for row in results.rows if row.method == "homing"}
    counts = f"{rows['far'].successes} of 32 (far), {rows['near'].successes} of 32 (near)"
    assert f"Homing reaches goals it was never trained for: {counts}" in text
    assert "still, the best baseline on the same data, in 0.0% (0.0 to 10.7%)" in text
    assert "The intervals do not overlap." in text
    for row in results.rows:
        low, high = row.overall.interval
        assert f"{100 * low:.1f} to {100 * high:.1f}%" in text
    for line in results.protocol.describe():
        assert line.partition(": ")[2] in text
    for part in ("abc123", "c0ffee", results.protocol.fingerprint):
        assert part in text


def _flat_results(protocol: Protocol, **successes: int) -> Results:
    def row(method: str, count: int) -> Row:
        return Row(
            method=method,
            split="far",
            episodes=tuple(
                EpisodeResult(index=i, seed=i, success=i < count, steps=5, budget=9, wall_between=i % 2 == 0)
                for i in range(20)
            ),
        )

    only = protocol.model_copy(update={"splits": {"far": protocol.splits["far"]}})
    return Results(protocol=only, rows=tuple(row(*item) for item in successes.items()), hardware={})


def test_a_difference_within_the_intervals_is_called_none(protocol: Protocol) -> None:
    close = render_report(_flat_results(protocol, a=12, b=10), ReportData())
    assert "The intervals overlap" in close
    assert "A reaches goals it was never trained for: 12 of 20 (far)" in close
    apart = render_report(_flat_results(protocol, a=20, b=2), ReportData())
    assert "The intervals do not overlap" in apart
    assert "No method reached a goal" in render_report(_flat_results(protocol, a=0), ReportData())


def test_walls_are_told_apart_where_a_split_holds_both(protocol: Protocol) -> None:
    text = " ".join(read(render_report(_flat_results(protocol, a=10), ReportData())).text)
    assert "wall between start and goal" in text
    assert text.count("n = 10") == 2


def test_names_are_text_and_not_markup(protocol: Protocol) -> None:
    html = render_report(_flat_results(protocol, **{"<script>alert(1)</script>": 3}), ReportData())
    assert "<script>" not in html


def test_a_report_that_fails_leaves_the_old_one(
    results: Results, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "report.html"
    path.write_text("old", encoding="utf-8")

    def full(self: Path, *_: Any, **__: Any) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(StorageError, match="disk is full"):
        write_report(path, replace(results, recordings=()))
    assert path.read_bytes() == b"old"


def recording(
    success: bool, steps: int, *, method: str = "m", split: str = "far", shape: Any = (16, 20, 3)
) -> Recording:
    frames = np.full((steps + 1, *shape), 240, np.uint8)
    return Recording(
        method=method, split=split, seed=1, success=success, steps=steps, frames=frames, goal=frames[0],
        path=None, target=None,
    )  # fmt: skip


def test_the_film_is_h264_and_ends_with_the_outcome_around_each_episode() -> None:
    import av

    video = episodes_video([recording(True, 4), recording(False, 9)], fps=10)
    assert video.absent == ""
    with av.open(io.BytesIO(video.data)) as container:
        stream = container.streams.video[0]
        assert stream.codec_context.name == "h264"
        assert stream.codec_context.pix_fmt == "yuv420p"
        frames = [frame.to_ndarray(format="rgb24").astype(int) for frame in container.decode(video=0)]
    assert len(frames) == 9 + 1 + 10
    assert frames[0].shape == (video.height, video.width, 3)
    row = 16 + 22 + 40  # within the left border of both tiles, which stand side by side
    second = 16 + (video.width - 16) // 2

    def hue(frame: np.ndarray, column: int) -> int:
        return int(frame[row, column + 1].argmax())

    assert hue(frames[6], 16) == 1  # the first has reached its goal: green
    assert np.ptp(frames[6][row, second + 1]) < 40  # the second is still under way: grey
    assert hue(frames[-1], second) == 0  # and has failed in the end: orange


@pytest.mark.parametrize("shape", [(7, 9, 1), (16, 20, 4), (480, 640, 3)])
def test_pictures_of_any_size_and_channels_make_a_film(shape: tuple[int, int, int]) -> None:
    video = episodes_video([recording(True, 1, shape=shape)])
    assert video.data
    assert video.width % 2 == video.height % 2 == 0
    assert max(video.width, video.height) < 1000


def test_no_pixels_make_no_film_and_say_so() -> None:
    assert "no episode with pixels" in episodes_video([]).absent


def test_episodes_alternate_between_splits_with_successes_first() -> None:
    all_of_them = [recording(True, step, split="far") for step in range(4)]
    all_of_them += [recording(False, 9, split="near"), recording(True, 7, split="near"), recording(True, 1, method="n")]
    chosen = choose(all_of_them, "m", successes=3, failures=2)
    assert [(one.split, one.success, one.steps) for one in chosen] == [
        ("far", True, 0),
        ("near", True, 7),
        ("far", True, 1),
        ("near", False, 9),
    ]


def test_figures_come_for_both_papers_and_are_the_same_each_time(everything: ReportData) -> None:
    assert everything.latents is not None
    first, second = latent_space(everything.latents), latent_space(everything.latents)
    assert first == second
    assert first.light != first.dark


def test_figures_that_training_did_not_log_are_left_out() -> None:
    assert training_curves([]) is None
    assert training_curves([{"step": 1, "time/wait": 0.5}]) is None
    assert training_curves([{"step": 1, "effective_rank": 3.0}, {"step": 2, "loss/prediction": 0.5}]) is not None


def test_a_distance_map_keeps_grids_and_leaves_walls_open() -> None:
    x, y = np.meshgrid(np.arange(12) * 2.0 + 1, np.arange(8) * 2.0 + 1)
    grid = np.stack([x.ravel(), y.ravel()], axis=1)
    image, across, down = binned(grid, grid[:, 0] + 100 * grid[:, 1], (0.0, 24.0, 0.0, 16.0))
    np.testing.assert_allclose(image, x + 100 * y)
    np.testing.assert_allclose(across, x[0])
    np.testing.assert_allclose(down, y[:, 0])
    beside_wall = grid[grid[:, 0] != 13]
    walled, _, _ = binned(
        np.concatenate([beside_wall, [[13.0, 3.0]]]), np.ones(len(beside_wall) + 1), (0.0, 24.0, 0.0, 16.0)
    )
    assert np.isfinite(walled[1, 6])  # the door
    assert np.isnan(walled[[0, 4, 5, 6, 7], 6]).all()


def test_too_few_latents_make_no_map() -> None:
    with pytest.raises(DataError, match="at least three latents, each with a position; got 2"):
        LatentMap(latents=np.zeros((2, 3)), positions=np.zeros((2, 2)))
