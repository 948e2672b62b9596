"""Reacher and a point maze on MuJoCo. Goals are observations, so no target is rendered."""

import functools
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from jaxtyping import Float, UInt8

from worldloom.core.errors import EnvironmentFailure
from worldloom.envs.rendering import draw, load_mujoco

LAYOUTS = {
    "open": ("#######", "#     #", "#     #", "#     #", "#######"),
    "umaze": ("#####", "#   #", "### #", "#   #", "#####"),
    "medium": (
        "########",
        "#  ##  #",
        "#  #   #",
        "##   ###",
        "#  #   #",
        "# #  # #",
        "#   #  #",
        "########",
    ),
}
_FASTEST = 5.0  # m/s; the maximum speed of the maze's point along each axis


class MuJoCoEnv(gymnasium.Env[Any, Any]):
    """Base class of MuJoCo environments with one camera, `height` metres above the plane.

    Environments with the same model share the model and its renderer. If there is no OpenGL, creating the environment
    raises an error; with `draws=False`, only rendering raises it.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 50, "simulator": True}  # noqa: RUF012 - Gymnasium declares it so

    def __init__(
        self, model: Callable[[], Any], *, substeps: int, height: float, size: int, draws: bool = True
    ) -> None:
        if not 8 <= size <= 480:
            raise EnvironmentFailure(f"'size' must be 8 to 480 pixels; got {size}")
        self._mujoco = load_mujoco(draws=draws)
        self._model = model()
        self._data = self._mujoco.MjData(self._model)
        self._substeps, self._size = substeps, size
        self._camera = self._mujoco.MjvCamera()
        self._camera.distance, self._camera.azimuth, self._camera.elevation = height, 90, -90
        self.observation_space = spaces.Box(0, 255, (size, size, 3), np.uint8)
        self.action_space = spaces.Box(-1.0, 1.0, (2,), np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Start an episode at a random state, from the seed."""
        super().reset(seed=seed)
        self._mujoco.mj_resetData(self._model, self._data)
        self._place()
        self._mujoco.mj_forward(self._model, self._data)
        return self._observe(), self._infos()

    def step(self, action: Float[np.ndarray, "2"]) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Apply `action` for one control step."""
        self._act(np.clip(np.asarray(action, np.float64), -1.0, 1.0))
        self._mujoco.mj_step(self._model, self._data, nstep=self._substeps)
        self._mujoco.mj_forward(self._model, self._data)  # so that frames and infos show the state after the step
        return self._observe(), 0.0, False, False, self._infos()

    def render(self) -> UInt8[np.ndarray, "H W 3"]:
        """Return the camera's frame."""
        return draw(self._model, self._data, self._camera, self._size)

    def _place(self) -> None: ...

    def _act(self, action: np.ndarray) -> None:
        self._data.ctrl[:] = action

    def _observe(self) -> Any:
        return self.render()

    def _infos(self) -> dict[str, Any]:
        return {}


class ReacherEnv(MuJoCoEnv):
    """A two-link arm in the plane, with the physics of Gymnasium's Reacher-v5 (0.02 s per step).

    Observation: uint8 pixels (size, size, 3); one frame does not show velocities. Action: one value in [-1, 1] for each
    joint, multiplied by `torque`, which is a fraction of Gymnasium's largest torque. The largest torque would make the
    arm spin. Infos: `joints` (2) in radians within [-pi, pi), `fingertip` (x, y) in metres. Episodes start at rest with
    random joint angles, and do not end by themselves.
    """

    def __init__(self, size: int = 64, torque: float = 0.1, render_mode: str | None = None) -> None:
        if not 0 < torque <= 1:
            raise EnvironmentFailure(f"'torque' of Reacher must be above 0 and at most 1; got {torque}")
        self.render_mode = render_mode
        self._torque = torque
        super().__init__(_reacher_model, substeps=2, height=0.54, size=size)

    def _place(self) -> None:
        self._data.qpos[:2] = self.np_random.uniform((-np.pi, -2.8), (np.pi, 2.8))

    def _act(self, action: np.ndarray) -> None:
        self._data.ctrl[:] = self._torque * action

    def _infos(self) -> dict[str, Any]:
        joints = (self._data.qpos[:2] + np.pi) % (2 * np.pi) - np.pi
        tip = self._data.body("fingertip").xpos[:2]
        return {"joints": joints.astype(np.float32), "fingertip": tip.astype(np.float32)}


