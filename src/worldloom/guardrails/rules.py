"""Guardrails and objectives as data: what a rule set file holds, and what becomes of it beside a model."""

import math
from abc import abstractmethod
from collections.abc import Mapping
from itertools import product
from typing import Annotated, Literal

from jaxtyping import Float
from pydantic import BeforeValidator, Field, SerializeAsAny, model_validator
from torch import Tensor

from worldloom.core.config import Component, component_of
from worldloom.core.errors import ConfigError
from worldloom.core.registry import Registry, nearest
from worldloom.core.seams import Objective, Stage
from worldloom.guardrails.rails import (
    Agreed,
    Ball,
    Box,
    Familiar,
    KeepAway,
    KeepIn,
    KeepOut,
    Magnitude,
    Rail,
    Rate,
    Region,
    Returnable,
    Unlike,
)
from worldloom.heads import Heads, Probe
from worldloom.planning import (
    Avoid,
    Effort,
    Elapsed,
    GoalObjective,
    InformationGain,
    InOrder,
    LatentL2,
    RegionGoal,
    Smoothness,
    VectorGoal,
    WeightedSum,
)


class RegionConfig(Component):
    """A set of points; a new one is a subclass with `build` and `within`, registered in `REGIONS`."""

    @abstractmethod
    def build(self) -> Region:
        """Return the region."""

    @abstractmethod
    def within(self, other: "RegionConfig") -> bool:
        """Whether every point lies in the other region as well; false where that is not known."""

    @property
    @abstractmethod
    def size(self) -> int:
        """How many values a point has."""


REGIONS: Registry[type[RegionConfig]] = Registry("region")
RegionField = Annotated[SerializeAsAny[RegionConfig], BeforeValidator(component_of(REGIONS))]


@REGIONS.register("ball")
class BallConfig(RegionConfig):
    """All points within a radius."""

    name: Literal["ball"] = "ball"
    centre: tuple[float, ...] = Field(min_length=1)
    radius: float = Field(gt=0)

    def build(self) -> Ball:
        """Return the region."""
        return Ball(self.centre, self.radius)

    def within(self, other: RegionConfig) -> bool:
        """Whether every point lies in the other region as well."""
        if other.size != self.size:
            return False
        if isinstance(other, BallConfig):
            return math.dist(self.centre, other.centre) + self.radius <= other.radius
        if isinstance(other, BoxConfig):
            low, high = other.corners
            return all(
                lo <= at - self.radius and at + self.radius <= hi
                for lo, at, hi in zip(low, self.centre, high, strict=True)
            )
        return False

    @property
    def size(self) -> int:
        """How many values a point has."""
        return len(self.centre)


