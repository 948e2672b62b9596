"""Guardrails: hard limits on predicted futures, over probed quantities, latents and actions.

A rail is the configuration of a guardrail, with a method that computes the violation. `bind` adds the inputs of that
method (probes, latents, models), a title, an owner and a margin, and returns the `Guardrail` for a planner. A guardrail
is satisfied where its violation is <= 0. The margin, the calibrated bound on prediction errors, is added to every
violation.
"""

import functools
import math
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal

import torch
from jaxtyping import Float
from pydantic import BeforeValidator, Field, SerializeAsAny
from torch import Tensor

from worldloom.core.config import Component, component_of
from worldloom.core.errors import ConfigError, PlanningError
from worldloom.core.registry import Registry, nearest
from worldloom.core.seams import Guardrail, Metric, WorldModel
from worldloom.core.types import Rollouts
from worldloom.guardrails.regions import RegionField
from worldloom.heads import Heads, Probe, nearest_gap

_BETWEEN = 4  # places at which each block is checked, because a hazard may be narrower than a block is long


class Rail(Component):
    """A guardrail as written in a rule file. To add a kind, register a subclass in `GUARDRAILS`.

    The subclass defines `reads`, `violation` and `_tightens`. `reason` explains the rule to people; `margin` is added
    to the calibrated margin. A rail that depends only on actions sets `of_actions`. A search then evaluates it before
    rails that need a network, and fallbacks and safe actions obey it too.
    """

    of_actions: ClassVar[bool] = False

    reason: str = ""
    margin: float = Field(default=0.0, ge=0)

    @property
    def files(self) -> tuple[str, ...]:
        """The files whose content is part of the limit; read them with `Heads.examples`, which checks the content."""
        return ()

    @property
    def peers(self) -> tuple[str, ...]:
        """The folders of other runs whose models are part of the limit; load them with `Heads.peer`."""
        return ()

    @property
    def longest(self) -> float:
        """The largest Euclidean norm of an environment action that the rail permits; infinite if it sets none."""
        return math.inf

    @property
    def largest_change(self) -> float:
        """The largest norm of the change between consecutive environment actions; infinite if the rail sets none."""
        return math.inf

    def forbids(self, action: Sequence[float]) -> bool:
        """Whether the rail forbids an environment action in every situation."""
        return math.hypot(*action) > self.longest * (1 + 1e-6)

    @abstractmethod
    def reads(self, title: str, heads: Heads) -> tuple[Any, ...]:
        """Return the arguments of `violation` after the rollouts, such as probes.

        Raises:
            ConfigError: the run lacks one of these inputs, or one has the wrong size; the message contains `title`.
        """

    @abstractmethod
    def violation(self, rollouts: Rollouts, *reads: Any) -> Float[Tensor, "B S T"]:
        """Return the violation of the limit at each predicted step, without margin."""

    def true(self, quantities: Mapping[str, Float[Tensor, "R _"]]) -> Float[Tensor, "R"] | None:
        """Return the violation computed from measured quantities, or None if these do not determine the violation."""
        return None

    @abstractmethod
    def _tightens(self, other: Any) -> bool:
        """Whether satisfying this rail implies satisfying `other`, of the same class; margins are not compared."""

    def tightens(self, other: "Rail") -> bool:
        """Whether satisfying this rail with its margin implies satisfying the other with its own; false if unknown."""
        return type(self) is type(other) and self.margin >= other.margin and self._tightens(other)

    def bind(self, title: str, owner: str, heads: Heads) -> "BoundRail":
        """Return the guardrail, bound to a title, an owner and the heads of a model.

        Raises:
            ConfigError: see `reads`.
        """
        return self.over(title, *self.reads(title, heads), owner=owner)

    def over(self, title: str, *reads: Any, owner: str = "") -> "BoundRail":
        """Return the guardrail, with `reads` as the arguments of `violation` after the rollouts."""
        return BoundRail(name=title, owner=owner, rail=self, reads=reads, margin=self.margin)


