"""Linear probes, which measure how well labels can be predicted from latents."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class ProbeScore:
    """The accuracy of a probe: the mean Euclidean error in the label's unit, and the R2 of the label."""

    error: float
    r2: float


@dataclass(frozen=True, kw_only=True)
class LinearProbe:
    """A linear map from latents to labels, fitted in closed form. The probe measures a model but is not part of it."""

    weight: Float[Tensor, "D L"]
    bias: Float[Tensor, "L"]

    @classmethod
    def fit(
        cls, latents: Float[Tensor, "*axes D"], labels: Float[Tensor, "*axes L"], *, ridge: float = 1e-3
    ) -> "LinearProbe":
        """Fit a ridge regression in double precision; `ridge` is relative to the mean variance of the latents."""
        inputs, outputs = latents.flatten(0, -2).double(), labels.flatten(0, -2).double()
        input_mean, output_mean = inputs.mean(0), outputs.mean(0)
        centred = inputs - input_mean
        gram = centred.T @ centred
        penalty = ridge * gram.diagonal().mean().clamp_min(1e-12)
        identity = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        weight = torch.linalg.solve(gram + penalty * identity, centred.T @ (outputs - output_mean))
        return cls(weight=weight.float(), bias=(output_mean - input_mean @ weight).float())

    def __call__(self, latents: Float[Tensor, "*axes D"]) -> Float[Tensor, "*axes L"]:
        """Predict labels from latents."""
        return latents @ self.weight + self.bias

    def score(self, latents: Float[Tensor, "*axes D"], labels: Float[Tensor, "*axes L"]) -> ProbeScore:
        """Compare predictions with the true labels; use latents that were not used in the fit."""
        residual = (self(latents) - labels).flatten(0, -2)
        spread = (labels - labels.flatten(0, -2).mean(0)).flatten(0, -2)
        unexplained = residual.square().sum() / spread.square().sum().clamp_min(1e-12)
        return ProbeScore(error=residual.norm(dim=-1).mean().item(), r2=1 - unexplained.item())
