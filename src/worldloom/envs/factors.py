"""The named factors of variation of each pixel environment, and the walls that they define.

Lengths are in px. One px is 1/64 of the environment's side, whatever the resolution of the frames.
"""

import colorsys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from jaxtyping import Float64, Int64
from pydantic import Field

from worldloom.core.config import Config
from worldloom.core.errors import ConfigError
from worldloom.core.registry import Registry, nearest

SIDE = 64.0
Byte = Annotated[int, Field(ge=0, le=255)]
Colour = tuple[Byte, Byte, Byte]
Near = Annotated[float, Field(ge=8, le=22)]  # a door in the half of a wall that starts at 0
Far = Annotated[float, Field(ge=42, le=56)]  # ... and in the half that ends at 64
Place = Annotated[float, Field(ge=8, le=56)]  # a coordinate of the centre of a pit
Axis = Literal["vertical", "horizontal"]
DOORS = ("up", "down", "left", "right")  # of four rooms
ClosingDoor = Literal["none", "up", "down", "left", "right"]


@dataclass(frozen=True)
class Draw:
    """The sampling function of a factor that may vary, used as an annotation of the factor's field."""

    value: Callable[[np.random.Generator], Any]


def _uniform(low: float, high: float) -> Draw:
    return Draw(lambda rng: float(rng.uniform(low, high)))


def _colour(saturation: float, low: float, high: float) -> Draw:
    def draw(rng: np.random.Generator) -> Colour:
        red, green, blue = colorsys.hsv_to_rgb(rng.random(), saturation, rng.uniform(low, high))
        return round(255 * red), round(255 * green), round(255 * blue)

    return Draw(draw)


def _doors(rng: np.random.Generator) -> tuple[float, ...]:
    near, far = rng.uniform(10, 20, 2), rng.uniform(44, 54, 2)
    return float(near[0]), float(far[0]), float(near[1]), float(far[1])


