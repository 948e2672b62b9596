"""The value objects that packages exchange.

Axes: B batch (environments), S candidates, K context frames, T future steps, A action block, D latent,
N frames, H W C height, width and channels. Pixels are unsigned bytes with channels last, everywhere.

A *block* is `ModelSpec.block` consecutive environment actions, concatenated; it is one step of the model.
`actions[t]` is the action between frame t and frame t + 1.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, UInt8
from torch import Tensor

from worldloom.core.config import Shape, check_shape
from worldloom.core.errors import DataError, PlanningError

BatchedT = TypeVar("BatchedT", bound="Batched")

_LARGEST, _LARGEST_VECTOR = 65_536, 2**24  # upper bounds, so that the size of a model can be computed
MOST_ACTION_VALUES = 65_536


class Batched:
    """Base class of frozen dataclasses whose tensors share their leading axes; `value[rows]` indexes every tensor.

    Tensors are indexed in fields, tuples, mappings and other `Batched` values. Other values, and the fields named in
    `whole`, belong to the whole batch and do not change.
    """

    whole: ClassVar[frozenset[str]] = frozenset()

    def map(self: BatchedT, function: Callable[[Tensor], Tensor]) -> BatchedT:
        """Return the value with `function` applied to each tensor."""
        parts = {part.name: getattr(self, part.name) for part in fields(self)}  # type: ignore[arg-type]
        return replace(
            self,  # type: ignore[type-var]
            **{name: part if name in self.whole else _mapped(part, function) for name, part in parts.items()},
        )

    def __getitem__(self: BatchedT, rows: Any) -> BatchedT:
        """Return the value for these rows: an index, several indices, a slice or a mask."""
        return self.map(lambda tensor: tensor[rows])

    def to(self: BatchedT, device: torch.device | str) -> BatchedT:
        """Return the same value on `device`."""
        return self.map(lambda tensor: tensor.to(device))


def _mapped(part: Any, function: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(part, Tensor):
        return function(part)
    if isinstance(part, Batched):
        return part.map(function)
    if isinstance(part, tuple):
        return tuple(_mapped(each, function) for each in part)
    if isinstance(part, Mapping):
        return {name: _mapped(each, function) for name, each in part.items()}
    return part


class _ObservationValues(Shape):
    pixels: tuple[int, int, int] | None
    vector: int


class _ActionValues(Shape):
    low: tuple[float, ...]
    high: tuple[float, ...]
    discrete: bool


@dataclass(frozen=True, kw_only=True)
class ObservationSpec:
    """The shape of one observation: pixels (H, W, C), a vector of `vector` values, or both."""

    pixels: tuple[int, int, int] | None = None
    vector: int = 0

    def __post_init__(self) -> None:
        if self.pixels is None and self.vector == 0:
            raise DataError(
                "an observation has neither pixels nor a vector; expected at least one. Set 'pixels' or 'vector'"
            )
        sides = (1, 1, 1) if self.pixels is None else self.pixels
        if not 0 <= self.vector <= _LARGEST_VECTOR or len(sides) != 3 or not 1 <= min(sides) <= max(sides) <= _LARGEST:
            raise DataError(
                f"expected pixels of shape (H, W, C) with sizes from 1 to {_LARGEST} and a vector of 0 to "
                f"{_LARGEST_VECTOR} values; got pixels {self.pixels} and a vector of {self.vector}. Correct the "
                f"observation's shape"
            )

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "ObservationSpec":
        """Return the specification from the JSON form of its `dataclasses.asdict`.

        Raises:
            DataError: a value is missing, or has the wrong type or size.
        """
        read = check_shape(values, _ObservationValues, "the observation's specification", DataError)
        return cls(pixels=read.pixels, vector=read.vector)

    def check(self, observations: "Observations") -> None:
        """Raise `DataError` if the observations do not have this shape."""
        pixels = None if observations.pixels is None else tuple(observations.pixels.shape[-3:])
        vector = 0 if observations.vector is None else observations.vector.shape[-1]
        if pixels != self.pixels or vector != self.vector:
            raise DataError(
                f"the model expects pixels {self.pixels} and a vector of {self.vector} values; got pixels {pixels} and "
                f"a vector of {vector}. Use data with the shapes that the model was trained on"
            )


@dataclass(frozen=True, kw_only=True)
class ActionSpec:
    """The bounds of one environment action. If `discrete`, the action's values are scores; the argmax is the choice."""

    low: tuple[float, ...]
    high: tuple[float, ...]
    discrete: bool = False

    def __post_init__(self) -> None:
        if self.size > MOST_ACTION_VALUES:
            raise DataError(
                f"an action has {self.size:,} values; at most {MOST_ACTION_VALUES:,} are supported. Use actions with "
                f"fewer values"
            )
        with np.errstate(over="ignore"):
            low, high = np.array(self.low, np.float32), np.array(self.high, np.float32)
        if not low.size or low.shape != high.shape or not (np.isfinite([low, high]).all() and (low < high).all()):
            raise DataError(
                f"action bounds must be finite with low < high in each dimension, in single precision; got low "
                f"{_some(self.low)}, high {_some(self.high)}. Wrap the environment so that its actions have finite "
                f"bounds"
            )

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "ActionSpec":
        """Return the specification from the JSON form of its `dataclasses.asdict`.

        Raises:
            DataError: a value is missing, or has the wrong type or size.
        """
        read = check_shape(values, _ActionValues, "the specification of the actions", DataError)
        return cls(low=read.low, high=read.high, discrete=read.discrete)

    @property
    def size(self) -> int:
        """The number of dimensions of one environment action."""
        return len(self.low)

    def clip(self, action: Any) -> Float32[np.ndarray, "A"]:
        """Return one action within the bounds, as float32.

        Raises:
            DataError: the action has a different size, or is not finite.
        """
        values = np.asarray(action, np.float32).reshape(-1)
        if values.size != self.size or not np.isfinite(values).all():
            raise DataError(
                f"expected an action of {self.size} finite values; got {action}. Correct the code that computes the "
                f"action"
            )
        clipped: np.ndarray = np.clip(values, np.array(self.low, np.float32), np.array(self.high, np.float32))
        return clipped


