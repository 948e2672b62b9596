"""Explains a plan: the predicted future, each guardrail along it, and the candidates that were ruled out."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from worldloom.core.errors import DataError, StorageError
from worldloom.core.progress import SILENT, Progress
from worldloom.core.types import Goal, Observations, Plan, Rollouts
from worldloom.reports import CandidatePaths, PlanFigure, PlanFrame, draw_plan
from worldloom.training import LinearProbe
from worldloom.workflow.report_data import in_pixels, position_label
from worldloom.workflow.run import Run

_EPISODES = 300
_SHOWN = 6  # predicted frames
_PATHS = 400  # candidates in the figure


@dataclass
class Considered:
    """A callback that collects the candidates that a search considers for one environment."""

    ruled_out_by: dict[str, int] = field(default_factory=dict)
    count: int = 0
    ruled_out: int = 0
    paths: list[Float[Tensor, "S T D"]] = field(default_factory=list)
    held: list[Bool[Tensor, "S"]] = field(default_factory=list)

    def __call__(self, rollouts: Rollouts, violations: Mapping[str, Float[Tensor, "B S T"]]) -> None:
        """Add candidates, and count those that break a guardrail."""
        worst = {name: violation[0].amax(dim=-1) for name, violation in violations.items()}
        broken = torch.zeros(rollouts.latents.shape[1], dtype=torch.bool, device=rollouts.latents.device)
        for name, violation in worst.items():
            self.ruled_out_by[name] = self.ruled_out_by.get(name, 0) + int((violation > 0).sum())
            broken |= violation > 0
        self.count += len(broken)
        self.ruled_out += int(broken.sum())
        self.paths.append(rollouts.latents[0].cpu())
        self.held.append(~broken.cpu())

    def sample(self) -> tuple[Float[Tensor, "P T D"], Bool[Tensor, "P"]]:
        """Return candidates spaced evenly over the search, and whether each satisfies all guardrails."""
        paths, held = torch.cat(self.paths), torch.cat(self.held)
        chosen = torch.linspace(0, len(paths) - 1, min(_PATHS, len(paths))).long()
        return paths[chosen], held[chosen]


@dataclass(frozen=True)
class _HeldOutFrames:
    """Held-out frames and their latents; a predicted latent is shown as the most similar frame."""

    latents: Float[Tensor, "N D"]
    frames: UInt8[np.ndarray, "N H W C"]
    positions: LinearProbe | None  # None unless positions are pixel coordinates

    def nearest(self, latents: Float[Tensor, "T D"]) -> tuple[UInt8[np.ndarray, "T H W C"], Float[Tensor, "T"]]:
        """Return the most similar frame to each latent, and its distance in latent space."""
        gaps, places = torch.cdist(latents.cpu(), self.latents).min(dim=1)
        return self.frames[places.numpy()], gaps


def explain(
    run: Run,
    path: Path,
    observations: Observations,
    goal: Goal,
    plan: Plan,
    considered: Considered,
    *,
    progress: Progress = SILENT,
) -> dict[str, Any]:
    """Draw a plan for one environment as a PNG, and return the numbers in it as JSON values.

    The model does not predict pictures. A predicted state is shown as the frame of held-out logs with the most similar
    latent; the picture states the distance between the two latents, in typical model steps. In the result, `violations`
    has each guardrail's worst violation along the plan, including the guardrail's margin.

    Raises:
        DataError: the model has no pixel observations, or the logs cannot be read.
        StorageError: the picture cannot be written.
    """
    if observations.pixels is None or goal.observations.pixels is None:
        raise DataError("--explain needs a model with pixel observations, and this model has none; leave out --explain")
    seen, block = _held_out_frames(run, progress), run.model.spec.block
    frames = [
        PlanFrame("now", observations.pixels[0].numpy(), "the observation"),
        *_future(run, plan, seen),
        PlanFrame("goal", goal.observations.pixels[0].numpy(), "the given goal"),
    ]
    figure = PlanFigure(
        frames=frames,
        violations={name: violation[0].cpu().numpy() for name, violation in plan.violations.items()},
        block=block,
        considered=considered.count,
        ruled_out=considered.ruled_out,
        ruled_out_by=considered.ruled_out_by,
        paths=None if seen.positions is None or not considered.count else _paths(seen.positions, plan, considered),
    )
    draw_plan(figure, path)
    return {
        "considered": considered.count,
        "ruled_out": considered.ruled_out,
        "ruled_out_by": considered.ruled_out_by,
        "violations": {name: round(violation[0].max().item(), 4) for name, violation in plan.violations.items()},
        "picture": str(path),
    }


def _held_out_frames(run: Run, progress: Progress) -> _HeldOutFrames:
    try:
        dataset, chosen = run.held_out()
    except (DataError, StorageError) as error:
        raise DataError(
            f"--explain needs frames of the training data, but the data cannot be read: {error}. Restore the "
            f"dataset, or leave out --explain"
        ) from error
    label: str | None = None
    latents: list[Float[Tensor, "_ D"]] = []
    frames: list[UInt8[np.ndarray, "_ H W C"]] = []
    positions: list[Float[Tensor, "_ 2"]] = []
    with progress.task("encode held-out frames", len(chosen[:_EPISODES]), "episode") as task, torch.inference_mode():
        for number in chosen[:_EPISODES]:
            episode = dataset.episode(number)
            label = label if frames else position_label([episode])
            seen, there, _ = run.encode(episode)
            assert seen.pixels is not None
            frames.append(seen.pixels.numpy())
            latents.append(there.cpu())
            if label is not None:
                positions.append(torch.from_numpy(episode.labels[label][:: run.model.spec.block]))
            task.advance()
    every, shape = torch.cat(latents), run.model.spec.observation.pixels
    probe = None
    if positions and shape is not None and in_pixels(torch.cat(positions).numpy(), shape):
        probe = LinearProbe.fit(every, torch.cat(positions))
    return _HeldOutFrames(every, np.concatenate(frames), probe)


def _future(run: Run, plan: Plan, seen: _HeldOutFrames) -> list[PlanFrame]:
    horizon, block, step = plan.latents.shape[1], run.model.spec.block, run.heads.geometry.step_length
    places = np.unique(np.linspace(0, horizon - 1, min(_SHOWN, horizon)).round().astype(int))
    frames, gaps = seen.nearest(plan.latents[0, places.tolist()])
    return [
        PlanFrame(f"in {(place + 1) * block} actions", frame, f"{gap / step:.1f} steps from the prediction")
        for place, frame, gap in zip(places, frames, gaps.tolist(), strict=True)
    ]


def _paths(positions: LinearProbe, plan: Plan, considered: Considered) -> CandidatePaths:
    candidates, held = considered.sample()
    return CandidatePaths(
        candidates=positions(candidates).numpy(),
        held=held.numpy(),
        chosen=positions(plan.latents[0].cpu()).numpy(),
    )
