"""Policies of other libraries under our protocols, and our agents in other libraries' evaluators.

Both use `get_action(info)` as in stable-worldmodel's evaluator. `info` contains arrays with the axes (E, 1, ...) for E
environments and one time step: `pixels`, vectors by name, and the goals `goal` and `goal_NAME`. The result has shape
(E, A).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from gymnasium import spaces
from jaxtyping import Float, Float32, UInt8
from torch import Tensor

from worldloom.core.errors import DataError
from worldloom.core.seams import Agent
from worldloom.core.types import ActionSpec, Goal, Observations, ObservationSpec


@runtime_checkable
class InfoPolicy(Protocol):
    """A policy that acts from an info dictionary."""

    def get_action(self, info: dict[str, Any]) -> Any:
        """Return one action for each environment, (E, A)."""
        ...


class ForeignPolicy(Agent):
    """An `Agent` that wraps another library's policy.

    `info` has `pixels` and `goal` (E, 1, H, W, C) as bytes; the observation vector as `vector_name` and
    `goal_VECTOR_NAME` (E, 1, V); `action` (E, 1, A), the last action, NaN at the start; `step_idx` (E, 1); `terminated`
    (E, 1); and the flag `_needs_flush` (E,), true in the first call of an episode. If the policy has a method
    `set_env`, the method is called before each batch of episodes with an object that has `num_envs`, `action_space` and
    `single_action_space`. If the policy has a `seed`, its `set_seed` is called with this seed once for each batch size.
    The policy receives all environments until the end of the batch, including those with finished episodes.

    Raises:
        DataError: the policy's actions are not finite or do not have shape (E, A).
    """

    def __init__(self, policy: InfoPolicy, action: ActionSpec, *, vector_name: str = "proprio") -> None:
        self._policy, self._action, self._vector_name = policy, action, vector_name
        self._goal: Goal | None = None
        self._last = np.zeros((0, action.size), np.float32)
        self._step = 0
        self._envs: dict[
            int, SimpleNamespace
        ] = {}  # kept, so that a seeded policy continues its stream in later batches

    def reset(self, goal: Goal) -> None:
        """Set new goals, and reset the policy."""
        size = goal.observations.axes[0]
        self._goal, self._step = goal, 0
        self._last = np.full((size, self._action.size), np.nan, np.float32)
        if not hasattr(self._policy, "set_env"):
            return
        known = size in self._envs
        if not known:
            low, high = np.array(self._action.low, np.float32), np.array(self._action.high, np.float32)
            self._envs[size] = SimpleNamespace(
                num_envs=size,
                single_action_space=spaces.Box(low, high),
                action_space=spaces.Box(np.tile(low, (size, 1)), np.tile(high, (size, 1))),
            )
        self._policy.set_env(self._envs[size])
        seed, set_seed = (getattr(self._policy, name, None) for name in ("seed", "set_seed"))
        if not known and seed is not None and callable(set_seed):
            set_seed(seed)

    def act(self, observations: Observations) -> Float[Tensor, "B A"]:
        """Return the policy's actions, clipped to the bounds."""
        assert self._goal is not None
        size = len(self._last)
        info: dict[str, Any] = {
            **self._part(observations, "pixels", self._vector_name),
            **self._part(self._goal.observations, "goal", f"goal_{self._vector_name}"),
            "action": self._last[:, None],
            "step_idx": np.full((size, 1), self._step),
            "terminated": np.zeros((size, 1), bool),
            "_needs_flush": np.full(size, self._step == 0),
        }
        answer = self._policy.get_action(info)
        actions = answer.detach().cpu().numpy() if isinstance(answer, Tensor) else np.asarray(answer)
        if actions.shape != self._last.shape or not np.isfinite(actions).all():
            raise DataError(
                f"the policy {type(self._policy).__name__} returned actions of shape {actions.shape}"
                f"{'' if np.isfinite(actions).all() else ' that are not all finite'}; expected finite actions of shape "
                f"{self._last.shape}"
            )
        self._last = np.clip(actions, self._action.low, self._action.high).astype(np.float32)
        self._step += 1
        return torch.from_numpy(self._last)

    @staticmethod
    def _part(observations: Observations, pixels: str, vector: str) -> dict[str, np.ndarray]:
        named = {pixels: observations.pixels, vector: observations.vector}
        return {name: part.cpu().numpy()[:, None].copy() for name, part in named.items() if part is not None}


