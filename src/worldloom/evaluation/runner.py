"""Runs methods over the splits of a protocol, all on the same starts and goals."""

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Int64
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
    (results,) = evaluate_together(
        [protocol],
        methods,
        batch=batch,
        record=record,
        model=model,
        training_seed=training_seed,
        provenance=provenance,
        witness=witness,
        rules=rules,
        progress=progress,
    )
    return results


def evaluate_together(
    judging: Sequence[protocols.Protocol],
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
) -> list[Results]:
    """Evaluate under several protocols at once; return the results of each, in their order.

    The protocols may differ in what success is, and in which pairs of start and goal they skip. A pair that several
    protocols draw is run only once, until all of them have judged the episode. See `evaluate` for all else.

    Raises:
        ConfigError: there is no protocol, two differ in something else, or see `evaluate`.
        EnvironmentFailure, DataError: see `evaluate`.
    """
    if not methods or batch < 1:
        raise ConfigError(
            f"expected at least one method and a batch of at least 1; got {len(methods)} methods and batch {batch}"
        )
    _require_alike(judging)
    protocol = judging[0]
    agents: dict[str, Agent] = {}
    rows: list[list[Row]] = [[] for _ in judging]
    recordings: list[list[Recording]] = [[] for _ in judging]
    with Worlds(protocol, batch, rules) as worlds:
        skipped = worlds.skipped(list(methods))
        for name, why in skipped.items():
            _log.warning("method %r is skipped: %s", name, why)
        methods = {name: factory for name, factory in methods.items() if name not in skipped}
        for split, conventions in protocol.splits.items():
            with progress.task(f"{split}: drawing goals", conventions.episodes * len(judging), "episode") as task:
                drawn = [_draw_all(each, split, worlds, task) for each in judging]
            shared = list(_batches(judging, drawn, worlds.batch))
            for name, factory in methods.items():
                if name not in agents:
                    agents[name] = _agent_of(factory, name)
                with progress.task(f"{split}: {name}", sum(len(each.tasks) for each in shared), "episode") as task:
                    run = _MethodRun(judging, split, name, agents[name], record, task, witness)
                    for each in shared:
                        run.episodes_of(each, worlds.of(len(each.tasks)))
                for number, scores in enumerate(run.scores):
                    rows[number].append(run.row(scores))
                    recordings[number].extend(scores.recordings)
    return [
        Results(
            protocol=each,
            rows=tuple(rows[number]),
            hardware=describe_hardware(),
            model=model,
            training_seed=training_seed,
            provenance={**(provenance or {}), **({"skipped": skipped} if skipped else {})},
            recordings=tuple(recordings[number]),
        )
        for number, each in enumerate(judging)
    ]


# What protocols that are evaluated together may differ in: what success is, and which pairs they draw or skip.
_JUDGING = frozenset({"name", "version", "success", "min_distance", "count_solved", "crossing", "pairs_of"})


def _require_alike(judging: Sequence[protocols.Protocol]) -> None:
    if not judging:
        raise ConfigError("expected at least one protocol; got none")
    first, *others = (each.model_dump(exclude=set(_JUDGING)) for each in judging)
    for protocol, values in zip(judging[1:], others, strict=True):
        if differ := [name for name, value in values.items() if value != first[name]]:
            raise ConfigError(
                f"protocols that are evaluated together may differ only in their success rules and pairs; "
                f"{protocol.title} and {judging[0].title} differ in {', '.join(differ)}. Evaluate them one by one"
            )


def _draw_all(protocol: protocols.Protocol, split: str, worlds: Worlds, task: ProgressTask) -> Tasks:
    """Draw the starts and goals of a split."""
    chunks: list[Tasks] = []
    place, left = 0, protocol.splits[split].episodes
    while left:
        size = min(worlds.batch, left)
        where = f"drawing goals of split {split!r}"
        tasks, place = draw_tasks(protocol, split, worlds.of(size), place, where, guard=worlds.guard)
        chunks.append(tasks if worlds.repeats else tasks.unrepeated())
        left -= size
        task.advance(size)
    return Tasks.joined(chunks)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Batch:
    """Different tasks to run at the same time. `places` has, for each protocol, their rows in `drawn`, or -1."""

    tasks: Tasks
    drawn: list[Tasks]
    places: Int64[np.ndarray, "P R"]


