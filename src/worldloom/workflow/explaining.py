"""A plan explained: the future that it is predicted to cause, each guardrail along it, and what was ruled out."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from matplotlib.figure import Figure
from torch import Tensor

from worldloom.core.errors import DataError, StorageError
from worldloom.core.files import write_atomic
from worldloom.core.types import Goal, Observations, Plan, Rollouts
from worldloom.data import EpisodeDataset
from worldloom.models import LinearProbe
from worldloom.workflow.report_data import in_pixels, position_label
from worldloom.workflow.run import Run

_EPISODES = 300
_SHOWN = 6  # predicted frames
_PATHS = 400  # candidates that are drawn
_ALLOWED, _BROKEN, _CHOSEN = "#7f8c97", "#d55e00", "#0072b2"


@dataclass
class Considered:
    """What a search considered for one environment: a watcher of planning problems."""

    ruled_out: dict[str, int] = field(default_factory=dict)
    count: int = 0
    broken: int = 0
    paths: list[Float[Tensor, "S T D"]] = field(default_factory=list)
    held: list[Tensor] = field(default_factory=list)

    def __call__(self, rollouts: Rollouts, violations: Mapping[str, Float[Tensor, "B S T"]]) -> None:
        """See candidates, and by how much each breaks each guardrail."""
        worst = {name: violation[0].amax(dim=-1) for name, violation in violations.items()}
        broken = torch.zeros(rollouts.latents.shape[1], dtype=torch.bool, device=rollouts.latents.device)
        for name, much in worst.items():
            self.ruled_out[name] = self.ruled_out.get(name, 0) + int((much > 0).sum())
            broken |= much > 0
        self.count += len(broken)
        self.broken += int(broken.sum())
        self.paths.append(rollouts.latents[0].cpu())
        self.held.append(~broken.cpu())

    def some(self) -> tuple[Float[Tensor, "P T D"], Tensor]:
        """Return some of the candidates, evenly over the search, and whether each holds."""
        paths, held = torch.cat(self.paths), torch.cat(self.held)
        chosen = torch.linspace(0, len(paths) - 1, min(_PATHS, len(paths))).long()
        return paths[chosen], held[chosen]


@dataclass(frozen=True)
class _Seen:
    """Held-out frames as the model sees them, to show a predicted latent by the most similar of them."""

    latents: Float[Tensor, "N D"]
    frames: UInt8[np.ndarray, "N H W C"]
    positions: LinearProbe | None  # where positions are places in the picture

    def nearest(self, latents: Float[Tensor, "T D"]) -> tuple[np.ndarray, Float[Tensor, "T"]]:
        """Return the most similar frame of each latent, and how far it is."""
        gaps, places = torch.cdist(latents.cpu(), self.latents).min(dim=1)
        return self.frames[places.numpy()], gaps


def explain(
    run: Run, path: Path, observations: Observations, goal: Goal, plan: Plan, considered: Considered
) -> dict[str, Any]:
    """Draw a plan for one environment as a PNG, and return what it says in figures.

    The model predicts no pictures: a predicted state is shown by the most similar frame of held-out logs, with how far
    that is in typical model steps. `violations` are the worst of each guardrail along the plan, margin included.

    Raises:
        DataError: the model sees no pictures, or the logs are gone.
        StorageError: the picture cannot be written.
    """
    if observations.pixels is None or goal.observations.pixels is None:
        raise DataError("there is nothing to show of a model that sees no pictures; leave out --explain")
    seen = _held_out(run)
    figure = Figure(figsize=(11.0, 6.2), layout="constrained")
    parts: Any = figure.subfigures(2, 1, height_ratios=(1.0, 1.35))
    above, below = parts
    _draw_future(above, run, observations, goal, plan, seen)
    left, right = below.subplots(1, 2)
    _draw_margins(left, run, plan)
    _draw_considered(right, observations, plan, considered, seen)
    write_atomic(path, lambda temporary: figure.savefig(temporary, format="png", dpi=130))
    return {
        "considered": considered.count,
        "ruled_out": considered.broken,
        "ruled_out_by": dict(considered.ruled_out),
        "violations": {name: round(violation[0].max().item(), 4) for name, violation in plan.violations.items()},
        "picture": str(path),
    }


def _held_out(run: Run) -> _Seen:
    try:
        dataset = EpisodeDataset.open(run.data)
    except (DataError, StorageError) as error:
        raise DataError(f"a plan is explained with frames of the logs, which could not be read: {error}") from error
    chosen = run.figures.get("held_out") or range(len(dataset))
    episodes = [dataset.episode(int(number)) for number in list(chosen)[:_EPISODES]]
    label, block = position_label(episodes), run.model.spec.block
    latents, frames, positions = [], [], []
    with torch.inference_mode():
        for episode in episodes:
            assert episode.pixels is not None
            frames.append(episode.pixels[::block])
            vector = None if episode.vector is None else episode.vector[::block]
            there = Observations.from_numpy(frames[-1], vector).to(run.device)
            latents.append(run.model.encode(there).cpu())
            if label is not None:
                positions.append(torch.from_numpy(episode.labels[label][::block]))
    every, shape = torch.cat(latents), run.model.spec.observation.pixels
    probe = None
    if positions and shape is not None and in_pixels(torch.cat(positions).numpy(), shape):
        probe = LinearProbe.fit(every, torch.cat(positions))
    return _Seen(every, np.concatenate(frames), probe)


def _draw_future(figure: Any, run: Run, observations: Observations, goal: Goal, plan: Plan, seen: _Seen) -> None:
    horizon = plan.latents.shape[1]
    places = np.unique(np.linspace(0, horizon - 1, min(_SHOWN, horizon)).round().astype(int))
    frames, gaps = seen.nearest(plan.latents[0, places.tolist()])
    block, step = run.model.spec.block, run.heads.geometry.step_length
    assert observations.pixels is not None
    assert goal.observations.pixels is not None
    shown = [("now", observations.pixels[0].numpy(), "what it sees")]
    for place, frame, gap in zip(places, frames, gaps.tolist(), strict=True):
        shown.append((f"in {(place + 1) * block} actions", frame, f"like this to {gap / step:.1f} steps"))
    shown.append(("goal", goal.observations.pixels[0].numpy(), "what it was told"))
    figure.suptitle("The predicted future, by the most similar frames of the logs", fontsize=10, x=0.01, ha="left")
    for axis, (title, frame, note) in zip(np.atleast_1d(figure.subplots(1, len(shown))), shown, strict=True):
        axis.imshow(frame.squeeze(), cmap="gray", interpolation="nearest")
        axis.set_title(title, fontsize=9)
        axis.set_xlabel(note, fontsize=7)
        axis.set_xticks([])
        axis.set_yticks([])


def _draw_margins(axis: Any, run: Run, plan: Plan) -> None:
    axis.set_title("Guardrails along the plan", fontsize=10, loc="left")
    if not plan.violations:
        axis.text(0.5, 0.5, "no guardrail is kept", ha="center", va="center", transform=axis.transAxes)
        axis.set_axis_off()
        return
    block = run.model.spec.block
    actions = np.arange(1, plan.latents.shape[1] + 1) * block
    low, high = 0.0, 0.0
    for name, violation in plan.violations.items():
        values = violation[0].cpu().numpy()
        axis.plot(actions, values, marker="o", markersize=3, label=name)
        finite = values[np.isfinite(values)]
        low, high = min(low, *finite, 0.0), max(high, *finite, 0.0)
    room = 0.1 * max(high - low, 1e-3)
    axis.axhspan(0, high + room, color=_BROKEN, alpha=0.12, linewidth=0)
    axis.axhline(0, color=_BROKEN, linewidth=1)
    axis.text(actions[0], room * 0.2, "broken", color=_BROKEN, fontsize=8)
    axis.set_ylim(low - room, high + room)
    axis.set_xlabel("actions from now")
    axis.set_ylabel("violation, with its margin")
    axis.legend(fontsize=8, frameon=False)
    axis.spines[["top", "right"]].set_visible(False)


def _draw_considered(axis: Any, observations: Observations, plan: Plan, considered: Considered, seen: _Seen) -> None:
    title = f"{considered.count:,} futures considered, {considered.broken:,} ruled out"
    axis.set_title(title, fontsize=10, loc="left")
    if seen.positions is None or not considered.count:
        reasons = [f"{name}: {count:,}" for name, count in considered.ruled_out.items()]
        said = "\n".join(reasons) or "the solver does not say which"
        axis.text(0.5, 0.5, said, ha="center", va="center", transform=axis.transAxes)
        axis.set_axis_off()
        return
    assert observations.pixels is not None
    axis.imshow(observations.pixels[0].numpy().squeeze(), cmap="gray", interpolation="nearest", alpha=0.6)
    paths, held = considered.some()
    places = seen.positions(paths).numpy()
    for path, holds in sorted(zip(places, held.tolist(), strict=True), key=lambda pair: pair[1]):
        axis.plot(*path.T, color=_ALLOWED if holds else _BROKEN, linewidth=0.5, alpha=0.35)
    axis.plot(*seen.positions(plan.latents[0].cpu()).numpy().T, color=_CHOSEN, linewidth=2.2)
    height, width = observations.pixels.shape[1:3]
    axis.set_xlim(0, width)
    axis.set_ylim(height, 0)
    axis.set_xticks([])
    axis.set_yticks([])
    names = (("ruled out", _BROKEN), ("allowed", _ALLOWED), ("chosen", _CHOSEN))
    handles = [axis.plot([], [], color=colour, label=name)[0] for name, colour in names]
    axis.legend(handles=handles, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
