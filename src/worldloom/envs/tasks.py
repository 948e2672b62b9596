"""Random starts and goals in free space, with the length of the shortest path between them."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float64
from pydantic import Field

from worldloom.core.config import Config
from worldloom.core.errors import ConfigError
from worldloom.envs.factors import DOORS, SIDE, FourRoomsFactors, RoomFactors
from worldloom.envs.simulator import free

_GOALS = 20  # goals tried in a layout before it is rejected
_GRID = np.stack(np.meshgrid(np.arange(64) + 0.5, np.arange(64) + 0.5), axis=-1).reshape(-1, 2)  # (x, y), row by row
_MOVES = [(down, right) for down in (-1, 0, 1) for right in (-1, 0, 1) if down or right]
_AROUND = np.arange(64 * 64)[:, None] + np.array([64 * down + right for down, right in _MOVES])


class TaskOptions(Config):
    """The requirements on a start and a goal. Distances are in px; steps are at full speed along the shortest path.

    `split` requires start and goal in different rooms ("cross-room") or in the same room; the rooms of a maze are its
    cells. `closes_after` is the number of steps after which a door closes. The door is chosen so that the path becomes
    as long as possible, but is not blocked. `obstructed` requires (True) or forbids (False) a wall or a pit on the
    straight line between start and goal. `in_a_pit` places the goal or the start in a pit.
    """

    split: Literal["any", "cross-room", "same-room"] = "any"
    min_distance: float = Field(10.0, ge=0)
    max_distance: float | None = Field(None, gt=0)
    min_steps: float | None = Field(None, ge=0)
    max_steps: float | None = Field(None, gt=0)
    closes_after: int | None = Field(None, ge=1)
    obstructed: bool | None = None
    in_a_pit: Literal["nothing", "goal", "start"] = "nothing"


@dataclass(frozen=True, kw_only=True)
class Task:
    """A start and a goal (x, y) in px, the steps of the shortest path, and whether a wall or a pit is between them."""

    start: Float64[np.ndarray, "2"]
    goal: Float64[np.ndarray, "2"]
    shortest_steps: float
    wall_between: bool


def draw_task(factors: RoomFactors, options: TaskOptions, rng: np.random.Generator) -> Task:
    """Sample a goal uniformly in free space, then a start uniformly among the starts that satisfy the options.

    Starts are at the centre of a pixel or, without limits on steps, anywhere in the pixel. `in_a_pit` samples the goal
    or the start in a pit instead.

    Raises:
        ConfigError: no sampled goal has a start that satisfies the options, or `in_a_pit` is set without pits.
    """
    for _ in range(_GOALS):
        goal = draw_in_a_pit(factors, rng) if options.in_a_pit == "goal" else draw_free(factors, rng)
        steps = steps_from(factors, goal)
        starts = _GRID[np.isfinite(steps) & _suits(factors, options, _GRID, goal, steps)]
        if options.in_a_pit == "start":
            starts = draw_in_a_pit(factors, rng)[None]
        if not len(starts):
            continue
        start = starts[int(rng.integers(len(starts)))]
        moved = start + rng.uniform(-0.5, 0.5, 2)
        exact = options.min_steps is None and options.max_steps is None
        if exact and free(factors, moved[None])[0]:
            moved_steps = steps[_pixel(moved)][None]
            if _suits(factors, options, moved[None], goal, moved_steps)[0]:
                start = moved
        between = not bool(free(factors, _segment(start, goal)).all())
        if options.obstructed not in (None, between):
            continue
        return Task(start=start, goal=goal, shortest_steps=float(steps[_pixel(start)]), wall_between=between)
    raise ConfigError(
        f"found no start and goal with {options.model_dump(exclude_none=True)} in this layout, with {_GOALS} goals "
        f"tried. Relax the options, or use another seed to get another layout"
    )


def close_door(factors: RoomFactors, task: Task, step: int) -> RoomFactors:
    """Return factors in which a door on the task's path closes after `step` steps; see `TaskOptions`.

    Raises:
        ConfigError: the environment has no such doors, or no door lengthens the path without blocking it.
    """
    if not isinstance(factors, FourRoomsFactors):
        raise ConfigError(
            f"'closes_after' needs the environment FourRooms; got {type(factors).__name__}. Use FourRooms, or omit "
            f"'closes_after'"
        )
    rooms = {name: factors.model_copy(update={"closing_door": name, "closing_step": step}) for name in DOORS}
    lengths = {name: steps_from(room.after(step), task.goal)[_pixel(task.start)] for name, room in rooms.items()}
    longer = {name: length for name, length in lengths.items() if task.shortest_steps + 5 < length < np.inf}
    if not longer:
        raise ConfigError(
            "no door of this layout lengthens the task's path without blocking it; use another seed for another layout"
        )
    return rooms[max(longer, key=lambda name: longer[name])]


def draw_free(factors: RoomFactors, rng: np.random.Generator) -> Float64[np.ndarray, "2"]:
    """Sample a position uniformly where the agent's centre may be."""
    while True:
        points = rng.uniform(factors.agent_radius, SIDE - factors.agent_radius, (16, 2))
        fits = np.flatnonzero(free(factors, points))
        if len(fits):
            point: np.ndarray = points[fits[0]]
            return point


