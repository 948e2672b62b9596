"""A point robot among hazards on MuJoCo, based on Safety-Gymnasium's PointGoal. Goals are observations."""

import functools
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from jaxtyping import Float32, Float64, UInt8
from pydantic import Field

from worldloom.core.config import Config
from worldloom.core.errors import ConfigError
from worldloom.core.registry import nearest
from worldloom.envs.mujoco_worlds import MuJoCoEnv
from worldloom.envs.rendering import load_mujoco

HAZARDS = 8
RADIUS = 0.2  # m, the radius of a hazard
EXTENT = 1.5  # m, from the centre to the edge
BINS = 16
_SIGHT = 3.0  # m, the range of the lidar
_CLEAR = 0.2  # m around hazards without starts and goals
_TRIES = 10_000


class PointHazardsTask(Config):
    """The requirements on a start and a goal.

    `min_distance` is in metres. `obstructed` requires (True) or forbids (False) a hazard on the straight line between
    start and goal.
    """

    min_distance: float = Field(1.0, ge=0, lt=2)
    obstructed: bool | None = None


class PointHazardsEnv(MuJoCoEnv):
    """A point robot that drives and turns among eight hazards (0.1 s per step).

    The hazards' positions are random in each episode, or fixed by the seed `layout`.

    The robot, the number and size of the hazards and the lidar follow Safety-Gymnasium's PointGoal1 (Ji et al., 2023),
    without the vase and the rewards. Observation: a float32 vector of 23 values: position (2) in metres, cos and sin of
    the heading, velocity (2) along and across the heading in m/s, turning rate in rad/s, and 16 lidar bins around the
    robot. A bin is the closeness in [0, 1] of the nearest hazard in its direction, 0 beyond 3 m. A hazard counts in the
    two bins nearest to the hazard's bearing. Action: 2 values in [-1, 1], drive and turn. Infos: `position` (2);
    `hazard_depth` in metres, the distance from the robot's centre to the edge of the nearest hazard (negative outside);
    and `cost`, 1 inside a hazard. Hazards do not stop the robot. Episodes do not end by themselves.

    `reset(options={"task": {...}})` also samples a goal (see `PointHazardsTask`) and adds to the infos: `goal`, the
    observation at the goal at rest; `goal_position`; and `wall_between`, whether a hazard is between start and goal.

    Raises:
        EnvironmentFailure: MuJoCo is not installed, or rendering is requested and no OpenGL is available.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10, "simulator": True}  # noqa: RUF012 - Gymnasium declares it so

    def __init__(self, layout: int | None = None, size: int = 64, render_mode: str | None = None) -> None:
        self.render_mode = render_mode
        super().__init__(_compiled, substeps=10, height=4.2, size=size, draws=render_mode is not None)
        self._fixed = None if layout is None else _scatter(np.random.default_rng(layout))
        self._hazards = np.zeros((HAZARDS, 2))
        self.observation_space = spaces.Box(-np.inf, np.inf, (7 + BINS,), np.float32)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Float32[np.ndarray, "_"], dict[str, Any]]:
        """Place the hazards and the robot at random, from the seed."""
        gymnasium.Env.reset(self, seed=seed)
        if wrong := [name for name in options or {} if name != "task"]:
            raise ConfigError(f"unknown reset option {wrong[0]!r}; {nearest(wrong[0], ['task'])}")
        task = (options or {}).get("task")
        wanted = None if task is None else PointHazardsTask.parse(task)
        for _ in range(_TRIES):
            self._hazards = _scatter(self.np_random) if self._fixed is None else self._fixed
            start, goal = self._free(), self._free()
            between = bool((self._depth(np.linspace(start, goal, 64)) > 0).any())
            if wanted is None or (
                np.linalg.norm(goal - start) > wanted.min_distance and wanted.obstructed in (None, between)
            ):
                break
        else:
            raise ConfigError(f"found no start and goal with {wanted} in {_TRIES} tries; relax the options of the task")
        infos: dict[str, Any] = {}
        if wanted is not None:
            self._put(goal, self.np_random.uniform(-np.pi, np.pi))
            infos = {"goal": self._observe(), "goal_position": goal.astype(np.float32), "wall_between": between}
        self._put(start, self.np_random.uniform(-np.pi, np.pi))
        return self._observe(), {**self._infos(), **infos}

    def render(self) -> UInt8[np.ndarray, "H W 3"]:
        """Return an image from above."""
        self._data.mocap_pos[:, :2] = self._hazards
        self._mujoco.mj_forward(self._model, self._data)
        return super().render()

    def _free(self) -> Float64[np.ndarray, "2"]:
        while True:
            place: np.ndarray = self.np_random.uniform(-EXTENT + 0.1, EXTENT - 0.1, 2)
            if self._depth(place[None])[0] <= -_CLEAR:
                return place

    def _put(self, place: np.ndarray, heading: float) -> None:
        self._mujoco.mj_resetData(self._model, self._data)
        self._data.qpos[:] = (*place, heading)
        self._mujoco.mj_forward(self._model, self._data)

    def _depth(self, points: Float64[np.ndarray, "P 2"]) -> Float64[np.ndarray, "P"]:
        away = np.linalg.norm(points[:, None] - self._hazards, axis=-1).min(axis=1)
        depth: np.ndarray = RADIUS - away
        return depth

    def _observe(self) -> Float32[np.ndarray, "_"]:
        (x, y, heading), (along_x, along_y, turning) = self._data.qpos, self._data.qvel
        cos, sin = np.cos(heading), np.sin(heading)
        around = np.array([[cos, sin], [-sin, cos]])
        away = (self._hazards - (x, y)) @ around.T
        lidar = self._lidar(away)
        velocity = around @ (along_x, along_y)
        return np.array([x, y, cos, sin, *velocity, turning, *lidar], np.float32)

    def _lidar(self, away: Float64[np.ndarray, "H 2"]) -> Float64[np.ndarray, "_"]:
        """Return the lidar bins. Each hazard counts in the two bins nearest to the hazard's bearing."""
        bearing = np.arctan2(away[:, 1], away[:, 0]) % (2 * np.pi) / (2 * np.pi) * BINS
        close = np.clip(1 - np.linalg.norm(away, axis=1) / _SIGHT, 0, 1)
        first, share = bearing.astype(int), bearing % 1
        lidar = np.zeros(BINS)
        np.maximum.at(lidar, first % BINS, (1 - share) * close)
        np.maximum.at(lidar, (first + 1) % BINS, share * close)
        return lidar

    def _infos(self) -> dict[str, Any]:
        place = self._data.qpos[:2].copy()
        depth = float(self._depth(place[None])[0])
        return {
            "position": place.astype(np.float32),
            "hazard_depth": np.float32(depth),
            "cost": np.float32(depth > 0),
        }


