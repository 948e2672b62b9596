"""The latents of the data: where a model knows its way, and how far from there anything lies."""

from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from worldloom.core.config import Config
from worldloom.core.errors import DataError
from worldloom.core.progress import SILENT, Progress
from worldloom.core.seams import WorldModel
from worldloom.core.seeds import torch_generator
from worldloom.heads.head import read_head, restore, save_head
from worldloom.heads.latent_episodes import LatentEpisodes

_KIND = "support"
_FAR = 0.99  # of other latents of the data lie nearer to the references than what counts as known
_AT_ONCE = 8192


class SupportConfig(Config):
    """How many latents of the data are kept."""

    references: int = 128


class Support(nn.Module):
    """Some latents of the data; what lies farther than `known` from all of them is not like the data."""

    references: Tensor
    known: Tensor

    def __init__(self, references: Float[Tensor, "N D"], known: float = 1.0) -> None:
        super().__init__()
        self.register_buffer("references", references)
        self.register_buffer("known", torch.tensor(known, device=references.device))

    def gap(self, latents: Float[Tensor, "*axes D"]) -> Float[Tensor, "*axes"]:
        """Return how far latents lie from all references: 1 is as far as is still known."""
        return nearest_gap(latents, self.references) / self.known

    def measure(self, others: Float[Tensor, "M D"]) -> None:
        """Call known what is as near as others of the same kind."""
        self.known.fill_(1.0)
        self.known.copy_(self.gap(others).quantile(_FAR).clamp_min(1e-6))

    def save(self, stem: Path | str, model: WorldModel) -> str:
        """Write it beside the model whose latents they are; return the digest."""
        return save_head(stem, self, kind=_KIND, model=model, config=SupportConfig(references=len(self.references)))

    @classmethod
    def load(cls, stem: Path | str, model: WorldModel) -> "Support":
        """Read what `save` wrote.

        Raises:
            CheckpointError: it is missing, damaged or of another model.
        """
        tensors, metadata = read_head(stem, kind=_KIND, model=model)
        references = torch.zeros(SupportConfig.parse(metadata["config"]).references, model.spec.latent_dim)
        return restore(stem, cls(references).to(model.device), tensors)


def measure_support(
    episodes: LatentEpisodes, config: SupportConfig | None = None, *, seed: int, progress: Progress = SILENT
) -> Support:
    """Keep latents of the data, drawn uniformly, and measure on others how near is near.

    Raises:
        DataError: there are fewer than two latents.
    """
    config = config or SupportConfig()
    device = episodes.latents.device
    inside = torch.arange(episodes.latents.shape[1], device=device) < episodes.lengths[:, None]
    every = episodes.latents[inside]
    if len(every) < 2:
        raise DataError(f"what is like the data is measured on at least 2 frames; got {len(every)}")
    generator = torch_generator(seed, "support", device=device)
    drawn = torch.randperm(len(every), generator=generator, device=device)
    kept = min(config.references, len(every) // 2)
    support = Support(every[drawn[:kept]].clone())
    support.measure(every[drawn[kept : kept + _AT_ONCE]])
    return support


def nearest_gap(latents: Float[Tensor, "*axes D"], references: Float[Tensor, "N D"]) -> Float[Tensor, "*axes"]:
    """Return how far latents lie from the nearest reference.

    By one matrix product; what is nearer than rounding tells is at 0.
    """
    flat, references = latents.reshape(-1, latents.shape[-1]), references.to(latents)
    theirs = torch.linalg.vector_norm(references, dim=1).square()
    parts = [
        torch.addmm(theirs, some, references.T, alpha=-2).amin(dim=1) + torch.linalg.vector_norm(some, dim=1).square()
        for some in (flat.split(_AT_ONCE) if len(flat) > _AT_ONCE else (flat,))
    ]
    nearest = parts[0] if len(parts) == 1 else torch.cat(parts)
    return nearest.clamp_min(0).sqrt().reshape(latents.shape[:-1])
