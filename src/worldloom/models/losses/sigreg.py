"""Sketched isotropic Gaussian regularisation (SIGReg of LeJEPA; Balestriero and LeCun, arXiv 2511.08544)."""

import math
from typing import Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from worldloom.core.seeds import torch_generator
from worldloom.models.distributed import mean_over_ranks, world_size
from worldloom.models.losses.loss import LOSSES, Loss, LossConfig, LossInputs, Samples, draw_samples


@LOSSES.register("sigreg")
class SIGReg(LossConfig):
    """The Epps-Pulley statistic of random one-dimensional projections against the standard normal distribution.

    Only every `stride`-th frame of a window is used; `draw_samples` describes `samples`.
    """

    name: Literal["sigreg"] = "sigreg"
    projections: int = Field(default=256, ge=1)
    knots: int = Field(default=17, ge=2)
    limit: float = Field(default=3.0, gt=0)
    stride: int = Field(default=1, ge=1)
    samples: Samples = "frame"

    def build(self, *, latent_dim: int, block_size: int) -> Loss:
        """Build the module."""
        return SIGRegLoss(self)


class SIGRegLoss(Loss):
    """The module that `SIGReg` builds.

    For each projection x: the batch size times the integral over [-limit, limit] of
    |mean exp(itx) - exp(-t^2/2)|^2 exp(-t^2/2) dt, by the trapezoid rule; averaged over projections.
    """

    def __init__(self, config: SIGReg) -> None:
        super().__init__()
        self.config = config
        spacing = config.limit / (config.knots - 1)
        self._knots = [index * spacing for index in range(config.knots)]
        # The integrand is even, so every knot counts twice; the trapezoid rule halves the two at the ends.
        self._weights = [2 * spacing * math.exp(-(knot**2) / 2) for knot in self._knots]
        self._weights[0] /= 2
        self._weights[-1] /= 2

    def forward(self, inputs: LossInputs) -> Float[Tensor, ""]:
        """Return the mean statistic; the step seeds the random projections."""
        windows, _, dimension = inputs.latents.shape
        samples = draw_samples(inputs.latents[:, :: self.config.stride].float(), self.config.samples)
        # On the CPU, so that every machine and rank samples the same directions.
        directions = torch.randn(dimension, self.config.projections, generator=torch_generator(inputs.step, "sigreg"))
        values = samples @ (directions / directions.norm(dim=0)).to(samples.device)  # M G P
        parts = []
        for knot in self._knots:  # one at a time, so that intermediates stay in the CPU cache
            angle = knot * values
            parts.append(torch.stack([angle.cos().mean(0), angle.sin().mean(0)]))
        real, imaginary = mean_over_ranks(torch.stack(parts, dim=-1))  # G P Q each
        knots, weights = values.new_tensor([self._knots, self._weights])
        distance = (real - torch.exp(-knots.square() / 2)).square() + imaginary.square()
        statistic: Tensor = (distance @ weights).mean()
        return windows * world_size() * statistic
