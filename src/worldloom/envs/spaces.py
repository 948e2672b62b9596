"""Gymnasium's spaces and this library's specs: one adapter for observations, one for actions."""

from collections.abc import Mapping
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

from worldloom.core.errors import DataError, EnvironmentFailure
from worldloom.core.types import ActionSpec, Observations, ObservationSpec


class ObservationAdapter:
    """Turns a batch of an environment's observations into pixels and/or a vector.

    A unsigned-byte box with three axes (H, W, C) is pixels; other boxes of numbers are flattened into the
    vector, those of a dictionary in the order of their sorted keys. `Discrete` parts become one-hot.

    Raises:
        EnvironmentFailure: the space cannot be told apart into one image and vectors.
    """

    def __init__(self, space: spaces.Space[Any]) -> None:
        parts = sorted(space.spaces.items()) if isinstance(space, spaces.Dict) else [("", space)]
        images = [(key, part) for key, part in parts if _is_image(part)]
        if len(images) > 1:
            raise EnvironmentFailure(
                f"the observation has {len(images)} images ({', '.join(key for key, _ in images)}); expected at "
                f"most one. Keep one with gymnasium.wrappers.FilterObservation"
            )
        self._image_key = images[0][0] if images else None
        self._vectors = [(key, part) for key, part in parts if not _is_image(part)]
        for key, part in self._vectors:
            if not isinstance(part, spaces.Box | spaces.Discrete | spaces.MultiBinary):
                raise EnvironmentFailure(
                    f"observation part {key!r} is a {type(part).__name__}; expected boxes of numbers, at most one "
                    f"of them an image of unsigned bytes (H, W, C). Flatten it with a Gymnasium wrapper"
                )
        pixels: tuple[int, int, int] | None = None
        if images:
            height, width, channels = images[0][1].shape or (0, 0, 0)
            pixels = (height, width, channels)
        self.spec = ObservationSpec(pixels=pixels, vector=sum(spaces.flatdim(part) for _, part in self._vectors))

    def __call__(self, batch: Any, *, where: str = "") -> Observations:
        """Convert a batch (leading axis B) as a vector environment returns it.

        Raises:
            EnvironmentFailure: a shape, dtype or value is not what the space says; `where` names the place.
        """
        parts = batch if isinstance(batch, Mapping) else {"": batch}
        pixels = vector = None
        if self._image_key is not None:
            pixels = np.asarray(parts[self._image_key])
            if pixels.dtype != np.uint8 or pixels.shape[1:] != self.spec.pixels:
                raise EnvironmentFailure(
                    f"{where}pixels must be uint8 of shape {self.spec.pixels}; got {pixels.dtype} of {pixels.shape[1:]}"
                )
        if self._vectors:
            columns = [self._flatten(parts[key], part) for key, part in self._vectors]
            vector = np.concatenate(columns, axis=1)
            if vector.shape[1] != self.spec.vector:
                raise EnvironmentFailure(
                    f"{where}the observation vector must have {self.spec.vector} values; got {vector.shape[1]}"
                )
            if not np.isfinite(vector).all():
                raise EnvironmentFailure(
                    f"{where}the observation vector is not finite: {vector[~np.isfinite(vector).all(axis=1)][0]}"
                )
        return Observations.from_numpy(pixels, vector)

    @staticmethod
    def _flatten(values: Any, part: spaces.Space[Any]) -> np.ndarray:
        array: np.ndarray = np.asarray(values)
        if isinstance(part, spaces.Discrete):
            one_hot: np.ndarray = np.eye(int(part.n), dtype=np.float32)[array.reshape(-1) - int(part.start)]
            return one_hot
        return array.reshape(len(array), -1).astype(np.float32)


class ActionAdapter:
    """Turns a batch of flat actions into what an environment's `step` takes."""

    def __init__(self, space: spaces.Space[Any]) -> None:
        self._space = space
        if isinstance(space, spaces.Discrete):
            self.spec = ActionSpec(low=(0.0,) * int(space.n), high=(1.0,) * int(space.n), discrete=True)
        elif isinstance(space, spaces.Box) and np.issubdtype(space.dtype or np.float32, np.floating):
            low, high = (tuple(float(x) for x in bound.reshape(-1)) for bound in (space.low, space.high))
            self.spec = ActionSpec(low=low, high=high)
        else:
            raise EnvironmentFailure(
                f"the action space is {space}; expected a box of floats or a Discrete. Wrap the environment"
            )

    def __call__(self, actions: np.ndarray, *, where: str = "") -> np.ndarray:
        """Convert actions (B, A).

        Raises:
            DataError: an action is not finite, out of bounds, or of the wrong size.
        """
        low, high = np.array(self.spec.low, np.float32), np.array(self.spec.high, np.float32)
        if actions.ndim != 2 or actions.shape[1] != self.spec.size:
            raise DataError(f"{where}actions must have shape (B, {self.spec.size}); got {actions.shape}")
        slack = 1e-5 * (high - low)
        inside = (actions >= low - slack) & (actions <= high + slack)  # False for NaN too
        if not inside.all():
            row = int(np.argwhere(~inside.all(axis=1))[0][0])
            raise DataError(
                f"{where}action {actions[row]} of environment {row} is out of bounds or not finite; expected low "
                f"{low} to high {high}. Clip it in the policy"
            )
        if isinstance(self._space, spaces.Discrete):
            choices: np.ndarray = actions.argmax(axis=1) + int(self._space.start)
            return choices
        bounded: np.ndarray = np.clip(actions, low, high).astype(self._space.dtype)
        return bounded.reshape(len(actions), *(self._space.shape or ()))


def make_vector_env(
    env_id: str, num_envs: int, *, native: bool = True, **kwargs: Any
) -> gymnasium.vector.VectorEnv[Any, Any, Any]:
    """Make `num_envs` copies of a registered environment, natively vectorised where it offers that and `native`.

    Its `reset` takes one seed for each copy; a native one that cannot do that is passed over.

    An environment whose observation holds no pixels, made with `render_mode="rgb_array"`, keeps its vector
    observation; wrap it with `gymnasium.wrappers.AddRenderObservation` to learn from its pictures.

    Raises:
        EnvironmentFailure: the id is not registered or the environment cannot be made.
    """
    try:
        spec = gymnasium.spec(env_id)
        if native and spec.vector_entry_point is not None:
            envs = gymnasium.make_vec(env_id, num_envs=num_envs, vectorization_mode="vector_entry_point", **kwargs)
            if spec.entry_point is None or _takes_a_seed_for_each(envs):
                return envs
            envs.close()
        return gymnasium.make_vec(env_id, num_envs=num_envs, vectorization_mode="sync", **kwargs)
    except (gymnasium.error.Error, TypeError, ImportError) as error:
        raise EnvironmentFailure(
            f"cannot make environment {env_id!r}: {str(error).rstrip('.?')}. Check the id and the arguments, and name "
            f"the module that registers it (--import MODULE)"
        ) from error


def _takes_a_seed_for_each(envs: Any) -> bool:
    # Gymnasium's own CartPole, for one, takes a single seed for all copies.
    try:
        envs.reset(seed=list(range(envs.num_envs)))
    except (gymnasium.error.Error, TypeError, ValueError):
        return False
    return True


def _is_image(space: spaces.Space[Any]) -> bool:
    return isinstance(space, spaces.Box) and space.dtype == np.uint8 and len(space.shape) == 3
