"""Adapters between Gymnasium's spaces and this library's specifications, for observations and for actions."""

from collections.abc import Mapping
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

from worldloom.core.errors import DataError, EnvironmentFailure
from worldloom.core.picture_layout import PictureOptions, is_picture, picture_layout
from worldloom.core.types import MOST_ACTION_VALUES, ActionSpec, Observations, ObservationSpec


class ObservationAdapter:
    """Converts a batch of an environment's observations to pixels, a vector or both.

    A box of pictures (see `core.picture_layout`) becomes the pixels; `pictures` says how they are stored if this is not
    clear from the space. Other numeric parts are flattened and concatenated into the vector; the parts of a dictionary
    are in the order of their sorted keys. `Discrete` parts become one-hot.

    Raises:
        EnvironmentFailure: the space has several images, or a part that is neither an image nor numeric; or it is not
            clear how pictures are stored.
    """

    def __init__(self, space: spaces.Space[Any], *, pictures: PictureOptions | None = None) -> None:
        parts = sorted(space.spaces.items()) if isinstance(space, spaces.Dict) else [("", space)]
        images = [(key, part) for key, part in parts if isinstance(part, spaces.Box) and _is_image(part, pictures)]
        if len(images) > 1:
            raise EnvironmentFailure(
                f"the observation has {len(images)} images ({', '.join(key for key, _ in images)}); expected at "
                f"most one. Keep one with gymnasium.wrappers.FilterObservation"
            )
        self._image_key = images[0][0] if images else None
        self._vectors = [(key, part) for key, part in parts if not _is_image(part, pictures)]
        for key, part in self._vectors:
            if not isinstance(part, spaces.Box | spaces.Discrete | spaces.MultiBinary):
                raise EnvironmentFailure(
                    f"observation part {key!r} is a {type(part).__name__}; expected a Box, Discrete or MultiBinary "
                    f"space. Convert it with a Gymnasium wrapper, such as FlattenObservation"
                )
        pixels: tuple[int, int, int] | None = None
        if images:
            self._picture = images[0][1]
            what = f"the observation {self._image_key!r}" if self._image_key else "the observation"
            try:
                self._layout = picture_layout(
                    self._picture.shape, self._picture.dtype, what, options=pictures, stated=_stated(self._picture)
                )
            except DataError as error:
                raise EnvironmentFailure(
                    f"{error}. To learn from the values as a vector, wrap the environment with "
                    f"gymnasium.wrappers.FlattenObservation"
                ) from error
            pixels = self._layout.pixels
        elif pictures is not None:
            raise EnvironmentFailure(
                f"the observation space {space} has no pictures. Leave out --picture-axes and --picture-range"
            )
        self.spec = ObservationSpec(pixels=pixels, vector=sum(spaces.flatdim(part) for _, part in self._vectors))

    def __call__(self, batch: Any, *, where: str = "") -> Observations:
        """Convert a batch (leading axis B) from a vector environment; error messages begin with `where`.

        Raises:
            EnvironmentFailure: a shape, dtype or value does not match the space.
        """
        parts = batch if isinstance(batch, Mapping) else {"": batch}
        pixels = vector = None
        if self._image_key is not None:
            stored = np.asarray(parts[self._image_key])
            if stored.dtype != self._picture.dtype or stored.shape[1:] != self._picture.shape:
                raise EnvironmentFailure(
                    f"{where}pixels must be {self._picture.dtype} of shape {self._picture.shape}; got {stored.dtype} "
                    f"of shape {stored.shape[1:]}. Correct the environment's observation space"
                )
            try:
                pixels = self._layout.convert(stored, f"{where}the observation")
            except DataError as error:
                raise EnvironmentFailure(str(error)) from error
        if self._vectors:
            columns = [self._flatten(parts[key], part) for key, part in self._vectors]
            vector = np.concatenate(columns, axis=1)
            if vector.shape[1] != self.spec.vector:
                raise EnvironmentFailure(
                    f"{where}the observation vector must have {self.spec.vector} values; got {vector.shape[1]}. "
                    f"Correct the environment's observation space"
                )
            if not np.isfinite(vector).all():
                raise EnvironmentFailure(
                    f"{where}the observation vector is not finite: {vector[~np.isfinite(vector).all(axis=1)][0]}. "
                    f"Repair the environment"
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
    """Converts a batch of flat actions to the format that an environment's `step` accepts."""

    def __init__(self, space: spaces.Space[Any]) -> None:
        self._space = space
        if isinstance(space, spaces.Discrete):
            if space.n > MOST_ACTION_VALUES:
                raise EnvironmentFailure(
                    f"the action space is {space}; at most {MOST_ACTION_VALUES:,} choices are supported. Offer fewer "
                    f"choices with a gymnasium.ActionWrapper"
                )
            self.spec = ActionSpec(low=(0.0,) * int(space.n), high=(1.0,) * int(space.n), discrete=True)
        elif isinstance(space, spaces.Box) and np.issubdtype(space.dtype or np.float32, np.floating):
            low, high = (tuple(float(x) for x in bound.reshape(-1)) for bound in (space.low, space.high))
            self.spec = ActionSpec(low=low, high=high)
        else:
            raise EnvironmentFailure(
                f"the action space is {space}; expected a Box of floats or a Discrete space. Convert the "
                f"actions with a gymnasium.ActionWrapper"
            )

    def __call__(self, actions: np.ndarray, *, where: str = "") -> np.ndarray:
        """Convert actions (B, A); error messages begin with `where`.

        Raises:
            DataError: an action is not finite, out of bounds, or of the wrong size.
        """
        low, high = np.array(self.spec.low, np.float32), np.array(self.spec.high, np.float32)
        if actions.ndim != 2 or actions.shape[1] != self.spec.size:
            raise DataError(
                f"{where}actions must have shape (B, {self.spec.size}); got {actions.shape}. Correct the policy"
            )
        slack = 1e-5 * (high - low)
        inside = (actions >= low - slack) & (actions <= high + slack)  # False for NaN too
        if not inside.all():
            row = int(np.argwhere(~inside.all(axis=1))[0][0])
            raise DataError(
                f"{where}action {actions[row]} of environment {row} is out of bounds or not finite; expected finite "
                f"values from {low} to {high}. Correct the policy"
            )
        if isinstance(self._space, spaces.Discrete):
            choices: np.ndarray = actions.argmax(axis=1) + int(self._space.start)
            return choices
        bounded: np.ndarray = np.clip(actions, low, high).astype(self._space.dtype)
        return bounded.reshape(len(actions), *(self._space.shape or ()))


def make_vector_env(
    env_id: str, num_envs: int, *, native: bool = True, **kwargs: Any
) -> gymnasium.vector.VectorEnv[Any, Any, Any]:
    """Create `num_envs` parallel environments with a registered id.

    With `native`, the environment's own vectorised form is used if it exists and its `reset` accepts one seed for each
    environment.

    `render_mode="rgb_array"` does not add pixels to an observation; wrap the environment with
    `gymnasium.wrappers.AddRenderObservation` to learn from rendered frames.

    Raises:
        EnvironmentFailure: the id is not registered, or the environment cannot be created.
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
            f"cannot create environment {env_id!r}: {str(error).rstrip('.?')}. Check the id and the arguments, and "
            f"import the module that registers the id (--import MODULE)"
        ) from error


def _takes_a_seed_for_each(envs: Any) -> bool:
    # Gymnasium's vectorised CartPole, for example, accepts only a single seed for all copies.
    try:
        envs.reset(seed=list(range(envs.num_envs)))
    except (gymnasium.error.Error, TypeError, ValueError):
        return False
    return True


def _is_image(space: spaces.Space[Any], pictures: PictureOptions | None) -> bool:
    return isinstance(space, spaces.Box) and is_picture(space.shape, space.dtype, pictures)


def _stated(space: spaces.Box) -> tuple[float, float] | None:
    """Return the bounds of a box, if they are the same for all values."""
    low, high = space.low, space.high
    return (float(low.min()), float(high.max())) if low.min() == low.max() and high.min() == high.max() else None