def _scatter(rng: np.random.Generator) -> Float64[np.ndarray, "H 2"]:
    """Sample positions of hazards that do not overlap."""
    places: list[np.ndarray] = []
    while len(places) < HAZARDS:
        place = rng.uniform(-EXTENT + RADIUS, EXTENT - RADIUS, 2)
        if all(np.linalg.norm(place - other) > 2 * RADIUS for other in places):
            places.append(place)
    return np.array(places)


@functools.cache
def _compiled() -> Any:
    hazards = "".join(
        f'<body name="hazard{n}" mocap="true"><geom type="cylinder" size="{RADIUS} 0.01" rgba="0.3 0.3 1 1" '
        f'contype="0" conaffinity="0"/></body>'
        for n in range(HAZARDS)
    )
    walls = "".join(
        f'<geom type="box" pos="{x} {y} 0.1" size="{a} {b} 0.1" rgba="0.5 0.5 0.5 1"/>'
        for x, y, a, b in (
            (EXTENT + 0.15, 0, 0.05, EXTENT + 0.2),
            (-EXTENT - 0.15, 0, 0.05, EXTENT + 0.2),
            (0, EXTENT + 0.15, EXTENT + 0.2, 0.05),
            (0, -EXTENT - 0.15, EXTENT + 0.2, 0.05),
        )
    )
    return load_mujoco(draws=False).MjModel.from_xml_string(f"""
<mujoco>
  <option timestep="0.01" gravity="0 0 0" integrator="implicitfast"/>
  <visual><headlight ambient="1 1 1" diffuse="0 0 0" specular="0 0 0"/></visual>
  <worldbody>
    <geom type="plane" size="4 4 0.1" pos="0 0 -0.02" rgba="0.9 0.9 0.88 1" contype="0" conaffinity="0"/>
    {walls}
    {hazards}
    <body name="robot" pos="0 0 0.1">
      <joint name="x" type="slide" axis="1 0 0" damping="0.01"/>
      <joint name="y" type="slide" axis="0 1 0" damping="0.01"/>
      <joint name="turn" type="hinge" axis="0 0 1" damping="0.001"/>
      <geom name="robot" type="sphere" size="0.1" density="1" rgba="0.9 0.2 0.2 1"/>
      <geom type="box" size="0.05 0.05 0.05" pos="0.1 0 0" rgba="0.9 0.2 0.2 1" density="1" contype="0"
        conaffinity="0"/>
      <site name="middle"/>
    </body>
  </worldbody>
  <actuator>
    <motor site="middle" gear="0.008 0 0 0 0 0" ctrlrange="-1 1" ctrllimited="true"/>
    <motor site="middle" gear="0 0 0 0 0 0.002" ctrlrange="-1 1" ctrllimited="true"/>
  </actuator>
</mujoco>""")
