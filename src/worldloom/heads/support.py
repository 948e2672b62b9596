"""A sample of the data's latents, and the distance of other latents from it."""

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

_FAR = 0.99  # quantile of the gaps within the data; a larger gap counts as unknown
_AT_ONCE = 8192


class SupportConfig(Config):
    """The configuration of a `Support`: the number of latents of the data that serve as references."""

    references: int = 128


class Support(Head[SupportConfig]):
    """A sample of the data's latents. A latent farther than `known` from all of the sample is unlike the data."""

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
        """Return the distance to the nearest reference in units of `known`; a latent with a gap up to 1 is known.

        If `known` is not a finite number above 0, no latent is known.
        """
        usable = self.known.isfinite() & (self.known > 0)
        return torch.where(usable, nearest_gap(latents, self.references) / self.known, torch.inf)

    def check(self) -> None:
        """Check that all tensors are finite, and that `known` is above 0; otherwise no latent would be known."""
        super().check()
        if not bool(self.known > 0):
            raise DataError(
                f"'known', the largest gap that counts as near the data, must be above 0; got {float(self.known):g}"
            )

    def measure(self, others: Float[Tensor, "M D"]) -> None:
        """Set the threshold `known` to the 99th percentile of the gaps of `others`, data that are not references.

        Raises:
            DataError: a latent is not finite.
        """
        self.known.fill_(1.0)
        self.known.copy_(self.gap(others).quantile(_FAR).clamp_min(1e-6))
        self.check()

    @classmethod
    def build(cls, model: WorldModel, config: SupportConfig, **figures: Any) -> "Support":
        """Build a support whose references are zero until they are loaded."""
        return cls(torch.zeros(config.references, model.spec.latent_dim))


def measure_support(episodes: LatentEpisodes, *, seed: int, progress: Progress = SILENT) -> Support:
    """Sample references uniformly from the data's latents, and measure `known` on latents that are not references.

    Raises:
        DataError: there are fewer than two latents.
    """
    device = episodes.latents.device
    inside = torch.arange(episodes.latents.shape[1], device=device) < episodes.lengths[:, None]
    every = episodes.latents[inside]
    if len(every) < 2:
        raise DataError(f"the support needs at least 2 latents of the data; got {len(every)}. Collect more frames")
    generator = torch_generator(seed, "support", device=device)
    drawn = torch.randperm(len(every), generator=generator, device=device)
    kept = min(SupportConfig().references, len(every) // 2)
    support = Support(every[drawn[:kept]].clone())
    support.measure(every[drawn[kept : kept + _AT_ONCE]])
    return support


def nearest_gap(latents: Float[Tensor, "*axes D"], references: Float[Tensor, "N D"]) -> Float[Tensor, "*axes"]:
    """Return the distance of each latent to the nearest reference.

    Distances are computed by matrix products; distances below their rounding error are returned as 0.
    """
    flat, references = latents.reshape(-1, latents.shape[-1]), references.to(latents)
    theirs = torch.linalg.vector_norm(references, dim=1).square()
    parts = [
        torch.addmm(theirs, some, references.T, alpha=-2).amin(dim=1) + torch.linalg.vector_norm(some, dim=1).square()
        for some in (flat.split(_AT_ONCE) if len(flat) > _AT_ONCE else (flat,))
    ]
    nearest = parts[0] if len(parts) == 1 else torch.cat(parts)
    return nearest.clamp_min(0).sqrt().reshape(latents.shape[:-1])
