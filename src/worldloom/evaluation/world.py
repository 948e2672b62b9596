"""A vector environment under a protocol: whatever goes wrong in it is named by episode seed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any

import gymnasium
import numpy as np
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from worldloom.core.errors import ConfigError, EnvironmentFailure
from worldloom.core.registry import nearest
from worldloom.core.spaces import ActionAdapter, ObservationAdapter, make_vector_env
from worldloom.core.types import Observations
from worldloom.envs import register_envs
from worldloom.evaluation.protocol import Protocol, SuccessRule


@dataclass(frozen=True, kw_only=True)
class Frame:
    """What the environments in `rows` returned; every array here has one entry for each of them."""

    observations: Observations  # axes (R,)
    rows: np.ndarray  # (R,) their places in the vector environment
    terminated: np.ndarray  # (R,) bool
    over: np.ndarray  # (R,) bool: terminated or truncated
    parts: Mapping[str, np.ndarray]  # the keys of a dictionary observation, (R, ...)
    infos: Mapping[str, Any]

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
        """Return an info as (R, ...), or None where it is not there for each row."""
        if name not in self.infos:
            return None
        mask = self.infos.get(f"_{name}")
        if mask is not None and not np.asarray(mask)[self.rows].all():
            return None
        value: np.ndarray = np.asarray(self.infos[name])[self.rows]
        return value

    def numbers(self, name: str, who: str) -> np.ndarray:
        """Return an info that is numbers as float64 (R, L); `who` asks for it.

        Raises:
            ConfigError: there is none of this name.
        """
        value = self.info(name)
        if value is None or value.dtype.kind not in "fiub":
            raise ConfigError(
                f"{who} speaks of {name!r}, which this world does not give as numbers; {nearest(name, self._known())}"
            )
        return value.reshape(len(self.rows), -1).astype(np.float64)

    def vector(self, rule: SuccessRule) -> np.ndarray:
        """Return the vectors that the rule names, joined, float64 (R, L).

        Raises:
            ConfigError: there is none of this name.
        """
        parts = [self._named(name, rule.source) for name in rule.names]
        return np.concatenate([part.reshape(len(self.rows), -1).astype(np.float64) for part in parts], axis=1)

    def _named(self, name: str, source: str) -> np.ndarray:
        value = None
        if source in ("named", "info"):
            value = self.info(name)
        if value is None and source in ("named", "observation"):
            if name:
                value = self.parts.get(name)
            elif self.observations.vector is not None:
                value = self.observations.vector.numpy()
        if value is None or value.dtype.kind not in "fiub":
            known = self._known() + [name for name, part in self.parts.items() if part.dtype.kind in "fiub"]
            raise ConfigError(
                f"the success rule names {name or 'the observation vector'!r}, which this world does not give as "
                f"numbers; {nearest(name, known)}"
            )
        return value

    def _known(self) -> list[str]:
        infos = self.infos.items()
        return sorted(name for name, info in infos if name[:1] != "_" and np.asarray(info).dtype.kind in "fiub")


class EvaluationWorld:
    """`size` copies of a protocol's environment; close it, or use it in a `with` statement."""

    def __init__(self, protocol: Protocol, size: int) -> None:
        self.size = size
        self._where = ""
        self._seeds: list[int] = []
        self._stale = np.zeros(size, bool)
        self._first: Any = None  # what the last reset returned
        register_envs()
        # Gymnasium's base class is typed for one seed; its vector environments take one for each copy.
        self._envs: Any = make_vector_env(protocol.env_id, size, native=not protocol.replays, **protocol.env_kwargs)
        if isinstance(self._envs, SyncVectorEnv):
            self._envs.envs = [_Located(env) for env in self._envs.envs]
        self._autoreset = AutoresetMode(self._envs.metadata.get("autoreset_mode", AutoresetMode.NEXT_STEP))
        if self._autoreset is AutoresetMode.SAME_STEP:
            self._envs.close()
            raise EnvironmentFailure(
                f"{protocol.env_id} puts the next episode's first frame in the place of an episode's last one; "
                f"expected the autoreset mode NEXT_STEP or DISABLED"
            )
        self._observe = ObservationAdapter(self._envs.single_observation_space)
        self._convert = ActionAdapter(self._envs.single_action_space)
        self.observation_spec, self.action_spec = self._observe.spec, self._convert.spec

    def __enter__(self) -> "EvaluationWorld":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._envs.close()

    def reset(self, seeds: Sequence[int], task: Mapping[str, Any] | None, *, where: str) -> Frame:
        """Start one episode for each seed; `where` begins each message about what goes wrong from here on.

        Raises:
            EnvironmentFailure: the environment raised, or returned what its space does not allow.
        """
        self._where, self._seeds = where, list(seeds)
        options = {"task": dict(task)} if task is not None else None
        try:
            observations, infos = self._envs.reset(seed=self._seeds, options=options)
        except Exception as error:
            raise self._failure("reset", error) from error
        rows, none = np.arange(self.size), np.zeros(self.size, bool)
        self._stale, self._first = none, observations
        return self._frame(observations, infos, rows, none, none)

    def replay(self, seeds: Sequence[int], actions: Sequence[np.ndarray], *, where: str) -> Frame:
        """Start one episode for each seed and take in it the actions (K, A), K its own; return where that leads.

        Raises:
            EnvironmentFailure: the environment raised, or ended an episode on the way.
        """
        frame = self.reset(seeds, None, where=where)
        if not any(len(taken) for taken in actions):
            return frame
        observations, infos = list(_rows(self._first, self.size)), dict(frame.infos)
        infos = {name: np.array(value) for name, value in infos.items()}
        for row, (env, taken) in enumerate(zip(self._envs.envs, actions, strict=True)):
            ended, info = False, {}
            for action in taken:
                if ended:
                    break
                try:
                    observations[row], _, terminated, truncated, info = env.step(self._convert(action[None])[0])
                except Exception as error:
                    raise self._failure("step", error) from error
                ended = terminated or truncated
            if ended:
                raise EnvironmentFailure(
                    f"{where}, episode seed {seeds[row]}: the episode ended on the way to its start, which it did not "
                    f"when the goal was drawn; draw all randomness of the environment from self.np_random"
                )
            for name in set(info) & set(infos):
                infos[name][row] = info[name]
        rows, none = np.arange(self.size), np.zeros(self.size, bool)
        return self._frame(_batch(observations), infos, rows, none, none)

    def step(self, actions: np.ndarray, rows: np.ndarray) -> Frame:
        """Take one action (size, A) in each environment and return what those in `rows` gave.

        Raises:
            DataError: an action is not finite or out of bounds.
            EnvironmentFailure: the environment raised, or returned what its space does not allow.
        """
        converted = self._convert(actions, where=f"{self._where}: ")
        try:
            if self._autoreset is AutoresetMode.DISABLED and self._stale.any():
                # Their episodes are over; the reset only keeps the other copies going.
                self._envs.reset(options={"reset_mask": self._stale})
            observations, _, terminated, truncated, infos = self._envs.step(converted)
        except Exception as error:
            raise self._failure("step", error) from error
        terminated, truncated = np.asarray(terminated, bool), np.asarray(truncated, bool)
        self._stale = terminated | truncated
        return self._frame(observations, infos, rows, terminated, truncated)

    def observe(self, batch: Any, rows: np.ndarray) -> Observations:
        """Convert a batch of the environment's own observations of the given rows."""
        try:
            return self._observe(batch, where=f"{self._where}: ")
        except EnvironmentFailure:
            for index, row in enumerate(rows):
                self._observe(_take(batch, [index]), where=f"{self._where}, episode seed {self._seeds[row]}: ")
            raise

    def check_finite(self, values: np.ndarray, rows: np.ndarray, what: str) -> None:
        """Raise `EnvironmentFailure` that names the first row whose values are not finite."""
        finite = np.isfinite(values).reshape(len(rows), -1).all(axis=1)
        if not finite.all():
            index = int(np.flatnonzero(~finite)[0])
            raise EnvironmentFailure(
                f"{self._where}, episode seed {self._seeds[rows[index]]}: {what} is not finite: {values[index]}; "
                f"repair the environment"
            )

    def _frame(
        self, batch: Any, infos: Mapping[str, Any], rows: np.ndarray, terminated: np.ndarray, truncated: np.ndarray
    ) -> Frame:
        batch = _take(batch, rows)
        return Frame(
            observations=self.observe(batch, rows),
            rows=rows,
            terminated=terminated[rows],
            over=(terminated | truncated)[rows],
            parts={name: np.asarray(part) for name, part in batch.items()} if isinstance(batch, Mapping) else {},
            infos=infos,
        )

    def _failure(self, call: str, error: Exception) -> EnvironmentFailure:
        if isinstance(error, EnvironmentFailure):
            return EnvironmentFailure(f"{self._where}, {error}")
        some = ", ".join(map(str, self._seeds[:5])) + (", ..." if len(self._seeds) > 5 else "")
        return EnvironmentFailure(
            f"{self._where}, one of the episode seeds {some}: the environment raised in {call}: "
            f"{type(error).__name__}: {error}"
        )


