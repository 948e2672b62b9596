"""Runs methods over the splits of a protocol, all on the same starts and goals."""

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from worldloom.core.errors import ConfigError, DataError
from worldloom.core.hardware import describe_hardware
from worldloom.core.progress import SILENT, Progress, ProgressTask
from worldloom.core.seams import Agent
from worldloom.core.types import ActionSpec, Observations
from worldloom.envs import Frame, VectorWorld
from worldloom.evaluation import protocol as protocols
from worldloom.evaluation.goals import Tasks, draw_tasks, measured
from worldloom.evaluation.results import EpisodeResult, Latency, Recording, Results, Row
from worldloom.evaluation.world import ActingRules, Worlds, tell_applied

_log = logging.getLogger(__name__)
_RECORDING_BYTES = 256 * 2**20  # limit on the frames in memory while a batch runs; only a few episodes are kept


@runtime_checkable
class Witness(Protocol):
    """Observes an agent during an evaluation. Unlike the agent, it also receives the world's infos."""

    def begin(self, agent: Agent, size: int) -> None:
        """Begin episodes in `size` environments; the agent has the goals of these episodes."""
        ...

    def saw(self, frame: Frame, step: int) -> None:
        """Receive the frame of the running environments at a step, before the agent acts on it."""
        ...


def evaluate(
    protocol: protocols.Protocol,
    methods: Mapping[str, Callable[[], Agent]],
    *,
    batch: int = 50,
    record: int = 4,
    model: str = "",
    training_seed: int | None = None,
    provenance: Mapping[str, Any] | None = None,
    witness: Witness | None = None,
    rules: ActingRules | None = None,
    progress: Progress = SILENT,
) -> Results:
    """Evaluate each method on each split, up to `batch` environments at a time.

    `methods` maps names to factories. Each factory is called once and returns an agent that acts for a batch; see
    `worldloom.core.seams.Agent` for its optional methods. An agent with `plan_seconds` in its statistics is timed by
    its plans, any other agent by the calls of its `act`. The first `record` successes and the first `record` failures
    of each row become recordings. `model` is the fingerprint of the weights. A `witness` observes the episodes. A plant
    runs one episode at a time. Under `rules`, methods that may not act on a plant are skipped with a warning, and
    listed in the results' provenance as `skipped`.

    Raises:
        ConfigError: there is no method, the batch is below 1, a factory returns something other than an `Agent`, or
            `Worlds` or `Worlds.skipped` raises it.
        EnvironmentFailure: an environment raises an exception, returns values that are not finite, or starts
            differently for the same seed; the message contains the method, the split and the episode's seed.
        DataError: a method returns an action that is out of bounds or not finite.
    """
    if not methods or batch < 1:
        raise ConfigError(
            f"expected at least one method and a batch of at least 1; got {len(methods)} methods and batch {batch}"
        )
    agents: dict[str, Agent] = {}
    rows: list[Row] = []
    recordings: list[Recording] = []
    with Worlds(protocol, batch, rules) as worlds:
        skipped = worlds.skipped(list(methods))
        for name, why in skipped.items():
            _log.warning("method %r is skipped: %s", name, why)
        methods = {name: factory for name, factory in methods.items() if name not in skipped}
        for split, conventions in protocol.splits.items():
            chunks: list[Tasks] = []
            place, left = 0, conventions.episodes
            with progress.task(f"{split}: drawing goals", left, "episode") as task:
                while left:
                    size = min(worlds.batch, left)
                    where = f"drawing goals of split {split!r}"
                    tasks, place = draw_tasks(protocol, split, worlds.of(size), place, where, guard=worlds.guard)
                    chunks.append(tasks if worlds.repeats else tasks.unrepeated())
                    left -= size
                    task.advance(size)
            for name, factory in methods.items():
                if name not in agents:
                    agents[name] = _agent_of(factory, name)
                with progress.task(f"{split}: {name}", conventions.episodes, "episode") as task:
                    run = _MethodRun(protocol, split, name, agents[name], record, task, witness)
                    for tasks in chunks:
                        run.episodes_of(tasks, worlds.of(len(tasks.seeds)))
                rows.append(run.row())
                recordings.extend(run.recordings)
    return Results(
        protocol=protocol,
        rows=tuple(rows),
        hardware=describe_hardware(),
        model=model,
        training_seed=training_seed,
        provenance={**(provenance or {}), **({"skipped": skipped} if skipped else {})},
        recordings=tuple(recordings),
    )


