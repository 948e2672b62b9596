"""The base of the experts: logging policies that see the simulator's state and bring it to one target after another.

Published logs come from such experts. No agent receives what an expert sees.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping

import numpy as np
from jaxtyping import Float32, Float64

from worldloom.core.errors import ConfigError
from worldloom.core.types import ActionSpec, Observations

Infos = Mapping[str, Float64[np.ndarray, "L"]]


class ExpertEpisode(ABC):
    """An expert in one episode."""

    @property
    @abstractmethod
    def target(self) -> Float64[np.ndarray, "L"]:
        """The target at present."""

    @abstractmethod
    def act(self, infos: Infos) -> Float64[np.ndarray, "A"]:
        """Return the next action, in multiples of the largest action."""


class Expert(ABC):
    """A logging policy that sees infos of the simulator.

    Attributes:
        sees: the names of the infos.
        size: the number of action values that the expert returns.
    """

    sees: tuple[str, ...]
    size: int

    def __init__(self, action: ActionSpec, name: str) -> None:
        if action.size != self.size or action.discrete:
            raise ConfigError(
                f"the policy {name!r} needs {self.size} continuous action values; this environment has {action.size} "
                f"{'discrete' if action.discrete else 'continuous'} ones. Use another policy, such as directed-walk"
            )
        self._low, self._high = np.array(action.low), np.array(action.high)
        self._episodes: list[ExpertEpisode] = []
        self._infos: Mapping[str, Float64[np.ndarray, "B L"]] = {}

    @abstractmethod
    def begin(self, generator: np.random.Generator) -> ExpertEpisode:
        """Return the expert of one episode."""

    @property
    def targets(self) -> Float64[np.ndarray, "B L"]:
        """The target of each episode at present."""
        return np.stack([episode.target for episode in self._episodes])

    def reset(self, generators: list[np.random.Generator]) -> None:
        """Start one episode for each generator."""
        self._episodes = [self.begin(generator) for generator in generators]

    def see(self, infos: Mapping[str, Float64[np.ndarray, "B L"]]) -> None:
        """Receive the infos `sees` of the frames for which the next actions are chosen."""
        self._infos = infos

    def act(self, observations: Observations) -> Float32[np.ndarray, "B A"]:
        """Return one action for each episode."""
        states = self.states(observations)
        wishes = [episode.act(state) for episode, state in zip(self._episodes, states, strict=True)]
        actions: np.ndarray = np.clip(np.stack(wishes) * self._high, self._low, self._high).astype(np.float32)
        return actions

    def states(self, observations: Observations) -> list[Infos]:
        """Return what each episode's expert sees: by default the infos `sees`, and not the observations."""
        return [{name: self._infos[name][row] for name in self.sees} for row in range(len(self._episodes))]
