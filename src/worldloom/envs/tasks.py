"""Starts and goals: drawn in free space, with the shortest way between them known."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float64
from pydantic import Field

from worldloom.core.config import Config
from worldloom.core.errors import ConfigError
from worldloom.envs.factors import DOORS, SIDE, FourRoomsFactors, RoomFactors
from worldloom.envs.simulator import free

_GOALS = 20  # goals tried in a layout before it is given up
_GRID = np.stack(np.meshgrid(np.arange(64) + 0.5, np.arange(64) + 0.5), axis=-1).reshape(-1, 2)  # (x, y), row by row
_MOVES = [(down, right) for down in (-1, 0, 1) for right in (-1, 0, 1) if down or right]
_AROUND = np.arange(64 * 64)[:, None] + np.array([64 * down + right for down, right in _MOVES])


class TaskOptions(Config):
    """What a start and a goal must satisfy; distances in px, steps at full speed along the shortest way.

    "cross-room" and "same-room" speak of the world's rooms (of a maze: its cells), with neither in a doorway. With
    `closes_after` the door whose closing makes the way longest, but leaves one, closes after so many steps.
    With `obstructed` a wall or a pit lies on the straight line between them, or, where it is false, none does.
    `in_a_pit` says what lies in a pit: the goal, or the start.
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
    """A start, a goal, and what lies between them."""

    start: Float64[np.ndarray, "2"]
    goal: Float64[np.ndarray, "2"]
    shortest_steps: float
    wall_between: bool


def draw_task(factors: RoomFactors, options: TaskOptions, rng: np.random.Generator) -> Task:
    """Draw a goal uniformly in free space, then a start uniformly among those that satisfy the options.

    Starts lie at the middle of a pixel or, where no limit of steps is set, anywhere around it.

    Raises:
        ConfigError: the layout holds no such start for any of the goals tried.
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
        f"this layout holds no start and goal with {options.model_dump(exclude_none=True)} in {_GOALS} goals tried; "
        f"widen the limits, or draw another layout (another seed)"
    )


def close_door(factors: RoomFactors, task: Task, step: int) -> RoomFactors:
    """Return the room in which the door on the task's way closes after `step` steps; see `TaskOptions`.

    Raises:
        ConfigError: no door can be closed, or none makes the way longer and leaves one.
    """
    if not isinstance(factors, FourRoomsFactors):
        raise ConfigError(
            f"closes_after needs a world with several doors, such as FourRooms; got {type(factors).__name__}"
        )
    rooms = {name: factors.model_copy(update={"closing_door": name, "closing_step": step}) for name in DOORS}
    lengths = {name: steps_from(room.after(step), task.goal)[_pixel(task.start)] for name, room in rooms.items()}
    longer = {name: length for name, length in lengths.items() if task.shortest_steps + 5 < length < np.inf}
    if not longer:
        raise ConfigError("no door of this layout lies on the way of the task; draw another one (another seed)")
    return rooms[max(longer, key=lambda name: longer[name])]


def draw_free(factors: RoomFactors, rng: np.random.Generator) -> Float64[np.ndarray, "2"]:
    """Draw a position uniformly where the agent's centre may be."""
    while True:
        points = rng.uniform(factors.agent_radius, SIDE - factors.agent_radius, (16, 2))
        fits = np.flatnonzero(free(factors, points))
        if len(fits):
            point: np.ndarray = points[fits[0]]
            return point


def draw_in_a_pit(factors: RoomFactors, rng: np.random.Generator) -> Float64[np.ndarray, "2"]:
    """Draw a position where the agent's centre lies in a pit.

    Raises:
        ConfigError: the world has none.
    """
    pits = factors.hazards()
    if pits is None:
        raise ConfigError(f"in_a_pit needs a world with pits, such as Pits; got {type(factors).__name__}")
    centre = pits.centres[int(rng.integers(len(pits.centres)))]
    angle, away = rng.uniform(0, 2 * np.pi), pits.factors.pit_radius * np.sqrt(rng.uniform(0, 0.81))
    inside = centre + away * np.array([np.cos(angle), np.sin(angle)])
    point: np.ndarray = np.clip(inside, factors.agent_radius, SIDE - factors.agent_radius)
    return point


def steps_from(factors: RoomFactors, goal: Float64[np.ndarray, "2"]) -> Float64[np.ndarray, "P"]:
    """Return, for the middle of each pixel, the fewest steps to the goal at full speed (infinite: no way).

    A breadth-first search over pixels and their eight neighbours, both corners of a diagonal move being free. As
    each axis moves at full speed on its own, a diagonal pixel costs as much as a straight one, and the length of
    the way over the speed is the number of steps, to within a pixel at either end. It is a reference and no bound: a
    step that cuts a corner of a wall can make the best run about one step shorter.
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
    """Return which of its eight neighbours each pixel is joined to; those in `_AROUND` beyond the edge are not."""
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
    count = 2 + int(2 * np.linalg.norm(goal - start))  # a point at least every half pixel
    points: np.ndarray = start + np.linspace(0, 1, count)[:, None] * (goal - start)
    return points


def _pixel(point: Float64[np.ndarray, "2"]) -> int:
    column, row = np.clip(point.astype(np.int64), 0, 63)
    return int(64 * row + column)
