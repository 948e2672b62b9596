"""The figures of a consortium's report: losses, influence, bytes and privacy over rounds, one colour per owner."""

from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import Any

import numpy as np
from matplotlib import rcParams
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from worldloom.federation import LedgerHistory, Round, size
from worldloom.reports.figures import COLOURS, Themed, colour, themed

_LINES = ("-", "--", ":", "-.")
_NAMED = 0.07  # the smallest fraction of a bar with room for its number
_MEDIAN = "median"

Points = Sequence[tuple[float | int, float | int]]


def loss_curves(history: LedgerHistory) -> Themed | None:
    """Draw the held-out loss of each member over the bases.

    A solid line is the change of the loss by a round; a dotted line is the change by the member's own training between
    two rounds. If the ledger has no losses of members, draw the loss of the median member. Return None if there are no
    losses.
    """
    curves = {name: _judged(history, name) for name in history.members}
    if not any(curves.values()):
        curves = {_MEDIAN: [(round.number, *round.median) for round in history.rounds if round.median]}
    curves = {name: steps for name, steps in curves.items() if steps}
    if not curves:
        return None

    def draw(figure: Figure, theme: str) -> None:
        axis = figure.subplots()
        ends: dict[str, Points] = {}
        for name, steps in curves.items():
            style = _style(history, name, theme)
            for place, (number, before, after) in enumerate(steps):
                axis.plot([number, number + 1], [before, after], marker="o", markersize=3.5, **style)
                if place and steps[place - 1][0] == number - 1:
                    faint = {**style, "linestyle": ":", "linewidth": 1.0}
                    axis.plot([number, number], [steps[place - 1][2], before], **faint)
            ends[name] = [(number + 1, after) for number, _, after in steps]
        values = [value for steps in curves.values() for _, *losses in steps for value in losses]
        if min(values) > 0 and max(values) > 4 * min(values):
            _plain_logarithm(axis)
        elif min(values) >= 0:
            axis.set_ylim(bottom=0)
        _whole_numbers(axis)
        axis.set_xlabel("base (number of rounds)")
        axis.set_ylabel("held-out loss")
        _name_lines(axis, ends, lambda name: _style(history, name, theme)["color"])

    return themed(draw, (9.6, _height(len(curves))))


def influence(history: LedgerHistory) -> Themed | None:
    """Draw the owners' weights in each round as a stacked bar; return None if there are no weights."""
    if not any(round.weights for round in history.rounds):
        return None

    def draw(figure: Figure, theme: str) -> None:
        axis = figure.subplots()
        axis.set_ylim(0, 1)
        _stacked(axis, history, theme, [round.weights for round in history.rounds], named=len(history.rounds) <= 12)
        for round in history.rounds:
            if round.done and not round.weights:
                axis.text(round.number, 0.02, "none", ha="center", fontsize=8)
        axis.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{share:.0%}"))
        axis.set_ylabel("share of the change")

    return themed(draw, (9.6, _height(len(history.members))))


def bytes_up(history: LedgerHistory, base: int | None) -> Themed | None:
    """Draw the bytes uploaded per round, and the total beside that of float32 gradients at each training step.

    `base` is the size of the base in bytes; without it, the totals are left out. Return None if nothing was uploaded.
    """
    if not history.bytes:
        return None

    def draw(figure: Figure, theme: str) -> None:
        axes = figure.subplots(1, 1 if base is None else 2, squeeze=False)[0]
        scale, unit = (1e6, "MB") if max(round.bytes for round in history.rounds) >= 1e5 else (1e3, "kB")
        sent = [
            {name: one.bytes / scale for name, one in round.contributions.items()}
            for round in history.rounds
        ]  # fmt: skip
        axes[0].set_ylim(0, 1.05 * max(sum(part.values()) for part in sent))
        _stacked(axes[0], history, theme, sent, named=False)
        axes[0].set_ylabel(f"{unit} uploaded")
        axes[0].set_title("per round")
        if base is None:
            return
        axis, numbers = axes[1], [round.number + 1 for round in history.rounds]
        sums = {
            "contributions": [*accumulate(round.bytes for round in history.rounds)],
            "float32 gradients\nat each step": [*accumulate(gradients(history, base, one) for one in history.rounds)],
        }
        lines = {
            name: [(number, count / 1e6) for number, count in zip(numbers, found, strict=True)]
            for name, found in sums.items()
        }
        tones = dict(zip(lines, (colour(theme, 0), colour(theme, 6)), strict=True))
        for name, points in lines.items():
            axis.plot(*zip(*points, strict=True), marker="o", markersize=3.5, color=tones[name])
        _plain_logarithm(axis)
        _whole_numbers(axis)
        axis.set_xlabel("rounds done")
        axis.set_ylabel("MB in total (logarithmic)")
        axis.set_title("total")
        said = {name: f"{name}\n{size(found[-1])}" for name, found in sums.items()}
        _name_lines(axis, lines, tones.__getitem__, said, apart=0.24)

    return themed(draw, (9.6, _height(len(history.members))))