def _batches(judging: Sequence[protocols.Protocol], drawn: list[Tasks], size: int) -> Iterator[_Batch]:
    """Unite the tasks of the protocols, and divide them into batches."""
    number: dict[tuple[int, str, int], int] = {}
    for tasks in drawn:
        for key in tasks.identities():
            number.setdefault(key, len(number))
    places = np.full((len(judging), len(number)), -1)
    for row, tasks in enumerate(drawn):
        places[row, [number[key] for key in tasks.identities()]] = np.arange(len(tasks))
    owner = (places >= 0).argmax(axis=0)  # the first protocol that drew the task
    for first in range(0, len(number), size):
        some = np.arange(first, min(first + size, len(number)))
        parts = [drawn[owner[task]].rows([int(places[owner[task], task])]).unjudged() for task in some]
        yield _Batch(tasks=Tasks.joined(parts), drawn=drawn, places=places[:, some])


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
class _Judged:
    """The episodes and recordings of one method on one split, as one protocol judges them."""

    protocol: protocols.Protocol
    episodes: dict[int, EpisodeResult] = field(default_factory=dict)
    recordings: list[Recording] = field(default_factory=list)


@dataclass
class _MethodRun:
    """One method on one split: runs the episodes, which each protocol judges, and measures the times."""

    judging: Sequence[protocols.Protocol]
    split: str
    method: str
    agent: Agent
    record: int
    task: ProgressTask
    witness: Witness | None = None

    def __post_init__(self) -> None:
        self._clock = _Clock(self.agent)
        self.scores = [_Judged(protocol) for protocol in self.judging]

    def row(self, scores: _Judged) -> Row:
        """Return the row of the episodes run so far."""
        episodes = tuple(scores.episodes[index] for index in sorted(scores.episodes))
        return Row(method=self.method, split=self.split, episodes=episodes, latency=self._clock.latency())

    def episodes_of(self, batch: _Batch, world: VectorWorld) -> None:
        """Run one episode for each start and goal until all have ended."""
        protocol, tasks = self.judging[0], batch.tasks
        size, budgets, skip = world.size, tasks.budgets, protocol.frame_skip
        where = f"method {self.method!r}, split {self.split!r}"
        steps = protocol.splits[self.split].exploration
        if steps and self.agent.explores:
            _explore(protocol, self.split, tasks, world, self.agent, steps, where)
        frame = tasks.begin(protocol, self.split, world, where)
        self.agent.reset(tasks.goal)
        if self.witness is not None:
            self.witness.begin(self.agent, size)
        audience = _Audience(self.agent, frame.observations)
        judges = [
            _Judge(each, drawn, places, self.record)
            for each, drawn, places in zip(self.judging, batch.drawn, batch.places, strict=True)
        ]
        actions = _middle(world.action, size)
        ended: dict[int, EpisodeResult] = {}
        step = 0
        while True:
            over = frame.over | (step >= budgets[frame.rows])
            finished = np.all([judge.see(frame, world, step, over) for judge in judges], axis=0)
            if self.witness is not None:
                self.witness.saw(frame, step)
            if finished.any():
                for row in frame.rows[finished].tolist():
                    ended[row] = next(judge.ended[row] for judge in judges if row in judge.ended)
                self._report(judges[0], int(finished.sum()))
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
        for judge, scores in zip(judges, self.scores, strict=True):
            scores.episodes.update({episode.index: episode for episode in judge.ended.values()})
            scores.recordings.extend(judge.recordings(self.method, self.split, scores.recordings))

    def _report(self, judge: "_Judge", finished: int) -> None:
        """Report progress, with the figures of the first protocol."""
        so_far = (*self.scores[0].episodes.values(), *judge.ended.values())
        figures = {}
        if so_far:
            figures["success"] = float(np.mean([episode.success for episode in so_far]))
            if self.judging[0].limits:
                figures["violated"] = float(np.mean([episode.violated for episode in so_far]))
        self.task.advance(finished, **figures)

    def _shaped(self, chosen: Tensor, world: VectorWorld) -> np.ndarray:
        """Return an agent's actions as an array.

        Raises:
            DataError: the actions do not have the size of the world's actions.
        """
        actions: np.ndarray = chosen.detach().cpu().numpy()
        if actions.shape[1:] != (world.action.size,):
            raise DataError(
                f"method {self.method!r} returned actions of {' x '.join(map(str, actions.shape[1:]))} values; "
                f"{self.judging[0].env_id} expects {world.action.size}. Choose a protocol of the world that the method "
                f"was made for"
            )
        return actions