def explore(
    protocol: protocols.Protocol,
    agent: Agent,
    steps: int,
    *,
    batch: int = 50,
    rules: ActingRules | None = None,
    progress: Progress = SILENT,
) -> int:
    """Let an agent explore the worlds of a protocol's episodes, each for `steps` steps; return the number of worlds.

    Raises:
        ConfigError: the agent does not explore, or see `Worlds`.
        EnvironmentFailure: an environment raises an exception, or returns values that are not finite.
        DataError: the agent returns an action that is out of bounds or not finite.
    """
    seen = 0
    if not agent.explores:
        raise ConfigError(
            f"{type(agent).__name__} does not explore; choose the agent of a method that does, such as landmarks"
        )
    with Worlds(protocol, batch, rules) as worlds:
        for split, conventions in protocol.splits.items():
            with progress.task(f"{split}: exploring", conventions.episodes * steps, "step") as task:
                place, left = 0, conventions.episodes
                while left:
                    size = min(worlds.batch, left)
                    where, world = f"drawing the worlds of split {split!r}", worlds.of(size)
                    tasks, place = draw_tasks(protocol, split, world, place, where, guard=worlds.guard)
                    tasks = tasks if worlds.repeats else tasks.unrepeated()
                    _explore(protocol, split, tasks, world, agent, steps, f"split {split!r}", task)
                    left -= size
                seen += conventions.episodes
    return seen


def _explore(
    protocol: protocols.Protocol,
    split: str,
    tasks: Tasks,
    world: VectorWorld,
    agent: Agent,
    steps: int,
    where: str,
    task: ProgressTask | None = None,
) -> None:
    options = protocol.splits[split]
    changed = options.model_copy(update={"task": {**options.task, **options.exploration_task}})
    meanwhile = protocol.model_copy(update={"splits": {split: changed}})
    frame = tasks.begin(meanwhile, split, world, f"{where}, exploring")
    explorer = agent.explorer()
    for _ in range(steps):
        tell_applied(world, explorer.resume)
        actions = explorer.act(frame.observations).detach().cpu().numpy()
        frame = world.step(actions, frame.rows, limited=explorer.limited)
        if task is not None:
            task.advance(len(frame.rows))


def _agent_of(factory: Callable[[], Agent], name: str) -> Agent:
    agent = factory()
    if not isinstance(agent, Agent):
        raise ConfigError(
            f"expected an Agent from method {name!r}; got {type(agent).__name__}. Subclass worldloom.core.seams.Agent"
        )
    return agent


