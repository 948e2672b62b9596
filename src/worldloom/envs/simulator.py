"""The simulator of the pixel environments: motion, collisions and rendering of a batch, in NumPy.

The results of an environment do not depend, in any bit, on the other environments of the batch.
"""

from dataclasses import replace

import numpy as np
from jaxtyping import Bool, Float64, UInt8

from worldloom.envs.factors import SIDE, Hazards, RoomFactors

_DISTRACTOR_RADIUS = 2.0
_DISTRACTOR_SPEED = 1.5


class Simulator:
    """N environments of side 64 px, rendered as frames of `size` x `size` pixels."""

    def __init__(self, batch: int, size: int) -> None:
        self.batch, self.size = batch, size
        self.factors: list[RoomFactors] = [RoomFactors()] * batch
        self.position = np.zeros((batch, 2))
        self._walls = np.zeros((batch, 0, 4))
        self._radius, self._speed, self._wind = np.ones(batch), np.ones(batch), np.zeros((batch, 2))
        self._convention = np.tile(np.eye(2), (batch, 1, 1))
        self._colour = np.zeros((batch, 3), np.float32)
        self._background = np.zeros((batch, size, size, 3), np.uint8)
        none = np.zeros((0, 2))
        self._others: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = [(none, none, np.zeros(3))] * batch
        self.hazards: list[Hazards | None] = [None] * batch
        self.depth = np.full(batch, -np.inf)  # px from each agent to the edge of the nearest pit, negative outside
        self.fallen = np.zeros(batch, bool)
        self._fallen_for = np.zeros(batch, np.int64)

    def place(self, row: int, factors: RoomFactors, position: np.ndarray, rng: np.random.Generator) -> None:
        """Start an episode in environment `row`; `rng` samples the initial state of the distractors."""
        self.furnish(row, factors)
        self.position[row] = position
        self.hazards[row], self.fallen[row], self._fallen_for[row] = factors.hazards(), False, 0
        self._measure(row)
        centres = rng.uniform(_DISTRACTOR_RADIUS, SIDE - _DISTRACTOR_RADIUS, (factors.distractors, 2))
        heading = rng.uniform(0, 2 * np.pi, factors.distractors)
        velocity = _DISTRACTOR_SPEED * np.stack([np.cos(heading), np.sin(heading)], axis=1)
        self._others[row] = (centres, velocity, np.array(factors.distractor_colour, np.float32))

    def furnish(self, row: int, factors: RoomFactors) -> None:
        """Change the factors of environment `row`; agent, distractors and pits keep their positions."""
        walls = factors.walls()
        if len(walls) > self._walls.shape[1]:
            grown = np.full((self.batch, len(walls), 4), -np.inf)
            grown[:, : self._walls.shape[1]] = self._walls
            self._walls = grown
        self._walls[row] = -np.inf  # a wall at minus infinity stops no agent
        self._walls[row, : len(walls)] = walls
        self.factors[row] = factors
        self._radius[row], self._speed[row] = factors.agent_radius, factors.agent_speed
        self._wind[row], self._convention[row] = factors.drift(), factors.convention()
        self._colour[row] = factors.agent_colour
        self._background[row] = paint(factors, self.size)

    def step(self, actions: Float64[np.ndarray, "N 2"], moving: Bool[np.ndarray, "N"]) -> None:
        """Move the agents by their speed times `actions` in [-1, 1] (turned and mirrored), plus the wind.

        Agents move along x, then along y. On each axis they stop exactly at the first wall, so that even fast
        agents cannot pass through walls. Agents in a deadly pit do not move.
        """
        self._fallen_for += moving & self.fallen
        going = moving & ~self.fallen
        wanted = np.einsum("nij,nj->ni", self._convention, np.clip(actions, -1, 1))
        for axis in (0, 1):
            drive = wanted[:, axis] * self._speed + self._wind[:, axis]
            self._slide(axis, np.where(going, drive, 0.0))
        for row in np.flatnonzero(moving):
            centres, velocity, _ = self._others[row]
            if len(centres):
                centres += velocity
                outside = (centres < _DISTRACTOR_RADIUS) | (centres > SIDE - _DISTRACTOR_RADIUS)
                velocity[outside] *= -1
                np.clip(centres, _DISTRACTOR_RADIUS, SIDE - _DISTRACTOR_RADIUS, out=centres)
            if (pits := self.hazards[row]) is not None:
                self.hazards[row] = _moved(pits)
                self._measure(int(row))

    def lost(self) -> Bool[np.ndarray, "N"]:
        """Return, for each environment, whether the episode has ended because the agent fell into a pit."""
        lingers = np.array([0 if pits is None else pits.factors.linger for pits in self.hazards])
        return self.fallen & (self._fallen_for >= lingers)

    def render(self, positions: Float64[np.ndarray, "N 2"] | None = None) -> UInt8[np.ndarray, "N H W 3"]:
        """Render frames with the agents at `positions`, by default their current positions."""
        positions = self.position if positions is None else positions
        frames = self._background.copy()
        for row, pits in enumerate(self.hazards):
            if pits is not None:
                colour = np.array([pits.factors.pit_colour], np.float32)
                for centre in pits.centres:
                    _blend(frames[row : row + 1], centre[None], np.full(1, pits.factors.pit_radius), colour)
        for row, (centres, _, colour) in enumerate(self._others):
            for centre in centres:
                _blend(frames[row : row + 1], centre[None], np.full(1, _DISTRACTOR_RADIUS), colour[None])
        _blend(frames, positions, self._radius, self._colour)
        return frames

    def _measure(self, row: int) -> None:
        pits = self.hazards[row]
        if pits is not None:
            self.depth[row] = pits.depth(self.position[row : row + 1])[0]
            self.fallen[row] |= pits.factors.deadly and self.depth[row] > 0

    def _slide(self, axis: int, distance: Float64[np.ndarray, "N"]) -> None:
        here, beside = self.position[:, axis], self.position[:, 1 - axis]
        radius = self._radius[:, None]
        near, far = self._walls[:, :, axis] - radius, self._walls[:, :, axis + 2] + radius
        beside_near, beside_far = self._walls[:, :, 1 - axis] - radius, self._walls[:, :, 3 - axis] + radius
        in_the_way = (beside[:, None] > beside_near) & (beside[:, None] < beside_far)
        ahead = np.where(in_the_way & (near >= here[:, None]), near, np.inf).min(axis=1, initial=np.inf)
        behind = np.where(in_the_way & (far <= here[:, None]), far, -np.inf).max(axis=1, initial=-np.inf)
        low, high = np.maximum(behind, self._radius), np.minimum(ahead, SIDE - self._radius)
        self.position[:, axis] = np.clip(here + distance, low, high)


