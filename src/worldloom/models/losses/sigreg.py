"""Sketched isotropic Gaussian regularisation (SIGReg of LeJEPA; Balestriero and LeCun, arXiv 2511.08544)."""

import math
from typing import Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from worldloom.core.seeds import torch_generator
from worldloom.models.distributed import mean_over_ranks, world_size
from worldloom.models.losses.loss import LOSSES, Formula, LossInputs, Samples, draw_samples


@LOSSES.register("sigreg")
class SIGReg(Formula):
    """Epps-Pulley statistic of random one-dimensional projections against the standard normal distribution.

    For each projection x, the statistic is the batch size times the integral over [-limit, limit] of
    |mean exp(itx) - exp(-t^2/2)|^2 exp(-t^2/2) dt, by the trapezoid rule. The loss is the mean over projections.
    Only every `stride`-th frame of a window is used; for `samples` see `draw_samples`.
    """

    name: Literal["sigreg"] = "sigreg"
    projections: int = Field(default=256, ge=1)
    knots: int = Field(default=17, ge=2)
    limit: float = Field(default=3.0, gt=0)
    stride: int = Field(default=1, ge=1)
    samples: Samples = "frame"

    def compute(self, inputs: LossInputs) -> Float[Tensor, ""]:
        """Return the mean statistic; the step seeds the random projections."""
        spacing = self.limit / (self.knots - 1)
        knots = [index * spacing for index in range(self.knots)]
        # The integrand is even, so [0, limit] counts twice. The trapezoid rule halves the weights of both end knots.
        weights = [2 * spacing * math.exp(-(knot**2) / 2) for knot in knots]
        weights[0] /= 2
        weights[-1] /= 2
        windows, _, dimension = inputs.latents.shape
        samples = draw_samples(inputs.latents[:, :: self.stride].float(), self.samples)
        # On the CPU, so that every machine and rank draws the same.
        directions = torch.randn(dimension, self.projections, generator=torch_generator(inputs.step, "sigreg"))
        values = samples @ (directions / directions.norm(dim=0)).to(samples.device)  # M G P
        parts = []
        for knot in knots:  # one at a time: the intermediates stay in the processor's cache
            angle = knot * values
            parts.append(torch.stack([angle.cos().mean(0), angle.sin().mean(0)]))
        real, imaginary = mean_over_ranks(torch.stack(parts, dim=-1))  # G P Q each
        at, weight = values.new_tensor([knots, weights])
        distance = (real - torch.exp(-at.square() / 2)).square() + imaginary.square()
        statistic: Tensor = (distance @ weight).mean()
        return windows * world_size() * statistic
