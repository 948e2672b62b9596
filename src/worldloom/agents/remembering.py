"""Writes an agent's experience to its episodic memory while it acts, and restores its landmarks from the memory."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Float32
from torch import Tensor

from worldloom.core.errors import CheckpointError
from worldloom.core.types import Context, Observations, Plan
from worldloom.memory import Check, EpisodicMemory, LandmarkGraph, Where


class Rememberer:
    """Appends a record of each environment to the memory at each plan, and saves the landmarks when an episode begins.

    A record is stored before the agent acts. `events` returns the last event of each environment.
    """

    def __init__(
        self,
        memory: EpisodicMemory,
        graph: LandmarkGraph,
        *,
        replan: int,
        events: Callable[[], Sequence[str]] | None = None,
    ) -> None:
        self._memory, self._graph, self._replan, self._events = memory, graph, replan, events
        self._episodes = np.zeros(0, np.int64)
        self._steps = 0

    def begin(self, environments: int) -> None:
        """Begin new episodes; flush the memory and save the landmarks."""
        self.save()
        self._episodes, self._steps = self._memory.new_episodes(environments), 0

    def select(self, places: Sequence[int]) -> None:
        """Keep only these environments, given by their places in the last batch, in this order."""
        self._episodes = self._episodes[list(places)]

    def __call__(self, observations: Observations, context: Context, followed: Plan | None, blocks: int) -> None:
        """Remember the current observations; the first `blocks` blocks of the plan `followed` led to them."""
        latents, led, surprises = context.latents[:, -1], None, None
        if followed is not None and blocks:
            led = followed.actions[:, blocks - 1]
            surprises = self._surprises(latents, followed.latents[:, blocks - 1])
        self._memory.append(
            latents,
            episodes=self._episodes,
            steps=np.full(len(latents), self._steps),
            actions=led,
            surprises=surprises,
            outcomes=self._events() if self._events is not None else None,
            observations=observations,
        )
        self._steps += self._replan

    def save(self) -> None:
        """Flush the memory and save the landmarks."""
        self._memory.flush()
        newest = self._memory.read(newest=1)
        self._graph.save(_stem(self._memory), memories=int(newest.ids[-1]) + 1 if len(newest) else 0)

    def _surprises(self, latents: Float[Tensor, "B D"], predicted: Float[Tensor, "B D"]) -> Float32[np.ndarray, "B"]:
        """Return the distance between observed and predicted latents, in typical model steps."""
        misses: np.ndarray = ((latents - predicted).norm(dim=1) / self._graph.step_length).float().cpu().numpy()
        return misses


def recall_landmarks(
    memory: EpisodicMemory,
    empty: LandmarkGraph,
    *,
    block: int,
    check: Check | None = None,
) -> LandmarkGraph:
    """Return the landmarks of a memory: the saved landmarks, extended by the memories that were added later.

    If no landmarks were saved, or their configuration differs from that of `empty`, the landmarks are rebuilt from all
    memories. Rebuilt landmarks contain no failed edges.
    """
    graph, seen = _saved(memory, empty) or (empty, 0)
    memories = memory.read(Where())
    memories = memories[memories.ids >= seen]
    if len(memories):
        before = len(graph)
        graph.learn(torch.from_numpy(memories.latents.copy()), memories.episodes, memories.steps // block)
        if check is not None:
            graph.link(check, range(before, len(graph)))
    return graph


def _saved(memory: EpisodicMemory, empty: LandmarkGraph) -> tuple[LandmarkGraph, int] | None:
    stem = _stem(memory)
    try:
        graph, seen = LandmarkGraph.load(stem, empty.spec)
    except CheckpointError:
        return None  # none saved, or saved before the memories were re-encoded: they are rebuilt
    return (graph, seen) if graph.config == empty.config else None


def _stem(memory: EpisodicMemory) -> Path:
    return memory.path / "landmarks"
