"""Projection of actions onto the allowed set, and persistent random walks of actions for exploration."""

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn.functional import normalize

from worldloom.core.config import Config
from worldloom.core.types import ActionBounds, ModelSpec


def project(actions: Float[Tensor, "*axes A"], spec: ModelSpec, bounds: ActionBounds) -> Float[Tensor, "*axes A"]:
    """Return the nearest allowed blocks: within the bounds, and one-hot if actions are discrete.

    Gradients use a straight-through estimator for a discrete choice.
    """
    actions = bounds.clamp(actions)
    if not spec.action.discrete:
        return actions
    scores = actions.unflatten(-1, (spec.block, spec.action.size))
    choice = torch.zeros_like(scores).scatter_(-1, scores.argmax(-1, keepdim=True), 1.0).flatten(-2)
    chosen = bounds.low + choice * (bounds.high - bounds.low)
    return actions + (chosen - actions).detach()


class Walk(Config):
    """A random walk of actions whose direction drifts by `drift` per environment step.

    At each step, direction and speed are resampled with probability `renewal`. The speed is between `slowest` and
    `fastest`; a speed of 1 is about half the range of each action dimension. Actions are clamped to the bounds.
    """

    drift: float = Field(default=0.3, ge=0)
    renewal: float = Field(default=0.05, ge=0, le=1)
    slowest: float = Field(default=0.4, ge=0)
    fastest: float = Field(default=1.4, gt=0)

    @model_validator(mode="after")
    def _check(self) -> "Walk":
        if self.slowest > self.fastest:
            raise ValueError(
                f"'slowest' must be at most 'fastest'; got slowest={self.slowest} and fastest={self.fastest}. Lower "
                f"'slowest' or raise 'fastest'"
            )
        return self

    def sample(
        self,
        spec: ModelSpec,
        bounds: ActionBounds,
        shape: tuple[int, int, int],
        generator: torch.Generator,
    ) -> Float[Tensor, "B S T A"]:
        """Sample random walks; `shape` is (B, S, T), with T in blocks."""
        batch, candidates, horizon = shape
        size, device = spec.action.size, bounds.low.device
        lines, steps = batch * candidates, horizon * spec.block
        noise = torch.randn(lines, steps, size, generator=generator, device=device)
        renewed, share = torch.rand(2, lines, steps, generator=generator, device=device)
        # The step at which the current direction was sampled: the last renewal, or the start.
        origin = (torch.arange(steps, device=device) * (renewed < self.renewal)).cummax(1).values
        drawn = origin[..., None].expand_as(noise)
        drift = self.drift * noise.cumsum(1)
        heading = normalize(normalize(noise.gather(1, drawn), dim=-1) + drift - drift.gather(1, drawn), dim=-1)
        speed = self.slowest + (self.fastest - self.slowest) * share.gather(1, origin)
        walk = heading * (speed * (size / 2) ** 0.5)[..., None]
        half = (bounds.high - bounds.low) / 2
        return project(bounds.low + half + half * walk.view(*shape, -1), spec, bounds)