class RoomFactors(Config):
    """The factors that all pixel environments share. The agent is a disc, but its collisions use the bounding square.

    `action_turn` and `action_mirror` describe the agent's actuators. An action is first mirrored (left and right
    exchanged), then turned clockwise in the frame by `action_turn` degrees. The result moves the agent.
    """

    varies: ClassVar[tuple[str, ...]] = ()
    """The factors that this environment varies by default."""

    agent_radius: Annotated[float, _uniform(1.5, 3.5)] = Field(2.5, ge=1, le=4)
    agent_speed: Annotated[float, _uniform(1.5, 3.0)] = Field(2.5, gt=0, le=4)
    action_turn: Annotated[Literal[0, 90, 180, 270], Draw(lambda rng: int(rng.choice([0, 90, 180, 270])))] = 0
    action_mirror: Annotated[bool, Draw(lambda rng: bool(rng.integers(2)))] = False
    agent_colour: Annotated[Colour, _colour(0.85, 0.7, 0.95)] = (214, 60, 50)
    wall_colour: Annotated[Colour, _colour(0.3, 0.2, 0.45)] = (60, 64, 72)
    floor_colour: Annotated[Colour, _colour(0.1, 0.8, 1.0)] = (235, 232, 224)
    wall_thickness: Annotated[float, _uniform(3.0, 6.0)] = Field(4.0, ge=1, le=8)
    distractors: Annotated[int, Draw(lambda rng: int(rng.integers(0, 4)))] = Field(0, ge=0, le=8)
    distractor_colour: Annotated[Colour, _colour(0.6, 0.5, 0.9)] = (70, 130, 200)

    @classmethod
    def draws(cls) -> dict[str, Callable[[np.random.Generator], Any]]:
        """Return the sampling function of each factor that may vary, by name."""
        fields = cls.model_fields.items()
        return {name: part.value for name, field in fields for part in field.metadata if isinstance(part, Draw)}

    def walls(self) -> Float64[np.ndarray, "M 4"]:
        """Return the walls as rectangles (left, top, right, bottom). The default has no walls."""
        return np.zeros((0, 4))

    def rooms(self, points: Float64[np.ndarray, "P 2"]) -> Int64[np.ndarray, "P"]:
        """Return the index of the room that contains each point (x, y), or -1 in a doorway. The default is 0."""
        return np.zeros(len(points), np.int64)

    def after(self, step: int) -> "RoomFactors":
        """Return the factors that apply from this step of an episode onwards; the default returns `self`."""
        return self

    def convention(self) -> Float64[np.ndarray, "2 2"]:
        """Return the matrix that maps an action (a column vector) to a motion (right, down)."""
        quarter = np.linalg.matrix_power(np.array([[0.0, -1.0], [1.0, 0.0]]), self.action_turn // 90)
        return quarter @ np.diag([-1.0 if self.action_mirror else 1.0, 1.0])

    def drift(self) -> tuple[float, float]:
        """Return the drift (right, down) in px per step. The simulator adds the drift to every motion."""
        return 0.0, 0.0

    def hazards(self) -> "Hazards | None":
        """Return the pits at the start of an episode, or None if the environment has no pits."""
        return None

    def _clearance(self) -> float:
        """Return the distance from a wall's centre line beyond which the agent's centre is outside the doorway."""
        return self.wall_thickness / 2 + self.agent_radius


WORLDS: Registry[type[RoomFactors]] = Registry("world of pixel rooms")


@WORLDS.register("TwoRoom")
class TwoRoomFactors(RoomFactors):
    """Two rooms separated by a wall with a door, or a single room if `wall` is False.

    The agent's centre can pass through the door at up to `door_size` px from `door_position`.
    """

    varies = ("door_position",)

    wall: Annotated[bool, Draw(lambda rng: bool(rng.integers(2)))] = True
    door_position: Annotated[float, _uniform(11.0, 53.0)] = Field(32.0, ge=9, le=55)
    door_size: Annotated[float, _uniform(3.0, 6.0)] = Field(4.0, ge=1, le=8)
    wall_position: Annotated[float, _uniform(24.0, 40.0)] = Field(32.0, ge=20, le=44)
    wall_axis: Annotated[Axis, Draw(lambda rng: str(rng.choice(["vertical", "horizontal"])))] = "vertical"

    def walls(self) -> Float64[np.ndarray, "M 4"]:
        """Return the two parts of the wall, or no rectangles if `wall` is False."""
        if not self.wall:
            return np.zeros((0, 4))
        gap = self.door_size + self.agent_radius
        walls = _wall(self.wall_position, self.wall_thickness, 0.0, SIDE, self.door_position, gap)
        return np.array([_turned(wall) if self.wall_axis == "horizontal" else wall for wall in walls])

    def rooms(self, points: Float64[np.ndarray, "P 2"]) -> Int64[np.ndarray, "P"]:
        """Return for each point 0 (left of or above the wall), 1 (right or below) or -1 (in the doorway).

        If `wall` is False, return 0 for every point.
        """
        if not self.wall:
            return np.zeros(len(points), np.int64)
        across = points[:, 0 if self.wall_axis == "vertical" else 1] - self.wall_position
        return np.where(np.abs(across) < self._clearance(), -1, (across > 0).astype(np.int64))


@WORLDS.register("FourRooms")
class FourRoomsFactors(RoomFactors):
    """Four rooms separated by a cross of two walls, whose four arms (up, down, left, right) have one door each.

    The `closing_door` closes after `closing_step` steps of an episode. If the agent is in the door at that step, the
    door closes when the agent leaves. With `closing_step=0` the door is closed from the start.
    """

    varies = ("door_positions",)

    door_positions: Annotated[tuple[Near, Far, Near, Far], Draw(_doors)] = (16.0, 48.0, 16.0, 48.0)
    door_size: Annotated[float, _uniform(3.0, 5.0)] = Field(4.0, ge=1, le=5)
    closing_door: Annotated[ClosingDoor, Draw(lambda rng: str(rng.choice(["none", *DOORS])))] = "none"
    closing_step: Annotated[int, Draw(lambda rng: int(rng.integers(0, 100)))] = Field(0, ge=0)

    def walls(self) -> Float64[np.ndarray, "M 4"]:
        """Return the two parts of each arm. The two parts touch if the door between them is closed."""
        middle, thick = SIDE / 2, self.wall_thickness
        parts: list[tuple[float, float, float, float]] = []
        for number, (name, door) in enumerate(zip(DOORS, self.door_positions, strict=True)):
            begin = 0.0 if number % 2 == 0 else middle
            shut = name == self.closing_door and self.closing_step == 0
            gap = 0.0 if shut else self.door_size + self.agent_radius
            arm = _wall(middle, thick, begin, begin + middle, door, gap)
            parts += arm if number < 2 else [_turned(part) for part in arm]
        return np.array(parts)

    def after(self, step: int) -> "FourRoomsFactors":
        """Return the factors that apply from this step of an episode onwards; the door may have closed."""
        return (
            self if step < self.closing_step or self.closing_step == 0 else self.model_copy(update={"closing_step": 0})
        )

    def rooms(self, points: Float64[np.ndarray, "P 2"]) -> Int64[np.ndarray, "P"]:
        """Return the quadrant of each point, 0 to 3, or -1 in a doorway."""
        across = points - SIDE / 2
        quadrant = (across[:, 0] > 0) + 2 * (across[:, 1] > 0)
        return np.where((np.abs(across) < self._clearance()).any(axis=1), -1, quadrant)


@dataclass(frozen=True, kw_only=True)
class Hazards:
    """P round pits. The agent falls into a pit if the agent's centre is within `pit_radius` of the pit's centre."""

    factors: "PitsFactors"
    centres: Float64[np.ndarray, "P 2"]
    velocities: Float64[np.ndarray, "P 2"]  # px per step

    def depth(self, points: Float64[np.ndarray, "M 2"]) -> Float64[np.ndarray, "M"]:
        """Return the distance in px from each point to the edge of the nearest pit; negative outside."""
        away = np.linalg.norm(points[:, None] - self.centres, axis=-1).min(axis=1)
        depth: np.ndarray = self.factors.pit_radius - away
        return depth


@WORLDS.register("Pits")
class PitsFactors(RoomFactors):
    """One room with three pits. An agent that falls into a pit stays there if pits are `deadly`.

    The episode then ends after `linger` steps, so that logs contain steps in which actions have no effect.

    Pits move at `pit_speed` px per step in the directions `pit_heading` (radians) and bounce off the edge. Starts and
    goals are at least `pit_clearance` px from the pits' initial positions. The `wind` (right, down) is the agent's
    drift in px per step. If `shift_step` is above 0, then from that step onwards the agent's speed is multiplied by
    `speed_after` and the wind is `wind_after`.
    """

    varies = ("pits",)

    pits: Annotated[
        tuple[Place, Place, Place, Place, Place, Place],
        Draw(lambda rng: tuple(float(place) for place in rng.uniform(12, 52, 6))),
    ] = (20.0, 20.0, 44.0, 24.0, 30.0, 46.0)  # x, y of each
    pit_radius: Annotated[float, _uniform(4.0, 8.0)] = Field(6.0, ge=2, le=10)
    pit_colour: Annotated[Colour, _colour(0.4, 0.1, 0.3)] = (40, 40, 46)
    pit_speed: Annotated[float, _uniform(0.2, 0.8)] = Field(0.0, ge=0, le=2)
    pit_heading: Annotated[
        tuple[float, float, float], Draw(lambda rng: tuple(float(angle) for angle in rng.uniform(0, 2 * np.pi, 3)))
    ] = (0.0, 2.0, 4.0)
    pit_clearance: float = Field(2.0, ge=0, le=8)
    deadly: bool = True
    linger: int = Field(10, ge=0)
    wind: tuple[float, float] = (0.0, 0.0)
    shift_step: int = Field(0, ge=0)
    speed_after: float = Field(1.0, gt=0, le=4)
    wind_after: tuple[float, float] = (0.0, 0.0)

    def after(self, step: int) -> "PitsFactors":
        """Return the factors that apply from this step of an episode onwards; speed and wind may have changed."""
        if step < self.shift_step or self.shift_step == 0:
            return self
        shifted = {"shift_step": 0, "agent_speed": self.agent_speed * self.speed_after, "wind": self.wind_after}
        return self.model_copy(update=shifted)

    def drift(self) -> tuple[float, float]:
        """Return the wind in px per step."""
        return self.wind

    def hazards(self) -> Hazards:
        """Return the pits at the start of an episode."""
        heading = np.array(self.pit_heading)
        return Hazards(
            factors=self,
            centres=np.array(self.pits).reshape(3, 2),
            velocities=self.pit_speed * np.stack([np.cos(heading), np.sin(heading)], axis=1),
        )


@WORLDS.register("Maze")
class MazeFactors(RoomFactors):
    """A perfect maze of `cells` x `cells`, with exactly one path between any two cells.

    `layout` is the seed of the depth-first search that generates the maze. The agent is slower than in the other
    environments, so that goals can be more than 100 steps away.
    """

    varies = ("layout",)

    agent_radius: Annotated[float, _uniform(1.5, 2.5)] = Field(2.0, ge=1, le=3)
    agent_speed: Annotated[float, _uniform(1.0, 2.0)] = Field(1.25, gt=0, le=4)
    wall_thickness: Annotated[float, _uniform(1.5, 3.0)] = Field(2.0, ge=1, le=3)
    cells: Annotated[int, Draw(lambda rng: int(rng.integers(3, 6)))] = Field(5, ge=2, le=6)
    # A float32 label can represent every layout exactly.
    layout: Annotated[int, Draw(lambda rng: int(rng.integers(2**24)))] = Field(0, ge=0)

    def walls(self) -> Float64[np.ndarray, "M 4"]:
        """Return the walls between neighbouring cells that are not connected."""
        joined = self._joined()
        side, half, walls = SIDE / self.cells, self.wall_thickness / 2, []
        for column in range(self.cells):
            for row in range(self.cells):
                for right, down in ((1, 0), (0, 1)):
                    neighbour = (column + right, row + down)
                    if max(neighbour) < self.cells and ((column, row), neighbour) not in joined:
                        left, top = neighbour[0] * side, neighbour[1] * side
                        walls.append((left - half, top - half, left + down * side + half, top + right * side + half))
        return np.array(walls)

    def rooms(self, points: Float64[np.ndarray, "P 2"]) -> Int64[np.ndarray, "P"]:
        """Return the index of the cell that contains each point, in row-major order."""
        cell = np.clip((points * self.cells / SIDE).astype(np.int64), 0, self.cells - 1)
        return cell[:, 0] + self.cells * cell[:, 1]

    def _joined(self) -> set[tuple[tuple[int, int], tuple[int, int]]]:
        """Return the connected pairs of neighbouring cells, with the upper or left cell first."""
        rng = np.random.default_rng(self.layout)
        start = (int(rng.integers(self.cells)), int(rng.integers(self.cells)))
        path, seen = [start], {start}
        joined: set[tuple[tuple[int, int], tuple[int, int]]] = set()
        while path:
            column, row = path[-1]
            around = [(column + 1, row), (column - 1, row), (column, row + 1), (column, row - 1)]
            free = [cell for cell in around if cell not in seen and min(cell) >= 0 and max(cell) < self.cells]
            if not free:
                path.pop()
                continue
            chosen = free[int(rng.integers(len(free)))]
            seen.add(chosen)
            first, second = sorted((path[-1], chosen))
            joined.add((first, second))
            path.append(chosen)
        return joined


def check_names(factors: type[RoomFactors], vary: Sequence[str], fixed: Mapping[str, Any]) -> None:
    """Check that all names are factors, and that none is both fixed and varied.

    Raises:
        ConfigError: a name is unknown (the message suggests the nearest one), or both fixed and varied.
    """
    known = factors.draws()
    for name in vary:
        if name not in known:
            raise ConfigError(f"unknown factor {name!r}; {nearest(name, known)}")
    both = sorted(set(vary) & set(fixed))
    if both:
        raise ConfigError(f"factors {both} are in both 'factors' and 'vary'; remove each from one of them")


def _wall(
    position: float, thickness: float, begin: float, end: float, door: float, gap: float
) -> list[tuple[float, float, float, float]]:
    """Return the two parts of a vertical wall from `begin` to `end`, with a gap for the door."""
    left, right = position - thickness / 2, position + thickness / 2
    return [(left, begin, right, door - gap), (left, door + gap, right, end)]


def _turned(wall: tuple[float, float, float, float]) -> tuple[float, float, float, float]:
    left, top, right, bottom = wall
    return top, left, bottom, right