def gradients(history: LedgerHistory, base: int, round: Round | None = None) -> int:
    """Return the bytes that float32 gradients of a base would need.

    Gradients are counted at each step of the contributions to one round, or to all rounds if `round` is None.
    """
    rounds = history.rounds if round is None else (round,)
    return sum(base * one.steps for round in rounds for one in round.contributions.values())


def privacy_spent(history: LedgerHistory) -> Themed | None:
    """Draw the epsilon that each owner has spent, and the budget; return None if no epsilon is finite."""
    lines = {
        name: [
            (round.number, one.epsilon)
            for round in history.rounds
            if (one := round.contributions.get(name)) and one.epsilon is not None
        ]
        for name in history.members
    }
    lines = {name: points for name, points in lines.items() if points}
    if not lines:
        return None

    def draw(figure: Figure, theme: str) -> None:
        axis = figure.subplots()
        for name, points in lines.items():
            axis.plot(*zip(*points, strict=True), marker="o", **_style(history, name, theme))
        if history.budget is not None:
            axis.axhline(history.budget, linestyle="--", linewidth=1.2, color=colour(theme, 6))
            axis.annotate(
                f"the budget: {history.budget:g}", (0, history.budget), xycoords=("axes fraction", "data"),
                xytext=(4, 4), textcoords="offset points", fontsize=8,
            )  # fmt: skip
        axis.set_ylim(0, 1.15 * max(history.budget or 0, *(value for points in lines.values() for _, value in points)))
        _rounds(axis, history)
        axis.set_ylabel("epsilon spent in total")
        _name_lines(axis, lines, lambda name: _style(history, name, theme)["color"])

    return themed(draw, (9.6, 3.2))


def training_at_home(
    history: LedgerHistory, metrics: Mapping[str, Sequence[Mapping[str, float | int]]]
) -> Themed | None:
    """Draw the training loss of each owner over its own steps; return None if no owner has a training loss."""
    lines = {
        name: list({line["step"]: line["loss"] for line in found if "loss" in line and "step" in line}.items())
        for name, found in metrics.items()
    }
    lines = {name: points for name, points in lines.items() if points}
    if not lines:
        return None

    def draw(figure: Figure, theme: str) -> None:
        axis = figure.subplots()
        for name, points in lines.items():
            marker = "o" if len(points) < 30 else None
            style = {**_style(history, name, theme), "linewidth": 1.2, "marker": marker, "markersize": 3}
            axis.plot(*zip(*points, strict=True), **style)
        values = [value for points in lines.values() for _, value in points]
        if min(values) > 0:
            _plain_logarithm(axis)
        axis.set_xlabel("training step of the owner")
        axis.set_ylabel("training loss")
        _name_lines(axis, lines, lambda name: _style(history, name, theme)["color"])

    return themed(draw, (9.6, _height(len(lines))))


def _judged(history: LedgerHistory, name: str) -> list[tuple[int, float, float]]:
    """Return (round, loss before, loss after) for each round with both losses of a member."""
    judged = [(round.number, *round.losses[name]) for round in history.rounds if name in round.losses]
    return [(number, before, after) for number, before, after in judged if before is not None and after is not None]


