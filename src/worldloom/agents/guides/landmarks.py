"""Far goals over landmarks: the next subgoal on the route, and the edges that have failed."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from worldloom.agents.mpc import Guide
from worldloom.core.config import Config
from worldloom.core.errors import PlanningError
from worldloom.core.types import Context, Plan
from worldloom.memory import Check, LandmarkGraph, Route

_LOOKS = 7  # maximum number of further appearances of a goal in a world that has changed


class FollowConfig(Config):
    """How to follow a route over landmarks; lengths are in typical model steps, costs in blocks.

    Attributes:
        hops: the subgoal is this many landmarks ahead.
        near: the agent aims directly at a goal that is at most this many blocks away over landmarks.
        sight: without a known route, the agent aims directly at a goal whose latent is at most this far away.
        patience: after this many plans without progress, the agent follows one landmark at a time; after the same
            number of further plans without progress, the edge to the next landmark counts as failed.
        arrival: a plan whose prediction does not come this close to its landmark uses up the patience at once.
        surprise: a distance between prediction and observation. The world counts as changed if the last plan predicted
            a known place, the observation is farther than `surprise` from the prediction, and the observation is unlike
            the known states around that place. None disables the check.
        learn: whether observations on the way extend and change the graph.
    """

    hops: int = Field(default=2, ge=1)
    near: float = Field(default=3.0, ge=0)
    sight: float = Field(default=4.0, ge=0)
    patience: int = Field(default=3, ge=1)
    arrival: float = Field(default=1.0, gt=0)
    surprise: float | None = Field(default=0.6, gt=0)
    learn: bool = True


@dataclass(frozen=True, kw_only=True)
class Outlook:
    """The state of the route to a goal: its `kind`, the cost in `blocks`, and the landmark `nearest` to the goal.

    "known": a route over landmarks leads to the goal. "sight": the goal is near enough to plan without a route. "lost":
    a known route has failed; the agent aims at the goal itself. "unknown": the goal was never observed, or no known
    route leads to it; the agent goes to the reachable landmark that is nearest to the goal, and stays.
    """

    kind: Literal["known", "sight", "lost", "unknown"]
    blocks: float
    nearest: int
    gap: float  # distance from the nearest known place to the goal, in typical model steps


@runtime_checkable
class Beyond(Guide, Protocol):
    """A guide that chooses subgoals for environments without a known route."""

    def aim(self, context: Context, rows: Sequence[int]) -> Float[Tensor, "_ D"]:
        """Return the latents that the environments `rows` should aim at."""
        ...


@dataclass
class _Way:
    """One environment's route; the goal has several appearances if the world has changed on the way."""

    goals: list[Tensor]
    route: Route | None
    at: int = -1
    best: float = np.inf  # the fewest blocks to go since the route was found
    waited: int = 0  # number of plans since then
    careful: bool = False  # whether to follow one landmark at a time
    aim: int = -1  # the landmark of the last plan
    vain: bool = False  # whether the last plan was predicted not to reach `aim`
    known: bool = False  # whether a route was known in this episode
    beyond: bool = False  # whether landmarks lead no closer to the goal


