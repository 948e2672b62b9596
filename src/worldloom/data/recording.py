"""One batch of episodes, recorded from a vector environment as far as it comes."""

from collections.abc import Callable, Mapping
from typing import Any

import gymnasium
import numpy as np
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from jaxtyping import Bool, Float32, Int64

from worldloom.core.errors import DataError, EnvironmentFailure
from worldloom.core.progress import ProgressTask
from worldloom.core.registry import nearest
from worldloom.core.seams import Policy
from worldloom.core.spaces import ActionAdapter, ObservationAdapter, make_vector_env, numeric_labels
from worldloom.core.types import ActionSpec, Episode, Observations

_LARGEST_LABEL = 256  # values; a larger info column is a picture or a map, kept only when it is named

# Names the place of copy `row` of the environment, or of all copies for None.
_Where = Callable[[int | None], str]


class RecordedWorld:
    """A vector environment whose every failure is an `EnvironmentFailure` that names the episode and the step."""

    def __init__(self, env_id: str, size: int, kwargs: Mapping[str, Any]) -> None:
        self.id, self.size = env_id, size
        # Gymnasium types the seed of a batch as one number; every vector environment takes a list.
        self._env: Any = make_vector_env(env_id, size, **kwargs)
        if isinstance(self._env, SyncVectorEnv):
            self._env.envs = [_Copy(env, row) for row, env in enumerate(self._env.envs)]
        self._autoreset = self._env.metadata.get("autoreset_mode", AutoresetMode.NEXT_STEP)
        self._observe = ObservationAdapter(self._env.single_observation_space)
        self.act = ActionAdapter(self._env.single_action_space)
        self.observation, self.action = self._observe.spec, self.act.spec

    def close(self) -> None:
        """Close the environments."""
        self._env.close()

    def reset(self, seeds: list[int], where: _Where) -> tuple[Observations, dict[str, np.ndarray]]:
        """Return the first frame and the numeric infos of each copy."""
        batch, infos = self._call(lambda: self._env.reset(seed=seeds), where)
        rows = np.arange(self.size)
        return self._observations(batch, rows, where), _labels(infos, rows, self.size)

    def step(
        self, actions: np.ndarray, rows: Int64[np.ndarray, "R"], where: _Where
    ) -> tuple[Observations, dict[str, np.ndarray], Bool[np.ndarray, "R"], Bool[np.ndarray, "R"]]:
        """Step all copies with what `act` gives; of `rows` return the next frame, the numeric infos and the ends.

        Ends are (terminated, truncated). The last frame of an episode is its own, whatever the autoreset mode.
        """
        batch, _, terminated, truncated, infos = self._call(lambda: self._env.step(actions), where)
        terminated, truncated = np.asarray(terminated, bool), np.asarray(truncated, bool)
        done = terminated | truncated
        observations, labels = self._observations(batch, rows, where), _labels(infos, rows, self.size)
        if self._autoreset == AutoresetMode.SAME_STEP and done[rows].any():
            observations, labels = self._before_reset(observations, labels, infos, rows, done, where)
        if self._autoreset == AutoresetMode.DISABLED and done.any():
            # The frame after the reset belongs to no episode here; it only keeps the other copies going.
            self._call(lambda: self._env.reset(options={"reset_mask": done}), where)
        return observations, labels, terminated[rows], truncated[rows]

    def _before_reset(
        self,
        observations: Observations,
        labels: dict[str, np.ndarray],
        infos: Mapping[str, Any],
        rows: Int64[np.ndarray, "R"],
        done: Bool[np.ndarray, "B"],
        where: _Where,
    ) -> tuple[Observations, dict[str, np.ndarray]]:
        """Put the last frames of episodes that ended in place of the first frames of those that follow."""
        if "final_obs" not in infos:
            raise EnvironmentFailure(
                f"{where(None)}environment {self.id!r} resets in the step that ends an episode and gives no "
                f"'final_obs' in its infos; make it with the autoreset mode NEXT_STEP"
            )
        ended = rows[done[rows]]
        places = np.flatnonzero(done[rows])
        last = self._observations(infos["final_obs"], ended, where)
        last_labels = _labels(infos.get("final_info", {}), ended, self.size)
        for whole, part in ((observations.pixels, last.pixels), (observations.vector, last.vector)):
            if whole is not None and part is not None:
                whole[places] = part
        common = {
            name for name in labels if name in last_labels and labels[name].shape[1:] == last_labels[name].shape[1:]
        }
        for name in common:
            labels[name][places] = last_labels[name]
        return observations, {name: labels[name] for name in labels if name in common}

    def _observations(self, batch: Any, rows: Int64[np.ndarray, "R"], where: _Where) -> Observations:
        """Convert these rows; a failure names the first that is wrong. The result shares no memory with `batch`."""
        try:
            return self._observe(_take(batch, rows, self.size))
        except EnvironmentFailure:
            for row in rows:
                self._observe(_take(batch, row[None], self.size), where=where(int(row)))
            raise

    def _call(self, function: Callable[[], Any], where: _Where) -> Any:
        try:
            return function()
        except _CopyFailure as failure:
            error, place = failure.__cause__, where(failure.row)
        except Exception as failure:
            error, place = failure, where(None)
        raise EnvironmentFailure(f"{place}environment {self.id!r} raised {type(error).__name__}: {error}") from error