def _some(values: tuple[float, ...]) -> str:
    return f"({', '.join(map(str, values[:8]))}{', ...' if len(values) > 8 else ''})"


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """The shapes of a world model's inputs and outputs.

    One model step is `block` environment actions. The model's input is `context` frames, one block apart.
    `fingerprint` identifies the weights, so that latents of another model can be rejected.
    """

    observation: ObservationSpec
    action: ActionSpec
    block: int
    context: int
    latent_dim: int
    fingerprint: str = ""

    @property
    def block_size(self) -> int:
        """The size A of an action block: `block` actions, concatenated."""
        return self.block * self.action.size


@dataclass(frozen=True, kw_only=True)
class Observations(Batched):
    """A batch of observations with any leading axes, as tensors."""

    pixels: UInt8[Tensor, "*axes H W C"] | None = None
    vector: Float[Tensor, "*axes V"] | None = None

    @property
    def axes(self) -> tuple[int, ...]:
        """The leading axes, shared by all parts."""
        if self.pixels is not None:
            return tuple(self.pixels.shape[:-3])
        assert self.vector is not None
        return tuple(self.vector.shape[:-1])

    @classmethod
    def from_numpy(cls, pixels: np.ndarray | None, vector: np.ndarray | None) -> "Observations":
        """Wrap arrays (uint8 pixels, float vector) without copying where possible."""
        return cls(
            pixels=None if pixels is None else torch.from_numpy(np.ascontiguousarray(pixels)),
            vector=None if vector is None else torch.from_numpy(np.ascontiguousarray(vector, dtype=np.float32)),
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Episode:
    """One uninterrupted sequence of N = T+1 frames and T actions, without rewards.

    `labels` are named columns of simulator state, for probes and scores; agents never receive them.
    `metadata` is JSON: the seed, the policy and the factors of variation.

    Raises:
        DataError: the numbers of frames and actions do not match, a dtype is wrong, or a value is not finite.
    """

    pixels: np.ndarray | None = None  # uint8 (N, H, W, C)
    vector: np.ndarray | None = None  # float32 (N, V)
    actions: np.ndarray  # float32 (T, A of one action)
    labels: Mapping[str, np.ndarray] = field(default_factory=dict)  # float32 (N, L) each
    metadata: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.pixels is None and self.vector is None:
            raise DataError(
                "an episode has neither pixels nor vectors; expected at least one of them. Record pixels or vectors"
            )
        self._expect("actions", self.actions, np.float32, 2)
        frames = len(self.actions) + 1
        if frames < 2:
            raise DataError("an episode needs at least one action and two frames; got no action. Drop the episode")
        parts: list[tuple[str, np.ndarray | None, Any, int]] = [
            ("pixels", self.pixels, np.uint8, 4),
            ("vector", self.vector, np.float32, 2),
            *((f"label {name!r}", column, np.float32, 2) for name, column in self.labels.items()),
        ]
        for name, column, dtype, axes in parts:
            if column is None:
                continue
            self._expect(name, column, dtype, axes)
            if len(column) != frames:
                raise DataError(
                    f"{name} has {len(column)} frames for {len(self.actions)} actions; expected {frames} frames. "
                    f"Repair or drop the episode"
                )

    @staticmethod
    def _expect(name: str, array: np.ndarray, dtype: Any, axes: int) -> None:
        if not isinstance(array, np.ndarray) or array.dtype != dtype or array.ndim != axes:
            came = (
                f"{array.dtype} of shape {array.shape}"
                if isinstance(array, np.ndarray)
                else f"a {type(array).__name__}"
            )
            raise DataError(f"{name} must be {np.dtype(dtype)} with {axes} axes; got {came}. Convert the array")
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            step = int(np.argwhere(~np.isfinite(array))[0][0])
            raise DataError(f"{name} is not finite at step {step}; drop or repair the episode")

    @property
    def steps(self) -> int:
        """The number of actions T."""
        return len(self.actions)


@dataclass(frozen=True, kw_only=True)
class Windows(Batched):
    """A batch of training windows, each of K context frames and T future frames, one block apart.

    `actions[:, i]` is the block that leads from frame i to frame i + 1.
    """

    observations: Observations  # axes (B, K+T)
    actions: Float32[Tensor, "B M A"]  # M = K + T - 1
    labels: Mapping[str, Float32[Tensor, "B N _"]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Context(Batched):
    """The input of a prediction: K encoded frames and the action blocks between them.

    `taken` is the environment action that led to the last frame, for limits on the rate of change of actions. It is
    None if that action is unknown, for example at the start of an episode.
    """

    latents: Float[Tensor, "B K D"]
    actions: Float[Tensor, "B K-1 A"]
    taken: Float[Tensor, "B E"] | None = None

    @property
    def batch(self) -> int:
        """The number B of environments."""
        return self.latents.shape[0]


@dataclass(frozen=True, kw_only=True)
class Rollouts(Batched):
    """The predicted futures of S candidate action sequences, without the context frames."""

    context: Context
    actions: Float[Tensor, "B S T A"]
    latents: Float[Tensor, "B S T D"]


@dataclass(frozen=True, kw_only=True)
class Goal(Batched):
    """The goal of each of B environments, as an observation."""

    observations: Observations  # axes (B,)


@dataclass(frozen=True, kw_only=True)
class ActionBounds:
    """Bounds of an action block, each of shape (A,)."""

    low: Float[Tensor, "A"]
    high: Float[Tensor, "A"]

    def __post_init__(self) -> None:
        if not bool((self.low < self.high).all()):
            raise PlanningError(
                f"action bounds must have low < high in each dimension; got low {self.low} and high {self.high}. "
                f"Correct the bounds"
            )

    @classmethod
    def of(cls, spec: ModelSpec, device: torch.device | str = "cpu") -> "ActionBounds":
        """Return the bounds of one block of `spec`."""
        low, high = (
            torch.tensor(bound, dtype=torch.float32, device=device).repeat(spec.block)
            for bound in (spec.action.low, spec.action.high)
        )
        return cls(low=low, high=high)

    def clamp(self, actions: Float[Tensor, "*axes A"]) -> Float[Tensor, "*axes A"]:
        """Return the nearest actions within the bounds."""
        return torch.clamp(actions, self.low, self.high)


@dataclass(frozen=True, kw_only=True)
class Plan(Batched):
    """The chosen actions for each environment, the predicted latents and the cost.

    Attributes:
        violations: the violation of each guardrail at each step of the best plan found, by name. A guardrail is
            satisfied if all its violations are 0 or less. If a guardrail is not satisfied, an agent replaces
            the actions by fallback actions; `violations` still describes the rejected plan.
        cut_short: whether the deadline ended the search; the plan is then the best one found by the deadline.
        rollouts: the number of candidates that the search rolled out.
    """

    actions: Float[Tensor, "B T A"]
    latents: Float[Tensor, "B T D"]
    cost: Float[Tensor, "B"]
    violations: Mapping[str, Float[Tensor, "B T"]] = field(default_factory=dict)
    cut_short: bool = False
    rollouts: int = 0

    @cached_property
    def feasible(self) -> Bool[Tensor, "B"]:
        """Whether the plan is predicted to satisfy every guardrail, for each environment."""
        holds = torch.ones_like(self.cost, dtype=torch.bool)
        for violation in self.violations.values():
            holds &= (violation <= 0).all(dim=1)
        return holds

    @cached_property
    def refused(self) -> tuple[int, ...]:
        """The indices of the environments for which the best plan found breaks a guardrail."""
        return tuple(torch.nonzero(~self.feasible).flatten().tolist())