class LandmarkGuide:
    """Aims a planning agent at landmarks on the cheapest route to its goal.

    States on the way are added to the graph; an edge that fails is dropped, and the route is searched again. Where no
    route is known, the agent goes to the reachable landmark that is nearest to the goal; from there, `beyond` (if
    given) chooses subgoals. `events` contains the event of each environment at the last plan: "arrived" at the goal,
    "changed" (the world has changed), "failed" (an edge of the route) or "".
    """

    def __init__(
        self,
        graph: LandmarkGraph,
        config: FollowConfig | None = None,
        *,
        check: Check | None = None,
        beyond: Beyond | None = None,
    ) -> None:
        self.graph, self.config, self._check, self._beyond = graph, config or FollowConfig(), check, beyond
        self._ways: list[_Way] = []
        self.outlook: list[Outlook] = []
        self.events: list[str] = []

    def reset(self, goal: Float[Tensor, "B D"]) -> None:
        """Begin an episode with a goal for each environment."""
        if goal.shape[1] != self.graph.latents.shape[1]:
            raise PlanningError(
                f"expected a goal of {self.graph.latents.shape[1]} values, as in the landmark graph; got "
                f"{goal.shape[1]}. Build the graph with the same model"
            )
        self._ways = [_Way(goals=[each], route=self.graph.route(each)) for each in goal]
        self.outlook = []
        if self._beyond is not None:
            self._beyond.reset(goal)

    def select(self, places: Sequence[int]) -> None:
        """Keep only these environments, given by their places in the last batch, in this order."""
        self._ways = [self._ways[place] for place in places]
        self.outlook = [self.outlook[place] for place in places] if self.outlook else []
        if self._beyond is not None:
            self._beyond.select(places)

    def redirect(self, row: int, goal: Float[Tensor, "D"]) -> None:
        """Change the goal of one environment during an episode."""
        self._ways[row] = _Way(goals=[goal], route=self.graph.route(goal), at=self._ways[row].at)

    def __call__(self, context: Context, followed: Plan | None, blocks: int) -> Float[Tensor, "B D"]:
        """Return the subgoal of each environment, and update `outlook`."""
        here = context.latents[:, -1]
        self.locate(here, followed, blocks)
        aims = self.aim(here)
        if self._beyond is not None and (rows := [row for row in range(len(here)) if self._is_beyond(row)]):
            aims[rows] = self._beyond.aim(context, rows).to(aims)
            for row in rows:
                self._ways[row].aim = -1
        return aims

    def _is_beyond(self, row: int) -> bool:
        """Whether landmarks lead an environment no closer to its goal: no route is known, and no landmark remains."""
        way, unknown = self._ways[row], self.outlook[row].kind != "known"
        way.beyond = unknown and (way.beyond or way.aim in (way.at, -1))
        return way.beyond

    def aim(self, here: Float[Tensor, "B D"]) -> Float[Tensor, "B D"]:
        """Return the subgoal of each environment: a landmark, or the goal itself. Call `locate` first."""
        aims, self.outlook = torch.empty_like(here), []
        for row, way in enumerate(self._ways):
            goal = min(way.goals, key=lambda each: float((here[row] - each.to(here)).norm()))
            aim, outlook = self._aim(row, way, here[row], goal)
            if float((here[row] - goal.to(here)).norm()) <= self.graph.step_length:
                self.events[row] = "arrived"
            aims[row] = goal if aim is None else self.graph.latents[aim]
            way.aim = -1 if aim is None else aim
            self.outlook.append(outlook)
        return aims

    def locate(self, here: Float[Tensor, "B D"], followed: Plan | None, blocks: int) -> list[int]:
        """Locate the environments; return the landmark of each, or -1 for an environment at no known place.

        `followed` is the plan that led here; its first `blocks` blocks were executed.
        """
        self.events = [""] * len(here)
        if followed is not None:
            self._judge(followed)
            if self.config.learn and self.config.surprise is not None and self._check is not None and blocks:
                self._notice(here, followed.latents[:, blocks - 1], self._check)
        graph, before = self.graph, len(self.graph)
        if self.config.learn:
            places = graph.add(here, np.array([way.at for way in self._ways]))
            if self._check is not None and len(graph) > before:
                graph.link(self._check, range(before, len(graph)))
        else:
            places, gaps = graph.nearest(here)
            places = np.where(gaps <= graph.config.reach, places, -1)
        for way, place in zip(self._ways, places, strict=True):
            way.at = int(place)
        return [way.at for way in self._ways]

    def _judge(self, followed: Plan) -> None:
        """Record which plans were predicted not to arrive at their landmark."""
        for row, way in enumerate(self._ways):
            if way.aim >= 0:
                aim = self.graph.latents[way.aim].to(followed.latents)
                gap = float((followed.latents[row] - aim).norm(dim=1).min()) / self.graph.step_length
                way.vain = gap > self.config.arrival

    def _notice(self, here: Float[Tensor, "B D"], predicted: Float[Tensor, "B D"], check: Check) -> None:
        """Record which worlds have changed: the prediction is close to known places, but the observation is not.

        A step that a wall stopped also misses its prediction, but stays close to known places.
        """
        assert self.config.surprise is not None
        shifts = here - predicted
        misses = shifts.norm(dim=1).cpu().numpy() / self.graph.step_length
        known = self.graph.nearest(predicted)[1] <= self.graph.config.spacing
        surprised = np.flatnonzero(known & (misses > self.config.surprise))
        if not len(surprised):
            return
        aside = self.graph.off(here[surprised]) ** 2 - self.graph.off(predicted[surprised]) ** 2
        for row in surprised[aside > 0.5 * misses[surprised] ** 2].tolist():
            way = self._ways[row]
            self.events[row] = "changed"
            ((place,), _) = self.graph.nearest(predicted[row : row + 1])
            self.graph.changed(int(place), shifts[row], check)
            way.goals = self._looks(way.goals, shifts[row])
            way.route, way.at, way.best, way.waited, way.careful = None, -1, np.inf, 0, False

    def _looks(self, goals: list[Tensor], shift: Float[Tensor, "D"]) -> list[Tensor]:
        """Return the possible appearances of a goal after its world changed: the original one, and the newest others.

        Appearances that are very similar to another are left out; otherwise each change would double their number.
        """
        looks = list(goals)
        for goal in goals:
            other = goal + shift.to(goal)
            gaps = [float((other - look).norm()) for look in looks]
            if min(gaps) > self.graph.config.spacing * self.graph.step_length:
                looks.append(other)
        return [looks[0], *looks[1:][-_LOOKS:]]

    def _aim(
        self, row: int, way: _Way, here: Float[Tensor, "D"], goal: Float[Tensor, "D"]
    ) -> tuple[int | None, Outlook]:
        """Return the landmark to aim at (None for the goal itself), and the outlook."""
        graph, config = self.graph, self.config
        if way.at >= 0 and (way.route is None or not way.route.knows(way.at)):
            way.route = graph.route(*way.goals)
        (nearest,), (gap,) = graph.nearest(goal[None])
        if way.at < 0 or way.route is None or not way.route.knows(way.at):
            away = float((here - goal).norm()) / graph.step_length
            kind: Literal["sight", "lost", "unknown"] = "lost" if way.known else "unknown"
            if away <= config.sight or not len(graph):
                kind = "sight"
            outlook = Outlook(kind=kind, blocks=np.inf, nearest=int(nearest), gap=float(gap))
            return (self._nearest_reachable(way, goal) if kind == "unknown" else None), outlook
        way.known = True
        self._watch(row, way)
        blocks = float(way.route.blocks[way.at])
        outlook = Outlook(kind="known", blocks=blocks, nearest=int(nearest), gap=float(gap))
        if blocks <= (1 if way.careful else config.near):
            return None, outlook
        return self._next(way), outlook

    def _watch(self, row: int, way: _Way) -> None:
        """Track progress; without progress for too long, mark the current edge as failed and find another route."""
        assert way.route is not None
        blocks = float(way.route.blocks[way.at])
        vain, way.vain = way.vain and way.aim == self._next(way), False
        way.waited += 1
        if blocks < way.best:
            way.best, way.waited, way.careful = blocks, 0, False
            return
        if way.waited < self.config.patience and not vain:
            return
        way.waited = 0
        if not way.careful:
            way.careful = True
            return
        target = int(way.route.hop[way.at])
        if target >= 0:
            self.graph.failed(way.at, target)
            self.events[row] = "failed"
            way.route = self.graph.route(*way.goals)
        way.best = np.inf

    def _next(self, way: _Way) -> int:
        """Return the landmark to aim at on a known route."""
        assert way.route is not None
        return way.route.ahead(way.at, 1 if way.careful else self.config.hops)

    def _nearest_reachable(self, way: _Way, goal: Float[Tensor, "D"]) -> int | None:
        """Return the next landmark toward the reachable landmark that is nearest to the goal."""
        if way.at < 0:
            return None
        gaps = (self.graph.latents - goal.cpu()).norm(dim=1).numpy()
        gaps[~np.isfinite(self.graph.blocks_from(way.at))] = np.inf
        best = int(gaps.argmin())
        route = self.graph.route(self.graph.latents[best])
        return best if route is None or not route.knows(way.at) else route.ahead(way.at, self.config.hops)
