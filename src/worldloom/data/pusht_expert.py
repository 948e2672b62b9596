"""A logging policy that brings PushT's block to one random pose after another. It sees the state of the simulator.

The block slides without friction and stops when nothing pushes it, so a push has a closed form: the disc moves along
the normal of a face, and the block turns about a fixed centre. The policy searches over two such pushes in a row. This
is quasi-static pushing (Lynch and Mason, "Stable Pushing", 1996), with the block's mass and inertia as the limit
surface.
"""

import cmath
import math
from dataclasses import dataclass
from functools import cache

import numpy as np
from jaxtyping import Bool, Complex128, Float64
from pydantic import Field, model_validator

from worldloom.core.config import Config
from worldloom.core.types import ActionSpec
from worldloom.data.expert import Expert, ExpertEpisode, Infos
from worldloom.data.policies import register_policy

# Lengths are in px of the table, and points (x, y) are complex numbers x + iy, so that a rotation is a product. The
# block's frame has its origin at the centre of mass, and y along the stem.
_CENTRE = 45j  # the centre of mass, relative to the position that the environment returns
_BOXES = np.array([[-60, -45, 60, -15], [-15, -15, 15, 75]])  # the bar and the stem: left, top, right, bottom
_GYRATION = 3000.0  # px^2; the moment of inertia over the mass
_TURN = 55.0  # px per radian; the weight of the angle in the error of a pose, about the radius of gyration
_DISC = 15.0  # the radius of the disc
_TABLE = 512.0
_UNIT = 100.0  # an action of 1 sets the disc's target 100 px away
# Of the distance to its target, the disc covers 0.296 in the same step and 0.112 in the next one, by its velocity.
_CARRIED, _COVERED = 0.112, 0.408

_GAP = 8.0  # between disc and block where a push begins
_CLEARANCE = 1.5  # between disc and block on the way to that place
_BORDER = 5.0  # the disc keeps this distance from the edge of the table ...
_ROOM = 90.0  # ... and the block's centre this one, if possible
_LENGTHS = np.array([5, 10, 16, 24, 34, 46, 62, 82, 110], np.float64)  # of a push
_NEVER = 1e6  # px; the length of a way that does not exist
_HALF = 450.0  # px; the way of the disc that is worth half of the block's error
_PRECISE = 3.0  # px; smaller errors count as this one
_LOSS = 10.0  # px of the disc's way for each px by which the block's centre leaves its room
_CHANGE = 20.0  # px; the way that a second push costs in addition
_ARRIVED, _ASIDE, _OVER = 6.0, 12.0, 2.0  # px; where a push begins, from where it has slipped, and when it is over


class PushTExpertOptions(Config):
    """Options of the policy "pusht-expert". Speed and noise are shares of the largest action, drawn per episode."""

    slowest: float = Field(default=0.2, gt=0, le=1)  # the largest action of an episode lies between these two
    fastest: float = Field(default=0.6, gt=0, le=1)
    noise: float = Field(default=0.1, ge=0)  # the standard deviation of an episode's noise lies between 0 and this
    margin: float = Field(default=150.0, ge=0, lt=_TABLE / 2)  # px between the block's targets and the edge
    near: float = Field(default=8.0, gt=0)  # px; a target is reached if the block is this near ...
    turned: float = Field(default=0.14, gt=0)  # ... and its angle too, in radians
    patience: int = Field(default=150, ge=1)  # steps after which a target is replaced if it is not reached

    @model_validator(mode="after")
    def _ordered(self) -> "PushTExpertOptions":
        if self.slowest > self.fastest:
            raise ValueError(f"'slowest' must not exceed 'fastest'; got {self.slowest} and {self.fastest}")
        return self


