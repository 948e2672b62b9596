"""PushT: a disc pushes a T-shaped block on a table, with the physics of `gym-pusht` (pymunk).

The task is from Florence et al. (2021) and Chi et al., "Diffusion Policy" (2023), without the fixed target: goals are
observations.
"""

import os
import warnings
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from jaxtyping import Float32, UInt8

from worldloom.core.errors import EnvironmentFailure
from worldloom.core.extras import missing_extra

_TABLE = 512  # px; the table's side in the units of the simulator
_RGB = (0xFF, 0xFF00, 0xFF0000, 0)  # the surface's bytes are red, green, blue and one unused, in this order
_REACH = 100.0  # px from the disc to the target for an action of 1, the usual scale of relative actions for PushT


class PushTEnv(gymnasium.Env[Any, Any]):
    """PushT, seen from above. An action is the disc's target, relative to the disc's position.

    Observation: uint8 pixels (size, size, 3), scaled by area averaging. Action: (dx, dy) in [-1, 1], in units of 100 px
    of the 512 px table; a PD controller moves the disc toward the target for 0.1 s. The disc keeps its velocity between
    steps, but one frame does not show the velocity. The block stops when nothing pushes it. Infos: `agent` (x, y) and
    `block` (x, y) in px of the table, `angle` of the block in radians within [0, 2 pi). Episodes do not end by
    themselves.

    Raises:
        EnvironmentFailure: `gym-pusht` is not installed, or the size is out of range.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10, "simulator": True}  # noqa: RUF012 - Gymnasium declares it so

    def __init__(self, size: int = 64, render_mode: str | None = None) -> None:
        if not 8 <= size <= _TABLE:
            raise EnvironmentFailure(f"'size' of PushT must be 8 to {_TABLE} pixels; got {size}")
        self.render_mode = render_mode
        self._size = size
        self._physics, pygame, draw_options, self._cv2 = _load()
        self._surface = pygame.Surface((_TABLE, _TABLE), depth=32, masks=_RGB)
        self._options = draw_options(self._surface)
        self.observation_space = spaces.Box(0, 255, (size, size, 3), np.uint8)
        self.action_space = spaces.Box(-1.0, 1.0, (2,), np.float32)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[UInt8[np.ndarray, "H W 3"], dict[str, Any]]:
        """Place the disc and the block at random, from the seed."""
        super().reset(seed=seed)
        self._physics.reset(seed=int(self.np_random.integers(2**31)))
        return self.render(), self._infos()

    def step(
        self, action: Float32[np.ndarray, "2"]
    ) -> tuple[UInt8[np.ndarray, "H W 3"], float, bool, bool, dict[str, Any]]:
        """Move the disc toward its position plus 100 px times `action`, for 0.1 s."""
        here = np.array(self._physics.agent.position)
        self._physics.step(np.clip(here + _REACH * np.asarray(action, np.float64), 0.0, _TABLE))
        return self.render(), 0.0, False, False, self._infos()

    def render(self) -> UInt8[np.ndarray, "H W 3"]:
        """Return the observed frame, in pymunk's own colours and without the target of the original task."""
        self._surface.fill((255, 255, 255))
        self._physics.space.debug_draw(self._options)
        # The surface's own memory is scaled, without a copy of the whole table.
        whole = np.frombuffer(self._surface.get_buffer(), np.uint8).reshape(_TABLE, _TABLE, 4)
        small = self._cv2.resize(whole, (self._size, self._size), interpolation=self._cv2.INTER_AREA)
        return np.ascontiguousarray(small[..., :3])

    def _infos(self) -> dict[str, Any]:
        block = self._physics.block
        return {
            "agent": np.array(self._physics.agent.position, np.float32),
            "block": np.array(block.position, np.float32),
            "angle": np.array([block.angle % (2 * np.pi)], np.float32),
        }


def _load() -> tuple[Any, Any, Any, Any]:
    """Return the simulation and its renderer: `pygame`, pymunk's drawing options, and `cv2`."""
    os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # pygame imports a module that setuptools deprecates
            import cv2
            import pygame
            from gym_pusht.envs.pusht import PushTEnv as Physics
            from pymunk.pygame_util import DrawOptions
    except ImportError as error:
        raise EnvironmentFailure(missing_extra("pusht", error)) from error

    class WithoutCoverage(Physics):  # type: ignore[misc]
        """The simulation without its reward, the area of the block over the target, which took a third of a step."""

        def _get_coverage(self) -> float:
            return 0.0

    return WithoutCoverage(obs_type="state"), pygame, DrawOptions, cv2