@dataclass
class _MethodRun:
    """One method on one split: collects episodes, times and recordings."""

    protocol: protocols.Protocol
    split: str
    method: str
    agent: Agent
    record: int
    task: ProgressTask
    witness: Witness | None = None
    episodes: list[EpisodeResult] = field(default_factory=list)
    recordings: list[Recording] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._clock = _Clock(self.agent)

    def row(self) -> Row:
        """Return the row of the episodes run so far."""
        return Row(method=self.method, split=self.split, episodes=tuple(self.episodes), latency=self._clock.latency())

    def episodes_of(self, tasks: Tasks, world: VectorWorld) -> None:
        """Run one episode for each start and goal until all have ended."""
        size, budgets, skip = world.size, tasks.budgets, self.protocol.frame_skip
        where = f"method {self.method!r}, split {self.split!r}"
        steps = self.protocol.splits[self.split].exploration
        if steps and self.agent.explores:
            _explore(self.protocol, self.split, tasks, world, self.agent, steps, where)
        frame = tasks.begin(self.protocol, self.split, world, where)
        self.agent.reset(tasks.goal)
        if self.witness is not None:
            self.witness.begin(self.agent, size)
        audience = _Audience(self.agent, frame.observations)
        film = _Film(self.protocol, tasks, self.record)
        actions = _middle(world.action, size)
        ended: dict[int, EpisodeResult] = {}
        broken, satisfied = np.zeros(size, np.int64), np.zeros(size, np.int64)
        step = 0
        while True:
            now, distance = _verdict(self.protocol, tasks, world, frame)
            satisfied[frame.rows] = np.where(now, satisfied[frame.rows] + 1, 0)
            reached = satisfied[frame.rows] >= self.protocol.success.hold
            broken[frame.rows] += _broken(self.protocol, frame)
            film.add(frame)
            if self.witness is not None:
                self.witness.saw(frame, step)
            finished = reached | frame.over | (step >= budgets[frame.rows])
            for index in np.flatnonzero(finished):
                row = int(frame.rows[index])
                far = None if distance is None else float(distance[index])
                place = len(self.episodes) + row
                ended[row] = _episode(place, tasks, row, bool(reached[index]), step, far, int(broken[row]))
            if finished.any():
                so_far = (*self.episodes, *ended.values())
                figures = {"success": float(np.mean([episode.success for episode in so_far]))}
                if self.protocol.limits:
                    figures["violated"] = float(np.mean([episode.violated for episode in so_far]))
                self.task.advance(int(finished.sum()), **figures)
                audience.concludes(frame[finished], ended)
                frame = frame[~finished]
            if not len(frame.rows):
                break
            if step % skip == 0:
                observations = audience.sees(frame)
                tell_applied(world, self.agent.resume)
                with self._clock.decision(len(frame.rows) if self.agent.narrows else size):
                    chosen = self.agent.act(observations)
                actions[frame.rows] = self._shaped(chosen, world)[audience.places(frame)]
            frame = world.step(actions, frame.rows, limited=self.agent.limited)
            step += 1
        self._keep(film, tasks, ended)
        self.episodes.extend(ended[row] for row in range(size))

    def _shaped(self, chosen: Tensor, world: VectorWorld) -> np.ndarray:
        """Return an agent's actions as an array.

        Raises:
            DataError: the actions do not have the size of the world's actions.
        """
        actions: np.ndarray = chosen.detach().cpu().numpy()
        if actions.shape[1:] != (world.action.size,):
            raise DataError(
                f"method {self.method!r} returned actions of {' x '.join(map(str, actions.shape[1:]))} values; "
                f"{self.protocol.env_id} expects {world.action.size}. Choose a protocol of the world that the method "
                f"was made for"
            )
        return actions

    def _keep(self, film: "_Film", tasks: Tasks, ended: Mapping[int, EpisodeResult]) -> None:
        for outcome in (True, False):
            missing = self.record - sum(recording.success is outcome for recording in self.recordings)
            rows = [row for row in film.rows if ended[row].success is outcome][: max(missing, 0)]
            self.recordings.extend(film.recording(row, self.method, self.split, ended[row]) for row in rows)


class _Audience:
    """Selects the observations for an agent: those of running environments if the agent `narrows`, otherwise all."""

    def __init__(self, agent: Agent, first: Observations) -> None:
        self._agent = agent
        self._latest = first.map(lambda part: part.clone())
        self._rows = np.arange(first.axes[0])

    def sees(self, frame: Frame) -> Observations:
        if self._agent.narrows:
            if len(frame.rows) < len(self._rows):
                self._agent.select([int(place) for place in np.flatnonzero(np.isin(self._rows, frame.rows))])
                self._rows = frame.rows
            return frame.observations
        for latest, new in (
            (self._latest.pixels, frame.observations.pixels),
            (self._latest.vector, frame.observations.vector),
        ):
            if latest is not None and new is not None:
                latest[torch.from_numpy(frame.rows)] = new
        return self._latest

    def places(self, frame: Frame) -> np.ndarray:
        """Return the rows of the agent's actions that belong to the environments of a frame."""
        return np.arange(len(frame.rows)) if self._agent.narrows else frame.rows

    def concludes(self, frame: Frame, ended: Mapping[int, EpisodeResult]) -> None:
        """Report to the agent how the episodes of a frame ended."""
        places = np.flatnonzero(np.isin(self._rows, frame.rows)) if self._agent.narrows else frame.rows
        outcomes = [_outcome(ended[row]) for row in frame.rows.tolist()]
        self._agent.conclude(places.tolist(), frame.observations, outcomes)


