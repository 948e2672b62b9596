"""Selects what a full memory forgets: redundant memories, but never all memories of a region of the latent space.

Memories are assigned to cells around centres from greedy k-centre search, whose radius is at most twice the smallest
possible radius (Gonzalez, 1985). The most crowded cells lose memories first, from the oldest and least surprising. Four
groups are protected, in this order, until they fill half of the memories kept: the centres, the newest memories, the
most surprising ones, and those with an outcome.
"""

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from worldloom.memory.records import Memories

_SAMPLE = 65_536  # memories that the search for centres uses
_NEWEST, _SURPRISING = 0.1, 0.05  # protected fractions of the memories kept


def choose(memories: Memories, keep: int, generator: np.random.Generator) -> Bool[np.ndarray, "M"]:
    """Return a mask of the `keep` memories that stay."""
    count = len(memories)
    if keep >= count:
        return np.ones(count, bool)
    latents = torch.from_numpy(memories.latents)
    sample = np.sort(generator.choice(count, min(count, _SAMPLE), replace=False))
    centres = sample[_spread(latents[torch.from_numpy(sample)], max(1, min(1024, keep // 8)))]
    cells = _nearest(latents, latents[torch.from_numpy(centres)])
    first = _protected(memories, keep, centres)
    # The rank of a memory in its cell: protected ones first, then recent and surprising ones.
    age = np.argsort(np.argsort(-memories.ids)) / count
    calm = np.argsort(np.argsort(-np.nan_to_num(memories.surprises, nan=-np.inf), kind="stable")) / count
    order = np.lexsort((age + calm, ~first, cells))
    begins = np.searchsorted(cells[order], cells[order])
    rank = np.empty(count, np.int64)
    rank[order] = np.arange(count) - begins
    rank[first] = -1
    # Each cell keeps the same number of memories, the largest for which all fit; the remaining places go to the next
    # rank.
    kept: np.ndarray = np.zeros(count, bool)
    kept[np.lexsort((age, rank))[:keep]] = True
    return kept


def _protected(memories: Memories, keep: int, centres: Int64[np.ndarray, "C"]) -> Bool[np.ndarray, "M"]:
    newest = np.argsort(-memories.ids)
    measured = np.flatnonzero(~np.isnan(memories.surprises))
    surprising = measured[np.argsort(-memories.surprises[measured])]
    labelled = newest[memories.outcomes[newest] != ""]
    protected = np.zeros(len(memories), bool)
    room = keep // 2
    for some in (centres, newest[: int(_NEWEST * keep)], surprising[: int(_SURPRISING * keep)], labelled):
        some = some[~protected[some]][: room - int(protected.sum())]
        protected[some] = True
    return protected


def _spread(latents: Float[Tensor, "M D"], count: int) -> Int64[np.ndarray, "C"]:
    """Return centres by greedy k-centre search: each centre is the latent farthest from all earlier centres."""
    chosen = [0]
    gaps = (latents - latents[0]).square().sum(dim=1)
    while len(chosen) < count and float(gaps.max()) > 0:
        chosen.append(int(gaps.argmax()))
        gaps = torch.minimum(gaps, (latents - latents[chosen[-1]]).square().sum(dim=1))
    return np.array(chosen, np.int64)


def _nearest(latents: Float[Tensor, "M D"], centres: Float[Tensor, "C D"]) -> Int64[np.ndarray, "M"]:
    half = centres.square().sum(dim=1) / 2
    cells: np.ndarray = torch.cat([(half - some @ centres.T).argmin(dim=1) for some in latents.split(8192)]).numpy()
    return cells