@dataclass(frozen=True, kw_only=True)
class BoundRail(Guardrail):
    """A rail bound to a title, an owner, the arguments of its `violation`, and a margin.

    `margin` is one number for all predicted steps, or a tensor (T,) whose last value applies to all later steps.
    """

    name: str
    owner: str
    rail: Rail
    reads: tuple[Any, ...]
    margin: float | Float[Tensor, "_"]

    @property
    def of_actions(self) -> bool:
        """Whether the guardrail depends only on actions."""
        return self.rail.of_actions

    def violation(self, rollouts: Rollouts) -> Float[Tensor, "B S T"]:
        """Return the violation at each predicted step, with the margin added."""
        raw = self.rail.violation(rollouts, *self.reads)
        if isinstance(self.margin, Tensor):
            return raw + self.margins(raw.shape[-1]).to(raw)
        return raw + self.margin if self.margin else raw

    def margins(self, steps: int) -> Float[Tensor, "_"]:
        """Return the margins of the first `steps` predicted steps."""
        if not isinstance(self.margin, Tensor):
            return torch.full((steps,), self.margin)
        return self.margin[torch.arange(steps, device=self.margin.device).clamp_max(len(self.margin) - 1)]

    def with_margin(self, margin: float | Float[Tensor, "_"]) -> "BoundRail":
        """Return the same guardrail with a different margin."""
        return replace(self, margin=margin)

    def stated(self) -> "BoundRail":
        """Return the same guardrail with only the margin that its owner stated."""
        return self.with_margin(self.rail.margin)

    def stretched(self, times: float) -> "BoundRail":
        """Return the same guardrail with its margin multiplied by `times`."""
        return replace(self, margin=self.margin * times)


GUARDRAILS: Registry[type[Rail]] = Registry("guardrail")
RailField = Annotated[SerializeAsAny[Rail], BeforeValidator(component_of(GUARDRAILS))]


class _Regional(Rail):
    """A region that limits a probed quantity; the violation is `sign` times the depth inside the region."""

    sign: ClassVar[int]

    quantity: str
    region: RegionField

    def reads(self, title: str, heads: Heads) -> tuple[Probe]:
        """Return the quantity's probe."""
        return (probe_of(heads, title, self.quantity, self.region.size),)

    def violation(self, rollouts: Rollouts, probe: Probe) -> Float[Tensor, "B S T"]:
        """Return the largest violation along each block."""
        return _known((self.sign * self.region.depth(_way(probe, rollouts))).amax(dim=-1), probe, rollouts)

    def true(self, quantities: Mapping[str, Float[Tensor, "R _"]]) -> Float[Tensor, "R"] | None:
        """Return the violation computed from the measured quantity."""
        return self.sign * self.region.depth(quantities[self.quantity]) if self.quantity in quantities else None


@GUARDRAILS.register("keep-out")
class KeepOut(_Regional):
    """A probed quantity stays out of a region; the violation is the depth inside the region."""

    sign: ClassVar[int] = 1

    name: Literal["keep-out"] = "keep-out"

    def _tightens(self, other: Any) -> bool:
        return bool(self.quantity == other.quantity and other.region.within(self.region))


@GUARDRAILS.register("keep-in")
class KeepIn(_Regional):
    """A probed quantity stays in a region; the violation is the distance outside the region."""

    sign: ClassVar[int] = -1

    name: Literal["keep-in"] = "keep-in"

    def _tightens(self, other: Any) -> bool:
        return self.quantity == other.quantity and self.region.within(other.region)


@GUARDRAILS.register("keep-away")
class KeepAway(Rail):
    """Two probed quantities, such as the positions of the agent and a person, stay a distance apart."""

    name: Literal["keep-away"] = "keep-away"
    quantity: str
    other: str
    distance: float = Field(gt=0)

    def reads(self, title: str, heads: Heads) -> tuple[Probe, Probe]:
        """Return the probes of both quantities."""
        probe = probe_of(heads, title, self.quantity)
        return probe, probe_of(heads, title, self.other, probe.size)

    def violation(self, rollouts: Rollouts, probe: Probe, other: Probe) -> Float[Tensor, "B S T"]:
        """Return, for each block, by how much the smallest distance falls below `distance`."""
        apart = (_way(probe, rollouts) - _way(other, rollouts)).norm(dim=-1).amin(dim=-1)
        return _known(_known(self.distance - apart, probe, rollouts), other, rollouts)

    def true(self, quantities: Mapping[str, Float[Tensor, "R _"]]) -> Float[Tensor, "R"] | None:
        """Return by how much the distance between the two quantities falls below `distance`."""
        if not {self.quantity, self.other} <= set(quantities):
            return None
        apart: Tensor = (quantities[self.quantity] - quantities[self.other]).norm(dim=-1)
        return self.distance - apart

    def _tightens(self, other: Any) -> bool:
        same = {self.quantity, self.other} == {other.quantity, other.other}
        return bool(same and self.distance >= other.distance)