class RecordingBatch:
    """The episodes `numbers`, as far as they have come: an interrupt at any moment leaves whole frames."""

    def __init__(
        self, world: RecordedWorld, numbers: range, steps: int, labels: Mapping[str, int | None] | None
    ) -> None:
        self._world, self._numbers, self._steps, self._wanted = world, numbers, steps, labels
        size, pixels, vector = len(numbers), world.observation.pixels, world.observation.vector
        self._pixels = None if pixels is None else np.empty((size, steps + 1, *pixels), np.uint8)
        self._vector = np.empty((size, steps + 1, vector), np.float32) if vector else None
        self._actions = np.empty((size, steps, world.action.size), np.float32)
        self._labels: dict[str, np.ndarray] = {}
        self._frames = np.zeros(size, np.int64)  # how many whole ones each episode has
        self._ended = np.zeros(size, bool)
        self._terminated = np.zeros(size, bool)
        self._step = 0

    def run(
        self, policy: Policy, seeds: list[int], generators: list[np.random.Generator], name: str, task: ProgressTask
    ) -> None:
        """Record until all episodes have ended or have all their steps.

        Raises:
            EnvironmentFailure: names the episode and the step.
            DataError: the policy `name` raised or gave an action out of bounds, or a label that is wanted is not there.
        """
        rows = np.arange(len(self._numbers))
        observations, labels = self._world.reset(seeds, self._where)
        self._begin(labels)
        self._add(rows, observations, labels)
        task.advance(len(rows))
        policy.reset(generators)
        latest = observations.map(lambda part: part.clone())
        while self._step < self._steps and len(rows):
            self._step += 1
            where = self._where
            actions = self._actions_of(policy, latest, name)
            converted = self._world.act(actions, where=f"policy {name!r}, {where(None)}")
            observations, labels, terminated, truncated = self._world.step(converted, rows, where)
            self._actions[rows, self._step - 1] = _as_stored(actions[rows], self._world.action)
            self._add(rows, observations, labels)
            task.advance(len(rows))
            self._terminated[rows], self._ended[rows] = terminated, terminated | truncated
            for whole, part in ((latest.pixels, observations.pixels), (latest.vector, observations.vector)):
                if whole is not None and part is not None:
                    whole[rows] = part
            rows = rows[~(terminated | truncated)]

    def _actions_of(self, policy: Policy, latest: Observations, name: str) -> np.ndarray:
        try:
            return np.array(policy.act(latest), np.float32)
        except Exception as error:
            raise DataError(
                f"policy {name!r}, {self._where(None)}it raised {type(error).__name__}: {error}. Repair the policy"
            ) from error

    def episodes(self, seeds: list[int], policy: str, truncated_by: str | None = None) -> list[Episode]:
        """Return the episodes recorded so far that have two frames; those broken off are marked."""
        found = []
        for row, number in enumerate(self._numbers):
            frames = int(self._frames[row])
            if frames < 2:
                continue
            metadata: dict[str, Any] = {
                "episode": number,
                "seed": seeds[row],
                "policy": policy,
                "terminated": bool(self._terminated[row]),
            }
            if truncated_by is not None and not self._ended[row]:
                metadata["truncated_by"] = truncated_by
            found.append(
                Episode(
                    pixels=None if self._pixels is None else self._pixels[row, :frames],
                    vector=None if self._vector is None else self._vector[row, :frames],
                    actions=self._actions[row, : frames - 1],
                    labels={name: column[row, :frames] for name, column in self._labels.items()},
                    metadata=metadata,
                )
            )
        return found

    @property
    def labels(self) -> dict[str, int]:
        """The size of each label column."""
        return {name: column.shape[2] for name, column in sorted(self._labels.items())}

    def _where(self, row: int | None) -> str:
        first, last = self._numbers[0], self._numbers[-1]
        if row is not None:
            place = f"episode {self._numbers[row]}"
        else:
            place = f"episode {first}" if first == last else f"episodes {first} to {last}"
        return f"{place}, step {self._step}: "

    def _begin(self, labels: Mapping[str, np.ndarray]) -> None:
        """Choose the label columns by what a reset gives."""
        if self._wanted is None:
            names = [name for name, column in labels.items() if column.shape[1] <= _LARGEST_LABEL]
        else:
            names = list(self._wanted)
            for name in names:
                if name not in labels:
                    raise DataError(
                        f"label {name!r} is not among the numeric infos that {self._world.id!r} gives on reset; "
                        f"{nearest(name, labels)}"
                    )
        self._labels = {
            name: np.empty((len(self._numbers), self._steps + 1, labels[name].shape[1]), np.float32) for name in names
        }

    def _add(self, rows: Int64[np.ndarray, "R"], observations: Observations, labels: Mapping[str, np.ndarray]) -> None:
        for name in list(self._labels):
            store, column = self._labels[name], labels.get(name)
            expected = None if self._wanted is None else self._wanted[name]
            if column is None or column.shape[1] != (expected or store.shape[2]):
                if self._wanted is None:
                    del self._labels[name]
                    continue
                raise EnvironmentFailure(
                    f"{self._where(None)}info {name!r} is missing or of another size; it was there before. Name the "
                    f"labels to keep"
                )
            finite = np.isfinite(column).all(axis=1)
            if not finite.all():
                row = int(rows[np.flatnonzero(~finite)[0]])
                raise EnvironmentFailure(
                    f"{self._where(row)}info {name!r} is not finite: {column[~finite][0]}. Name the labels to keep"
                )
            store[rows, self._step] = column
        if self._pixels is not None and observations.pixels is not None:
            self._pixels[rows, self._step] = observations.pixels.numpy()
        if self._vector is not None and observations.vector is not None:
            self._vector[rows, self._step] = observations.vector.numpy()
        self._frames[rows] = self._step + 1  # last: from here on the frame is whole


