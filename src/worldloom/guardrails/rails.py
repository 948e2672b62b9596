"""Guardrails: hard limits on predicted futures, over probed quantities, latents and actions.

Each has a name, an owner, a reason and a margin that is added to every violation: what calibration found the prediction
to be off by. All are satisfied where the violation is <= 0.
"""

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from worldloom.core.errors import PlanningError
from worldloom.core.seams import Metric, WorldModel
from worldloom.core.types import Rollouts
from worldloom.heads import Probe, nearest_gap

_BETWEEN = 4  # places looked at on the way of each block: a hazard is narrower than a block is long


@runtime_checkable
class Region(Protocol):
    """A set of points."""

    def depth(self, points: Float[Tensor, "*axes L"]) -> Float[Tensor, "*axes"]:
        """Return how deep points lie inside, the Euclidean way to the edge; negative outside."""
        ...


@dataclass(frozen=True)
class Ball:
    """All points within a radius."""

    centre: tuple[float, ...]
    radius: float

    def depth(self, points: Float[Tensor, "*axes L"]) -> Float[Tensor, "*axes"]:
        """Return how deep points lie inside."""
        away: Tensor = (points - points.new_tensor(self.centre)).norm(dim=-1)
        return self.radius - away


@dataclass(frozen=True)
class Box:
    """All points between two corners; a side may be infinite."""

    low: tuple[float, ...]
    high: tuple[float, ...]

    def depth(self, points: Float[Tensor, "*axes L"]) -> Float[Tensor, "*axes"]:
        """Return how deep points lie inside."""
        low, high = (_point(corner, points.device, points.dtype) for corner in (self.low, self.high))
        beyond = torch.maximum(low - points, points - high)
        if beyond.shape[-1] == 1:
            return -beyond[..., 0]
        outside: Tensor = torch.linalg.vector_norm(beyond.clamp_min(0), dim=-1)
        return -(outside + beyond.amax(dim=-1).clamp_max(0))


@dataclass(frozen=True, kw_only=True)
class Rail(ABC):
    """A guardrail; a new one is a subclass with `raw`.

    `margin` holds for every predicted step, or, as (T,), for each; beyond its end the last one does. A subclass that
    looks at actions alone says so with `of_actions`: it is asked before those that need more.
    """

    of_actions: ClassVar[bool] = False

    name: str
    owner: str = ""
    reason: str = ""
    margin: float | Float[Tensor, "_"] = 0.0

    @abstractmethod
    def raw(self, rollouts: Rollouts) -> Float[Tensor, "B S T"]:
        """Return by how much each predicted step breaks the limit, without margin."""

    def violation(self, rollouts: Rollouts) -> Float[Tensor, "B S T"]:
        """Return by how much each predicted step breaks the limit, margin included."""
        raw = self.raw(rollouts)
        if isinstance(self.margin, Tensor):
            return raw + self.margins(raw.shape[-1]).to(raw)
        return raw + self.margin if self.margin else raw

    def margins(self, steps: int) -> Float[Tensor, "_"]:
        """Return the margin of each of so many predicted steps."""
        if not isinstance(self.margin, Tensor):
            return torch.full((steps,), self.margin)
        return self.margin[torch.arange(steps, device=self.margin.device).clamp_max(len(self.margin) - 1)]

    def true(self, quantities: Mapping[str, Float[Tensor, "R _"]]) -> Float[Tensor, "R"] | None:
        """Return by how much what really is breaks the limit, from named quantities; None where they do not tell."""
        return None

    def with_margin(self, margin: float | Float[Tensor, "_"]) -> "Rail":
        """Return the same guardrail with another margin."""
        return replace(self, margin=margin)


@dataclass(frozen=True, kw_only=True)
class _Probed(Rail):
    """A guardrail over probed quantities, looked at along the way of each block and not only at its end.

    What is outside a probe's calibration breaks it: by how much farther it lies than what is known, in multiples.
    `quantities` names what its probes read.
    """

    between: int = _BETWEEN
    quantities: tuple[str, ...] = ()

    def way(self, probe: Probe, rollouts: Rollouts) -> Float[Tensor, "B S T P L"]:
        """Return the quantity at P places along each block, the last at its end, by linear interpolation."""
        values = probe(_with_start(rollouts))
        shares = _shares(self.between, values.device)
        return torch.lerp(values[:, :, :-1, None], values[:, :, 1:, None], shares)

    def known(self, violation: Float[Tensor, "B S T"], probe: Probe, rollouts: Rollouts) -> Float[Tensor, "B S T"]:
        """Return the violation, above 0 wherever the probe does not know what it reads."""
        excess = probe.gap(rollouts.latents) - 1
        return torch.where(excess > 0, torch.maximum(violation, excess), violation)


