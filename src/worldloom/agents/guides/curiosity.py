"""Curiosity: exploration of states that memory does not contain, guided by the model, without reward or goal."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Float32, Float64
from pydantic import Field
from torch import Tensor

from worldloom.agents.guides.landmarks import FollowConfig, LandmarkGuide
from worldloom.core.actions import Walk
from worldloom.core.config import Config
from worldloom.core.seams import WorldModel
from worldloom.core.seeds import torch_generator
from worldloom.core.types import ActionBounds, Context, Plan
from worldloom.heads import still
from worldloom.memory import Check, LandmarkGraph


class CuriosityConfig(Config):
    """How to search for new states; distances between latents are in units of the typical model step.

    From each landmark the model imagines `walks` random walks of `horizon` blocks. A walk that ends farther than
    `novelty` from every landmark gives its landmark a promise (see `CuriosityGuide.promise`). The guide chooses the
    landmark with the largest ratio of promise to cost. The cost is the number of blocks to reach the landmark, plus
    `overhead`. From this landmark the guide aims at the most novel end of its walks. Each such try lowers the
    landmark's promise. An imagined state that was tried but not found no longer counts as new.
    """

    walks: int = Field(default=16, ge=1)
    horizon: int = Field(default=4, ge=1)
    novelty: float = Field(default=1.5, gt=0)
    overhead: float = Field(default=4.0, gt=0)
    walk: Walk = Walk(slowest=1.0)
    follow: FollowConfig = FollowConfig(surprise=None)


@dataclass
class _Search:
    """The target of one environment: a landmark, then an imagined state beyond it."""

    landmark: int
    beyond: Tensor | None = None
    left: int = 0  # number of plans before another target is chosen
    gap: float = np.inf  # the smallest distance so far to `beyond`
    stalled: int = 0  # number of plans since the gap last fell by more than a tenth


class CuriosityGuide:
    """Aims a planning agent at landmarks from which the model imagines states that memory does not contain.

    The guide has no goal; `reset` uses only the number of goals.
    """

    def __init__(
        self,
        model: WorldModel,
        graph: LandmarkGraph,
        config: CuriosityConfig | None = None,
        *,
        check: Check | None = None,
        seed: int = 0,
    ) -> None:
        self.graph, self.config = graph, config or CuriosityConfig()
        self._model = model
        self._generator = torch_generator(seed, "curiosity", device=model.device)
        self._travel = LandmarkGuide(graph, self.config.follow, check=check)
        self._searches: list[_Search | None] = []
        self._imagined = 0  # number of landmarks from which walks were imagined
        self._ends = torch.zeros(0, model.spec.latent_dim)
        self._owners = np.zeros(0, np.int64)
        self._gaps = np.zeros(0, np.float32)
        self._tries = np.zeros(0)
        self._refuted = self._ends

    def reset(self, goal: Float[Tensor, "B D"]) -> None:
        """Begin in a new batch of environments; keep what was imagined and tried before."""
        self._travel.reset(goal)
        self._searches = [None] * len(goal)

    def select(self, places: Sequence[int]) -> None:
        """Keep only these environments, given by their places in the last batch, in this order."""
        self._travel.select(places)
        self._searches = [self._searches[place] for place in places]

    def __call__(self, context: Context, followed: Plan | None, blocks: int) -> Float[Tensor, "B D"]:
        """Return the latents that each environment should aim at."""
        here, before = context.latents[:, -1], len(self.graph)
        places = self._travel.locate(here, followed, blocks)
        self._imagine()
        promise = self.promise()
        sought: dict[int, Tensor] = {}
        for row, place in enumerate(places):
            beyond = self._seek(row, place, place >= before, here[row].cpu(), promise)
            if beyond is not None:
                sought[row] = beyond
        aims = self._travel.aim(here)
        for row, beyond in sought.items():
            aims[row] = beyond.to(aims)
        return aims

    def promise(self) -> Float64[np.ndarray, "N"]:
        """Return each landmark's promise: how new the states are that the model imagines from it.

        A landmark's promise is ((gap - `novelty`) / (1 + tries))^2, where the gap is the distance from the most novel
        end of its walks to the nearest landmark. Squaring prefers one very new state, such as the far side of a door,
        to slightly new ones, such as the other side of a corridor.
        """
        promise = np.zeros(len(self.graph))
        np.maximum.at(promise, self._owners, np.square(self._gaps - self.config.novelty, dtype=np.float64))
        less: np.ndarray = promise / (1 + self._tries) ** 2
        return less

    def _seek(
        self, row: int, place: int, new: bool, here: Float[Tensor, "D"], promise: Float64[np.ndarray, "N"]
    ) -> Tensor | None:
        """Return the imagined state to try now, or None on the way to the landmark from which it was imagined."""
        search = self._searches[row]
        if search is not None:
            search.left -= 1
            if search.beyond is not None:
                gap = float((here - search.beyond).norm())
                search.stalled = 0 if gap < 0.9 * search.gap else search.stalled + 1
                search.gap = min(gap, search.gap)
                if search.stalled >= 2:
                    search.left = 0
            if search.left <= 0 or (search.beyond is not None and new):
                if search.beyond is None:
                    self._tries[search.landmark] += 1  # the landmark was not reached
                elif not new:
                    self._refute(search.beyond)
                search = None
        if search is None:
            blocks = self.graph.blocks_from(place)
            gain = promise / (blocks + self.config.overhead)
            best = int(gain.argmax())
            search = _Search(landmark=best, left=3 * int(min(blocks[best], 1e6)) + 4 * self.config.follow.patience)
            self._searches[row] = search
            if best != place:
                self._travel.redirect(row, self.graph.latents[best])
        if search.beyond is None and place == search.landmark:
            ends = np.flatnonzero(self._owners == place)
            search.left = self.config.horizon + 1
            search.beyond = self._ends[ends[self._gaps[ends].argmax()]] if len(ends) else self._somewhere(place)
            self._tries[place] += 1
        return search.beyond

    def _imagine(self) -> None:
        """Imagine walks from new landmarks, and drop ends that are no longer new."""
        graph, first = self.graph, self._imagined
        if len(graph) > first:
            fresh = graph.latents[first:]
            self._gaps = np.minimum(self._gaps, self._gaps_to(self._ends, fresh))
            ends = self._walk_from(fresh)
            owners = np.repeat(np.arange(first, len(graph)), self.config.walks)
            gaps = np.minimum(graph.nearest(ends)[1], self._gaps_to(ends, self._refuted) * self.config.novelty)
            self._ends = torch.cat([self._ends, ends])
            self._owners, self._gaps = np.concatenate([self._owners, owners]), np.concatenate([self._gaps, gaps])
            self._tries = np.concatenate([self._tries, np.zeros(len(fresh))])
            self._imagined = len(graph)
        new = self._gaps > self.config.novelty
        if not new.all():
            self._ends, self._owners, self._gaps = self._ends[torch.from_numpy(new)], self._owners[new], self._gaps[new]

    def _refute(self, state: Float[Tensor, "D"]) -> None:
        """Record that an imagined state was not found: states within one step of it no longer count as new."""
        self._refuted = torch.cat([self._refuted, state[None]])
        self._gaps = np.minimum(self._gaps, self._gaps_to(self._ends, state[None]) * self.config.novelty)

    def _gaps_to(self, ends: Float[Tensor, "E D"], states: Float[Tensor, "M D"]) -> Float32[np.ndarray, "E"]:
        if not len(ends) or not len(states):
            return np.full(len(ends), np.inf, np.float32)
        gaps: np.ndarray = (torch.cdist(ends, states).min(dim=1).values / self.graph.step_length).numpy()
        return gaps

    def _walk_from(self, latents: Float[Tensor, "M D"]) -> Float[Tensor, "_ D"]:
        """Return the ends of imagined walks from these latents, `walks` for each."""
        spec, config = self._model.spec, self.config
        bounds = ActionBounds.of(spec, self._model.device)
        ends = []
        for some in latents.split(256):
            shape = (len(some), config.walks, config.horizon)
            walks = config.walk.sample(spec, bounds, shape, self._generator)
            context = still(some.to(self._model.device), self._model)
            with torch.inference_mode():
                ends.append(self._model.rollout(context, walks)[:, :, -1].flatten(0, 1).cpu())
        return torch.cat(ends)

    def _somewhere(self, place: int) -> Float[Tensor, "D"]:
        """Return the end of one imagined walk from a landmark that has no new states left."""
        ends = self._walk_from(self.graph.latents[place : place + 1])
        drawn = torch.randint(len(ends), (1,), generator=self._generator, device=self._model.device)
        chosen: Tensor = ends[int(drawn)]
        return chosen
