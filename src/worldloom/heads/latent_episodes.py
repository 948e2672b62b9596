"""Episodes as latents of a frozen encoder: the training data of the heads."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from worldloom.core.actions import Walk
from worldloom.core.errors import DataError
from worldloom.core.progress import SILENT, Progress
from worldloom.core.seams import WorldModel
from worldloom.core.types import ActionBounds, Batched, Context, Observations
from worldloom.data import Frames


@dataclass(frozen=True, kw_only=True, eq=False)
class LatentEpisodes(Batched):
    """E episodes of latents, one block apart and padded at the end; `lengths` counts the latents of each episode."""

    latents: Float[Tensor, "E N D"]
    blocks: Float[Tensor, "E N-1 A"]  # blocks[:, t] leads from latent t to t + 1
    lengths: Int[Tensor, "E"]

    def __post_init__(self) -> None:
        if len(self.lengths) == 0 or int(self.lengths.min()) < 2 or int(self.lengths.max()) > self.latents.shape[1]:
            raise DataError(
                f"expected at least one latent episode, each with 2 to {self.latents.shape[1]} latents; got "
                f"lengths {self.lengths.tolist()[:8]}. Collect episodes longer than one block"
            )

    def __len__(self) -> int:
        return len(self.lengths)

    @classmethod
    def of(cls, episodes: Sequence[tuple[Float[Tensor, "_ D"], Float[Tensor, "_ A"]]]) -> "LatentEpisodes":
        """Pad and stack episodes, each given as its latents and the blocks between them."""
        if not episodes:
            raise DataError("expected at least one latent episode; got none. Collect episodes first")
        pad = torch.nn.utils.rnn.pad_sequence
        return cls(
            latents=pad([latents for latents, _ in episodes], batch_first=True),
            blocks=pad([blocks for _, blocks in episodes], batch_first=True),
            lengths=torch.tensor([len(latents) for latents, _ in episodes], device=episodes[0][0].device),
        )

    @property
    def step_length(self) -> float:
        """The mean Euclidean length of one model step, measured on these latents."""
        before, _, after = self.transitions()
        return float((after - before).norm(dim=-1).mean())

    def transitions(self) -> tuple[Float[Tensor, "M D"], Float[Tensor, "M A"], Float[Tensor, "M D"]]:
        """Return every latent that has a next one, the block between the two, and the next latent."""
        steps = torch.arange(self.blocks.shape[1], device=self.lengths.device)
        real = steps < (self.lengths - 1)[:, None]
        return self.latents[:, :-1][real], self.blocks[real], self.latents[:, 1:][real]

    def context(self, episodes: Int[Tensor, "M"], frames: Int[Tensor, "M"], size: int) -> Context:
        """Return the context of `size` latents that ends at each of these frames.

        Before the start of an episode, the first latent repeats and the blocks are zero, as in training windows.
        """
        places = frames[:, None] + torch.arange(1 - size, 1, device=frames.device)
        between = places[:, :-1]
        blocks = self.blocks[episodes[:, None], between.clamp_min(0)] * (between >= 0)[..., None]
        return Context(latents=self.latents[episodes[:, None], places.clamp_min(0)], actions=blocks)


def dream(
    model: WorldModel,
    episodes: LatentEpisodes,
    *,
    per_episode: int,
    horizon: int,
    walk: Walk,
    generator: torch.Generator,
) -> LatentEpisodes:
    """Imagine random walks of `horizon` blocks that start from random states of each episode.

    A walk keeps the environment layout of its episode (such as walls), because the start state determines it. Dream
    `e * per_episode + i` is the i-th of episode e; its first latent is the start state.
    """
    spec, device = model.spec, episodes.latents.device
    bounds = ActionBounds.of(spec, device)
    sources = torch.arange(len(episodes), device=device).repeat_interleave(per_episode)
    share = torch.rand(len(sources), generator=generator, device=device)
    frames = (share * episodes.lengths[sources]).long()
    blocks = walk.sample(spec, bounds, (len(sources), 1, horizon), generator)
    latents = []
    with torch.no_grad():
        for rows in torch.arange(len(sources), device=device).split(512):
            context = episodes.context(sources[rows], frames[rows], spec.context)
            latents.append(torch.cat([context.latents[:, -1:], model.rollout(context, blocks[rows])[:, 0]], dim=1))
    return LatentEpisodes(
        latents=torch.cat(latents), blocks=blocks[:, 0], lengths=torch.full_like(sources, horizon + 1)
    )


def with_dreams(
    model: WorldModel, episodes: LatentEpisodes, sets: int, *, horizon: int, walk: Walk, generator: torch.Generator
) -> list[LatentEpisodes]:
    """Return the episodes and `sets` sets of dreams, each with one dream per episode; see `dream`."""
    dreams = [
        dream(model, episodes, per_episode=1, horizon=horizon, walk=walk, generator=generator) for _ in range(sets)
    ]
    return [episodes, *dreams]


def encode_episodes(
    model: WorldModel,
    cache: Frames,
    *,
    episodes: np.ndarray | None = None,
    offset: int = 0,
    frames_at_once: int = 1024,
    progress: Progress = SILENT,
) -> LatentEpisodes:
    """Encode every `block`-th frame of each episode, starting at frame `offset`.

    Episodes with fewer than two such frames are left out.

    Raises:
        DataError: every episode has fewer than two such frames.
    """
    block = model.spec.block
    device = model.device
    chosen = np.arange(len(cache.lengths)) if episodes is None else np.asarray(episodes)
    counts = (cache.lengths[chosen] - offset) // block + 1
    chosen, counts = chosen[counts >= 2], counts[counts >= 2]
    if len(chosen) == 0:
        raise DataError(f"no episode is longer than one block of {block} steps; collect longer episodes")
    rows = np.concatenate(
        [cache.starts[episode] + offset + block * np.arange(n) for episode, n in zip(chosen, counts, strict=True)]
    )
    parts: list[Tensor] = []
    with progress.task("encode", len(rows), "frame") as task, torch.no_grad():
        for part in np.array_split(rows, range(frames_at_once, len(rows), frames_at_once)):
            observations = Observations.from_numpy(
                None if cache.pixels is None else cache.pixels[part],
                None if cache.vector is None else cache.vector[part],
            )
            parts.append(model.encode(observations.to(device)))
            task.advance(len(part))
    latents = torch.cat(parts).split(counts.tolist())
    # The actions of every block. No block follows the last frame.
    blocks = [
        torch.from_numpy(cache.actions[first : first + block * (n - 1)].reshape(n - 1, -1)).to(device)
        for first, n in zip(cache.starts[chosen] + offset, counts, strict=True)
    ]
    return LatentEpisodes.of(list(zip(latents, blocks, strict=True)))
