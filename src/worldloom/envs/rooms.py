"""The pixel environments for Gymnasium, single and vectorised, on the same simulator."""

from collections.abc import Mapping, Sequence
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.vector import AutoresetMode
from gymnasium.vector.utils import batch_space
from jaxtyping import Float64

from worldloom.core.errors import ConfigError
from worldloom.core.registry import nearest
from worldloom.envs.factors import WORLDS, check_names
from worldloom.envs.simulator import Simulator, free
from worldloom.envs.tasks import Task, TaskOptions, close_door, draw_free, draw_task

_OPTIONS = ("factors", "task")
_SEED_LIMIT = 2**31
_LAYOUTS = 20  # layouts sampled before a task is reported as impossible

Infos = dict[str, Any]


class RoomsVectorEnv(gymnasium.vector.VectorEnv[Any, Any, Any]):
    """N rooms of one world. Observations are frames (N, size, size, 3), actions (N, 2) in [-1, 1] (x right, y down).

    Each step moves the agent's centre by the action times `agent_speed` px; the agent slides along walls. The reward is
    always 0.0. An episode ends only after `max_episode_steps` or in a deadly pit. Infos contain `position` (N, 2) in
    px and every numeric factor in `vary`. With pits, infos also contain `pit_positions` (N, 6), the x and y of each
    pit, and `pit_depth` (N,), the distance in px from the agent to the edge of the nearest pit (negative outside).

    Args:
        world: "TwoRoom", "FourRooms", "Maze" or "Pits". Environment ids registered with Gymnasium set this argument.
        num_envs: the number N of parallel environments.
        vary: the factors that are resampled in each episode, from the episode's seed; see the factors of the world.
            The default is the positions of the doors, the layout of the maze, or the positions of the pits.
        factors: the values of fixed factors. All other factors that are not in `vary` have their default values.
        size: the side of a frame in pixels; the world itself is always 64 px wide.
        max_episode_steps: the number of steps after which an episode is truncated; None means no limit.
        render_mode: None or "rgb_array".

    `reset(options=...)` accepts `factors` (values for the next episodes) and `task` (the fields of `TaskOptions`).
    With `task`, a start and a goal are sampled, and the infos of the reset contain `goal`, the frames at the goals
    (N, size, size, 3), `goal_position` (N, 2), `shortest_steps` (N,) and `wall_between` (N,).

    Raises:
        ConfigError: a factor or option is unknown, a value is out of range, or no task satisfies the options.
    """

    metadata: dict[str, Any] = {  # noqa: RUF012 - Gymnasium's own type
        "render_modes": ["rgb_array"],
        "render_fps": 10,
        "autoreset_mode": AutoresetMode.NEXT_STEP,
        "simulator": True,
    }

    def __init__(
        self,
        world: str,
        num_envs: int = 1,
        *,
        vary: Sequence[str] | None = None,
        factors: Mapping[str, Any] | None = None,
        size: int = 64,
        max_episode_steps: int | None = None,
        render_mode: str | None = None,
    ) -> None:
        if not 16 <= size <= 512:
            raise ConfigError(f"'size' must be 16 to 512 pixels; got {size}")
        if num_envs < 1:
            raise ConfigError(f"num_envs must be at least 1; got {num_envs}")
        self.num_envs, self.render_mode, self.factors_type = num_envs, render_mode, WORLDS[world]
        self._fixed = dict(factors or {})
        self._vary = tuple(self.factors_type.varies if vary is None else vary)
        check_names(self.factors_type, self._vary, self._fixed)
        self.factors_type.parse(self._fixed)
        self._max_steps = max_episode_steps
        self._simulator = Simulator(num_envs, size)
        self.single_observation_space = spaces.Box(0, 255, (size, size, 3), np.uint8)
        self.single_action_space = spaces.Box(-1.0, 1.0, (2,), np.float32)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._generators = [np.random.default_rng() for _ in range(num_envs)]
        self._elapsed = np.zeros(num_envs, np.int64)
        self._over = np.ones(num_envs, bool)

    def reset(
        self,
        *,
        seed: int | np.integer[Any] | Sequence[int | None] | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> tuple[np.ndarray, Infos]:
        """Start an episode in each environment; an integer `seed` seeds environment i with `seed + i`."""
        for name in options or {}:
            if name not in _OPTIONS:
                raise ConfigError(f"unknown reset option {name!r}; {nearest(name, _OPTIONS)}")
        values = dict(options or {})
        task_options = TaskOptions.parse(values["task"]) if values.get("task") is not None else None
        seeds = [int(seed) + row for row in range(self.num_envs)] if isinstance(seed, int | np.integer) else seed
        if seeds is not None and len(seeds) != self.num_envs:
            raise ConfigError(f"expected {self.num_envs} seeds, one for each environment; got {len(seeds)}")
        tasks: list[Task] = []
        for row in range(self.num_envs):
            if seeds is not None and (given := seeds[row]) is not None:
                self._generators[row] = np.random.default_rng(given)
            task = self._begin(row, values.get("factors") or {}, task_options)
            tasks += [] if task is None else [task]
        infos = self._infos()
        if tasks:
            goals = np.stack([task.goal for task in tasks])
            infos |= {
                "goal": self._simulator.render(goals),
                "goal_position": goals.astype(np.float32),
                "shortest_steps": np.array([task.shortest_steps for task in tasks], np.float32),
                "wall_between": np.array([task.wall_between for task in tasks]),
            }
        return self._simulator.render(), infos

    def step(self, actions: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, Infos]:
        """Move each agent; an environment whose episode has ended starts the next episode instead."""
        wanted: Float64[np.ndarray, "N 2"] = np.asarray(actions, np.float64)
        if wanted.shape != (self.num_envs, 2) or not np.isfinite(wanted).all():
            raise ConfigError(
                f"expected finite actions of shape {(self.num_envs, 2)}; got shape {wanted.shape}: {wanted}"
            )
        again = np.flatnonzero(self._over)
        self._simulator.step(wanted, ~self._over)
        self._elapsed += 1
        self._change_rooms()
        for row in again:
            self._begin(int(row), {}, None)
        truncated = np.zeros(self.num_envs, bool)
        if self._max_steps is not None:
            truncated = self._elapsed >= self._max_steps
        terminated = self._simulator.lost()
        self._over = truncated | terminated
        return self._simulator.render(), np.zeros(self.num_envs), terminated, truncated, self._infos()

    def render(self) -> tuple[np.ndarray, ...] | None:
        """Return the current frames if `render_mode` is "rgb_array", else None."""
        return tuple(self._simulator.render()) if self.render_mode == "rgb_array" else None

    def _begin(self, row: int, given: Mapping[str, Any], options: TaskOptions | None) -> Task | None:
        rng = np.random.default_rng(self._generators[row].integers(_SEED_LIMIT))
        draws = self.factors_type.draws()
        check_names(self.factors_type, tuple(given), {})
        for attempt in range(_LAYOUTS):
            # Every varying factor is sampled, even if a value is given, so that other factors stay the same.
            drawn = {name: draws[name](rng) for name in sorted(self._vary)}
            factors = self.factors_type.parse({**self._fixed, **drawn, **given})
            try:
                task = None if options is None else draw_task(factors, options, rng)
                if task is not None and options is not None and options.closes_after is not None:
                    factors = close_door(factors, task, options.closes_after)
            except ConfigError:
                if attempt == _LAYOUTS - 1:
                    raise
            else:
                break
        start = draw_free(factors, rng) if task is None else task.start
        self._simulator.place(row, factors.after(0), start, rng)
        self._elapsed[row], self._over[row] = 0, False
        return task

    def _change_rooms(self) -> None:
        for row, factors in enumerate(self._simulator.factors):
            now = factors.after(int(self._elapsed[row]))
            if now is factors:
                continue
            # A door does not close on an agent in it.
            same = np.array_equal(now.walls(), factors.walls())
            if same or free(now, self._simulator.position[row : row + 1])[0]:
                self._simulator.furnish(row, now)

    def _infos(self) -> Infos:
        infos: Infos = {"position": self._simulator.position.astype(np.float32)}
        pits = [one for one in self._simulator.hazards if one is not None]
        if pits:
            infos["pit_positions"] = np.array([one.centres.ravel() for one in pits], np.float32)
            infos["pit_depth"] = self._simulator.depth.astype(np.float32)
        for name in self._vary:
            values = [getattr(factors, name) for factors in self._simulator.factors]
            if not isinstance(values[0], str):
                infos[name] = np.array(values, np.float32)
        return infos


class RoomEnv(gymnasium.Env[np.ndarray, np.ndarray]):
    """A single environment of `RoomsVectorEnv`, with the same arguments except `num_envs`."""

    metadata: dict[str, Any] = {  # noqa: RUF012 - Gymnasium's own type
        "render_modes": ["rgb_array"],
        "render_fps": 10,
        "simulator": True,
    }

    def __init__(self, world: str, *, render_mode: str | None = None, **kwargs: Any) -> None:
        self._batch = RoomsVectorEnv(world, render_mode=render_mode, **kwargs)
        self.render_mode = render_mode
        self.observation_space = self._batch.single_observation_space
        self.action_space = self._batch.single_action_space

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, Infos]:
        """Start an episode; `RoomsVectorEnv` describes the options."""
        super().reset(seed=seed)
        # The batch uses this generator, so that a seed gives the same episodes as the same seed in a batch.
        self._batch._generators = [self.np_random]
        frames, infos = self._batch.reset(options=options)
        return frames[0], {name: values[0] for name, values in infos.items()}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, Infos]:
        """Move the agent."""
        frames, _, terminated, truncated, infos = self._batch.step(np.asarray(action)[None])
        values = {name: value[0] for name, value in infos.items()}
        return frames[0], 0.0, bool(terminated[0]), bool(truncated[0]), values

    def render(self) -> np.ndarray | None:
        """Return the current frame if `render_mode` is "rgb_array", else None."""
        frames = self._batch.render()
        return None if frames is None else frames[0]