@GUARDRAILS.register("unlike")
class Unlike(Rail):
    """Each predicted state is more than `distance` step lengths away from the latents of each of the `pictures`."""

    name: Literal["unlike"] = "unlike"
    pictures: tuple[str, ...] = Field(min_length=1)
    distance: float = Field(gt=0)

    @property
    def files(self) -> tuple[str, ...]:
        """The pictures."""
        return self.pictures

    def reads(self, title: str, heads: Heads) -> tuple[Float[Tensor, "N D"], float]:
        """Return the latents of the pictures, and the step length."""
        return heads.examples(self.pictures), heads.geometry.step_length

    def violation(
        self, rollouts: Rollouts, examples: Float[Tensor, "N D"], step_length: float
    ) -> Float[Tensor, "B S T"]:
        """Return by how many step lengths the distance to the nearest picture falls below `distance`."""
        return self.distance - nearest_gap(rollouts.latents, examples) / step_length

    def _tightens(self, other: Any) -> bool:
        return set(self.pictures) >= set(other.pictures) and bool(self.distance >= other.distance)


@GUARDRAILS.register("familiar")
class Familiar(Rail):
    """Predicted states stay near the data.

    The gap of a latent is its distance to the nearest reference latent. The gap of each predicted latent is at most
    `times` x g, where g is the 99th percentile of the gaps of data that are not references.
    """

    name: Literal["familiar"] = "familiar"
    times: float = Field(default=1.5, gt=0)

    def reads(self, title: str, heads: Heads) -> tuple[Float[Tensor, "N D"], float, float]:
        """Return the reference latents, the largest allowed gap as a multiple of the step length, and that length."""
        support, step_length = heads.support, heads.geometry.step_length
        return support.references, self.times * float(support.known) / step_length, step_length

    def violation(
        self, rollouts: Rollouts, data: Float[Tensor, "N D"], distance: float, step_length: float
    ) -> Float[Tensor, "B S T"]:
        """Return by how many step lengths the gap of each predicted latent exceeds the allowed gap."""
        return nearest_gap(rollouts.latents, data) / step_length - distance

    def _tightens(self, other: Any) -> bool:
        return bool(self.times <= other.times)


@GUARDRAILS.register("agreed")
class Agreed(Rail):
    """Predictions differ by at most `spread` step lengths from the predictions of the separately trained `runs`."""

    name: Literal["agreed"] = "agreed"
    runs: tuple[str, ...] = Field(min_length=1)
    spread: float = Field(gt=0)

    @property
    def peers(self) -> tuple[str, ...]:
        """The runs."""
        return self.runs

    def reads(self, title: str, heads: Heads) -> tuple[float, tuple[WorldModel, ...]]:
        """Return the step length, and the models of the runs."""
        return heads.geometry.step_length, tuple(heads.peer(run) for run in self.runs)

    def violation(self, rollouts: Rollouts, step_length: float, models: Sequence[WorldModel]) -> Float[Tensor, "B S T"]:
        """Return by how many step lengths the largest difference between predictions exceeds `spread`."""
        gaps = [(model.rollout(rollouts.context, rollouts.actions) - rollouts.latents).norm(dim=-1) for model in models]
        worst: Tensor = torch.stack(gaps).amax(dim=0) / step_length
        return worst - self.spread

    def _tightens(self, other: Any) -> bool:
        return set(self.runs) >= set(other.runs) and bool(self.spread <= other.spread)


@GUARDRAILS.register("returnable")
class Returnable(Rail):
    """Actions stay reversible: the way back from every predicted state to the current one is at most `steps` long."""

    name: Literal["returnable"] = "returnable"
    steps: float = Field(gt=0)

    def reads(self, title: str, heads: Heads) -> tuple[Metric]:
        """Return the learned temporal distance."""
        return (heads.distance,)

    def violation(self, rollouts: Rollouts, back: Metric) -> Float[Tensor, "B S T"]:
        """Return by how many steps the learned temporal distance of the way back exceeds `steps`."""
        return back(rollouts.latents, rollouts.context.latents[:, None, -1:]) - self.steps

    def _tightens(self, other: Any) -> bool:
        return bool(self.steps <= other.steps)


class _OfActions(Rail):
    """A limit on the Euclidean norm of environment actions or of their changes."""

    of_actions: ClassVar[bool] = True

    limit: float = Field(gt=0)

    def reads(self, title: str, heads: Heads) -> tuple[int]:
        """Return the number of values of an environment action."""
        return (heads.model.spec.action.size,)

    def _tightens(self, other: Any) -> bool:
        return bool(self.limit <= other.limit)


@GUARDRAILS.register("magnitude")
class Magnitude(_OfActions):
    """The Euclidean norm of every environment action is at most `limit`."""

    name: Literal["magnitude"] = "magnitude"

    @property
    def longest(self) -> float:
        """The limit, less the margin."""
        return max(self.limit - self.margin, 0.0)

    def violation(self, rollouts: Rollouts, size: int) -> Float[Tensor, "B S T"]:
        """Return by how much the largest action norm in each block exceeds the limit."""
        longest: Tensor = torch.linalg.vector_norm(_actions(rollouts, size), dim=-1).amax(dim=-1)
        return longest - self.limit


