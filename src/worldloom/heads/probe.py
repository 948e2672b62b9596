"""Probes: small decoders of named quantities, fitted on the labelled frames, with a measured error."""

import math
from typing import Any

import torch
from jaxtyping import Float, Int
from pydantic import Field, model_validator
from torch import Tensor

from worldloom.core.config import Sizes
from worldloom.core.errors import DataError
from worldloom.core.progress import SILENT, Progress
from worldloom.core.seams import WorldModel
from worldloom.core.seeds import seeded_weights, torch_generator
from worldloom.heads.head import FitConfig, Head
from worldloom.heads.support import Support
from worldloom.models import MLP


class ProbeConfig(FitConfig):
    """The configuration of a `Probe` and its fit. A share `held_out` of the episodes only serves to measure the error.

    `between` clips the labels to a range, so that the network resolves the values that matter, such as those near the
    edge of a hazard.
    """

    hidden: Sizes = Field(default=(256,), min_length=1)
    steps: int = Field(default=1500, ge=1)
    batch: int = Field(default=256, ge=1)
    held_out: float = Field(default=0.3, gt=0, lt=1)
    references: int = Field(default=256, ge=1)
    between: tuple[float, float] | None = None

    @model_validator(mode="after")
    def _check_between(self) -> "ProbeConfig":
        if self.between is not None and not self.between[0] < self.between[1]:
            raise ValueError(
                f"'between' needs a lower end below the upper end; got {list(self.between)}. Swap the ends, or move one"
            )
        return self


class Probe(Head[ProbeConfig]):
    """Decodes a named quantity of `size` values from latents, in the unit of its labels.

    `errors` are the probe's Euclidean errors on held-out frames, in ascending order. The errors do not apply to latents
    that are unlike the probe's `support`, a sample of the latents of the fit.
    """

    kind = "probe"
    config_type = ProbeConfig
    errors: Tensor
    mean: Tensor
    scale: Tensor

    def __init__(self, latent_dim: int, size: int, config: ProbeConfig, *, errors: int, references: int) -> None:
        super().__init__()
        self.size, self.config = size, config
        self.network = MLP((latent_dim, *config.hidden, size), norm="layer", activation="silu")
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("scale", torch.ones(size))
        self.register_buffer("errors", torch.zeros(errors))
        self.support = Support(torch.zeros(references, latent_dim), 0.0)

    def figures(self) -> dict[str, Any]:
        """Return the sizes of the buffers."""
        return {"size": self.size, "errors": len(self.errors), "references": len(self.support.references)}

    @classmethod
    def build(cls, model: WorldModel, config: ProbeConfig, **figures: Any) -> "Probe":
        """Build an untrained probe with buffers of the saved sizes."""
        return cls(model.spec.latent_dim, config=config, **figures)

    def forward(self, latents: Float[Tensor, "*axes D"]) -> Float[Tensor, "*axes L"]:
        """Return the decoded quantity."""
        out: Tensor = self.mean + self.scale * self.network(latents)
        return out

    def error(self, risk: float) -> float:
        """Return a bound that the error on a new, exchangeable frame exceeds with probability at most `risk`.

        This is the split-conformal quantile (Vovk et al. 2005): the k-th smallest of n held-out errors with
        k = ceil((n + 1)(1 - risk)), or infinity if n is too small for this risk.
        """
        place = math.ceil((len(self.errors) + 1) * (1 - risk))
        return math.inf if place > len(self.errors) else float(self.errors[max(place, 1) - 1])


def fit_probe(
    latents: Float[Tensor, "N D"],
    values: Float[Tensor, "N L"],
    config: ProbeConfig,
    *,
    groups: Int[Tensor, "N"] | None = None,
    seed: int,
    progress: Progress = SILENT,
) -> Probe:
    """Fit a probe on labelled frames. All frames of a group (an episode) are used for the fit, or all are held out.

    Raises:
        DataError: there are fewer than four groups, or a label is not finite.
    """
    device = latents.device
    groups = torch.arange(len(latents), device=device) if groups is None else groups.to(device)
    names = groups.unique()
    if len(names) < 4:
        raise DataError(
            f"a probe needs labelled frames from at least 4 episodes, some for the fit and some to measure its error; "
            f"got {len(names)} episodes. Label frames of more episodes"
        )
    if not bool(values.isfinite().all()):
        raise DataError("expected finite labels; got NaN or infinity. Leave out the frames that have no label")
    values = values.to(device, torch.float32)
    if config.between is not None:
        values = values.clamp(*config.between)
    generator = torch_generator(seed, "probe", device=device)
    shuffled = names[torch.randperm(len(names), generator=generator, device=device)]
    away = torch.isin(groups, shuffled[: max(1, round(config.held_out * len(names)))])
    seen, labels = latents[~away], values[~away]
    kept = torch.randperm(len(seen), generator=generator, device=device)[: config.references]
    with seeded_weights(seed, "probe", "weights"):
        probe = Probe(latents.shape[1], values.shape[1], config, errors=int(away.sum()), references=len(kept))
    probe.to(device)
    probe.mean.copy_(labels.mean(0))
    probe.scale.copy_(labels.std(0).clamp_min(1e-6))

    def loss(step: int) -> Tensor:
        rows = torch.randint(len(seen), (config.batch,), generator=generator, device=device)
        error: Tensor = ((probe(seen[rows]) - labels[rows]) / probe.scale).square().mean()
        return error

    probe.fit(loss, progress)
    with torch.no_grad():
        probe.support.references.copy_(seen[kept])
        errors = (probe(latents[away]) - values[away]).norm(dim=-1)
        probe.errors.copy_(errors.sort().values)
        probe.support.measure(latents[away])
    return probe