@dataclass(frozen=True, kw_only=True)
class _Pushes:
    """C pushes of L lengths, and N places around the block, all in the block's frame before the push."""

    inward: Complex128[np.ndarray, "C"]  # the direction of the push, normal to the face
    contact: Complex128[np.ndarray, "C"]  # the disc's centre when it touches the block
    moved: Complex128[np.ndarray, "C L"]  # how far the push moves the centre of mass
    turned: Float64[np.ndarray, "C L"]  # how far it turns the block
    share: Float64[np.ndarray, "C"]  # the speed of the centre of mass, as a share of the disc's speed
    spin: Float64[np.ndarray, "C"]  # radians per px of the disc's way
    places: Complex128[np.ndarray, "N"]  # for the disc; the first C are where the pushes begin
    lines: Float64[np.ndarray, "N N"]  # the distance between two places if the disc can move straight, else `_NEVER`
    ways: Float64[np.ndarray, "N N"]  # the shortest way around the block between two places


@cache
def _pushes() -> _Pushes:
    stem = range(4, 73, 11)
    faces = {  # the points of each face, by the direction of the push
        1j: [complex(x, -45) for x in range(-55, 56, 10)],
        -1j: [complex(x, -15) for x in (-55, -44, -33, 33, 44, 55)] + [complex(x, 75) for x in (-10, 0, 10)],
        1.0: [complex(-60, y) for y in (-40, -30, -20)] + [complex(-15, y) for y in stem],
        -1.0: [complex(60, y) for y in (-40, -30, -20)] + [complex(15, y) for y in stem],
    }
    inward = np.array([normal for normal, points in faces.items() for _ in points], np.complex128)
    touched = np.array([point for points in faces.values() for point in points])
    torque = (touched.conj() * inward).imag
    # The impulse acts along the normal. The point of contact moves along it as fast as the disc.
    share = 1 / (1 + torque**2 / _GYRATION)
    spin = share * torque / _GYRATION
    turned = spin[:, None] * _LENGTHS
    # An arc's chord; sinc(x) is sin(pi x) / (pi x).
    moved = inward[:, None] * share[:, None] * _LENGTHS * np.sinc(turned / (2 * np.pi)) * np.exp(0.5j * turned)
    away = _DISC + _GAP
    around = [complex(x, y) for x in (-60 - away, 60 + away) for y in (-45 - away, -15 + away)]
    around += [complex(x, 75 + away) for x in (-15 - away, 15 + away)]
    places = np.concatenate([touched - away * inward, around])
    lines = np.stack([np.where(_visible(place, places), np.abs(places - place), _NEVER) for place in places])
    return _Pushes(
        inward=inward,
        contact=touched - _DISC * inward,
        moved=moved,
        turned=turned,
        share=share,
        spin=spin,
        places=places,
        lines=lines,
        ways=_shortest(lines),
    )


def _shortest(lines: Float64[np.ndarray, "N N"]) -> Float64[np.ndarray, "N N"]:
    """Return the length of the shortest way between all places over straight lines (Floyd and Warshall)."""
    ways = lines
    for middle in range(len(ways)):
        ways = np.minimum(ways, ways[:, middle, None] + ways[None, middle])
    return ways


def _visible(start: complex, ends: Complex128[np.ndarray, "N"]) -> Bool[np.ndarray, "N"]:
    """Return to which ends the disc can move straight without touching the block, in the block's frame."""
    begin = np.array([start.real, start.imag])
    along = (np.stack([ends.real, ends.imag], axis=1) - begin + 1e-9)[:, None]
    grown = np.array([-1, -1, 1, 1]) * (_DISC + _CLEARANCE) + _BOXES
    # Where each line crosses the edges of each box, as a share of the line: (N, 2 boxes, x and y).
    first, second = (grown[:, :2] - begin) / along, (grown[:, 2:] - begin) / along
    enters, leaves = np.minimum(first, second).max(axis=2), np.maximum(first, second).min(axis=2)
    free: np.ndarray = ~((enters < leaves) & (leaves > 0) & (enters < 1)).any(axis=1)
    return free