@REGIONS.register("box")
class BoxConfig(RegionConfig):
    """All points between two corners; a side that is null, or a corner that is left out, is open."""

    name: Literal["box"] = "box"
    low: tuple[float | None, ...] = ()
    high: tuple[float | None, ...] = ()

    @model_validator(mode="after")
    def _check(self) -> "BoxConfig":
        if not self.low and not self.high:
            raise ValueError("a box needs a 'low' or a 'high' corner, or both")
        if self.low and self.high and len(self.low) != len(self.high):
            raise ValueError(f"the corners of a box have {len(self.low)} and {len(self.high)} values; expected as many")
        if any(lo >= hi for lo, hi in zip(*self.corners, strict=True)):
            raise ValueError(f"a box needs low < high on each side; got {self.low} and {self.high}")
        return self

    @property
    def corners(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """The corners, infinite where the box is open."""
        low = tuple(-math.inf if side is None else side for side in self.low or (None,) * self.size)
        high = tuple(math.inf if side is None else side for side in self.high or (None,) * self.size)
        return low, high

    def build(self) -> Box:
        """Return the region."""
        return Box(*self.corners)

    def within(self, other: RegionConfig) -> bool:
        """Whether every point lies in the other region as well."""
        if other.size != self.size:
            return False
        low, high = self.corners
        if isinstance(other, BoxConfig):
            other_low, other_high = other.corners
            return all(theirs <= mine for theirs, mine in zip(other_low, low, strict=True)) and all(
                mine <= theirs for theirs, mine in zip(other_high, high, strict=True)
            )
        if isinstance(other, BallConfig):
            corners = product(*zip(low, high, strict=True))
            return all(math.dist(corner, other.centre) <= other.radius for corner in corners)
        return False

    @property
    def size(self) -> int:
        """How many values a point has."""
        return len(self.low or self.high)


class RailConfig(Component):
    """A guardrail as data; a new one is a subclass with `make` and `tightens`, registered in `GUARDRAILS`.

    `reason` is what is said when it refuses a plan; `margin` is kept beside what calibration asks for.
    """

    reason: str = ""
    margin: float = Field(default=0.0, ge=0)

    @abstractmethod
    def make(self, title: str, owner: str, heads: Heads) -> Rail:
        """Return the guardrail beside a model, without margin."""

    @property
    def files(self) -> tuple[str, ...]:
        """The files whose content says what it forbids, and which a signature therefore has to vouch for."""
        return ()

    @abstractmethod
    def _tightens(self, other: "RailConfig") -> bool:
        """Whether all that keeps this keeps the other, of the same kind, margins aside."""

    def tightens(self, other: "RailConfig") -> bool:
        """Whether all that keeps this keeps the other as well; false where that is not known."""
        return type(self) is type(other) and self.margin >= other.margin and self._tightens(other)

    def build(self, title: str, owner: str, heads: Heads) -> Rail:
        """Return the guardrail beside a model.

        Raises:
            ConfigError: it speaks of what the run has not learned, or in other sizes.
        """
        return self.make(title, owner, heads).with_margin(self.margin)


GUARDRAILS: Registry[type[RailConfig]] = Registry("guardrail")
RailField = Annotated[SerializeAsAny[RailConfig], BeforeValidator(component_of(GUARDRAILS))]


def _probe(heads: Heads, title: str, quantity: str, size: int | None = None) -> Probe:
    """Return the probe of a quantity, of so many values."""
    if quantity not in heads.probes:
        raise ConfigError(
            f"{title!r} speaks of {quantity!r}, for which the run has no probe; {nearest(quantity, heads.probes)}. "
            f"Add it to the recipe's probes and train again into the same folder with resume"
        )
    probe = heads.probes[quantity]
    if size is not None and probe.size != size:
        raise ConfigError(f"{title!r} takes {quantity!r} for {size} values; it has {probe.size}")
    return probe


@GUARDRAILS.register("keep-out")
class KeepOutConfig(RailConfig):
    """A probed quantity stays out of a region."""

    name: Literal["keep-out"] = "keep-out"
    quantity: str
    region: RegionField

    def make(self, title: str, owner: str, heads: Heads) -> Rail:
        """Return the guardrail beside a model."""
        probe = _probe(heads, title, self.quantity, self.region.size)
        return KeepOut(
            name=title,
            owner=owner,
            reason=self.reason,
            probe=probe,
            region=self.region.build(),
            quantities=(self.quantity,),
        )

    def _tightens(self, other: RailConfig) -> bool:
        return isinstance(other, KeepOutConfig) and self.quantity == other.quantity and other.region.within(self.region)


@GUARDRAILS.register("keep-in")
class KeepInConfig(RailConfig):
    """A probed quantity stays within a region."""

    name: Literal["keep-in"] = "keep-in"
    quantity: str
    region: RegionField

    def make(self, title: str, owner: str, heads: Heads) -> Rail:
        """Return the guardrail beside a model."""
        probe = _probe(heads, title, self.quantity, self.region.size)
        return KeepIn(
            name=title,
            owner=owner,
            reason=self.reason,
            probe=probe,
            region=self.region.build(),
            quantities=(self.quantity,),
        )

    def _tightens(self, other: RailConfig) -> bool:
        return isinstance(other, KeepInConfig) and self.quantity == other.quantity and self.region.within(other.region)


@GUARDRAILS.register("keep-away")
class KeepAwayConfig(RailConfig):
    """Two probed quantities, such as the agent's place and a person's, stay a distance apart."""

    name: Literal["keep-away"] = "keep-away"
    quantity: str
    other: str
    distance: float = Field(gt=0)

    def make(self, title: str, owner: str, heads: Heads) -> Rail:
        """Return the guardrail beside a model."""
        probe = _probe(heads, title, self.quantity)
        other = _probe(heads, title, self.other, probe.size)
        return KeepAway(
            name=title,
            owner=owner,
            reason=self.reason,
            probe=probe,
            other=other,
            distance=self.distance,
            quantities=(self.quantity, self.other),
        )

    def _tightens(self, other: RailConfig) -> bool:
        return (
            isinstance(other, KeepAwayConfig)
            and {self.quantity, self.other} == {other.quantity, other.other}
            and self.distance >= other.distance
        )


@GUARDRAILS.register("unlike")
class UnlikeConfig(RailConfig):
    """Never like these pictures: farther than `distance` step lengths from each."""

    name: Literal["unlike"] = "unlike"
    pictures: tuple[str, ...] = Field(min_length=1)
    distance: float = Field(gt=0)

    @property
    def files(self) -> tuple[str, ...]:
        """The pictures."""
        return self.pictures

    def make(self, title: str, owner: str, heads: Heads) -> Rail:
        """Return the guardrail beside a model."""
        return Unlike(
            name=title,
            owner=owner,
            reason=self.reason,
            examples=heads.examples(self.pictures),
            distance=self.distance,
            step_length=heads.geometry.step_length,
        )

    def _tightens(self, other: RailConfig) -> bool:
        return (
            isinstance(other, UnlikeConfig)
            and set(self.pictures) >= set(other.pictures)
            and self.distance >= other.distance
        )


@GUARDRAILS.register("familiar")
class FamiliarConfig(RailConfig):
    """Stay where the model knows its way: at most `times` as far from the data as the data are from each other."""

    name: Literal["familiar"] = "familiar"
    times: float = Field(default=1.5, gt=0)

    def make(self, title: str, owner: str, heads: Heads) -> Rail:
        """Return the guardrail beside a model."""
        support, step = heads.support, heads.geometry.step_length
        return Familiar(
            name=title,
            owner=owner,
            reason=self.reason,
            data=support.references,
            distance=self.times * float(support.known) / step,
            step_length=step,
        )

    def _tightens(self, other: RailConfig) -> bool:
        return isinstance(other, FamiliarConfig) and self.times <= other.times


@GUARDRAILS.register("agreed")
class AgreedConfig(RailConfig):
    """Stay where models that were trained apart agree: the runs named predict the same to within `spread` steps."""

    name: Literal["agreed"] = "agreed"
    runs: tuple[str, ...] = Field(min_length=1)
    spread: float = Field(gt=0)

    def make(self, title: str, owner: str, heads: Heads) -> Rail:
        """Return the guardrail beside a model."""
        return Agreed(
            name=title,
            owner=owner,
            reason=self.reason,
            models=tuple(heads.peer(run) for run in self.runs),
            spread=self.spread,
            step_length=heads.geometry.step_length,
        )

    def _tightens(self, other: RailConfig) -> bool:
        return isinstance(other, AgreedConfig) and set(self.runs) >= set(other.runs) and self.spread <= other.spread


@GUARDRAILS.register("returnable")
class ReturnableConfig(RailConfig):
    """What is done can be undone: the way back to where a plan begins takes at most `steps`."""

    name: Literal["returnable"] = "returnable"
    steps: float = Field(gt=0)

    def make(self, title: str, owner: str, heads: Heads) -> Rail:
        """Return the guardrail beside a model."""
        return Returnable(name=title, owner=owner, reason=self.reason, back=heads.distance, steps=self.steps)

    def _tightens(self, other: RailConfig) -> bool:
        return isinstance(other, ReturnableConfig) and self.steps <= other.steps


@GUARDRAILS.register("magnitude")
class MagnitudeConfig(RailConfig):
    """No action is longer than `limit`."""

    name: Literal["magnitude"] = "magnitude"
    limit: float = Field(gt=0)

    def make(self, title: str, owner: str, heads: Heads) -> Rail:
        """Return the guardrail beside a model."""
        size = heads.model.spec.action.size
        return Magnitude(name=title, owner=owner, reason=self.reason, limit=self.limit, size=size)

    def _tightens(self, other: RailConfig) -> bool:
        return isinstance(other, MagnitudeConfig) and self.limit <= other.limit


@GUARDRAILS.register("rate")
class RateConfig(RailConfig):
    """No action differs from the one before by more than `limit`."""

    name: Literal["rate"] = "rate"
    limit: float = Field(gt=0)

    def make(self, title: str, owner: str, heads: Heads) -> Rail:
        """Return the guardrail beside a model."""
        size = heads.model.spec.action.size
        return Rate(name=title, owner=owner, reason=self.reason, limit=self.limit, size=size)

    def _tightens(self, other: RailConfig) -> bool:
        return isinstance(other, RateConfig) and self.limit <= other.limit


class ObjectiveConfig(Component):
    """A cost as data; a new one is a subclass with `build`, registered in `OBJECTIVES`."""

    weight: float = Field(default=1.0, gt=0)

    @property
    def files(self) -> tuple[str, ...]:
        """The files whose content says what it is about; see `RailConfig.files`."""
        return ()

    @abstractmethod
    def build(self, title: str, heads: Heads, goal: Float[Tensor, "B D"]) -> Objective:
        """Return the cost beside a model, without weight; `goal` are the latents of what the agent was told to reach.

        Raises:
            ConfigError: it speaks of what the run has not learned, or in other sizes.
        """


OBJECTIVES: Registry[type[ObjectiveConfig]] = Registry("objective")
ObjectiveField = Annotated[SerializeAsAny[ObjectiveConfig], BeforeValidator(component_of(OBJECTIVES))]


@OBJECTIVES.register("goal")
class GoalConfig(ObjectiveConfig):
    """Reach what the agent was told to reach; nearer than `within` step lengths counts as there."""

    name: Literal["goal"] = "goal"
    within: float = Field(default=0.0, ge=0)
    last_weight: float = Field(default=1.0, ge=0)

    def build(self, title: str, heads: Heads, goal: Float[Tensor, "B D"]) -> GoalObjective:
        """Return the cost beside a model."""
        metric = LatentL2(heads.geometry.step_length)
        return GoalObjective(metric, goal, last_weight=self.last_weight, within=self.within)


@OBJECTIVES.register("vector")
class VectorConfig(ObjectiveConfig):
    """A probed quantity comes within `within` of a target."""

    name: Literal["vector"] = "vector"
    quantity: str
    target: tuple[float, ...] = Field(min_length=1)
    within: float = Field(default=0.0, ge=0)

    def build(self, title: str, heads: Heads, goal: Float[Tensor, "B D"]) -> VectorGoal:
        """Return the cost beside a model."""
        probe = _probe(heads, title, self.quantity, len(self.target))
        return VectorGoal(quantity=probe, target=goal.new_tensor(self.target), within=self.within)


@OBJECTIVES.register("region")
class RegionGoalConfig(ObjectiveConfig):
    """A probed quantity comes into a region."""

    name: Literal["region"] = "region"
    quantity: str
    region: RegionField

    def build(self, title: str, heads: Heads, goal: Float[Tensor, "B D"]) -> RegionGoal:
        """Return the cost beside a model."""
        probe = _probe(heads, title, self.quantity, self.region.size)
        return RegionGoal(quantity=probe, region=self.region.build())


@OBJECTIVES.register("sequence")
class SequenceConfig(ObjectiveConfig):
    """One thing after another: each stage is a `goal`, a `vector` or a `region`."""

    name: Literal["sequence"] = "sequence"
    stages: tuple[ObjectiveField, ...] = Field(min_length=1)

    def build(self, title: str, heads: Heads, goal: Float[Tensor, "B D"]) -> InOrder:
        """Return the cost beside a model."""
        return InOrder([_stage(stage, f"{title}, stage {n}", heads, goal) for n, stage in enumerate(self.stages)])


@OBJECTIVES.register("avoid")
class AvoidConfig(ObjectiveConfig):
    """Rather not: a step that breaks a guardrail costs as much as it breaks it; with `until`, up to there."""

    name: Literal["avoid"] = "avoid"
    rail: RailField
    until: ObjectiveField | None = None

    @property
    def files(self) -> tuple[str, ...]:
        """Those of the guardrail."""
        return self.rail.files

    def build(self, title: str, heads: Heads, goal: Float[Tensor, "B D"]) -> Avoid:
        """Return the cost beside a model."""
        until = None if self.until is None else _stage(self.until, f"{title}, until", heads, goal)
        return Avoid(rail=self.rail.build(title, "", heads), until=until)


@OBJECTIVES.register("effort")
class EffortConfig(ObjectiveConfig):
    """The mean square of all actions."""

    name: Literal["effort"] = "effort"

    def build(self, title: str, heads: Heads, goal: Float[Tensor, "B D"]) -> Effort:
        """Return the cost beside a model."""
        return Effort()


@OBJECTIVES.register("smoothness")
class SmoothnessConfig(ObjectiveConfig):
    """The mean square of how much actions change from one to the next."""

    name: Literal["smoothness"] = "smoothness"

    def build(self, title: str, heads: Heads, goal: Float[Tensor, "B D"]) -> Smoothness:
        """Return the cost beside a model."""
        return Smoothness(size=heads.model.spec.action.size)


@OBJECTIVES.register("time")
class TimeConfig(ObjectiveConfig):
    """The share of the plan that is over before a stage is reached."""

    name: Literal["time"] = "time"
    until: ObjectiveField

    def build(self, title: str, heads: Heads, goal: Float[Tensor, "B D"]) -> Elapsed:
        """Return the cost beside a model."""
        return Elapsed(stage=_stage(self.until, f"{title}, until", heads, goal))


@OBJECTIVES.register("information")
class InformationConfig(ObjectiveConfig):
    """Go where models that were trained apart disagree: those of the runs named."""

    name: Literal["information"] = "information"
    runs: tuple[str, ...] = Field(min_length=1)

    def build(self, title: str, heads: Heads, goal: Float[Tensor, "B D"]) -> InformationGain:
        """Return the cost beside a model."""
        models = tuple(heads.peer(run) for run in self.runs)
        return InformationGain(models=models, step_length=heads.geometry.step_length)


def build_objective(
    configs: Mapping[str, ObjectiveConfig], heads: Heads, goal: Float[Tensor, "B D"], usual: Objective
) -> Objective:
    """Return the weighted sum of objectives, with the `usual` one where none of them says what is to be reached.

    Raises:
        ConfigError: one speaks of what the run has not learned, or in other sizes.
    """
    parts = [(config.weight, config.build(title, heads, goal)) for title, config in configs.items()]
    if not any(isinstance(part, Stage | InOrder) for _, part in parts):
        parts.insert(0, (1.0, usual))
    return usual if len(parts) == 1 and parts[0][1] is usual else WeightedSum(parts)


def _stage(config: ObjectiveConfig, title: str, heads: Heads, goal: Float[Tensor, "B D"]) -> Stage:
    stage = config.build(title, heads, goal)
    if not isinstance(stage, Stage):
        raise ConfigError(f"{title!r}: a {config.name!r} says nothing of being reached; name a goal, vector or region")
    return stage
