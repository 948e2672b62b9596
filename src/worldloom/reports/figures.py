"""The figures of reports, each drawn for a light and for a dark page."""

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, UInt8
from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

from worldloom.core.errors import DataError
from worldloom.evaluation import Results

# Okabe and Ito's colours, which colour-blind readers can distinguish, and three more; lighter on dark pages.
# The page template uses the same colours.
_CYCLE = {
    "light": (
        "#0072b2",
        "#d55e00",
        "#009e73",
        "#cc79a7",
        "#b58900",
        "#56b4e9",
        "#555555",
        "#7a4fbf",
        "#8c5a3c",
        "#a3a833",
    ),
    "dark": (
        "#56b4e9",
        "#f08a4b",
        "#2cc295",
        "#e29fc4",
        "#e6c14c",
        "#8fb8ff",
        "#b0b0b0",
        "#b79af0",
        "#c99a7c",
        "#cfd46a",
    ),
}
_INK = {"light": "#1d2329", "dark": "#e4e7ea"}
_FAINT = {"light": "#d5dade", "dark": "#3a4148"}
MARKERS = ("o", "s", "D", "^", "v", "P", "X", "<", ">", "p")
COLOURS = len(_CYCLE["light"])
_MAP = "viridis"


class Themed(NamedTuple):
    """One figure as SVG, for a light and for a dark page."""

    light: bytes
    dark: bytes


@dataclass(frozen=True, kw_only=True)
class LatentMap:
    """Encoded frames and their positions in `unit`; if the unit is pixels, y points downward."""

    latents: Float[np.ndarray, "N D"]
    positions: Float[np.ndarray, "N 2"]
    unit: str = "px"

    def __post_init__(self) -> None:
        if len(self.latents) != len(self.positions) or len(self.latents) < 3:
            raise DataError(
                f"a latent map needs at least three latents, each with a position; got {len(self.latents)} latents "
                f"and {len(self.positions)} positions. Pass as many positions as latents"
            )


@dataclass(frozen=True, kw_only=True)
class DistanceMap:
    """The distance of each of M positions to one goal, by one or more named measures with units.

    `picture` shows the room; one unit of the positions is one pixel of the picture.
    """

    positions: Float[np.ndarray, "M 2"]
    distances: Mapping[str, Float[np.ndarray, "M"]]
    goal: Float[np.ndarray, "2"]
    picture: UInt8[np.ndarray, "H W C"] | None = None
    unit: str = "px"


@dataclass(frozen=True, kw_only=True)
class PredictedPaths:
    """P paths of N = T+1 positions: the true ones, and the open-loop predictions decoded by a probe."""

    true: Float[np.ndarray, "P N 2"]
    predicted: Float[np.ndarray, "P N 2"]
    pictures: UInt8[np.ndarray, "P H W C"] | None = None
    steps: int = 1  # environment steps between positions
    unit: str = "px"


class _Panel(NamedTuple):
    title: str
    unit: str
    names: list[str]


def success_by_distance(results: Results) -> Themed | None:
    """Draw success over goal distance with 95% intervals, per split; None if no split has several bins."""
    binned_splits = {split: results.bins(split) for split in results.protocol.splits}
    panels = {split: bins for split, bins in binned_splits.items() if bins is not None and len(bins.edges) > 2}
    if not panels:
        return None

    def draw(figure: Figure, theme: str) -> None:
        axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for axis, (split, bins) in zip(axes, panels.items(), strict=True):
            shown = [row for row in results.rows if row.split == split]
            for place, row in enumerate(shown):
                groups = bins.split(row.episodes)
                # Side by side, because intervals at the same distance would cover each other.
                shift = (place - (len(shown) - 1) / 2) * 0.011 * (bins.edges[-1] - bins.edges[0])
                rates = np.array([rate.rate for rate, _ in groups])
                ends = np.array([rate.interval for rate, _ in groups])
                kind = results.methods.index(row.method)
                axis.errorbar(
                    [mean + shift for _, mean in groups],
                    100 * rates,
                    yerr=100 * np.abs(ends.T - rates),
                    marker=MARKERS[kind % len(MARKERS)],
                    color=colour(theme, kind),
                    label=row.method,
                    elinewidth=1,
                )
            axis.set(title=split, xlabel=bins.measure, ylim=(-4, 104))
        axes[0].set_ylabel("success (%)")
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3)

    return themed(draw, (9.6, 3.9))