class LentPolicy:
    """Makes our agents usable by another library's evaluator, through `get_action(info)`.

    `make` returns an agent for a batch of environments. Pixels may be bytes or floats in [0, 1], channels first or
    last, of any size; they are resized to the model's picture size by area averaging. The vector is the concatenation
    of the arrays that the keys `vector` name. An environment starts a new episode if its `step_idx` decreases, if its
    goal changes, or if `_needs_flush` is true while `step_idx` (if given) does not increase. The flag alone does not
    start an episode, because stable-worldmodel leaves it set after a reset. If `terminated` is true, the action is
    zero.

    Raises:
        DataError: `info` lacks a key, or an array has a wrong shape.
    """

    def __init__(
        self,
        make: Callable[[], Agent],
        observation: ObservationSpec,
        action: ActionSpec,
        *,
        vector: Sequence[str] = ("proprio",),
    ) -> None:
        self._make, self._observation, self._action, self._vector = make, observation, action, tuple(vector)
        self._groups: list[_Group] = []
        self._goal: Observations | None = None
        self._steps: np.ndarray | None = None

    def set_env(self, env: Any) -> None:
        """Forget all episodes; `env` is ignored."""
        self._groups, self._goal, self._steps = [], None, None

    def get_action(self, info: Mapping[str, Any], **options: Any) -> Float32[np.ndarray, "E A"]:
        """Return one action for each environment. Extra keyword arguments, which other libraries pass, are ignored."""
        observations, goal = self._read(info, ""), self._read(info, "goal")
        size = observations.axes[0]
        steps = _flat(info["step_idx"], size) if "step_idx" in info else None
        fresh = self._fresh(info, goal, steps, size)
        self._goal, self._steps = goal, steps
        dead = _flat(info.get("terminated", False), size).astype(bool)
        for group in self._groups:
            group.drop(fresh | dead)
        self._groups = [group for group in self._groups if len(group.rows)]
        begins = np.flatnonzero(fresh & ~dead)
        if len(begins):
            agent = self._make()
            agent.reset(Goal(observations=goal[torch.from_numpy(begins)]))
            self._groups.append(_Group(agent, begins, begins))
        actions = np.zeros((size, self._action.size), np.float32)
        for group in self._groups:
            chosen = group.agent.act(observations[torch.from_numpy(group.seen)]).detach().cpu().numpy()
            actions[group.rows] = chosen[np.isin(group.seen, group.rows)]
        return actions

    def _fresh(self, info: Mapping[str, Any], goal: Observations, steps: np.ndarray | None, size: int) -> np.ndarray:
        if self._goal is None or self._goal.axes[0] != size:
            self._groups = []
            return np.ones(size, bool)
        fresh = _flat(info.get("_needs_flush", False), size).astype(bool)
        if steps is not None and self._steps is not None:
            fresh = (fresh & (steps <= self._steps)) | (steps < self._steps)
        for before, now in ((self._goal.pixels, goal.pixels), (self._goal.vector, goal.vector)):
            if before is not None and now is not None:
                fresh |= (before != now).reshape(size, -1).any(dim=1).numpy()
        return fresh

    def _read(self, info: Mapping[str, Any], prefix: str) -> Observations:
        pixels = vector = None
        if self._observation.pixels is not None:
            pixels = _as_pixels(_latest(info, prefix or "pixels"), self._observation.pixels, prefix or "pixels")
        if self._observation.vector:
            names = [f"{prefix}_{name}" if prefix else name for name in self._vector]
            columns = [_latest(info, name) for name in names]
            vector = np.concatenate([column.reshape(len(column), -1) for column in columns], axis=1)
            if vector.shape[1] != self._observation.vector:
                raise DataError(
                    f"expected a vector of {self._observation.vector} values; {' + '.join(names)} have "
                    f"{vector.shape[1]}. Pass the keys that make up the model's vector as vector=..."
                )
        return Observations.from_numpy(pixels, vector)


@dataclass
class _Group:
    """Environments whose episodes began in the same call: `rows` still run, and the agent still receives `seen`."""

    agent: Agent
    rows: np.ndarray
    seen: np.ndarray

    def drop(self, gone: np.ndarray) -> None:
        stays = ~gone[self.rows]
        if stays.all():
            return
        self.rows = self.rows[stays]
        if self.agent.narrows and len(self.rows):
            self.agent.select([int(place) for place in np.flatnonzero(np.isin(self.seen, self.rows))])
            self.seen = self.rows


def _flat(value: Any, size: int) -> np.ndarray:
    """Return a copy with one number per environment, from (E,), (E, 1) or a single number."""
    array = value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)
    return np.array(np.broadcast_to(array.reshape(-1), (size,)))


def _latest(info: Mapping[str, Any], name: str) -> np.ndarray:
    """Return the last time step of the array `name`, (E, ...)."""
    if name not in info:
        known = ", ".join(sorted(key for key in info if not key.startswith("_")))
        raise DataError(
            f"the evaluator's info has no key {name!r}; its keys are {known}. Add the key, or use these names"
        )
    value = info[name]
    array: np.ndarray = value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)
    if array.ndim < 2:
        raise DataError(
            f"expected info {name!r} with axes (environments, time, ...); got shape {array.shape}. Add the axes"
        )
    return array[:, -1]


def _as_pixels(array: np.ndarray, shape: tuple[int, int, int], name: str) -> UInt8[np.ndarray, "E H W C"]:
    from worldloom.data import resize  # takes long to load

    height, width, channels = shape
    if array.ndim != 4 or channels not in (array.shape[1], array.shape[3]):
        raise DataError(
            f"expected pictures with {channels} channels in info {name!r}; got shape {array.shape[1:]}. Pass "
            f"(H, W, C) or (C, H, W)"
        )
    if array.shape[3] != channels:
        array = array.transpose(0, 2, 3, 1)
    if array.dtype != np.uint8:
        if not (np.isfinite(array).all() and array.min() >= 0 and array.max() <= 1):
            raise DataError(
                f"info {name!r} has {array.dtype} values from {array.min():g} to {array.max():g}; expected bytes, or "
                f"floats in [0, 1]. Pass the pictures before they are standardised"
            )
        array = np.round(array * 255).astype(np.uint8)
    return resize(array, (height, width))