def draw_in_a_pit(factors: RoomFactors, rng: np.random.Generator) -> Float64[np.ndarray, "2"]:
    """Sample a position of the agent's centre in a pit.

    Raises:
        ConfigError: the environment has no pits.
    """
    pits = factors.hazards()
    if pits is None:
        raise ConfigError(
            f"'in_a_pit' needs the environment Pits; got {type(factors).__name__}. Use Pits, or omit 'in_a_pit'"
        )
    centre = pits.centres[int(rng.integers(len(pits.centres)))]
    angle, away = rng.uniform(0, 2 * np.pi), pits.factors.pit_radius * np.sqrt(rng.uniform(0, 0.81))
    inside = centre + away * np.array([np.cos(angle), np.sin(angle)])
    point: np.ndarray = np.clip(inside, factors.agent_radius, SIDE - factors.agent_radius)
    return point


def steps_from(factors: RoomFactors, goal: Float64[np.ndarray, "2"]) -> Float64[np.ndarray, "P"]:
    """Return the steps that the shortest path takes from the centre of each pixel to the goal; infinite without a path.

    A breadth-first search over pixels and their eight neighbours finds the paths. A diagonal move is possible only if
    both pixels beside it are free.
    The agent moves at full speed along each axis independently, so a diagonal move costs as much as a straight one. The
    number of steps is the path length divided by the speed, exact to within a pixel at either end. An agent can need
    about one step less, because a step can cut the corner of a wall.
    """
    open_ = free(factors, _GRID)
    joined = _joined(open_)
    steps = np.full(len(_GRID), np.inf)
    frontier = np.flatnonzero(open_)[[np.square(_GRID[open_] - goal).sum(axis=1).argmin()]]
    distance = 0
    while len(frontier):
        steps[frontier] = distance / factors.agent_speed
        distance += 1
        around = _AROUND[frontier][joined[frontier]]
        frontier = np.unique(around[np.isinf(steps[around])])
    return steps


def _joined(open_: Bool[np.ndarray, "P"]) -> Bool[np.ndarray, "P 8"]:
    """Return whether each pixel is connected to each of its eight neighbours in `_AROUND`; False beyond the edge."""
    cells = np.pad(open_.reshape(64, 64), 1)

    def moved(down: int, right: int) -> np.ndarray:
        shifted: np.ndarray = cells[1 + down : 65 + down, 1 + right : 65 + right]
        return shifted.reshape(-1)

    columns = [
        moved(down, right) & (moved(down, 0) & moved(0, right) if down and right else True) for down, right in _MOVES
    ]
    return np.stack(columns, axis=1)


def _suits(
    factors: RoomFactors,
    options: TaskOptions,
    starts: Float64[np.ndarray, "P 2"],
    goal: Float64[np.ndarray, "2"],
    steps: Float64[np.ndarray, "P"],
) -> Bool[np.ndarray, "P"]:
    distance = np.linalg.norm(starts - goal, axis=1)
    suits: np.ndarray = distance > options.min_distance
    if options.max_distance is not None:
        suits &= distance <= options.max_distance
    if options.min_steps is not None:
        suits &= steps >= options.min_steps
    if options.max_steps is not None:
        suits &= steps <= options.max_steps
    if options.split != "any":
        rooms, room = factors.rooms(starts), factors.rooms(goal[None])[0]
        suits &= (rooms >= 0) & (room >= 0) & ((rooms == room) == (options.split == "same-room"))
    return suits


def _segment(start: Float64[np.ndarray, "2"], goal: Float64[np.ndarray, "2"]) -> Float64[np.ndarray, "P 2"]:
    count = 2 + int(2 * np.linalg.norm(goal - start))  # at least two points per px
    points: np.ndarray = start + np.linspace(0, 1, count)[:, None] * (goal - start)
    return points


def _pixel(point: Float64[np.ndarray, "2"]) -> int:
    column, row = np.clip(point.astype(np.int64), 0, 63)
    return int(64 * row + column)