def free(factors: RoomFactors, points: Float64[np.ndarray, "P 2"]) -> Bool[np.ndarray, "P"]:
    """Return whether the agent's centre may be at each point: inside the edge, and outside of walls and pits."""
    radius = factors.agent_radius
    inside: np.ndarray = np.all((points >= radius) & (points <= SIDE - radius), axis=1)
    for left, top, right, bottom in factors.walls():
        x, y = points[:, 0], points[:, 1]
        inside &= ~((x > left - radius) & (x < right + radius) & (y > top - radius) & (y < bottom + radius))
    pits = factors.hazards()
    if pits is not None:
        inside &= pits.depth(points) < -pits.factors.pit_clearance
    return inside


def _moved(pits: Hazards) -> Hazards:
    """Return the pits one step later. Pits bounce off the edge."""
    centres, velocities, radius = pits.centres + pits.velocities, pits.velocities, pits.factors.pit_radius
    outside = (centres < radius) | (centres > SIDE - radius)
    return replace(
        pits,
        centres=np.clip(centres, radius, SIDE - radius),
        velocities=np.where(outside, -velocities, velocities),
    )


def paint(factors: RoomFactors, size: int) -> UInt8[np.ndarray, "H W 3"]:
    """Return the frame without moving objects; a pixel is a wall if its centre is inside a wall."""
    picture = np.empty((size, size, 3), np.uint8)
    picture[:] = factors.floor_colour
    centres = (np.arange(size) + 0.5) * SIDE / size
    for left, top, right, bottom in factors.walls():
        rows, columns = (centres >= top) & (centres < bottom), (centres >= left) & (centres < right)
        picture[np.ix_(rows, columns)] = factors.wall_colour
    return picture


def _blend(
    frames: UInt8[np.ndarray, "N H W 3"],
    centres: Float64[np.ndarray, "N 2"],
    radii: Float64[np.ndarray, "N"],
    colours: np.ndarray,
) -> None:
    """Draw a disc with a soft edge of one pixel into each frame, in place."""
    count, size = frames.shape[:2]
    scale = size / SIDE
    centre, radius = centres * scale, radii * scale
    patch = min(size, 2 * int(np.ceil(radius.max() + 1)) + 2)
    corner = np.clip(np.floor(centre).astype(np.int64) - patch // 2 + 1, 0, size - patch)
    columns, rows = (corner[:, axis, None] + np.arange(patch) for axis in (0, 1))
    across, down = columns + 0.5 - centre[:, :1], rows + 0.5 - centre[:, 1:]
    distance = np.sqrt(down[:, :, None] ** 2 + across[:, None, :] ** 2)
    cover = np.clip(radius[:, None, None] + 0.5 - distance, 0, 1).astype(np.float32)[..., None]
    place = (np.arange(count)[:, None, None], rows[:, :, None], columns[:, None, :])
    below = frames[place].astype(np.float32)
    frames[place] = np.rint(below + (colours[:, None, None].astype(np.float32) - below) * cover).astype(np.uint8)
