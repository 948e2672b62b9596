"""A sample of the data's latents, and how far other latents lie from them."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from worldloom.core.config import Config
from worldloom.core.errors import DataError
from worldloom.core.progress import SILENT, Progress
from worldloom.core.seams import WorldModel
from worldloom.core.seeds import torch_generator
from worldloom.heads.head import Head
from worldloom.heads.latent_episodes import LatentEpisodes

_FAR = 0.99  # quantile of the gaps of other latents of the data, which counts as the limit of the known
_AT_ONCE = 8192


class SupportConfig(Config):
    """How many latents of the data are references."""

    references: int = 128


class Support(Head[SupportConfig]):
    """Some latents of the data; a latent farther than `known` from all of them is unlike the data."""

    kind = "support"
    config_type = SupportConfig
    references: Tensor
    known: Tensor

    def __init__(self, references: Float[Tensor, "N D"], known: float = 1.0) -> None:
        super().__init__()
        self.config = SupportConfig(references=len(references))
        self.register_buffer("references", references)
        self.register_buffer("known", torch.tensor(known, device=references.device))

    def gap(self, latents: Float[Tensor, "*axes D"]) -> Float[Tensor, "*axes"]:
        """Return how far latents lie from the nearest reference; values up to 1 count as known."""
        return nearest_gap(latents, self.references) / self.known

    def measure(self, others: Float[Tensor, "M D"]) -> None:
        """Set the limit `known` by the gaps of other latents of the same kind."""
        self.known.fill_(1.0)
        self.known.copy_(self.gap(others).quantile(_FAR).clamp_min(1e-6))

    @classmethod
    def build(cls, model: WorldModel, config: SupportConfig, **figures: Any) -> "Support":
        """Build it with as many references as `config` says, all zero."""
        return cls(torch.zeros(config.references, model.spec.latent_dim))


def measure_support(episodes: LatentEpisodes, *, seed: int, progress: Progress = SILENT) -> Support:
    """Draw references uniformly from the data's latents, and measure `known` on others.

    Raises:
        DataError: there are fewer than two latents.
    """
    device = episodes.latents.device
    inside = torch.arange(episodes.latents.shape[1], device=device) < episodes.lengths[:, None]
    every = episodes.latents[inside]
    if len(every) < 2:
        raise DataError(f"what is like the data is measured on at least 2 frames; got {len(every)}")
    generator = torch_generator(seed, "support", device=device)
    drawn = torch.randperm(len(every), generator=generator, device=device)
    kept = min(SupportConfig().references, len(every) // 2)
    support = Support(every[drawn[:kept]].clone())
    support.measure(every[drawn[kept : kept + _AT_ONCE]])
    return support


def nearest_gap(latents: Float[Tensor, "*axes D"], references: Float[Tensor, "N D"]) -> Float[Tensor, "*axes"]:
    """Return how far latents lie from the nearest reference.

    Computed by one matrix product; distances below its rounding are 0.
    """
    flat, references = latents.reshape(-1, latents.shape[-1]), references.to(latents)
    theirs = torch.linalg.vector_norm(references, dim=1).square()
    parts = [
        torch.addmm(theirs, some, references.T, alpha=-2).amin(dim=1) + torch.linalg.vector_norm(some, dim=1).square()
        for some in (flat.split(_AT_ONCE) if len(flat) > _AT_ONCE else (flat,))
    ]
    nearest = parts[0] if len(parts) == 1 else torch.cat(parts)
    return nearest.clamp_min(0).sqrt().reshape(latents.shape[:-1])
