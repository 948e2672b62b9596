"""The report of an evaluation: one self-contained HTML file."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import worldloom
from worldloom.core.files import write_text
from worldloom.evaluation import Recording, Results, Row, floor_of
from worldloom.reports.figures import (
    COLOURS,
    DistanceMap,
    LatentMap,
    PredictedPaths,
    distance_map,
    latent_space,
    predicted_paths,
    success_by_distance,
    training_curves,
)
from worldloom.reports.film import choose, episodes_video, to_size
from worldloom.reports.page import data_uri, embedded, render_page

_STRIP = 8  # frames in a picture strip, not counting the goal


@dataclass(frozen=True, kw_only=True)
class ReportData:
    """The optional parts of a report besides the results; the report explains why a part is missing.

    `metrics` are the lines of metrics.jsonl. `baselines` are the methods for the comparison below the headline.
    `absent` maps missing parts to reasons; its keys are `metrics`, `latents`, `distance`, `paths` and `episodes`.
    """

    metrics: Sequence[Mapping[str, float | int]] = ()
    latents: LatentMap | None = None
    distance: DistanceMap | None = None
    paths: PredictedPaths | None = None
    baselines: Sequence[str] = ()
    absent: Mapping[str, str] = field(default_factory=dict)


def write_report(path: Path, results: Results, data: ReportData | None = None) -> None:
    """Write the report atomically.

    Raises:
        StorageError: the file cannot be written. An older report is not changed.
    """
    write_text(path, render_report(results, data or ReportData()))


def render_report(results: Results, data: ReportData) -> str:
    """Return the report as HTML."""
    best = _ranked(results)[0]
    video = episodes_video(choose(results.recordings, best))
    walls = [_wall_row(results, method) for method in results.methods]
    return render_page(
        "report.html",
        protocol=results.protocol,
        conventions=[line.partition(": ")[::2] for line in results.protocol.describe()],
        # A line break within "cross-room" would be hard to read in large type.
        headline=_headline(results, best).replace("-", "\N{NON-BREAKING HYPHEN}"),
        comparison=_comparison(results, best, data.baselines),
        summary=_summary(results),
        splits=[_split_table(results, split) for split in results.protocol.splits],
        floored=len(results.methods) > 1 and any(floor_of(results, split) for split in results.protocol.splits),
        paths_known=any(row.spl is not None for row in results.rows),
        walls=[wall for wall in walls if wall is not None],
        best=best,
        figures={
            name: embedded(figure)
            for name, figure in {
                "by_distance": success_by_distance(results),
                "metrics": training_curves(data.metrics),
                "latents": latent_space(data.latents) if data.latents else None,
                "distance": distance_map(data.distance) if data.distance else None,
                "paths": predicted_paths(data.paths) if data.paths else None,
            }.items()
        },
        absent={
            "by_distance": "there are too few episodes for bins, or the distance from start to goal is unknown.",
            "metrics": "this report has no training metrics.",
            "latents": "this report has no encoded frames with a position label.",
            "distance": "this report has no measure of distance with a position label.",
            "paths": "this report has no position label that a probe can predict.",
            "episodes": f"{video.absent}.",
            **data.absent,
        },
        video=data_uri("video/mp4", video.data) if video.data else "",
        video_size=(video.width, video.height),
        strips=[_strip(recording) for recording in choose(results.recordings, best, successes=2)],
        provenance=_flat({"hardware": results.hardware, **results.provenance}),
        model=results.model,
        training_seed=results.training_seed,
        version=worldloom.__version__,
    )


def _ranked(results: Results) -> list[str]:
    """Return the methods by their mean success rate over splits, the best first; ties are ordered by mean SPL."""

    def merit(method: str) -> tuple[float, float]:
        rows = [row for row in results.rows if row.method == method]
        return float(np.mean([row.overall.rate for row in rows])), float(np.mean([row.spl or 0.0 for row in rows]))

    return sorted(results.methods, key=merit, reverse=True)


def _headline(results: Results, best: str) -> str:
    """Return one sentence about the result of the best method on each split."""
    if not any(row.overall.successes for row in results.rows):
        return "No method reached a goal"
    rates = [(row.overall, row.split) for row in results.rows if row.method == best]
    parts = ", ".join(f"{rate.successes} of {rate.n} ({split})" for rate, split in rates)
    return f"{best[:1].upper()}{best[1:]} reaches goals it was never trained for: {parts}"


def _comparison(results: Results, best: str, baselines: Sequence[str]) -> str:
    """Return a sentence that compares the best method with one rival, on the split where the two differ most.

    The rival is the best of the baselines or, without baselines, the next best method.
    """
    others = [method for method in _ranked(results) if method != best]
    rivals = [method for method in others if method in baselines] or others
    if not rivals:
        return "No other method was evaluated, so there is no comparison."
    rival = rivals[0]
    gaps = {
        split: results.row(best, split).overall.rate - results.row(rival, split).overall.rate
        for split in results.protocol.splits
    }
    split = max(gaps, key=lambda name: abs(gaps[name]))
    goals = f"goals {split}" if results.protocol.goal_source == "logged-policy" else f"{split} goals"
    first, second = results.row(best, split).overall, results.row(rival, split).overall
    apart = first.interval[0] > second.interval[1]
    verdict = (
        "The intervals do not overlap"
        if apart
        else "The intervals overlap, so more episodes are needed to separate the two"
    )
    kind = "the best baseline on the same data" if rival in baselines else "the next best method"
    return (
        f"On {goals} {best} succeeds in {_percent(first.rate)} of episodes (95% interval "
        f"{_interval(first.interval)}); {rival}, {kind}, in {_percent(second.rate)} ({_interval(second.interval)}). "
        f"{verdict}."
    )


def _summary(results: Results) -> list[str]:
    sizes = {row.split: row.overall.n for row in results.rows}
    hardware, threads = results.hardware, results.hardware.get("threads", "?")
    machine = hardware.get("accelerator") or hardware.get("processor") or "unknown hardware"
    return [
        results.protocol.title,
        ", ".join(f"{split}: {n} episodes" for split, n in sizes.items()),
        f"evaluation seed {results.protocol.seed}",
        *([] if results.training_seed is None else [f"training seed {results.training_seed}"]),
        f"{machine}, {threads} thread{'' if threads == 1 else 's'}",
    ]


def _split_table(results: Results, split: str) -> dict[str, Any]:
    ranked = _ranked(results)
    mine = [row for row in results.rows if row.split == split]
    rows = sorted(mine, key=lambda row: (-row.overall.rate, ranked.index(row.method)))
    solved = mine[0].solved_at_start
    share = _percent(solved / mine[0].overall.n)
    name = f"{split} ({solved} of {mine[0].overall.n}, {share}, solved at the start)" if solved else split
    return {"name": name, "rows": [_row(results, row) for row in rows]}


def _row(results: Results, row: Row) -> dict[str, Any]:
    low, high = row.overall.interval
    return {
        "method": row.method,
        "colour": results.methods.index(row.method) % COLOURS,
        "rate": row.overall.rate,
        "low": low,
        "high": high,
        "rate_text": _percent(row.overall.rate),
        "interval_text": _interval(row.overall.interval),
        # Without the interval, for which the table has no room.
        "above": "-" if (above := row.overall.above(floor_of(results, row.split))) is None else _percent(above[0]),
        "count": f"{row.overall.successes} / {row.overall.n}",
        "violated": f"{_percent(row.violated.rate)} ({_interval(row.violated.interval)})",
        "spl": _number(row.spl),
        "ratio": _number(row.steps_over_shortest),
        "latency": _number(row.latency.mean_ms if row.latency else None),
        "p95": _number(row.latency.p95_ms if row.latency else None),
    }


def _wall_row(results: Results, method: str) -> dict[str, Any] | None:
    """Return a method's rates with and without a wall; None if no split has episodes of both kinds."""
    rows = [row for row in results.rows if row.method == method]
    if not any(len(row.by_wall) == 2 for row in rows):
        return None
    pooled = Row(method=method, split="all", episodes=tuple(episode for row in rows for episode in row.episodes))
    return {
        "method": method,
        "rates": [f"{_percent(rate.rate)} ({_interval(rate.interval)}, n = {rate.n})" for rate in pooled.by_wall],
    }


def _strip(recording: Recording) -> dict[str, Any]:
    assert recording.frames is not None
    places = np.unique(np.linspace(0, len(recording.frames) - 1, _STRIP).round().astype(int))
    outcome = "reached" if recording.success else "not reached"
    return {
        "success": recording.success,
        "caption": f"{recording.split}, {outcome} in {recording.steps} steps (episode seed {recording.seed})",
        "frames": [{"step": int(place), "image": _png(recording.frames[place])} for place in places],
        "goal": None if recording.goal is None else _png(recording.goal),
    }


def _png(picture: np.ndarray) -> str:
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(to_size(picture)).save(file, format="PNG", optimize=True)
    return data_uri("image/png", file.getvalue())


def _percent(rate: float) -> str:
    return f"{100 * rate:.1f}%"


def _interval(interval: tuple[float, float]) -> str:
    return f"{100 * interval[0]:.1f} to {100 * interval[1]:.1f}%"


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return "< 0.01" if 0 < value < 0.005 else f"{value:.2f}"


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    items: list[tuple[str, str]] = []
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            items.extend(_flat(value, f"{name}."))
        elif value is not None:
            items.append((name, str(value)))
    return items