def _style(history: LedgerHistory, name: str, theme: str) -> dict[str, Any]:
    place = history.members.index(name) if name in history.members else 0
    return {"color": colour(theme, place), "linestyle": _LINES[place // COLOURS % len(_LINES)]}


def _height(names: int) -> float:
    return max(3.4, 1.2 + 0.19 * names)


def _stacked(
    axis: Axes, history: LedgerHistory, theme: str, parts: Sequence[Mapping[str, float]], *, named: bool
) -> None:
    """Draw a stacked bar per round, with the owners' names beside the last bar. Set the axis limits first."""
    numbers = [round.number for round in history.rounds]
    owners = [name for name in history.members if any(part.get(name) for part in parts)]
    floor = np.zeros(len(parts))
    wanted: dict[str, float] = {}
    for name in owners:
        heights = np.array([part.get(name, 0.0) for part in parts])
        tone = colour(theme, history.members.index(name))
        hatch = ("", "//", "..", "xx")[history.members.index(name) // COLOURS % 4]
        axis.bar(numbers, heights, bottom=floor, width=0.72, color=tone, hatch=hatch, linewidth=0)
        for number, low, height in zip(numbers, floor, heights, strict=True):
            if named and height >= _NAMED:
                ink = "#ffffff" if np.dot(to_rgb(tone), (0.299, 0.587, 0.114)) < 0.52 else "#1d2329"
                axis.text(number, low + height / 2, f"{height:.0%}", ha="center", va="center", fontsize=8, color=ink)
        last = max(place for place, height in enumerate(heights) if height)
        wanted[name] = float(floor[last] + heights[last] / 2)
        floor += heights
    axis.grid(visible=False, axis="x")
    _rounds(axis, history)
    axis.set_xlim(numbers[0] - 0.6, numbers[-1] + 0.6)
    places = _apart({name: value / axis.get_ylim()[1] for name, value in wanted.items()}, 0.065)
    for name, place in places.items():
        axis.annotate(
            f"\N{BLACK SQUARE} {_text(name)}", (1.01, place), xycoords="axes fraction", va="center",
            color=colour(theme, history.members.index(name)),
        )  # fmt: skip


def _name_lines(
    axis: Axes,
    lines: Mapping[str, Points],
    tone: Callable[[str], str],
    said: Mapping[str, str] | None = None,
    *,
    apart: float = 0.065,
) -> None:
    """Write the name of each line beside its end; lines with the same end share one label."""
    low, high = axis.get_ylim()
    logarithmic = axis.get_yscale() == "log"

    def height(value: float | int) -> float:
        ends = np.log([value, low, high]) if logarithmic else np.array([value, low, high])
        return float((ends[0] - ends[1]) / (ends[2] - ends[1]))

    together: dict[tuple[float, float], list[str]] = {}
    for name, points in lines.items():
        together.setdefault((points[-1][0], float(f"{points[-1][1]:.3g}")), []).append(name)
    firsts = {names[0]: names for names in together.values()}
    places = _apart({name: height(lines[name][-1][1]) for name in firsts}, apart)
    for name, names in firsts.items():
        ink = tone(name) if len(names) == 1 else rcParams["text.color"]
        axis.annotate(
            ", ".join(map(_text, names)) if said is None else said[name],
            lines[name][-1],
            xytext=(1.03, places[name]),
            textcoords="axes fraction",
            va="center",
            color=ink,
            arrowprops={
                "arrowstyle": "-",
                "color": ink,
                "linewidth": 0.6,
                "shrinkA": 2,
                "shrinkB": 3,
                "relpos": (0, 0.5),
            },
        )


def _apart(wanted: Mapping[str, float], gap: float) -> dict[str, float]:
    """Return positions near the wanted positions, at least `gap` apart, and within [0, 1] if they fit."""
    names = sorted(wanted, key=lambda name: wanted[name])
    gap = min(gap, 1 / max(len(names) - 1, 1))
    # With the gaps subtracted, positions must not decrease; neighbours in the wrong order get their mean.
    groups: list[list[float]] = []
    for rank, name in enumerate(names):
        groups.append([wanted[name] - rank * gap])
        while len(groups) > 1 and np.mean(groups[-2]) > np.mean(groups[-1]):
            groups[-2:] = [groups[-2] + groups[-1]]
    free = [float(np.mean(group)) for group in groups for _ in group]
    most = 1 - gap * (len(names) - 1)
    return {name: float(np.clip(free[rank], 0, most)) + rank * gap for rank, name in enumerate(names)}


def _rounds(axis: Axes, history: LedgerHistory) -> None:
    axis.set_xlim(history.rounds[0].number - 0.5, history.rounds[-1].number + 0.5)
    _whole_numbers(axis)
    axis.set_xlabel("round")


def _whole_numbers(axis: Axes) -> None:
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=12, min_n_ticks=1))


def _plain_logarithm(axis: Axes) -> None:
    """Make an axis logarithmic, with plain numbers."""
    axis.set_yscale("log")
    low, high = axis.get_ylim()
    few = (1, 2, 5) if high / low < 300 else (1,)
    axis.yaxis.set_major_locator(LogLocator(subs=few))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}" if value >= 1e-3 else f"{value:g}"))
    axis.yaxis.set_minor_formatter(NullFormatter())


def _text(name: str) -> str:
    """Return a name that matplotlib does not parse as mathematics."""
    return name.replace("$", r"\$")
