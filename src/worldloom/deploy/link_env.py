"""A plant as a Gymnasium environment, for data collection and evaluation."""

import time
from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

from worldloom.core.errors import ConfigError
from worldloom.core.types import ActionSpec, ObservationSpec
from worldloom.deploy.link import Link, PlantReading, SocketLink
from worldloom.deploy.wire import LinkError

_BOUND = 3.4e38  # finite float32 bounds, because the range of a sensor is unknown


class LinkEnv(gymnasium.Env[Any, np.ndarray]):
    """A link as an environment: `step` sends the action and waits for the observation of the next period.

    The plant runs on its own clock. A caller that steps more slowly than the rate misses periods. The info `missed` is
    the number of missed periods. In missed periods the plant's watchdog acts, and the info `safe` is 1. Other infos are
    the plant's labels, `sequence`, and `age`, the seconds from the arrival of an observation to the return of `step`.
    The reward is always 0, and episodes do not end by themselves. `reset` calls `on_reset(seed)`, if set (for example,
    to ask an operator), then requests a new episode and waits up to `reset_timeout` seconds for the first observation.

    Raises:
        LinkError: the link is broken, or no observation arrives within `timeout` seconds and two periods.
        ConfigError: both `address` and `link` are set, or neither.
    """

    metadata: dict[str, Any] = {"render_modes": ["rgb_array"], "simulator": False}  # noqa: RUF012  Gymnasium's own type

    def __init__(
        self,
        address: str | None = None,
        *,
        link: Link | None = None,
        timeout: float = 5.0,
        reset_timeout: float = 60.0,
        on_reset: Callable[[int | None], object] | None = None,
        render_mode: str | None = None,
    ) -> None:
        if (address is None) == (link is None):
            raise ConfigError(
                "expected either 'address' (tcp://HOST:PORT or unix:PATH) or 'link'; set exactly one of them"
            )
        self.link = link if link is not None else SocketLink(str(address))
        self.observation_space = observation_space(self.link.observation)
        self.action_space = action_space(self.link.action)
        self.render_mode = render_mode
        self._timeout = max(timeout, 2 / self.link.rate)
        self._reset_timeout, self._on_reset = reset_timeout, on_reset
        self._last: PlantReading | None = None

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Start an episode and return its first observation."""
        super().reset(seed=seed)
        if self._on_reset is not None:
            self._on_reset(seed)
        self.link.reset(seed=seed, options=options)
        self._last = None
        return self._next(self._reset_timeout)

    def step(self, action: np.ndarray) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Send the action, and return the observation of the next period, with a reward of 0."""
        values = np.asarray(action)
        if self.link.action.discrete:
            values = np.eye(self.link.action.size)[int(values)]
        answers = -1 if self._last is None else self._last.sequence
        self.link.receive(0.0)  # an observation from before the action does not show its effect; `missed` counts it
        self.link.send(values.astype(np.float32).reshape(-1), kind="environment", answers=answers)
        observation, info = self._next(self._timeout)
        return observation, 0.0, False, False, info

    def applied(self) -> np.ndarray | None:
        """Return the action that the plant is applying; see `Link.applied`."""
        return self.link.applied()

    def render(self) -> Any:
        """Return the pixels of the last observation."""
        return None if self._last is None else self._last.pixels

    def close(self) -> None:
        """Close the link; the plant then applies its safe action."""
        self.link.close()

    def _next(self, timeout: float) -> tuple[Any, dict[str, Any]]:
        reading = self.link.receive(timeout)
        if reading is None:
            raise LinkError(f"no observation arrived within {timeout:g} s; check that the plant sends observations")
        missed = 0 if self._last is None else reading.sequence - self._last.sequence - 1
        self._last = reading
        parts = {"pixels": reading.pixels, "vector": reading.vector}
        info: dict[str, Any] = {
            **reading.labels,
            "missed": float(missed),
            "safe": float(reading.safe),
            "age": time.monotonic() - reading.arrived,
            "sequence": float(reading.sequence),
        }
        return {name: part for name, part in parts.items() if part is not None}, info


def observation_space(spec: ObservationSpec) -> spaces.Space[Any]:
    """Return the Gymnasium space for an observation spec."""
    parts: dict[str, spaces.Space[Any]] = {}
    if spec.pixels is not None:
        parts["pixels"] = spaces.Box(0, 255, spec.pixels, np.uint8)
    if spec.vector:
        parts["vector"] = spaces.Box(-_BOUND, _BOUND, (spec.vector,), np.float32)
    return spaces.Dict(parts)


def action_space(spec: ActionSpec) -> spaces.Space[Any]:
    """Return the Gymnasium space for an action spec."""
    if spec.discrete:
        return spaces.Discrete(spec.size)
    return spaces.Box(np.array(spec.low, np.float32), np.array(spec.high, np.float32), dtype=np.float32)