@dataclass(frozen=True, kw_only=True)
class KeepOut(_Probed):
    """A probed quantity stays out of a region; the violation is the depth inside."""

    probe: Probe
    region: Region

    def raw(self, rollouts: Rollouts) -> Float[Tensor, "B S T"]:
        """Return the greatest depth inside on the way of each block."""
        depth = self.region.depth(self.way(self.probe, rollouts)).amax(dim=-1)
        return self.known(depth, self.probe, rollouts)

    def true(self, quantities: Mapping[str, Float[Tensor, "R _"]]) -> Float[Tensor, "R"] | None:
        """Return by how much what really is breaks the limit."""
        values = _all(quantities, self.quantities, 1)
        return None if values is None else self.region.depth(values[0])


@dataclass(frozen=True, kw_only=True)
class KeepIn(_Probed):
    """A probed quantity stays within a region; the violation is the way outside."""

    probe: Probe
    region: Region

    def raw(self, rollouts: Rollouts) -> Float[Tensor, "B S T"]:
        """Return the farthest way outside on the way of each block."""
        depth = self.region.depth(self.way(self.probe, rollouts)).amin(dim=-1)
        return self.known(-depth, self.probe, rollouts)

    def true(self, quantities: Mapping[str, Float[Tensor, "R _"]]) -> Float[Tensor, "R"] | None:
        """Return by how much what really is breaks the limit."""
        values = _all(quantities, self.quantities, 1)
        return None if values is None else -self.region.depth(values[0])


@dataclass(frozen=True, kw_only=True)
class KeepAway(_Probed):
    """Two probed quantities, such as the agent's place and a hazard's, stay a distance apart."""

    probe: Probe
    other: Probe
    distance: float

    def raw(self, rollouts: Rollouts) -> Float[Tensor, "B S T"]:
        """Return by how much they come nearer than allowed on the way of each block."""
        apart = (self.way(self.probe, rollouts) - self.way(self.other, rollouts)).norm(dim=-1).amin(dim=-1)
        violation = self.known(self.distance - apart, self.probe, rollouts)
        return self.known(violation, self.other, rollouts)

    def true(self, quantities: Mapping[str, Float[Tensor, "R _"]]) -> Float[Tensor, "R"] | None:
        """Return by how much what really is breaks the limit."""
        values = _all(quantities, self.quantities, 2)
        return None if values is None else self.distance - (values[0] - values[1]).norm(dim=-1)


@dataclass(frozen=True, kw_only=True)
class Unlike(Rail):
    """Never like these: every predicted latent stays `distance` step lengths away from all examples."""

    examples: Float[Tensor, "N D"]
    distance: float
    step_length: float

    def raw(self, rollouts: Rollouts) -> Float[Tensor, "B S T"]:
        """Return by how many step lengths a predicted latent comes nearer than allowed."""
        return self.distance - nearest_gap(rollouts.latents, self.examples) / self.step_length


@dataclass(frozen=True, kw_only=True)
class Familiar(Rail):
    """Stay where the model knows its way: near latents of the data, at most `distance` step lengths away."""

    data: Float[Tensor, "N D"]
    distance: float
    step_length: float

    def raw(self, rollouts: Rollouts) -> Float[Tensor, "B S T"]:
        """Return by how many step lengths a predicted latent lies farther than allowed."""
        return nearest_gap(rollouts.latents, self.data) / self.step_length - self.distance


@dataclass(frozen=True, kw_only=True)
class Agreed(Rail):
    """Stay where models that were trained apart agree: their predictions spread at most `spread` step lengths."""

    models: tuple[WorldModel, ...] = field(default_factory=tuple)
    spread: float
    step_length: float

    def raw(self, rollouts: Rollouts) -> Float[Tensor, "B S T"]:
        """Return by how many step lengths the farthest of the other predictions differs from the plan's."""
        gaps = [
            (model.rollout(rollouts.context, rollouts.actions) - rollouts.latents).norm(dim=-1) for model in self.models
        ]
        worst: Tensor = torch.stack(gaps).amax(dim=0) / self.step_length
        return worst - self.spread


