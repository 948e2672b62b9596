"""Policies of other libraries under our protocols, and our agents in other libraries' evaluators.

Both speak `get_action(info)` as stable-worldmodel's evaluator does: `info` holds arrays with the axes (E, 1, ...) for E
environments and one moment, `goal` and `goal_NAME` stand beside `pixels` and `NAME`, and the answer is (E, A).
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
    """Acts from an info dictionary."""

    def get_action(self, info: dict[str, Any]) -> Any:
        """Return one action for each environment, (E, A)."""
        ...


class ForeignPolicy(Agent):
    """An `Agent` made of another library's policy.

    `info` has `pixels` and `goal` (E, 1, H, W, C) as bytes; the observation vector as `vector_name` and
    `goal_VECTOR_NAME` (E, 1, V); `action`, the last one, NaN at first as there (E, 1, A); `step_idx` and `terminated`
    (E, 1); and the flag `_needs_flush` (E,), true in the first call of an episode. A policy that has `set_env` is
    handed an object with `num_envs`, `action_space` and `single_action_space` before each batch of episodes; one that
    has a `seed` is told by `set_seed` to begin with it, once for each size of batch. It sees all environments to the
    end of the batch, those too whose episode is over.

    Raises:
        DataError: an answer is not (E, A) or not finite.
    """

    def __init__(self, policy: InfoPolicy, action: ActionSpec, *, vector_name: str = "proprio") -> None:
        self._policy, self._action, self._vector_name = policy, action, vector_name
        self._goal: Goal | None = None
        self._last = np.zeros((0, action.size), np.float32)
        self._step = 0
        self._envs: dict[int, SimpleNamespace] = {}  # kept, so that a seeded policy draws on from batch to batch

    def reset(self, goal: Goal) -> None:
        """Take new goals; the policy is told to forget the last episode."""
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
        """Return what the policy answers, clipped to the bounds."""
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
                f"the policy {type(self._policy).__name__} answered actions of shape {actions.shape}"
                f"{'' if np.isfinite(actions).all() else ' that are not all finite'}; expected finite ones of shape "
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
    """Our agents behind `get_action(info)`, for another library's evaluator.

    `make` gives an agent for a batch of environments. Pixels may be bytes or floats in [0, 1], channels first or last,
    of any size: they are brought to the model's by area. The vector is made of the keys `vector`, in this order.
    An environment begins anew where its `step_idx` goes back, its goal changes, or `_needs_flush` says so while
    `step_idx`, if given, has not gone on: stable-worldmodel leaves that flag standing after a reset. No action is
    chosen where `terminated` is true (its row is zero).

    Raises:
        DataError: `info` lacks a key, or an array has another shape.
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
        """Forget all episodes; the environments themselves are not looked at."""
        self._groups, self._goal, self._steps = [], None, None

    def get_action(self, info: Mapping[str, Any], **options: Any) -> Float32[np.ndarray, "E A"]:
        """Return one action for each environment; `options` of other libraries are not read."""
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
                    f"{' + '.join(names)} hold {vector.shape[1]} values; the model takes {self._observation.vector}. "
                    f"Name the keys that make its vector (vector=...)"
                )
        return Observations.from_numpy(pixels, vector)


@dataclass
class _Group:
    """Environments whose episode began at the same moment; `seen` are those the agent is still shown."""

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
    """Return one number for each environment, from (E,), (E, 1) or a single one; a copy."""
    array = value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)
    return np.array(np.broadcast_to(array.reshape(-1), (size,)))


def _latest(info: Mapping[str, Any], name: str) -> np.ndarray:
    """Return the last moment of what stands under a name, (E, ...)."""
    if name not in info:
        known = ", ".join(sorted(key for key in info if not key.startswith("_")))
        raise DataError(f"the evaluator's info has no {name!r}; it has {known}")
    value = info[name]
    array: np.ndarray = value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)
    if array.ndim < 2:
        raise DataError(f"info {name!r} has shape {array.shape}; expected (environments, time, ...)")
    return array[:, -1]


def _as_pixels(array: np.ndarray, shape: tuple[int, int, int], name: str) -> UInt8[np.ndarray, "E H W C"]:
    from worldloom.data import resize  # takes long to load

    height, width, channels = shape
    if array.ndim != 4 or channels not in (array.shape[1], array.shape[3]):
        raise DataError(f"info {name!r} has pictures of shape {array.shape[1:]}; expected {channels} channels")
    if array.shape[3] != channels:
        array = array.transpose(0, 2, 3, 1)
    if array.dtype != np.uint8:
        if not (np.isfinite(array).all() and array.min() >= 0 and array.max() <= 1):
            raise DataError(
                f"info {name!r} holds {array.dtype} from {array.min():g} to {array.max():g}; expected bytes, or floats "
                f"in [0, 1]: hand the pictures over before they are standardised"
            )
        array = np.round(array * 255).astype(np.uint8)
    return resize(array, (height, width))