class _Judge:
    """Judges the episodes of a batch that one protocol has drawn; `ended` has their results by row of the batch."""

    def __init__(self, protocol: protocols.Protocol, tasks: Tasks, places: Int64[np.ndarray, "R"], record: int) -> None:
        self._protocol, self._tasks, self._places, self._record = protocol, tasks, places, record
        self._film = _Film(protocol, tasks, places, record)
        self._open = places >= 0
        self._broken, self._satisfied = np.zeros((2, len(places)), np.int64)
        self.ended: dict[int, EpisodeResult] = {}

    def see(self, frame: Frame, world: VectorWorld, step: int, over: Bool[np.ndarray, "R"]) -> Bool[np.ndarray, "R"]:
        """Judge a frame, and return which of its rows need no further judgement. Episodes end where `over` is set."""
        judged = self._open[frame.rows]
        if judged.any():
            mine = frame if judged.all() else frame[judged]
            self._film.add(mine)
            targets = None if self._tasks.target is None else self._tasks.target[self._places[mine.rows]]
            now, distance = _verdict(self._protocol, targets, world, mine)
            self._satisfied[mine.rows] = np.where(now, self._satisfied[mine.rows] + 1, 0)
            self._broken[mine.rows] += _broken(self._protocol, mine)
            reached = self._satisfied[mine.rows] >= self._protocol.success.hold
            for index in np.flatnonzero(reached | over[judged]):
                row = int(mine.rows[index])
                far = None if distance is None else float(distance[index])
                place, broken = int(self._places[row]), int(self._broken[row])
                self.ended[row] = _episode(self._tasks, place, bool(reached[index]), step, far, broken)
                self._open[row] = False
        decided: np.ndarray = ~self._open[frame.rows]
        return decided

    def recordings(self, method: str, split: str, before: Sequence[Recording]) -> Iterator[Recording]:
        """Return the first successes and failures, unless enough are recorded already."""
        for outcome in (True, False):
            missing = self._record - sum(recording.success is outcome for recording in before)
            rows = [row for row in self._film.rows if self.ended[row].success is outcome][: max(missing, 0)]
            yield from [self._film.recording(row, method, split, self.ended[row]) for row in rows]


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

    def __init__(self, protocol: protocols.Protocol, tasks: Tasks, places: Int64[np.ndarray, "R"], record: int) -> None:
        self._protocol, self._tasks, self._places = protocol, tasks, places
        pixels = tasks.goal.observations.pixels
        each = 1 if pixels is None else pixels[0].numel() * (int(tasks.budgets.max()) + 1)
        fits = max(record, _RECORDING_BYTES // each)
        self.rows: list[int] = np.flatnonzero(places >= 0)[: fits if record else 0].tolist()
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
        goal, target, place = self._tasks.goal.observations.pixels, self._tasks.target, int(self._places[row])
        return Recording(
            method=method,
            split=split,
            seed=episode.seed,
            success=episode.success,
            steps=episode.steps,
            frames=np.stack(self._frames[row]) if self._frames[row] else None,
            goal=None if goal is None else goal[place].numpy(),
            path=np.stack(self._path[row]) if self._path[row] else None,
            target=None if target is None else target[place],
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
    protocol: protocols.Protocol, targets: np.ndarray | None, world: VectorWorld, frame: Frame
) -> tuple[np.ndarray, np.ndarray | None]:
    """Return which rows satisfy the success rule now, and each row's distance to the goal (None if not measured)."""
    values = measured(protocol, world, frame)
    if values is None or targets is None:
        for name in ("success", "is_success"):
            word = frame.info(name)
            if word is not None:
                return word.reshape(len(frame.rows)).astype(bool), None
        return frame.terminated, None
    distance = protocol.success.distance(values, targets)
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
    tasks: Tasks, index: int, success: bool, steps: int, end_distance: float | None, violations: int
) -> EpisodeResult:
    def at(values: np.ndarray | None) -> float | None:
        return None if values is None else float(values[index])

    return EpisodeResult(
        index=index,
        seed=tasks.seeds[index],
        success=success,
        steps=steps,
        budget=int(tasks.budgets[index]),
        shortest_steps=at(tasks.shortest_steps),
        start_distance=at(tasks.start_distance),
        end_distance=end_distance,
        wall_between=None if tasks.wall_between is None else bool(tasks.wall_between[index]),
        task=tasks.digests[index],
        violations=violations,
    )


def _outcome(episode: EpisodeResult) -> str:
    words = ["reached"] * episode.success + ["limit broken"] * bool(episode.violated)
    return ", ".join(words) or "not reached"


def _middle(spec: ActionSpec, size: int) -> np.ndarray:
    """Return an action within bounds for each environment, for episodes that have ended."""
    return np.tile((np.array(spec.low, np.float32) + np.array(spec.high, np.float32)) / 2, (size, 1))