class PointMazeEnv(MuJoCoEnv):
    """A point mass in a maze of 1 m cells, with the parameters of Gymnasium-Robotics' PointMaze.

    `layout` is one of `LAYOUTS`. Observation: uint8 pixels (size, size, 3). Action: two values in [-1, 1], the force
    along x and y in units of 100 N, applied for `substeps` steps of 0.01 s. Infos: `position` (x, y) in metres from the
    maze's centre. Episodes do not end by themselves.
    """

    def __init__(
        self, layout: str = "umaze", size: int = 64, substeps: int = 5, render_mode: str | None = None
    ) -> None:
        if layout not in LAYOUTS:
            raise EnvironmentFailure(f"unknown maze layout {layout!r}; expected one of {', '.join(LAYOUTS)}")
        self.render_mode = render_mode
        rows = LAYOUTS[layout]
        self._free = _centres(rows, " ")
        height = 1.15 * max(len(rows), len(rows[0]))
        super().__init__(lambda: _maze_model(layout), substeps=substeps, height=height, size=size)

    def _place(self) -> None:
        cell = self._free[self.np_random.integers(len(self._free))]
        self._data.qpos[:] = cell + self.np_random.uniform(-0.25, 0.25, 2)

    def _act(self, action: np.ndarray) -> None:
        self._data.qvel[:] = np.clip(self._data.qvel, -_FASTEST, _FASTEST)
        super()._act(action)

    def _infos(self) -> dict[str, Any]:
        return {"position": self._data.qpos.astype(np.float32)}


@functools.cache
def _reacher_model() -> Any:
    mujoco = load_mujoco()
    package = find_spec("gymnasium")
    assert package is not None
    assert package.origin is not None
    path = Path(package.origin).parent / "envs" / "mujoco" / "assets" / "reacher.xml"
    model = mujoco.MjModel.from_xml_path(str(path))
    model.geom("target").rgba[3] = 0.0
    return model


@functools.cache
def _maze_model(layout: str) -> Any:
    walls = "".join(
        f'<geom type="box" pos="{x} {y} 0.2" size="0.5 0.5 0.2" contype="1" conaffinity="1" rgba="0.75 0.65 0.5 1"/>'
        for x, y in _centres(LAYOUTS[layout], "#")
    )
    return load_mujoco().MjModel.from_xml_string(f"""
<mujoco>
  <option timestep="0.01" gravity="0 0 0" iterations="20" integrator="Euler"/>
  <visual><headlight ambient="1 1 1" diffuse="0 0 0" specular="0 0 0"/></visual>
  <default>
    <joint damping="1" limited="false"/>
    <geom friction="0.5 0.1 0.1" density="1000" margin="0.002" condim="1" contype="2" conaffinity="1"/>
  </default>
  <worldbody>
    <geom type="plane" size="40 40 0.25" pos="0 0 -0.1" contype="1" conaffinity="0" rgba="0.2 0.25 0.35 1"/>
    {walls}
    <body name="particle">
      <geom type="sphere" size="0.1" contype="1" rgba="0 0 1 0"/>
      <site type="sphere" size="0.3" rgba="0.95 0.25 0.2 1"/>
      <joint name="x" type="slide" axis="1 0 0"/>
      <joint name="y" type="slide" axis="0 1 0"/>
    </body>
  </worldbody>
  <actuator>
    <motor joint="x" ctrlrange="-1 1" ctrllimited="true" gear="100"/>
    <motor joint="y" ctrlrange="-1 1" ctrllimited="true" gear="100"/>
  </actuator>
</mujoco>""")


def _centres(rows: tuple[str, ...], kind: str) -> np.ndarray:
    """Return the centres (x, y) of the cells marked with `kind`; the first row is at the top."""
    height, width = len(rows), len(rows[0])
    return np.array(
        [
            (column + 0.5 - width / 2, height / 2 - row - 0.5)
            for row, line in enumerate(rows)
            for column, cell in enumerate(line)
            if cell == kind
        ]
    )