class _CopyFailure(Exception):
    """One copy of the environment raised; its error is the cause."""

    def __init__(self, row: int) -> None:
        super().__init__(row)
        self.row = row


class _Copy(gymnasium.Wrapper[Any, Any, Any, Any]):
    """Says which copy of an environment raised."""

    def __init__(self, env: gymnasium.Env[Any, Any], row: int) -> None:
        super().__init__(env)
        self._row = row

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Reset the copy."""
        try:
            return self.env.reset(seed=seed, options=options)
        except Exception as error:
            raise _CopyFailure(self._row) from error

    def step(self, action: Any) -> Any:
        """Step the copy."""
        try:
            return self.env.step(action)
        except Exception as error:
            raise _CopyFailure(self._row) from error


def _take(batch: Any, rows: Int64[np.ndarray, "R"], size: int) -> Any:
    """Select environments from a batch of observations: an array, a mapping of arrays, or an array of objects."""
    if isinstance(batch, Mapping):
        return {key: _take(part, rows, size) for key, part in batch.items()}
    array = np.asarray(batch)
    if array.shape[:1] != (size,):
        raise EnvironmentFailure(f"a batch of observations has shape {array.shape}; expected ({size}, ...)")
    if array.dtype != object:
        return array[rows]
    items = [array[row] for row in rows]
    if isinstance(items[0], Mapping):
        return {key: np.stack([item[key] for item in items]) for key in items[0]}
    return np.stack(items)


def _labels(infos: Mapping[str, Any], rows: Int64[np.ndarray, "R"], size: int) -> dict[str, np.ndarray]:
    """Return the numeric infos that all of these environments have."""
    arrays = {key: value for key, value in infos.items() if isinstance(value, np.ndarray)}
    return numeric_labels({key: a[rows] for key, a in arrays.items() if a.shape[:1] == (size,)}, len(rows))


def _as_stored(actions: Float32[np.ndarray, "R A"], spec: ActionSpec) -> Float32[np.ndarray, "R A"]:
    """Return what the environment took: clipped within rounding, or the choice as one-hot."""
    if spec.discrete:
        one_hot: np.ndarray = np.eye(spec.size, dtype=np.float32)[actions.argmax(axis=1)]
        return one_hot
    clipped: np.ndarray = np.clip(actions, np.array(spec.low, np.float32), np.array(spec.high, np.float32))
    return clipped
