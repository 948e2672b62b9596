"""Starts and goals, sampled once and shared by all methods."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float64

from worldloom.core.errors import ConfigError, EnvironmentFailure
from worldloom.core.seams import Policy, SafePolicy, SeeingPolicy
from worldloom.core.seeds import derive_seed
from worldloom.core.types import Goal, Observations
from worldloom.envs import Frame, VectorWorld
from worldloom.evaluation.protocol import Protocol
from worldloom.evaluation.world import naming, tell_applied

_CANDIDATES = 20  # maximum number of seeds tried per logged goal
_CROSSING_CANDIDATES = 500  # ... if start and goal must lie on different sides of a line: 1% of short walks cross it


@dataclass(frozen=True, kw_only=True)
class Tasks:
    """B starts and goals. An array is None if the world does not provide it."""

    seeds: tuple[int, ...]
    goal: Goal
    target: np.ndarray | None  # (B, L): the success rule's vector at the goal
    start_distance: np.ndarray | None  # (B,)
    shortest_steps: np.ndarray | None  # (B,)
    wall_between: np.ndarray | None  # (B,) bool
    budgets: np.ndarray  # (B,) environment steps
    before: tuple[np.ndarray, ...]  # (K, A) each: the actions from the reset to the start
    digests: tuple[str, ...]  # of each start and goal observation
    exact: bool = True  # whether a repeated start must have the same digest as before

    def __len__(self) -> int:
        return len(self.seeds)

    def identities(self) -> list[tuple[int, str, int]]:
        """Return what identifies each task: its seed, its digest and its budget."""
        return list(zip(self.seeds, self.digests, map(int, self.budgets), strict=True))

    def rows(self, rows: Sequence[int]) -> "Tasks":
        """Return the tasks of these rows."""

        def some(values: np.ndarray | None) -> np.ndarray | None:
            return None if values is None else values[list(rows)]

        return Tasks(
            seeds=tuple(self.seeds[row] for row in rows),
            goal=Goal(observations=self.goal.observations[list(rows)]),
            target=some(self.target),
            start_distance=some(self.start_distance),
            shortest_steps=some(self.shortest_steps),
            wall_between=some(self.wall_between),
            budgets=self.budgets[list(rows)],
            before=tuple(self.before[row] for row in rows),
            digests=tuple(self.digests[row] for row in rows),
            exact=self.exact,
        )

    @classmethod
    def joined(cls, parts: Sequence["Tasks"]) -> "Tasks":
        """Return the tasks of several parts in one; an array is None if a part lacks it."""

        def whole(arrays: list[np.ndarray | None]) -> np.ndarray | None:
            present = [array for array in arrays if array is not None]
            return np.concatenate(present) if len(present) == len(arrays) else None

        return cls(
            seeds=tuple(seed for part in parts for seed in part.seeds),
            goal=Goal(observations=_joined([part.goal.observations for part in parts])),
            target=whole([part.target for part in parts]),
            start_distance=whole([part.start_distance for part in parts]),
            shortest_steps=whole([part.shortest_steps for part in parts]),
            wall_between=whole([part.wall_between for part in parts]),
            budgets=np.concatenate([part.budgets for part in parts]),
            before=tuple(actions for part in parts for actions in part.before),
            digests=tuple(digest for part in parts for digest in part.digests),
            exact=all(part.exact for part in parts),
        )

    def unjudged(self) -> "Tasks":
        """Return the same tasks without what a protocol measures of them."""
        return replace(self, target=None, start_distance=None)

    def unrepeated(self) -> "Tasks":
        """Return the same tasks, for a world that cannot repeat a start exactly."""
        return replace(self, exact=False)

    def begin(self, protocol: Protocol, split: str, world: VectorWorld, where: str) -> Frame:
        """Reset the world to the starts.

        Raises:
            EnvironmentFailure: the world fails, or the same seed and actions lead to a different start.
        """
        names = naming(world, self.seeds, where)
        if protocol.goal_source == "world":
            frame = world.reset(self.seeds, names, options={"task": protocol.task(split)})
        else:
            frame = world.replay(self.seeds, self.before, names)
        self._check(frame, where)
        return frame

    def _check(self, start: Frame, where: str) -> None:
        for row, seed in enumerate(self.seeds):
            if self.exact and _digest(start.observations[row], self.goal.observations[row]) != self.digests[row]:
                raise EnvironmentFailure(
                    f"{where}, episode seed {seed}: a second reset with the same seed returned a different "
                    f"observation, so goals may be unreachable and methods may have different starts. Take all "
                    f"randomness of the environment from self.np_random"
                )


def goal_policy_generator(episode_seed: int) -> np.random.Generator:
    """Return the random generator of the logging policy on its way to the goal of one episode."""
    return np.random.default_rng(derive_seed(episode_seed, "goal-policy"))


def draw_tasks(
    protocol: Protocol,
    split: str,
    world: VectorWorld,
    first: int,
    where: str,
    *,
    guard: Callable[[Policy], SafePolicy] | None = None,
) -> tuple[Tasks, int]:
    """Draw one start and goal per environment in `world`, from episode index `first` on.

    Also return the next unused index. If `guard` is given, it converts the logging policy to one that obeys a rule
    set.

    Raises:
        ConfigError: too few goals of the logging policy are far enough from their starts.
        EnvironmentFailure: the world fails, or does not provide a goal.
    """
    if protocol.goal_source == "world":
        seeds = [protocol.episode_seed(split, first + row) for row in range(world.size)]
        return _world_tasks(protocol, split, world, seeds, where), first + world.size
    return _logged_tasks(protocol, split, world, first, where, guard)


def _world_tasks(protocol: Protocol, split: str, world: VectorWorld, seeds: list[int], where: str) -> Tasks:
    start = world.reset(seeds, naming(world, seeds, where), options={"task": protocol.task(split)})
    pictures = start.infos.get("goal")
    if pictures is None:
        raise EnvironmentFailure(
            f"{where}: expected info 'goal' from the world's reset with the option 'task'; got none, so the world has "
            f"no goals of its own. Use a protocol with goals of the logging policy"
        )
    goal = world.observe(pictures, start.rows)
    target = distance = None
    if protocol.success.source != "environment":
        parts = []
        for name in protocol.success.names:
            part = start.info(f"goal_{name}")
            if part is None:
                raise EnvironmentFailure(
                    f"{where}: the success rule needs info 'goal_{name}' from the world's reset; got none. Add it to "
                    f"the world, or change the rule"
                )
            parts.append(part.reshape(world.size, -1).astype(np.float64))
            world.check_finite(parts[-1], start.rows, f"goal_{name}")
        target = np.concatenate(parts, axis=1)
        distance = protocol.success.distance(protocol.success.vector(start), target)
    shortest, wall = start.info("shortest_steps"), start.info("wall_between")
    if protocol.budget is not None:
        budgets = np.full(world.size, protocol.budget)
    elif shortest is not None:
        assert protocol.budget_over_shortest is not None
        budgets = np.ceil(protocol.budget_over_shortest * shortest).astype(int)
    else:
        raise EnvironmentFailure(
            f"{where}: the budget is a multiple of the shortest path, but the world does not provide this path. "
            f"Set a budget in steps"
        )
    return Tasks(
        seeds=tuple(seeds),
        goal=Goal(observations=goal),
        target=target,
        start_distance=distance,
        shortest_steps=shortest,
        wall_between=None if wall is None else wall.astype(bool),
        budgets=budgets,
        before=_nothing(world),
        digests=tuple(_digest(start.observations[row], goal[row]) for row in range(world.size)),
    )


def _logged_tasks(
    protocol: Protocol,
    split: str,
    world: VectorWorld,
    first: int,
    where: str,
    guard: Callable[[Policy], SafePolicy] | None,
) -> tuple[Tasks, int]:
    drawn: list[_Drawn] = []
    index, most = first, _CANDIDATES if protocol.crossing is None else _CROSSING_CANDIDATES
    while len(drawn) < world.size:
        if index - first >= most * world.size:
            raise ConfigError(
                f"{where}: only {len(drawn)} of {index - first} goals of the policy {protocol.policy!r} are more than "
                f"{protocol.least_distance} from their starts"
                f"{'' if protocol.crossing is None else ' and on the other side of the line'}; use a larger "
                f"goal_offset or a smaller tolerance"
            )
        for candidate in _follow_policy(protocol, split, world, index, where, guard):
            index += 1
            if candidate is None:
                continue
            least = protocol.least_distance
            far = least is None or candidate.distance is None or candidate.distance > least
            if far and candidate.crosses:
                drawn.append(candidate)
            if len(drawn) == world.size:
                break
    goal = _joined([one.goal[None] for one in drawn])
    distances = [one.distance for one in drawn if one.distance is not None]
    targets = [one.target for one in drawn if one.target is not None]
    assert protocol.budget is not None
    tasks = Tasks(
        seeds=tuple(one.seed for one in drawn),
        goal=Goal(observations=goal),
        target=np.stack(targets) if targets else None,
        start_distance=np.array(distances) if distances else None,
        shortest_steps=None,
        wall_between=None,
        budgets=np.full(world.size, protocol.budget),
        before=tuple(one.before for one in drawn),
        digests=tuple(_digest(one.start, one.goal) for one in drawn),
    )
    return tasks, index


@dataclass(frozen=True, kw_only=True)
class _Drawn:
    """One start, and the goal that the logging policy reached from it."""

    seed: int
    before: np.ndarray  # (K, A): the actions that led to the start
    start: Observations
    goal: Observations
    target: np.ndarray | None
    distance: float | None
    crosses: bool  # whether start and goal lie on different sides of the protocol's line; True without a line


def _follow_policy(
    protocol: Protocol,
    split: str,
    world: VectorWorld,
    first: int,
    where: str,
    guard: Callable[[Policy], SafePolicy] | None,
) -> Iterator[_Drawn | None]:
    """Run the logging policy for one episode per environment; yield None for episodes that ended before the goal."""
    from worldloom.data import POLICIES, infos_for

    seeds = [protocol.episode_seed(split, first + row) for row in range(world.size)]
    policy: Policy = POLICIES[protocol.policy](world.action, **protocol.policy_options)
    safe = None if guard is None else guard(policy)
    policy = policy if safe is None else safe
    policy.reset([goal_policy_generator(seed) for seed in seeds])
    offset = protocol.splits[split].goal_offset
    assert offset is not None
    begins = np.array([protocol.start_steps(split, first + row) for row in range(world.size)])
    frame = world.reset(seeds, naming(world, seeds, where))
    starts: list[tuple[Observations, np.ndarray | None, int] | None] = [None] * world.size
    goals = list(starts)
    taken: list[np.ndarray] = []
    everyone = frame.rows
    running = np.ones(world.size, bool)
    for step in range(int(begins.max()) + offset + 1):
        reached = frame[running]
        vectors = measured(protocol, world, reached)
        sides = np.zeros(len(reached.rows), np.int64) if protocol.crossing is None else protocol.crossing.side(reached)
        for index, row in enumerate(reached.rows):
            seen = reached.observations[index], None if vectors is None else vectors[index], int(sides[index])
            if step == begins[row]:
                starts[row] = seen
            elif begins[row] < step <= begins[row] + offset:
                goals[row] = seen
        running &= ~frame.over & (step < begins + offset)
        if not running.any():
            break
        if safe is not None:
            tell_applied(world, safe.resume)
        if isinstance(policy, SeeingPolicy):
            policy.see(infos_for(policy, frame, protocol.policy))
        actions = policy.act(frame.observations)
        taken.append(actions)
        frame = world.step(actions, everyone, limited=None if safe is None else safe.limited)
    for row, seed in enumerate(seeds):
        start, goal = starts[row], goals[row]
        if start is None or goal is None:
            yield None
            continue
        distance = None if start[1] is None or goal[1] is None else float(protocol.success.distance(start[1], goal[1]))
        before = [actions[row] for actions in taken[: begins[row]]]
        yield _Drawn(
            seed=seed,
            before=np.stack(before) if before else _nothing(world)[row],
            start=start[0],
            goal=goal[0],
            target=goal[1],
            distance=distance,
            crosses=protocol.crossing is None or start[2] * goal[2] < 0,
        )


def _nothing(world: VectorWorld) -> tuple[np.ndarray, ...]:
    return (np.zeros((0, world.action.size), np.float32),) * world.size


def measured(protocol: Protocol, world: VectorWorld, frame: Frame) -> Float64[np.ndarray, "R L"] | None:
    """Return, for each row, the vector that the success rule compares; None if the environment decides success.

    Raises:
        EnvironmentFailure: a value is not finite.
    """
    if protocol.success.source == "environment":
        return None
    values = protocol.success.vector(frame)
    world.check_finite(values, frame.rows, protocol.success.name or "the observation vector")
    return values


def _joined(parts: list[Observations]) -> Observations:
    pixels = [part.pixels for part in parts if part.pixels is not None]
    vectors = [part.vector for part in parts if part.vector is not None]
    return Observations(pixels=torch.cat(pixels) if pixels else None, vector=torch.cat(vectors) if vectors else None)


def _digest(start: Observations, goal: Observations) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for part in (start.pixels, start.vector, goal.pixels, goal.vector):
        if part is not None:
            digest.update(part.contiguous().numpy().tobytes())
    return digest.hexdigest()
