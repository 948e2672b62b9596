"""What an agent sees goes into its episodic memory while it acts, and its landmarks come back from there."""

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
    """Appends a memory of each environment with each plan; the landmarks are saved beside when an episode begins.

    A memory is acknowledged before the agent acts on. `events` says in a word what each environment met.
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
        """Begin new stretches of experience; what was seen so far is tended, and the landmarks are saved."""
        self.save()
        self._episodes, self._steps = self._memory.new_episodes(environments), 0

    def select(self, places: Sequence[int]) -> None:
        """Narrow to these environments, given by their places in the last batch, in this order."""
        self._episodes = self._episodes[list(places)]

    def __call__(self, observations: Observations, context: Context, followed: Plan | None, blocks: int) -> None:
        """Remember what is seen now, after so many blocks of the plan that was followed."""
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
        """Tend the memory and save the landmarks."""
        self._memory.flush()
        newest = self._memory.read(newest=1)
        self._graph.save(_stem(self._memory), memories=int(newest.ids[-1]) + 1 if len(newest) else 0)

    def _surprises(self, latents: Float[Tensor, "B D"], predicted: Float[Tensor, "B D"]) -> Float32[np.ndarray, "B"]:
        """Return how far what is seen is from what was predicted, in typical model steps."""
        misses: np.ndarray = ((latents - predicted).norm(dim=1) / self._graph.step_length).float().cpu().numpy()
        return misses


def recall_landmarks(
    memory: EpisodicMemory,
    empty: LandmarkGraph,
    *,
    block: int,
    check: Check | None = None,
) -> LandmarkGraph:
    """Return the landmarks of a memory: those that were saved, and of what was remembered since.

    They are built anew from the memories where none were saved or the configuration is another than that of `empty`.
    What failed is remembered by saved ones only.
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
        return None  # none yet, or of the model before the memories were encoded anew: they are built again
    return (graph, seen) if graph.config == empty.config else None


def _stem(memory: EpisodicMemory) -> Path:
    return memory.path / "landmarks"
