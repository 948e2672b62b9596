"""Small episodes and a small world for the tests of this folder."""

from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

from worldloom.core.types import ActionSpec, Episode, ObservationSpec
from worldloom.data import DatasetSpec

SHAPE = (6, 10, 3)
SPEC = DatasetSpec(
    observation=ObservationSpec(pixels=SHAPE, vector=2),
    action=ActionSpec(low=(-1.0, -3.0), high=(1.0, 5.0)),
    labels={"position": 2, "speed": 1},
    environment={"id": "somewhere"},
)


def make_episode(index: int, steps: int = 5, spec: DatasetSpec = SPEC) -> Episode:
    """An episode whose content depends on (index, steps) alone: pixel [0, 0, 0] is the step, [0, 1, 0] the index."""
    generator = np.random.default_rng([index, steps])
    pixels = None
    if spec.observation.pixels is not None:
        pixels = generator.integers(0, 255, (steps + 1, *spec.observation.pixels), np.uint8)
        pixels[:, 0, 0, 0] = np.arange(steps + 1) % 256
        pixels[:, 0, 1, 0] = index % 256
    low, high = np.array(spec.action.low), np.array(spec.action.high)
    vector = None
    if spec.observation.vector:
        vector = generator.normal(size=(steps + 1, spec.observation.vector)).astype(np.float32)
    return Episode(
        pixels=pixels,
        vector=vector,
        actions=(low + (high - low) * generator.random((steps, len(low)))).astype(np.float32),
        labels={
            name: generator.normal(size=(steps + 1, size)).astype(np.float32) for name, size in spec.labels.items()
        },
        metadata={"index": index, "note": "ü"},
    )


def same(left: Episode, right: Episode) -> bool:
    pairs = [(left.pixels, right.pixels), (left.vector, right.vector), (left.actions, right.actions)]
    pairs += [(left.labels[name], right.labels[name]) for name in left.labels]
    equal = all(np.array_equal(a, b) if a is not None and b is not None else a is b for a, b in pairs)
    return equal and left.labels.keys() == right.labels.keys() and left.metadata == right.metadata


class PushWorld(gymnasium.Env[Any, Any]):
    """A point on a line of pixels and a counter: frames are not square, bounds not symmetric.

    `length` ends an episode; `fail` raises and `bad` returns NaN at that step in the environment whose first
    random number is below `share`. `forget` leaves the info `place` out at that step.
    """

    observation_space = spaces.Dict(
        {
            "camera": spaces.Box(0, 255, SHAPE, np.uint8),
            "state": spaces.Box(-np.inf, np.inf, (2,), np.float32),
        }
    )
    action_space = spaces.Box(np.array([-1, -3], np.float32), np.array([1, 5], np.float32))

    def __init__(self, length: int = 0, fail: int = -1, bad: int = -1, share: float = 1.0, forget: int = -1) -> None:
        self.length, self.fail, self.bad, self.share, self.forget = length, fail, bad, share, forget

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.state = self.np_random.normal(size=2).astype(np.float32)
        self.chosen = self.np_random.random() < self.share
        self.time = 0
        self.end = self.length + int(abs(self.state[1]) * 100) % 3 if self.length else -1
        return self._observation(), self._info()

    def step(self, action: np.ndarray) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        assert self.action_space.contains(action), action
        self.state = (self.state + 0.1 * action).astype(np.float32)
        self.time += 1
        if self.chosen and self.time == self.fail:
            raise RuntimeError("the motor is on fire")
        if self.chosen and self.time == self.bad:
            self.state[0] = np.nan
        return self._observation(), 0.0, self.time == self.end, False, {**self._info(), "only_on_step": 1.0}

    def _observation(self) -> dict[str, np.ndarray]:
        camera = np.zeros(SHAPE, np.uint8)
        camera[self.time % SHAPE[0], :, 0] = 200
        camera[0, 0, 1] = self.time
        return {"camera": camera, "state": self.state}

    def _info(self) -> dict[str, Any]:
        place = {} if self.time == self.forget else {"place": self.state * 2}
        return {"time": self.time, **place, "name": "push", "map": np.zeros((30, 30))}


def register() -> str:
    if "test_data/Push-v0" not in gymnasium.registry:
        gymnasium.register("test_data/Push-v0", entry_point=PushWorld)
    return "test_data/Push-v0"
