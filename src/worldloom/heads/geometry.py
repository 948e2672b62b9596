"""The geometry of a latent space, measured on data: the length of a step, and whether steps can be undone."""

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor

from worldloom.core.actions import Walk
from worldloom.core.config import Shape, check_shape
from worldloom.core.errors import CheckpointError, DataError
from worldloom.core.progress import SILENT, Progress
from worldloom.core.seams import WorldModel
from worldloom.core.seeds import torch_generator
from worldloom.core.types import Context
from worldloom.heads.head import Head
from worldloom.heads.inverse import InverseModel, InverseModelConfig, fit_inverse_model
from worldloom.heads.latent_episodes import LatentEpisodes, dream

_WALKS, _BLOCKS = 512, 4  # number and length of the walks that measure reversibility
_REACH = 3  # maximum number of blocks to a target


@dataclass(frozen=True, kw_only=True)
class Reversibility:
    """How well inverse dynamics undo a walk.

    `displacement` is the mean latent distance between the start and the end of the walks. `gap` is the mean distance
    from the start that remains after walking back. Dynamics count as reversible if `gap` is at most 40% of
    `displacement`.
    """

    gap: float
    displacement: float

    @property
    def remaining(self) -> float:
        """The fraction of the displacement that was not undone: 0 is a full return, 1 or more means no return."""
        return self.gap / max(self.displacement, 1e-12)

    @property
    def reversible(self) -> bool:
        """Whether a search may imagine backwards from a goal."""
        return self.remaining <= 0.4


def measure_reversibility(
    model: WorldModel, inverse: InverseModel, episodes: LatentEpisodes, *, walk: Walk, generator: torch.Generator
) -> Reversibility:
    """Roll out walks from states of the data, walk back by inverse dynamics, and measure how close the way back ends.

    The model predicts the way back block by block; each block starts from the prediction of the block before it.
    """
    per_episode = -(-_WALKS // len(episodes))
    there = dream(model, episodes, per_episode=per_episode, horizon=_BLOCKS, walk=walk, generator=generator).latents
    there = there[torch.randperm(len(there), generator=generator, device=there.device)[:_WALKS]]
    home, latents = there[:, 0], there[:, -1]
    with torch.no_grad():
        for step in range(_BLOCKS - 1, -1, -1):
            back = inverse(latents, there[:, step])
            latents = model.rollout(still(latents, model), back[:, None, None])[:, 0, 0]
    return Reversibility(
        gap=(latents - home).norm(dim=-1).mean().item(),
        displacement=(there[:, -1] - home).norm(dim=-1).mean().item(),
    )


def still(latents: Tensor, model: WorldModel) -> Context:
    """Return contexts of agents that have stood still, one at each of these latents (B, D)."""
    size = model.spec.context
    return Context(
        latents=latents[:, None].expand(-1, size, -1),
        actions=latents.new_zeros(len(latents), size - 1, model.spec.block_size),
    )


def predict_arrival(
    model: WorldModel, geometry: "LatentGeometry", sources: Float[Tensor, "M D"], targets: Float[Tensor, "M D"]
) -> tuple[Float[Tensor, "M"], Bool[Tensor, "M"]]:
    """Imagine going straight from each source to its target by inverse dynamics.

    Returns the number of blocks until arrival (1 to 3), and whether the model predicts an arrival within one typical
    step length in at most 3 blocks. This detects a wall between two latents that are close.
    """
    device = model.device
    arrived = torch.full((len(sources),), torch.inf)
    with torch.inference_mode():
        for some in torch.arange(len(sources)).split(4096):
            latents, goal = sources[some].to(device), targets[some].to(device)
            for block in range(1, _REACH + 1):
                action = geometry.inverse(latents, goal)
                latents = model.rollout(still(latents, model), action[:, None, None])[:, 0, 0]
                near = ((latents - goal).norm(dim=-1) <= geometry.step_length).cpu()
                arrived[some] = torch.where(near, arrived[some].clamp_max(block), arrived[some])
    return arrived.clamp_max(_REACH), arrived.isfinite()


class _GeometryFigures(Shape):
    step_length: float = Field(ge=0)
    reversibility: Reversibility


class LatentGeometry(Head[InverseModelConfig]):
    """The typical length of a model step, inverse dynamics, and whether dynamics can be reversed."""

    kind = "latent-geometry"
    config_type = InverseModelConfig

    def __init__(self, *, step_length: float, inverse: InverseModel, reversibility: Reversibility) -> None:
        super().__init__()
        self.step_length, self.inverse, self.reversibility = step_length, inverse, reversibility
        self.config = inverse.config

    def figures(self) -> dict[str, Any]:
        """Return the step length and the reversibility."""
        return {"step_length": self.step_length, "reversibility": asdict(self.reversibility)}

    def check(self) -> None:
        """Check that all tensors and figures are finite, and that the step length, a unit of distance, is above 0."""
        super().check()
        values = (self.step_length, self.reversibility.gap, self.reversibility.displacement)
        if not all(isinstance(value, int | float) and math.isfinite(value) for value in values):
            raise DataError(f"expected a finite step length and reversibility; got {values}")
        if self.step_length <= 0:
            raise DataError(f"expected a step length above 0; got {self.step_length:g}")

    @classmethod
    def build(cls, model: WorldModel, config: InverseModelConfig, **figures: Any) -> "LatentGeometry":
        """Build the geometry from the saved figures, with untrained inverse dynamics."""
        read = check_shape(figures, _GeometryFigures, "the geometry", CheckpointError)
        return cls(
            step_length=read.step_length, inverse=InverseModel(model.spec, config), reversibility=read.reversibility
        )


def measure_geometry(
    model: WorldModel,
    episodes: LatentEpisodes,
    config: InverseModelConfig,
    *,
    seed: int,
    progress: Progress = SILENT,
) -> LatentGeometry:
    """Fit inverse dynamics on the episodes, and measure step length and reversibility."""
    inverse = fit_inverse_model(model, episodes, config, seed=seed, progress=progress)
    generator = torch_generator(seed, "reversibility", device=episodes.latents.device)
    return LatentGeometry(
        step_length=episodes.step_length,
        inverse=inverse,
        reversibility=measure_reversibility(model, inverse, episodes, walk=config.walk, generator=generator),
    )
