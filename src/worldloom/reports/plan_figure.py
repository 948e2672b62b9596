"""A plan as a picture: the predicted future, the guardrails along it, and the candidates that were ruled out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, UInt8
from matplotlib.figure import Figure

from worldloom.core.files import write_atomic

_ALLOWED, _BROKEN, _CHOSEN = "#7f8c97", "#d55e00", "#0072b2"


class PlanFrame(NamedTuple):
    """A picture along a plan, with a title above and a note below it."""

    title: str
    pixels: UInt8[np.ndarray, "H W C"]
    note: str


@dataclass(frozen=True, kw_only=True)
class CandidatePaths:
    """The paths of P candidates and of the plan in pixels, and whether each candidate satisfies all guardrails."""

    candidates: Float[np.ndarray, "P T 2"]
    held: Bool[np.ndarray, "P"]
    chosen: Float[np.ndarray, "N 2"]


@dataclass(frozen=True, kw_only=True)
class PlanFigure:
    """The contents of the figure of a plan for one environment.

    Attributes:
        frames: the current picture, the pictures along the plan, and the goal; the first is the background of `paths`.
        violations: the violation of each guardrail at each of T model steps, including its margin.
        block: the number of environment actions per model step.
        considered: the number of candidates that the search considered; `ruled_out` of them broke a guardrail.
        ruled_out_by: the number of candidates that each guardrail ruled out.
        paths: None if positions in the picture cannot be decoded from the model's latents.
    """

    frames: Sequence[PlanFrame]
    violations: Mapping[str, Float[np.ndarray, "T"]]
    block: int
    considered: int
    ruled_out: int
    ruled_out_by: Mapping[str, int]
    paths: CandidatePaths | None = None


def draw_plan(plan: PlanFigure, path: Path) -> None:
    """Draw the figure and write it as a PNG.

    Raises:
        StorageError: the disk is full or the file cannot be written.
    """
    figure = Figure(figsize=(11.0, 6.2), layout="constrained")
    parts: Any = figure.subfigures(2, 1, height_ratios=(1.0, 1.35))
    above, below = parts
    _draw_future(above, plan.frames)
    left, right = below.subplots(1, 2)
    _draw_violations(left, plan)
    _draw_candidates(right, plan)
    write_atomic(path, lambda temporary: figure.savefig(temporary, format="png", dpi=130))


def _draw_future(figure: Any, frames: Sequence[PlanFrame]) -> None:
    figure.suptitle("The predicted future, by the most similar frames of the logs", fontsize=10, x=0.01, ha="left")
    for axis, frame in zip(np.atleast_1d(figure.subplots(1, len(frames))), frames, strict=True):
        axis.imshow(frame.pixels.squeeze(), cmap="gray", interpolation="nearest")
        axis.set_title(frame.title, fontsize=9)
        axis.set_xlabel(frame.note, fontsize=7)
        axis.set(xticks=[], yticks=[])


def _draw_violations(axis: Any, plan: PlanFigure) -> None:
    axis.set_title("Guardrails along the plan", fontsize=10, loc="left")
    if not plan.violations:
        axis.text(0.5, 0.5, "there are no guardrails", ha="center", va="center", transform=axis.transAxes)
        axis.set_axis_off()
        return
    low, high = 0.0, 0.0
    for name, values in plan.violations.items():
        actions = np.arange(1, len(values) + 1) * plan.block
        axis.plot(actions, values, marker="o", markersize=3, label=name)
        finite = values[np.isfinite(values)]
        low, high = min(low, *finite, 0.0), max(high, *finite, 0.0)
    room = 0.1 * max(high - low, 1e-3)
    axis.axhspan(0, high + room, color=_BROKEN, alpha=0.12, linewidth=0)
    axis.axhline(0, color=_BROKEN, linewidth=1)
    axis.text(plan.block, room * 0.2, "broken", color=_BROKEN, fontsize=8)
    axis.set(ylim=(low - room, high + room), xlabel="actions from now", ylabel="violation, with its margin")
    axis.legend(fontsize=8, frameon=False)
    axis.spines[["top", "right"]].set_visible(False)


def _draw_candidates(axis: Any, plan: PlanFigure) -> None:
    axis.set_title(f"{plan.considered:,} futures considered, {plan.ruled_out:,} ruled out", fontsize=10, loc="left")
    if plan.paths is None:
        counts = "\n".join(f"{name}: {count:,}" for name, count in plan.ruled_out_by.items())
        said = counts or "the solver does not report its candidates"
        axis.text(0.5, 0.5, said, ha="center", va="center", transform=axis.transAxes)
        axis.set_axis_off()
        return
    background = plan.frames[0].pixels
    axis.imshow(background.squeeze(), cmap="gray", interpolation="nearest", alpha=0.6)
    candidates = zip(plan.paths.candidates, plan.paths.held.tolist(), strict=True)
    for path, holds in sorted(candidates, key=lambda candidate: candidate[1]):
        axis.plot(*path.T, color=_ALLOWED if holds else _BROKEN, linewidth=0.5, alpha=0.35)
    axis.plot(*plan.paths.chosen.T, color=_CHOSEN, linewidth=2.2)
    axis.set(xlim=(0, background.shape[1]), ylim=(background.shape[0], 0), xticks=[], yticks=[])
    names = (("ruled out", _BROKEN), ("allowed", _ALLOWED), ("chosen", _CHOSEN))
    handles = [axis.plot([], [], color=colour, label=name)[0] for name, colour in names]
    axis.legend(handles=handles, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