def training_curves(metrics: Sequence[Mapping[str, float | int]]) -> Themed | None:
    """Draw the metrics of metrics.jsonl, one panel per kind; return None if no metric is known."""
    names = list(dict.fromkeys(name for line in metrics for name in line))
    ratios: list[str] = [name for name in ("inverse_dynamics", "open_loop") if name in names]
    kinds = [
        _Panel("Losses, unweighted", "value", [name for name in names if name.startswith("loss/")]),
        _Panel("Effective rank of the latents", "dimensions", [name for name in names if name == "effective_rank"]),
        _Panel("Error relative to a constant prediction", "ratio (1: no information)", ratios),
        _Panel("Position read from latents by a probe", "mean error (label's unit)", _probe_names(names)),
    ]
    panels = [panel for panel in kinds if panel.names]
    if not panels:
        return None

    def draw(figure: Figure, theme: str) -> None:
        rows = (len(panels) + 1) // 2
        axes = figure.subplots(rows, min(2, len(panels)), squeeze=False).ravel()
        for axis, (title, unit, found) in zip(axes, panels, strict=False):
            for name in found:
                points = [(line["step"], line[name]) for line in metrics if name in line and "step" in line]
                marker = "o" if len(points) < 30 else None
                axis.plot(*zip(*points, strict=True), label=_readable(name), marker=marker, markersize=3)
            positive = all(line[name] > 0 for line in metrics for name in found if name in line)
            if title.startswith("Losses") and positive:
                axis.set_yscale("log")
            elif positive:
                axis.set_ylim(bottom=0)
            axis.set(title=title, xlabel="training step", ylabel=unit)
            if len(found) > 1:
                axis.legend(fontsize=8)
        for axis in axes[len(panels) :]:
            axis.remove()

    return themed(draw, (9.6, 2.9 * ((len(panels) + 1) // 2)))


def latent_space(data: LatentMap) -> Themed:
    """Draw latents on their first two principal components, coloured by x and by y."""
    centred = data.latents - data.latents.mean(axis=0)
    _, scales, directions = np.linalg.svd(centred, full_matrices=False)
    plane = centred @ directions[:2].T
    share = scales**2 / max(float((scales**2).sum()), 1e-12)

    def draw(figure: Figure, theme: str) -> None:
        axes = figure.subplots(1, 2, sharex=True, sharey=True)
        for axis, values, name in zip(axes, data.positions.T, ("x", "y"), strict=True):
            points = axis.scatter(*plane.T, c=values, s=5, cmap=_point_colours(theme), linewidths=0, rasterized=True)
            bar = figure.colorbar(points, ax=axis, shrink=0.85)
            bar.set_label(_in(f"{name} of the agent", data.unit))
            bar.outline.set_visible(False)
            axis.set_xlabel(f"first component ({share[0]:.0%} of variance)")
            axis.grid(False)
        axes[0].set_ylabel(f"second component ({share[1]:.0%})" if len(share) > 1 else "second component")

    return themed(draw, (9.6, 3.8))


def distance_map(data: DistanceMap) -> Themed:
    """Draw each measure of distance to one goal over the room, beside a picture of the room."""
    panels = len(data.distances) + (data.picture is not None)
    x0, x1, y0, y1 = extent = _extent(data)

    def place(axis: Axes) -> None:
        axis.set(xlim=(x0, x1), ylim=(y1, y0), aspect="equal", xlabel=_in("x", data.unit))
        axis.grid(False)
        for size, edge in ((11, "black"), (9, "white")):
            ring = axis.plot(*data.goal, marker="o", markersize=size, markeredgewidth=2)[0]
            ring.set(markerfacecolor="none", markeredgecolor=edge)

    def draw(figure: Figure, theme: str) -> None:
        axes = list(figure.subplots(1, panels, squeeze=False)[0])
        if data.picture is not None:
            room = axes.pop(0)
            room.imshow(data.picture, extent=(x0, x1, y1, y0), interpolation="nearest")
            room.set(title="the room, with the goal circled", ylabel=_in("y", data.unit))
            place(room)
        for axis, (name, distances) in zip(axes, data.distances.items(), strict=True):
            image, across, down = binned(data.positions, distances, extent)
            shown = axis.pcolormesh(across, down, np.ma.masked_invalid(image), cmap=_MAP, rasterized=True)
            # Contours show whether the distance goes around walls, which colour does not show clearly.
            axis.contour(across, down, np.ma.masked_invalid(image), levels=8, colors="white", linewidths=0.7, alpha=0.8)
            bar = figure.colorbar(shown, ax=axis, shrink=0.7)
            bar.outline.set_visible(False)
            axis.set_title(name)
            place(axis)

    return themed(draw, (9.6, 3.6 if panels > 2 else 4.2))


def predicted_paths(data: PredictedPaths) -> Themed:
    """Draw up to four true paths and their open-loop predictions over the room, and the error over steps."""
    count = min(4, len(data.true))
    errors = np.linalg.norm(data.true - data.predicted, axis=2)
    steps = np.arange(errors.shape[1]) * data.steps

    def draw(figure: Figure, theme: str) -> None:
        grid = figure.add_gridspec(1, count + 1, width_ratios=[*[1.0] * count, 1.3])
        # The picture is the same on a dark page, so the lines on it use the colours for light pages.
        paper = theme if data.pictures is None else "light"
        for place in range(count):
            axis = figure.add_subplot(grid[0, place])
            if data.pictures is not None:
                height, width = data.pictures.shape[1:3]
                axis.imshow(data.pictures[place], extent=(0, width, height, 0), interpolation="nearest")
            axis.plot(*data.true[place].T, color=colour(paper, 0), linewidth=2.4, label="the world")
            axis.plot(
                *data.predicted[place].T, color=colour(paper, 1), linewidth=1.6, dashes=(2.5, 1), label="prediction"
            )
            axis.plot(*data.true[place, 0], marker="o", color=colour(paper, 0), markersize=5)
            axis.set(aspect="equal", xticks=[], yticks=[])
            axis.grid(False)
            axis.set_title(
                f"{errors[place, -1]:.1f}{data.unit and ' ' + data.unit} after {steps[-1]} steps", fontsize=9
            )
        figure.legend(*axis.get_legend_handles_labels(), loc="outside lower left", ncols=2)
        axis = figure.add_subplot(grid[0, count])
        low, middle, high = np.percentile(errors, [10, 50, 90], axis=0)
        axis.fill_between(
            steps, low, high, alpha=0.25, color=colour(theme, 1), linewidth=0, label="10th to 90th percentile"
        )
        axis.plot(steps, middle, color=colour(theme, 1), label="median")
        axis.set_ylim(bottom=0)
        axis.set(xlabel="environment steps", ylabel=_in("error", data.unit))
        axis.set_title(f"all {len(errors)} paths", fontsize=9)
        axis.legend(fontsize=7, loc="upper left")

    return themed(draw, (9.6, 2.6))


def themed(draw: Callable[[Figure, str], None], size: tuple[float, float]) -> Themed:
    """Call `draw(figure, theme)` for each theme and return both figures as SVG; matplotlib's state stays unchanged."""
    return Themed(*(_svg(draw, theme, size) for theme in ("light", "dark")))


def _svg(draw: Callable[[Figure, str], None], theme: str, size: tuple[float, float]) -> bytes:
    with rc_context(_style(theme)):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure, theme)
        file = io.BytesIO()
        figure.savefig(file, format="svg", transparent=True, dpi=200, metadata={"Date": None, "Creator": None})
    return file.getvalue()


def _style(theme: str) -> Any:
    from cycler import cycler

    ink, faint = _INK[theme], _FAINT[theme]
    return {
        "font.family": "DejaVu Sans",
        "font.size": 9,
        "text.color": ink,
        "axes.edgecolor": faint,
        "axes.labelcolor": ink,
        "axes.titlecolor": ink,
        "axes.titlesize": 10,
        "axes.titlelocation": "left",
        "axes.titlepad": 8,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.prop_cycle": cycler(color=_CYCLE[theme]),
        "grid.color": faint,
        "grid.linewidth": 0.6,
        "lines.linewidth": 1.6,
        "lines.markersize": 5,
        "xtick.color": faint,
        "ytick.color": faint,
        "xtick.labelcolor": ink,
        "ytick.labelcolor": ink,
        "legend.frameon": False,
        "legend.labelcolor": ink,
        "svg.hashsalt": "worldloom",  # makes the bytes of a figure reproducible
    }


def colour(theme: str, place: int) -> str:
    """Return a colour of the cycle, for a light or a dark page."""
    return _CYCLE[theme][place % len(_CYCLE[theme])]


def _point_colours(theme: str) -> ListedColormap:
    # The darkest tones would be invisible on a dark page.
    return ListedColormap(colormaps[_MAP](np.linspace(0.0 if theme == "light" else 0.22, 1.0, 256)))


def _probe_names(names: Sequence[str]) -> list[str]:
    now = [name for name in names if name.startswith("probe/position/") and name.endswith("error")]
    ahead = [name for name in names if name.startswith("open_loop/position/")]
    return now + sorted(ahead, key=lambda name: int(name.rsplit("/", 1)[1]))


def _readable(name: str) -> str:
    if name.startswith("open_loop/"):
        return f"predicted {name.rsplit('/', 1)[1]} blocks ahead"
    known = {
        "inverse_dynamics": "inverse dynamics",
        "open_loop": "open-loop prediction",
        "probe/position/error": "of the frame itself",
    }
    return known.get(name, name.removeprefix("loss/").replace("_", " "))


def _extent(data: DistanceMap) -> tuple[float, float, float, float]:
    if data.picture is not None:
        return 0.0, float(data.picture.shape[1]), 0.0, float(data.picture.shape[0])
    (x0, y0), (x1, y1) = data.positions.min(axis=0), data.positions.max(axis=0)
    return float(x0), float(x1), float(y0), float(y1)


def binned(
    positions: Float[np.ndarray, "M 2"],
    values: Float[np.ndarray, "M"],
    extent: tuple[float, float, float, float],
) -> tuple[Float[np.ndarray, "R C"], Float[np.ndarray, "C"], Float[np.ndarray, "R"]]:
    """Return the mean value in each cell of a grid (NaN without a value), and the cells' centres.

    If the positions are on a grid, its cells are used. An isolated cell without a value gets its neighbours' mean.
    """
    x0, x1, y0, y1 = extent
    distinct = [len(np.unique(positions[:, axis])) for axis in (0, 1)]
    gridded = distinct[0] * distinct[1] <= 2 * len(positions)
    cells = np.array(distinct if gridded else [int(np.clip(np.sqrt(len(positions) / 3), 4, 48))] * 2)
    if gridded:  # the positions are the cells' centres
        low, high = positions.min(axis=0), positions.max(axis=0)
        margin = (high - low) / np.maximum(cells - 1, 1) / 2
        (x0, y0), (x1, y1) = low - margin, high + margin
    origin, size = np.array([x0, y0]), np.maximum(np.array([x1 - x0, y1 - y0]), 1e-9)
    places = np.clip(((positions - origin) / size * cells).astype(int), 0, cells - 1)
    total, count = np.zeros((cells[1], cells[0])), np.zeros((cells[1], cells[0]))
    np.add.at(total, (places[:, 1], places[:, 0]), values)
    np.add.at(count, (places[:, 1], places[:, 0]), 1)
    image = np.divide(total, count, out=np.full_like(total, np.nan), where=count > 0)
    measured = np.pad(count > 0, 1)
    padded = np.pad(np.nan_to_num(image), 1)
    around = [(row, column) for row in range(3) for column in range(3) if (row, column) != (1, 1)]
    rows, columns = image.shape
    neighbours = sum(measured[row : row + rows, column : column + columns].astype(int) for row, column in around)
    sums = sum(padded[row : row + rows, column : column + columns] for row, column in around)
    holes = (count == 0) & (neighbours >= 7)  # a wall one cell wide has six such neighbours, and stays empty
    image[holes] = (sums / np.maximum(neighbours, 1))[holes]
    across, down = ((np.arange(n) + 0.5) / n for n in cells)
    return image, x0 + (x1 - x0) * across, y0 + (y1 - y0) * down


def _in(quantity: str, unit: str) -> str:
    return f"{quantity} ({unit})" if unit else quantity
