"""OGBench's cube environment on MuJoCo: an arm with a gripper, a table and one cube. Goals are observations.

The environment is from Park et al., "OGBench" (2025), in data collection mode: arm and cube start at random places.
"""

import copy
import threading
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from jaxtyping import Float32, UInt8

from worldloom.core.errors import EnvironmentFailure
from worldloom.core.extras import missing_extra
from worldloom.envs.rendering import draw, load_mujoco

OBSERVATIONS = ("vector", "pixels", "both")
_LARGEST = 480  # px; the side of the render buffer
_CELL = 0.006  # m; `simple_meshes` merges the vertices within such cells
_CAMERA = "front_pixels"  # OGBench's camera for pixel observations, in which the arm is nearly transparent


class CubeEnv(gymnasium.Env[Any, Any]):
    """A UR5e arm with a two-finger gripper above a table with one 4 cm cube (0.05 s per step).

    Observation: a float32 vector of 28 values, OGBench's state; with `observation="pixels"`, uint8 pixels (size, size,
    3); with "both", a dictionary of pixels and vector. The vector contains the arm's joint angles (6, rad) and joint
    velocities (6); the effector's position (3) in decimetres from (0.425, 0, 0) m, and cos and sin of the effector's
    yaw; the gripper's closing in [0, 1], times 3; the gripper's contact in [0, 1]; the cube's position (3, in the units
    of the effector's position), quaternion (4), and cos and sin of the cube's yaw. Action: 5 values in [-1, 1],
    relative to the effector: x, y, z (5 cm), yaw (0.3 rad), closing of the gripper (1). Infos: `block` and `effector`
    (x, y, z) in metres, `quaternion` (w, x, y, z) of the cube. Arm and cube start anywhere within OGBench's bounds.
    Episodes do not end by themselves. Images are rendered only if observed. `simple_meshes` draws the arm with a tenth
    of the triangles, which takes a fifth of the time on a CPU; the images differ a little, the physics do not.

    Raises:
        EnvironmentFailure: `ogbench` is not installed, an argument is out of range, or pixels are requested and no
            OpenGL is available.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 20, "simulator": True}  # noqa: RUF012 - Gymnasium declares it so

    def __init__(
        self,
        observation: str = "vector",
        size: int = 64,
        simple_meshes: bool = False,
        render_mode: str | None = None,
    ) -> None:
        if observation not in OBSERVATIONS:
            raise EnvironmentFailure(
                f"unknown observation {observation!r} of the cube environment; use one of {', '.join(OBSERVATIONS)}"
            )
        if not 8 <= size <= _LARGEST:
            raise EnvironmentFailure(f"'size' of the cube environment must be 8 to {_LARGEST} pixels; got {size}")
        self.render_mode = render_mode
        self._observation, self._size = observation, size
        self._physics = _load(draws=observation != "vector", simple_meshes=simple_meshes)
        vector = spaces.Box(-np.inf, np.inf, (28,), np.float32)
        pixels = spaces.Box(0, 255, (size, size, 3), np.uint8)
        both = spaces.Dict({"pixels": pixels, "vector": vector})
        shown: dict[str, spaces.Space[Any]] = {"vector": vector, "pixels": pixels, "both": both}
        self.observation_space = shown[observation]
        self.action_space = spaces.Box(-1.0, 1.0, (5,), np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Place arm and cube at random, from the seed."""
        super().reset(seed=seed)
        vector, told = self._physics.reset(seed=int(self.np_random.integers(2**31)))
        return self._observe(vector), _infos(told)

    def step(self, action: Float32[np.ndarray, "5"]) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Move the effector toward its position plus `action`, for 0.05 s."""
        vector, _, _, _, told = self._physics.step(np.clip(np.asarray(action, np.float64), -1.0, 1.0))
        return self._observe(vector), 0.0, False, False, _infos(told)

    def render(self) -> UInt8[np.ndarray, "H W 3"]:
        """Return the image that pixel observations contain."""
        return draw(self._physics.model, self._physics.data, _CAMERA, self._size)

    def _observe(self, vector: np.ndarray) -> Any:
        parts = {}
        if self._observation != "pixels":
            parts["vector"] = vector.astype(np.float32)
        if self._observation != "vector":
            parts["pixels"] = self.render()
        return parts if self._observation == "both" else parts[self._observation]


def _infos(told: dict[str, Any]) -> dict[str, Any]:
    return {
        "block": told["privileged/block_0_pos"].astype(np.float32),
        "quaternion": told["privileged/block_0_quat"].astype(np.float32),
        "effector": told["proprio/effector_pos"].astype(np.float32),
    }


_TEMPLATES = threading.local()  # per thread, because the inverse kinematics use a scratch buffer


def _load(*, draws: bool, simple_meshes: bool = False) -> Any:
    """Return an OGBench environment with a state of its own. All environments in a thread share the compiled model.

    Compilation takes a second, so separate models for a hundred environments would take minutes.
    """
    mujoco = load_mujoco(draws=draws, extra="cube")
    templates: dict[bool, Any] = _TEMPLATES.__dict__.setdefault("worlds", {})
    if simple_meshes not in templates:
        templates[simple_meshes] = _compile()
        if simple_meshes:
            _simplify(templates[simple_meshes].model)
    template = templates[simple_meshes]
    physics = copy.copy(template)
    physics._data = mujoco.MjData(template.model)
    return physics


def _compile() -> Any:
    try:
        from ogbench.manipspace.envs.cube_env import CubeEnv as Physics
    except ImportError as error:
        raise EnvironmentFailure(missing_extra("cube", error)) from error
    # This is the only mode in which all randomness comes from the seed of the reset.
    template = Physics(
        "single",
        mode="data_collection",
        ob_type="pixels",
        visualize_info=False,
        terminate_at_goal=False,
        width=_LARGEST,
        height=_LARGEST,
    )
    template._mjcf_model = template.build_mjcf_model()  # with the colours of pixel observations ...
    template._ob_type = "states"  # ... but without rendering at every step
    template.reset(seed=0)
    return template


def _simplify(model: Any) -> None:
    """Merge the vertices of each mesh within cells of `_CELL`, and drop triangles that vanish or become equal.

    This changes only what is drawn: the physics use the vertices and their convex hulls.
    """
    for mesh in range(model.nmesh):
        first, count = model.mesh_vertadr[mesh], model.mesh_vertnum[mesh]
        cells = np.floor(model.mesh_vert[first : first + count] / _CELL).astype(np.int64)
        _, merged, cell_of = np.unique(cells, axis=0, return_index=True, return_inverse=True)
        first, count = model.mesh_faceadr[mesh], model.mesh_facenum[mesh]
        whole = slice(first, first + count)
        corners = np.sort(cell_of.ravel()[model.mesh_face[whole]], axis=1)
        triangles = np.unique(corners, axis=0, return_index=True)[1]
        triangles = triangles[(np.diff(corners[triangles], axis=1) > 0).all(axis=1)]
        rest = slice(first, first + len(triangles))
        model.mesh_face[rest] = merged[cell_of.ravel()[model.mesh_face[whole][triangles]]]
        for column in (model.mesh_facenormal, model.mesh_facetexcoord):
            column[rest] = column[whole][triangles]
        model.mesh_facenum[mesh] = len(triangles)
