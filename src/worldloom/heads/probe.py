"""Probes: small decoders of named quantities, fitted on the few frames that have labels, that know their own error."""

import math
from pathlib import Path

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field, model_validator
from torch import Tensor, nn

from worldloom.core.config import Config
from worldloom.core.errors import DataError
from worldloom.core.progress import SILENT, Progress
from worldloom.core.seams import WorldModel
from worldloom.core.seeds import derive_seed, torch_generator
from worldloom.heads.head import read_head, restore, save_head
from worldloom.heads.support import Support
from worldloom.models import MLP, fit_head

_KIND = "probe"


class ProbeConfig(Config):
    """The network and its fit; the share `held_out` of the labelled frames measures its error instead.

    With `between`, each value is read no farther than to these two ends: so that all that is told apart is told apart
    where it matters, such as near the edge of a hazard.
    """

    hidden: tuple[int, ...] = Field(default=(256,), min_length=1)
    steps: int = Field(default=1500, ge=1)
    batch: int = Field(default=256, ge=1)
    learning_rate: float = Field(default=1e-3, gt=0)
    held_out: float = Field(default=0.3, gt=0, lt=1)
    references: int = Field(default=256, ge=1)
    between: tuple[float, float] | None = None

    @model_validator(mode="after")
    def _check_between(self) -> "ProbeConfig":
        if self.between is not None and not self.between[0] < self.between[1]:
            raise ValueError(f"'between' needs a lower end below the upper one; got {list(self.between)}")
        return self


class Probe(nn.Module):
    """Reads a named quantity of `size` values from latents, in the unit of its labels.

    `errors` are its Euclidean errors on frames that its fit did not see, ascending. What is not like the `support`, of
    latents that it did see, is outside its calibration.
    """

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

    def forward(self, latents: Float[Tensor, "*axes D"]) -> Float[Tensor, "*axes L"]:
        """Read the quantity."""
        out: Tensor = self.mean + self.scale * self.network(latents)
        return out

    def error(self, risk: float) -> float:
        """Return what the error on another frame of the same kind exceeds with at most this probability.

        The split-conformal quantile (Vovk et al. 2005): the k-th smallest of n held-out errors with
        k = ceil((n + 1)(1 - risk)); infinite where so small a risk cannot be told from so few frames.
        """
        place = math.ceil((len(self.errors) + 1) * (1 - risk))
        return math.inf if place > len(self.errors) else float(self.errors[max(place, 1) - 1])

    def gap(self, latents: Float[Tensor, "*axes D"]) -> Float[Tensor, "*axes"]:
        """Return how far latents lie from all that the fit saw: 1 is as far as is still known."""
        return self.support.gap(latents)

    def knows(self, latents: Float[Tensor, "*axes D"]) -> Bool[Tensor, "*axes"]:
        """Return whether latents are like those that its error was measured on."""
        return self.gap(latents) <= 1

    def save(self, stem: Path | str, model: WorldModel) -> str:
        """Write it beside the model whose latents it reads; return the digest."""
        sizes = {"size": self.size, "errors": len(self.errors), "references": len(self.support.references)}
        return save_head(stem, self, kind=_KIND, model=model, config=self.config, sizes=sizes)

    @classmethod
    def load(cls, stem: Path | str, model: WorldModel) -> "Probe":
        """Read what `save` wrote.

        Raises:
            CheckpointError: it is missing, damaged or of another model.
        """
        tensors, metadata = read_head(stem, kind=_KIND, model=model)
        sizes = metadata["sizes"]
        config = ProbeConfig.parse(metadata["config"])
        probe = cls(
            model.spec.latent_dim, sizes["size"], config, errors=sizes["errors"], references=sizes["references"]
        )
        return restore(stem, probe.to(model.device), tensors)


def fit_probe(
    latents: Float[Tensor, "N D"],
    values: Float[Tensor, "N L"],
    config: ProbeConfig | None = None,
    *,
    groups: Int[Tensor, "N"] | None = None,
    seed: int,
    progress: Progress = SILENT,
) -> Probe:
    """Fit a probe on labelled frames; those of one group (an episode) are alike, and fitted or held out together.

    Raises:
        DataError: there are fewer than four groups, or a label is not finite.
    """
    config = config or ProbeConfig()
    device = latents.device
    groups = torch.arange(len(latents), device=device) if groups is None else groups.to(device)
    names = groups.unique()
    if len(names) < 4:
        raise DataError(
            f"a probe needs labelled frames of at least 4 episodes, some to fit and some to measure its error on; got "
            f"{len(names)}"
        )
    if not bool(values.isfinite().all()):
        raise DataError("a label is not finite; leave out the frames without labels")
    values = values.to(device, torch.float32)
    if config.between is not None:
        values = values.clamp(*config.between)
    generator = torch_generator(seed, "probe", device=device)
    shuffled = names[torch.randperm(len(names), generator=generator, device=device)]
    away = torch.isin(groups, shuffled[: max(1, round(config.held_out * len(names)))])
    seen, labels = latents[~away], values[~away]
    kept = torch.randperm(len(seen), generator=generator, device=device)[: config.references]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "probe", "weights"))
        probe = Probe(latents.shape[1], values.shape[1], config, errors=int(away.sum()), references=len(kept))
    probe.to(device)
    probe.mean.copy_(labels.mean(0))
    probe.scale.copy_(labels.std(0).clamp_min(1e-6))

    def loss(step: int) -> Tensor:
        rows = torch.randint(len(seen), (config.batch,), generator=generator, device=device)
        error: Tensor = ((probe(seen[rows]) - labels[rows]) / probe.scale).square().mean()
        return error

    fit_head(probe, loss, config.steps, config.learning_rate, progress, description="probe")
    with torch.no_grad():
        probe.support.references.copy_(seen[kept])
        errors = (probe(latents[away]) - values[away]).norm(dim=-1)
        probe.errors.copy_(errors.sort().values)
        probe.support.measure(latents[away])
    return probe