class _Film:
    """Stores the frames and paths of as many environments of a batch as memory allows."""

    def __init__(self, protocol: protocols.Protocol, tasks: Tasks, record: int) -> None:
        self._protocol, self._tasks = protocol, tasks
        pixels = tasks.goal.observations.pixels
        each = 1 if pixels is None else pixels[0].numel() * (int(tasks.budgets.max()) + 1)
        fits = min(len(tasks.seeds), max(record, _RECORDING_BYTES // each))
        self.rows = range(fits if record else 0)
        self._frames: dict[int, list[np.ndarray]] = {row: [] for row in self.rows}
        self._path: dict[int, list[np.ndarray]] = {row: [] for row in self.rows}

    def add(self, frame: Frame) -> None:
        if self._protocol.success.source == "environment":
            points = frame.info("position")
        else:
            points = self._protocol.success.vector(frame)
        for index, row in enumerate(frame.rows):
            if row in self._frames:
                if frame.observations.pixels is not None:
                    self._frames[row].append(frame.observations.pixels[index].numpy())
                if points is not None:
                    self._path[row].append(np.array(points[index], np.float64).reshape(-1))

    def recording(self, row: int, method: str, split: str, episode: EpisodeResult) -> Recording:
        goal, target = self._tasks.goal.observations.pixels, self._tasks.target
        return Recording(
            method=method,
            split=split,
            seed=episode.seed,
            success=episode.success,
            steps=episode.steps,
            frames=np.stack(self._frames[row]) if self._frames[row] else None,
            goal=None if goal is None else goal[row].numpy(),
            path=np.stack(self._path[row]) if self._path[row] else None,
            target=None if target is None else target[row],
        )


class _Clock:
    """Times decisions by the agent's own statistics of its plans or, without these, by calls of `act`."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent
        self._plans_before = len(agent.statistics.get("plan_seconds", ()))
        self._seconds: list[float] = []
        self._environments: list[int] = []

    @contextmanager
    def decision(self, environments: int) -> Iterator[None]:
        """Time one call for `environments` environments."""
        start = time.perf_counter()
        yield
        self._seconds.append(time.perf_counter() - start)
        self._environments.append(environments)

    def latency(self) -> Latency | None:
        """Return a summary of the times."""
        statistics = self._agent.statistics
        if "plan_seconds" not in statistics:
            return Latency.of("act", self._seconds, self._environments)
        seconds, environments = (
            list(statistics[key])[self._plans_before :] for key in ("plan_seconds", "plan_environments")
        )
        return Latency.of("plan", seconds, [int(count) for count in environments])


def _verdict(
    protocol: protocols.Protocol, tasks: Tasks, world: VectorWorld, frame: Frame
) -> tuple[np.ndarray, np.ndarray | None]:
    """Return which rows satisfy the success rule now, and each row's distance to the goal (None if not measured)."""
    values = measured(protocol, world, frame)
    if values is None or tasks.target is None:
        for name in ("success", "is_success"):
            word = frame.info(name)
            if word is not None:
                return word.reshape(len(frame.rows)).astype(bool), None
        return frame.terminated, None
    distance = protocol.success.distance(values, tasks.target[frame.rows])
    return distance <= protocol.success.radius, distance


def _broken(protocol: protocols.Protocol, frame: Frame) -> np.ndarray:
    """Return which rows break a limit of the protocol.

    Raises:
        ConfigError: the world does not provide the info of a limit.
    """
    broken = np.zeros(len(frame.rows), bool)
    for limit in protocol.limits:
        broken |= limit.broken(frame.numbers(limit.name, "the limit"))
    return broken


def _episode(
    index: int, tasks: Tasks, row: int, success: bool, steps: int, end_distance: float | None, violations: int
) -> EpisodeResult:
    def at(values: np.ndarray | None) -> float | None:
        return None if values is None else float(values[row])

    return EpisodeResult(
        index=index,
        seed=tasks.seeds[row],
        success=success,
        steps=steps,
        budget=int(tasks.budgets[row]),
        shortest_steps=at(tasks.shortest_steps),
        start_distance=at(tasks.start_distance),
        end_distance=end_distance,
        wall_between=None if tasks.wall_between is None else bool(tasks.wall_between[row]),
        task=tasks.digests[row],
        violations=violations,
    )


def _outcome(episode: EpisodeResult) -> str:
    words = ["reached"] * episode.success + ["limit broken"] * bool(episode.violated)
    return ", ".join(words) or "not reached"


def _middle(spec: ActionSpec, size: int) -> np.ndarray:
    """Return an action within bounds for each environment, for episodes that have ended."""
    return np.tile((np.array(spec.low, np.float32) + np.array(spec.high, np.float32)) / 2, (size, 1))
