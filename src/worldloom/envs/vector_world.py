"""`VectorWorld`: parallel Gymnasium environments. Error messages give the episode and the step."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import gymnasium
import numpy as np
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from gymnasium.vector.utils import concatenate, create_empty_array, iterate
from jaxtyping import Bool, Float32, Int64

from worldloom.core.closing import Closing
from worldloom.core.errors import ConfigError, EnvironmentFailure
from worldloom.core.picture_layout import PictureOptions
from worldloom.core.registry import nearest
from worldloom.core.types import Observations
from worldloom.envs.spaces import ActionAdapter, ObservationAdapter, make_vector_env

# Returns the nearest action that may follow the action that a plant is applying; see `Actor.limited`.
Limited = Callable[[np.ndarray, np.ndarray | None], np.ndarray]

# Returns the beginning of an error message: the episode and step of one environment, or of all environments for None.
Where = Callable[[int | None], str]


@dataclass(frozen=True, kw_only=True)
class Frame:
    """The results of one step in the R environments `rows`. Arrays outside `infos` have the leading axis R."""

    observations: Observations  # axes (R,)
    rows: Int64[np.ndarray, "R"]  # their indices in the vectorised world
    terminated: Bool[np.ndarray, "R"]
    over: Bool[np.ndarray, "R"]  # terminated or truncated
    parts: Mapping[str, np.ndarray]  # the parts of a dictionary observation, (R, ...)
    infos: Mapping[str, Any]  # of all environments

    def __getitem__(self, chosen: np.ndarray) -> "Frame":
        """Select some of the rows, by a mask or by indices."""
        return replace(
            self,
            observations=self.observations[chosen],
            rows=self.rows[chosen],
            terminated=self.terminated[chosen],
            over=self.over[chosen],
            parts={name: part[chosen] for name, part in self.parts.items()},
        )

    def info(self, name: str) -> np.ndarray | None:
        """Return an info as (R, ...), or None if some row has no such info."""
        if name not in self.infos:
            return None
        mask = self.infos.get(f"_{name}")
        if mask is not None and not np.asarray(mask)[self.rows].all():
            return None
        value: np.ndarray = np.asarray(self.infos[name])[self.rows]
        return value

    def numbers(self, name: str, who: str) -> np.ndarray:
        """Return a numeric info as float64 (R, L). Errors name `who`, the part of the protocol that uses the info.

        Raises:
            ConfigError: no numeric info has this name.
        """
        return self.vector((name,), "info", who)

    def vector(self, names: Sequence[str], source: str, who: str) -> np.ndarray:
        """Return the named vectors, concatenated, as float64 (R, L); `who` is the part of the protocol that uses them.

        `source` is "info", "observation" or "named". "observation" selects a part of the observation, or the
        observation's vector if the name is empty. "named" selects an info, or a part of the observation if no info has
        the name.

        Raises:
            ConfigError: no numeric vector has this name.
        """
        parts = [self._named(name, source, who) for name in names]
        return np.concatenate([part.reshape(len(self.rows), -1).astype(np.float64) for part in parts], axis=1)

    def _named(self, name: str, source: str, who: str) -> np.ndarray:
        value = self.info(name) if source in ("named", "info") else None
        if value is None and source in ("named", "observation"):
            if name:
                value = self.parts.get(name)
            elif self.observations.vector is not None:
                value = self.observations.vector.numpy()
        if value is None or value.dtype.kind not in "fiub":
            parts = {} if source == "info" else self.parts
            known = [
                name
                for name, each in [*self.infos.items(), *parts.items()]
                if name[:1] != "_" and np.asarray(each).dtype.kind in "fiub"
            ]
            raise ConfigError(
                f"{who} uses {name or 'the observation vector'!r}, which this environment does not return as numbers; "
                f"{nearest(name, known)}"
            )
        return value


class VectorWorld(Closing):
    """`size` parallel environments with a registered id. Close the object, or use it in a `with` statement.

    In every autoreset mode, an environment whose episode has ended is still stepped together with the others; leave it
    out of `rows` to ignore it. The last frame of an episode is never replaced by the first frame of the next episode.
    `native` uses the environment's own vectorised form if it exists. `pictures` says how pictures are stored, if this
    is not clear from the observation space.

    Raises:
        EnvironmentFailure: the environment cannot be created, or its spaces are not supported.
    """

    def __init__(
        self,
        env_id: str,
        size: int,
        kwargs: Mapping[str, Any] | None = None,
        *,
        native: bool = True,
        pictures: PictureOptions | None = None,
    ) -> None:
        self.id, self.size = env_id, size
        # Any: Gymnasium's types allow one seed for a batch, but vector environments accept a list.
        self._envs: Any = make_vector_env(env_id, size, native=native, **(kwargs or {}))
        if isinstance(self._envs, SyncVectorEnv):
            self._envs.envs = [_Copy(env, row) for row, env in enumerate(self._envs.envs)]
        self._autoreset = AutoresetMode(self._envs.metadata.get("autoreset_mode", AutoresetMode.NEXT_STEP))
        self._observe = ObservationAdapter(self._envs.single_observation_space, pictures=pictures)
        self._convert = ActionAdapter(self._envs.single_action_space)
        self.observation, self.action = self._observe.spec, self._convert.spec
        self.steps = np.zeros(size, np.int64)  # of each environment since the reset
        self._stale = np.zeros(size, bool)
        self._first: Any = None  # what the last reset returned
        self._where: Where = lambda row: ""

    @property
    def simulator(self) -> bool | None:
        """What the environment declares under "simulator" in its metadata; None if it declares nothing.

        A simulator can run in several copies, and nothing outside the program moves when it is stepped.
        """
        declared = self._envs.metadata.get("simulator")
        return declared if isinstance(declared, bool) else None

    def close(self) -> None:
        """Close the environments."""
        self._envs.close()

    def reset(self, seeds: Sequence[int], where: Where, *, options: Mapping[str, Any] | None = None) -> Frame:
        """Start one episode for each seed. Error messages begin with `where` until the next reset.

        Raises:
            EnvironmentFailure: the environment raised, or returned values that its space does not allow.
        """
        self._where = where
        self.steps[:] = 0
        given = None if options is None else dict(options)
        observations, infos = self._call(lambda: self._envs.reset(seed=list(seeds), options=given))
        rows, none = np.arange(self.size), np.zeros(self.size, bool)
        self._stale, self._first = none, observations
        return self._frame(observations, infos, rows, none, none)

    def replay(self, seeds: Sequence[int], actions: Sequence[np.ndarray], where: Where) -> Frame:
        """Start one episode per seed, apply the K actions (K, A) of each episode, and return the last frames.

        This needs a `VectorWorld` created with `native=False`.

        Raises:
            EnvironmentFailure: the environment raised, or an episode ended before all actions were applied.
        """
        frame = self.reset(seeds, where)
        if not any(len(taken) for taken in actions):
            return frame
        observations = list(iterate(self._envs.observation_space, self._first))
        infos = {name: np.array(value) for name, value in frame.infos.items()}
        for row, (env, taken) in enumerate(zip(self._envs.envs, actions, strict=True)):
            ended, info = False, {}
            for action in taken:
                if ended:
                    break
                self.steps[row] += 1
                converted = self._convert(action[None], where=where(row))[0]
                observations[row], _, terminated, truncated, info = self._call(partial(env.step, converted))
                ended = terminated or truncated
            if ended:
                raise EnvironmentFailure(
                    f"{where(row)}the episode ended earlier than with the same seed and actions at recording. Take "
                    f"all randomness of the environment from self.np_random"
                )
            for name in set(info) & set(infos):
                infos[name][row] = info[name]
        space = self._envs.single_observation_space
        batch: Any = create_empty_array(space, self.size)
        batch = self._call(lambda: concatenate(space, observations, batch))
        return self._frame(batch, infos, frame.rows, frame.terminated, frame.over)

    def applied(self) -> Float32[np.ndarray, "A"] | None:
        """Return the action that a plant is applying now; None for simulators, and for plants that do not say it.

        A plant applies its own safe action at first, during a reset, and after a period without an action. Its
        environment says so with a method `applied`.

        Raises:
            EnvironmentFailure: the environment returns something else than one action.
        """
        if self.simulator is not False or self.size != 1 or not isinstance(self._envs, SyncVectorEnv):
            return None
        asked = getattr(self._envs.envs[0].unwrapped, "applied", None)
        given = None if asked is None else self._call(asked)
        if given is None:
            return None
        values = np.asarray(given, np.float32)
        if values.shape != (self.action.size,) or not np.isfinite(values).all():
            raise EnvironmentFailure(
                f"{self._where(None)}'applied' of environment {self.id!r} returned {given!r}; expected "
                f"{self.action.size} finite values or None. Repair the environment"
            )
        return values

    def step(
        self, actions: np.ndarray, rows: Int64[np.ndarray, "R"], *, by: str = "", limited: Limited | None = None
    ) -> Frame:
        """Apply `actions` (size, A), one in each environment, and return the frames of the environments `rows`.

        Messages about a wrong action begin with `by`, the source of the actions. `limited` corrects an action that
        follows another one than its source knows, because a plant applied its own safe action in between.

        Raises:
            DataError: an action is not finite or out of bounds.
            EnvironmentFailure: the environment raised, or returned values that its space does not allow.
        """
        self.steps += 1
        where = f"{by}{self._where(None)}"
        converted = self._convert(actions, where=where)
        if limited is not None and (applied := self.applied()) is not None:
            converted = self._convert(limited(actions[0], applied)[None], where=where)
        if self._autoreset is AutoresetMode.DISABLED and self._stale.any():
            # Environments whose episodes have ended must be reset, because the batch is stepped as a whole.
            self._call(lambda: self._envs.reset(options={"reset_mask": self._stale}))
        observations, _, terminated, truncated, infos = self._call(lambda: self._envs.step(converted))
        terminated, truncated = np.asarray(terminated, bool), np.asarray(truncated, bool)
        self._stale = terminated | truncated
        return self._frame(observations, infos, rows, terminated, truncated)

    def observe(self, batch: Any, rows: Int64[np.ndarray, "R"]) -> Observations:
        """Convert the environment's observations of these rows. An error message reports the first wrong row."""
        try:
            return self._observe(batch, where=self._where(None))
        except EnvironmentFailure:
            for index, row in enumerate(rows.tolist()):
                self._observe(_take(batch, np.array([index]), len(rows)), where=self._where(row))
            raise

    def check_finite(self, values: np.ndarray, rows: Int64[np.ndarray, "R"], what: str) -> None:
        """Raise `EnvironmentFailure` for the first row with values that are not finite."""
        finite = np.isfinite(values).reshape(len(rows), -1).all(axis=1)
        if not finite.all():
            index = int(np.flatnonzero(~finite)[0])
            raise EnvironmentFailure(
                f"{self._where(int(rows[index]))}{what} is not finite: {values[index]}; repair the environment"
            )

    def labels(self, frame: Frame) -> dict[str, np.ndarray]:
        """Return the numeric infos that all rows of a frame have, as float32 (R, L). Other infos are omitted."""
        labels: dict[str, np.ndarray] = {}
        for name, value in frame.infos.items():
            if name.startswith("_") or not isinstance(value, np.ndarray) or value.shape[:1] != (self.size,):
                continue
            column = frame.info(name)
            if column is not None and column.dtype.kind in "fiub":
                labels[name] = column.reshape(len(column), -1).astype(np.float32)
        return labels

    def _frame(
        self,
        batch: Any,
        infos: Mapping[str, Any],
        rows: Int64[np.ndarray, "R"],
        terminated: Bool[np.ndarray, "B"],
        truncated: Bool[np.ndarray, "B"],
    ) -> Frame:
        over = terminated | truncated
        taken = _take(batch, rows, self.size)  # a copy: shares no memory with the batch
        if self._autoreset is AutoresetMode.SAME_STEP and over[rows].any():
            taken, infos = self._before_reset(taken, infos, rows, over)
        return Frame(
            observations=self.observe(taken, rows),
            rows=rows,
            terminated=terminated[rows],
            over=over[rows],
            parts=taken if isinstance(taken, dict) else {},
            infos=infos,
        )

    def _before_reset(
        self, taken: Any, infos: Mapping[str, Any], rows: Int64[np.ndarray, "R"], over: Bool[np.ndarray, "B"]
    ) -> tuple[Any, dict[str, Any]]:
        """Replace the first frame of each new episode by the last frame of the episode that ended."""
        if "final_obs" not in infos:
            raise EnvironmentFailure(
                f"{self._where(None)}environment {self.id!r} has the autoreset mode SAME_STEP, but its infos have no "
                f"'final_obs'; create the environment with the autoreset mode NEXT_STEP"
            )
        places, ended = np.flatnonzero(over[rows]), rows[over[rows]]
        last = _take(infos["final_obs"], ended, self.size)
        for name in taken if isinstance(taken, dict) else (None,):
            (taken if name is None else taken[name])[places] = last if name is None else last[name]
        final, merged = infos.get("final_info", {}), {}
        for name, value in infos.items():
            former = final.get(name)
            if isinstance(value, np.ndarray) and isinstance(former, np.ndarray) and value.shape == former.shape:
                merged[name] = value.copy()
                merged[name][ended] = former[ended]
        return taken, merged

    def _call(self, function: Callable[[], Any]) -> Any:
        try:
            return function()
        except _CopyFailure as failure:
            error, place = failure.__cause__, self._where(failure.args[0])
        except Exception as failure:
            error, place = failure, self._where(None)
        raise EnvironmentFailure(
            f"{place}environment {self.id!r} raised {type(error).__name__}: {error}. Check the environment"
        ) from error


class _CopyFailure(Exception):
    """One of the environments raised an error. The argument is the environment's row; the cause is the error."""


class _Copy(gymnasium.Wrapper[Any, Any, Any, Any]):
    """A wrapper that reports which of the parallel environments raised an error."""

    def __init__(self, env: gymnasium.Env[Any, Any], row: int) -> None:
        super().__init__(env)
        self._row = row

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Reset the environment."""
        try:
            return self.env.reset(seed=seed, options=options)
        except Exception as error:
            raise _CopyFailure(self._row) from error

    def step(self, action: Any) -> Any:
        """Step the environment."""
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
        raise EnvironmentFailure(
            f"a batch of observations has shape {array.shape}; expected ({size}, ...). Repair the environment"
        )
    if array.dtype != object:
        return array[rows]
    items = [array[row] for row in rows]
    if isinstance(items[0], Mapping):
        return {key: np.stack([item[key] for item in items]) for key in items[0]}
    return np.stack(items)