@dataclass(frozen=True, kw_only=True)
class Returnable(Rail):
    """What is done can be undone: from every predicted state the way back to the present one is at most `steps`."""

    back: Metric
    steps: float

    def raw(self, rollouts: Rollouts) -> Float[Tensor, "B S T"]:
        """Return by how many steps the way back is too long, by the learned temporal distance."""
        return self.back(rollouts.latents, rollouts.context.latents[:, None, -1:]) - self.steps


@dataclass(frozen=True, kw_only=True)
class Magnitude(Rail):
    """No environment action is longer than `limit` (Euclidean)."""

    of_actions: ClassVar[bool] = True

    limit: float
    size: int

    def raw(self, rollouts: Rollouts) -> Float[Tensor, "B S T"]:
        """Return by how much the longest action of each block exceeds the limit."""
        longest: Tensor = torch.linalg.vector_norm(_actions(rollouts, self.size), dim=-1).amax(dim=-1)
        return longest - self.limit


@dataclass(frozen=True, kw_only=True)
class Rate(Rail):
    """No environment action differs from the one before by more than `limit` (Euclidean).

    The first of a plan is compared with the last one taken, where the context says which that was.
    """

    of_actions: ClassVar[bool] = True

    limit: float
    size: int

    def raw(self, rollouts: Rollouts) -> Float[Tensor, "B S T"]:
        """Return by how much the greatest change within each block, and into it, exceeds the limit."""
        actions = _actions(rollouts, self.size)
        line = actions.flatten(2, 3)
        taken = rollouts.context.taken
        before = line[:, :, :1] if taken is None else taken[:, None, None].to(line).expand_as(line[:, :, :1])
        change: Tensor = torch.linalg.vector_norm(line - torch.cat([before, line[:, :, :-1]], dim=2), dim=-1)
        return change.view(actions.shape[:4]).amax(dim=-1) - self.limit


@dataclass(frozen=True, kw_only=True)
class Custom(Rail):
    """Any limit: a function of rollouts that gives (B, S, T), or (B, S) for the plan as a whole.

    It may work on what it is given in place: that is a copy, and other guardrails judge what was predicted.
    """

    function: Callable[[Rollouts], Tensor]

    def raw(self, rollouts: Rollouts) -> Float[Tensor, "B S T"]:
        """Return what the function says; what it says of a whole plan holds for its last step."""
        found = self.function(replace(rollouts, actions=rollouts.actions.clone(), latents=rollouts.latents.clone()))
        if found.ndim == 2:
            whole = torch.full_like(rollouts.latents[..., 0], -torch.inf)
            whole[..., -1] = found
            return whole
        if found.shape != rollouts.latents.shape[:3]:
            raise PlanningError(
                f"guardrail {self.name!r} must give violations of shape {tuple(rollouts.latents.shape[:3])}, or one "
                f"for each candidate; got {tuple(found.shape)}"
            )
        return found


def _all(
    quantities: Mapping[str, Float[Tensor, "R _"]], names: tuple[str, ...], count: int
) -> list[Float[Tensor, "R _"]] | None:
    """Return the quantities of these names, if they are so many and all are there."""
    return [quantities[name] for name in names] if len(names) == count and set(names) <= set(quantities) else None


@functools.lru_cache(maxsize=256)
def _point(values: tuple[float, ...], device: torch.device, dtype: torch.dtype) -> Float[Tensor, "L"]:
    """Return a point as a tensor: a search asks for the same one many times."""
    with torch.inference_mode(False):  # it outlives the mode it was made in, and a gradient solver takes it too
        return torch.tensor(values, device=device, dtype=dtype)


@functools.cache
def _shares(count: int, device: torch.device) -> Float[Tensor, "_ 1"]:
    """Return so many shares of a way, the last of them all of it."""
    with torch.inference_mode(False):  # see `_point`
        return torch.arange(1, count + 1, device=device)[:, None] / count


def _with_start(rollouts: Rollouts) -> Float[Tensor, "B S _ D"]:
    """Return the predicted latents behind the present one."""
    latents = rollouts.latents
    now = rollouts.context.latents[:, None, -1:].to(latents).expand(-1, latents.shape[1], -1, -1)
    return torch.cat([now, latents], dim=2)


def _actions(rollouts: Rollouts, size: int) -> Float[Tensor, "B S T block _"]:
    """Return the environment actions of each block."""
    actions: Tensor = rollouts.actions.unflatten(-1, (-1, size))
    return actions