@dataclass(frozen=True)
class _Pose:
    """A pose of the block: the centre of mass and the angle in radians."""

    centre: complex
    angle: float

    def seen(self, point: complex) -> complex:
        """Return a point of the table in the block's frame."""
        return (point - self.centre) * cmath.exp(-1j * self.angle)

    def gap(self, target: "_Pose") -> tuple[complex, float]:
        """Return how far the block must move, in its own frame, and turn, in radians, to reach a target."""
        return self.seen(target.centre), math.remainder(target.angle - self.angle, 2 * math.pi)


class _Hand(ExpertEpisode):
    """The expert of one episode."""

    def __init__(self, options: PushTExpertOptions, generator: np.random.Generator) -> None:
        self._options, self._generator, self._pushes = options, generator, _pushes()
        self._largest = _UNIT * generator.uniform(options.slowest, options.fastest)  # px
        self._noise = _UNIT * generator.uniform(0, options.noise)
        self._last = 0j  # the last action, in px
        self._target = self._draw()
        self._left = options.patience
        self._push: int | None = None
        self._pushing = False  # whether the disc is where the push begins
        self._ways = self._pushes.ways  # around the block as it stands, over places on the table
        self._end = self._target  # the pose of the block after the push

    def _draw(self) -> _Pose:
        x, y = self._generator.uniform(self._options.margin, _TABLE - self._options.margin, 2)
        return _Pose(complex(x, y), self._generator.uniform(-math.pi, math.pi))

    @property
    def target(self) -> Float64[np.ndarray, "3"]:
        """The block's position (x, y) and angle at the target."""
        place = self._target.centre - _CENTRE * cmath.exp(1j * self._target.angle)
        return np.array([place.real, place.imag, self._target.angle])

    def act(self, infos: Infos) -> Float64[np.ndarray, "2"]:
        """Return the next action, in multiples of the largest action."""
        angle = float(infos["angle"][0])
        step = self._act(
            complex(*infos["agent"]), _Pose(complex(*infos["block"]) + _CENTRE * cmath.exp(1j * angle), angle)
        )
        return np.array([step.real, step.imag]) / _UNIT

    def _act(self, disc: complex, block: _Pose) -> complex:
        """Return the next action in px."""
        move, turn = block.gap(self._target)
        self._left -= 1
        if (abs(move) < self._options.near and abs(turn) < self._options.turned) or self._left < 0:
            self._target, self._left, self._push = self._draw(), self._options.patience, None
        rests = block.seen(disc + _CARRIED * self._last)  # where the disc would come to rest without an action
        if self._push is None or self._over(rests, block):
            self._choose(rests, block)
        wish = self._follow(rests, block)
        step = (wish - rests) * cmath.exp(1j * block.angle) / _COVERED
        step += self._noise * complex(*self._generator.standard_normal(2))
        step *= min(1.0, self._largest / max(abs(step), 1e-9))
        x, y = disc.real + step.real, disc.imag + step.imag
        self._last = complex(min(max(x, 0.0), _TABLE), min(max(y, 0.0), _TABLE)) - disc
        return self._last

    def _over(self, disc: complex, block: _Pose) -> bool:
        assert self._push is not None
        if not self._pushing:
            return False
        aside = (disc - self._pushes.contact[self._push]) / self._pushes.inward[self._push]
        return bool(self._length(block) < _OVER or abs(aside.imag) > _ASIDE)

    def _length(self, block: _Pose) -> float:
        """Return for how many px the push must go on."""
        push, pushes = self._push, self._pushes
        move, turn = block.gap(self._end)
        speed, spin = pushes.share[push] * pushes.inward[push], _TURN * pushes.spin[push]
        return float(((move * speed.conjugate()).real + _TURN * turn * spin) / (abs(speed) ** 2 + spin**2))

    def _follow(self, disc: complex, block: _Pose) -> complex:
        """Return where the disc should come to rest, in the block's frame."""
        push, pushes = self._push, self._pushes
        self._pushing |= bool(abs(pushes.places[push] - disc) < _ARRIVED)
        if self._pushing:
            return complex(pushes.contact[push] + pushes.inward[push] * max(self._length(block), 0.0))
        ways = self._lines(disc) + self._ways[:, push]
        # The farthest of the places on the shortest way.
        place = pushes.places[np.where(ways < ways.min() + 2.0, self._ways[:, push], np.inf).argmin()]
        return complex(place)

    def _lines(self, disc: complex) -> Float64[np.ndarray, "N"]:
        """Return the distance of the disc from each place that it can reach straight; `_NEVER` for other places."""
        lines = np.abs(self._pushes.places - disc)
        free = _visible(disc, self._pushes.places)
        if not free.any():  # the disc touches the block
            free = lines <= lines.min()
        return np.where(free, lines, _NEVER)

    def _on_table(self, block: _Pose) -> Bool[np.ndarray, "N"]:
        """Return which places are on the table."""
        there = block.centre + self._pushes.places * cmath.exp(1j * block.angle)
        far = np.maximum(np.abs(there.real - _TABLE / 2), np.abs(there.imag - _TABLE / 2))
        return np.asarray(far < _TABLE / 2 - _BORDER)

    def _choose(self, disc: complex, block: _Pose) -> None:
        """Choose the first of the two pushes that bring the block near to the target with little way."""
        pushes = self._pushes
        count = len(pushes.inward)
        on_table = self._on_table(block)
        self._ways = pushes.ways
        if not on_table.all():
            self._ways = _shortest(np.where(on_table & on_table[:, None], pushes.lines, _NEVER))
        to_target, angle = block.gap(self._target)
        # What is left after the first push, (C, L), in the block's frame after it.
        move = (to_target - pushes.moved) * np.exp(-1j * pushes.turned)
        turn = _TURN * np.angle(np.exp(1j * (angle - pushes.turned)))
        square = np.abs(move) ** 2 + turn**2
        # The second push, (C, L, C), without its curvature: the projection on its direction gives the best length.
        speed, spin = pushes.share * pushes.inward, _TURN * pushes.spin
        along = np.multiply.outer(move.real, speed.real) + np.multiply.outer(move.imag, speed.imag)
        along += np.multiply.outer(turn, spin)
        norm = pushes.share**2 + spin**2
        length = np.clip(along / norm, 0.0, _LENGTHS[-1])
        left = _effort(square[..., None] - length * (2 * along - length * norm))
        left += length + _CHANGE + self._ways[:count, None, :count]
        best = np.minimum(left.min(axis=2), _effort(square))
        ends = block.centre + pushes.moved * cmath.exp(1j * block.angle)
        outside = sum(np.maximum(np.abs(part - _TABLE / 2) - _TABLE / 2 + _ROOM, 0) for part in (ends.real, ends.imag))
        ways = (self._lines(disc)[:, None] + self._ways[:, :count]).min(axis=0)
        cost = best + ways[:, None] + _LENGTHS + _LOSS * outside
        push, size = np.unravel_index(int(cost.argmin()), cost.shape)
        self._push, self._pushing = int(push), False
        self._end = _Pose(complex(ends[push, size]), block.angle + float(pushes.turned[push, size]))


def _effort(square: Float64[np.ndarray, "*axes"]) -> Float64[np.ndarray, "*axes"]:
    """Return an error, given squared, as the way of the disc that it is worth: each half of it is worth the same."""
    effort: np.ndarray = _HALF / 2 * np.log2(np.maximum(square, _PRECISE**2))
    return effort


@register_policy("pusht-expert", PushTExpertOptions)
class PushTExpert(Expert):
    """A policy that pushes PushT's block to one random pose after another, with a speed and noise of each episode.

    A target is the block's position (x, y) in px and its angle in radians.
    """

    sees = ("agent", "block", "angle")
    size = 2

    def __init__(self, action: ActionSpec, options: PushTExpertOptions) -> None:
        super().__init__(action, "pusht-expert")
        self._options = options

    def begin(self, generator: np.random.Generator) -> ExpertEpisode:
        """Return the expert of one episode."""
        return _Hand(self._options, generator)