@GUARDRAILS.register("rate")
class Rate(_OfActions):
    """Consecutive environment actions differ by at most `limit` in the Euclidean norm.

    The first action of a plan is compared with the last executed action, if the context contains it.
    """

    name: Literal["rate"] = "rate"

    @property
    def largest_change(self) -> float:
        """The limit, less the margin."""
        return max(self.limit - self.margin, 0.0)

    def violation(self, rollouts: Rollouts, size: int) -> Float[Tensor, "B S T"]:
        """Return by how much the largest action change in each block exceeds the limit.

        This includes the change from the last action before a block to the first action of the block.
        """
        actions = _actions(rollouts, size)
        line = actions.flatten(2, 3)
        taken = rollouts.context.taken
        before = line[:, :, :1] if taken is None else taken[:, None, None].to(line).expand_as(line[:, :, :1])
        change: Tensor = torch.linalg.vector_norm(line - torch.cat([before, line[:, :, :-1]], dim=2), dim=-1)
        return change.view(actions.shape[:4]).amax(dim=-1) - self.limit


class Custom(Rail):
    """Any limit in Python: a function of rollouts that returns violations.

    The function returns one violation per predicted step, of shape (B, S, T), or one per plan, of shape (B, S).

    It receives copies of the rollouts, and may change the copies in place.
    """

    name: Literal["custom"] = "custom"
    function: Callable[[Rollouts], Tensor]

    def reads(self, title: str, heads: Heads) -> tuple[()]:
        """Return no arguments: the function receives only the rollouts."""
        return ()

    def violation(self, rollouts: Rollouts) -> Float[Tensor, "B S T"]:
        """Return the function's violations; a violation of shape (B, S) counts at the last step."""
        found = self.function(replace(rollouts, actions=rollouts.actions.clone(), latents=rollouts.latents.clone()))
        shape = rollouts.latents.shape[:3]
        if found.ndim == 2:
            whole = torch.full_like(rollouts.latents[..., 0], -torch.inf)
            whole[..., -1] = found
            return whole
        if found.shape != shape:
            raise PlanningError(
                f"expected violations of shape {tuple(shape)} or {tuple(shape[:2])} from a custom guardrail; got "
                f"{tuple(found.shape)}. Return one of these shapes"
            )
        return found

    def _tightens(self, other: Any) -> bool:
        return self.function is other.function


def probe_of(heads: Heads, title: str, quantity: str, size: int | None = None) -> Probe:
    """Return the probe of a quantity, for the rule with this title.

    Raises:
        ConfigError: the run has no such probe, or the probe does not have `size` values.
    """
    if quantity not in heads.probes:
        raise ConfigError(
            f"{title!r} uses {quantity!r}, but the run has no probe of that name; {nearest(quantity, heads.probes)}. "
            f"Correct the name, or add the probe to the recipe and resume training in the same folder"
        )
    probe = heads.probes[quantity]
    if size is not None and probe.size != size:
        raise ConfigError(
            f"{title!r} uses {quantity!r} with {size} values, but the run's probe has {probe.size}. Write the "
            f"rule for {probe.size} values"
        )
    return probe


def _way(probe: Probe, rollouts: Rollouts) -> Float[Tensor, "B S T P L"]:
    """Return the quantity at P places along each block by linear interpolation; the last place is the block's end."""
    latents = rollouts.latents
    now = rollouts.context.latents[:, None, -1:].to(latents).expand(-1, latents.shape[1], -1, -1)
    values = probe(torch.cat([now, latents], dim=2))
    return torch.lerp(values[:, :, :-1, None], values[:, :, 1:, None], _shares(_BETWEEN, values.device))


def _known(violation: Float[Tensor, "B S T"], probe: Probe, rollouts: Rollouts) -> Float[Tensor, "B S T"]:
    """Return the violation, raised above 0 for each latent that is unlike the data of the probe (its `support`).

    The gap of a latent is its distance to these data, in units of `Support.known`. Where the gap exceeds 1, the
    violation is at least the excess. A gap that is NaN gives NaN, which counts as broken.
    """
    excess = probe.support.gap(rollouts.latents) - 1
    return torch.where(excess <= 0, violation, torch.maximum(violation, excess))


@functools.cache
def _shares(count: int, device: torch.device) -> Float[Tensor, "_ 1"]:
    """Return the fractions 1 / `count`, 2 / `count`, ..., 1."""
    with torch.inference_mode(False):  # the cached tensor is used outside inference mode too, by gradient solvers
        return torch.arange(1, count + 1, device=device)[:, None] / count


def _actions(rollouts: Rollouts, size: int) -> Float[Tensor, "B S T block _"]:
    """Return the environment actions of each block."""
    actions: Tensor = rollouts.actions.unflatten(-1, (-1, size))
    return actions