class _Located(gymnasium.Wrapper[Any, Any, Any, Any]):
    """Names the episode's seed and step when the environment raises."""

    def __init__(self, env: gymnasium.Env[Any, Any]) -> None:
        super().__init__(env)
        self._seed: int | None = None
        self._step = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Reset, and remember the seed."""
        self._seed, self._step = (self._seed if seed is None else seed), 0
        try:
            return self.env.reset(seed=seed, options=options)
        except Exception as error:
            raise self._failure(error) from error

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """Step, and count."""
        self._step += 1
        try:
            return self.env.step(action)
        except Exception as error:
            raise self._failure(error) from error

    def _failure(self, error: Exception) -> EnvironmentFailure:
        place = f"step {self._step}" if self._step else "reset"
        return EnvironmentFailure(
            f"episode seed {self._seed}: the environment raised at {place}: {type(error).__name__}: {error}"
        )


def _take(batch: Any, rows: Any) -> Any:
    if isinstance(batch, Mapping):
        return {name: np.asarray(part)[rows] for name, part in batch.items()}
    return np.asarray(batch)[rows]


def _rows(batch: Any, size: int) -> list[Any]:
    if isinstance(batch, Mapping):
        return [{name: part[row] for name, part in batch.items()} for row in range(size)]
    return [batch[row] for row in range(size)]


def _batch(rows: list[Any]) -> Any:
    if isinstance(rows[0], Mapping):
        return {name: np.stack([np.asarray(row[name]) for row in rows]) for name in rows[0]}
    return np.stack([np.asarray(row) for row in rows])
