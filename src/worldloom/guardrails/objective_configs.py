"""Objectives as data: the costs in a rule set, and the objective they define for a model and a goal."""

from abc import abstractmethod
from collections.abc import Mapping
from typing import Annotated, Literal

from jaxtyping import Float
from pydantic import BeforeValidator, Field, SerializeAsAny
from torch import Tensor

from worldloom import planning
from worldloom.core.config import Component, component_of
from worldloom.core.errors import ConfigError
from worldloom.core.registry import Registry
from worldloom.core.seams import Objective, Stage
from worldloom.guardrails.rails import Rail, RailField, probe_of
from worldloom.guardrails.regions import RegionField
from worldloom.heads import Heads


class ObjectiveConfig(Component):
    """A cost as written in a rule file. To add a kind, register a subclass with `build` in `OBJECTIVES`."""

    weight: float = Field(default=1.0, gt=0)

    @property
    def components(self) -> tuple["Rail | ObjectiveConfig", ...]:
        """The guardrails and objectives inside this one."""
        return ()

    @property
    def files(self) -> tuple[str, ...]:
        """The files whose content is part of the objective; see `Rail.files`."""
        return tuple(file for component in self.components for file in component.files)

    @property
    def peers(self) -> tuple[str, ...]:
        """The folders of other runs whose models are part of the objective; see `Rail.peers`."""
        return tuple(run for component in self.components for run in component.peers)

    @abstractmethod
    def build(self, title: str, heads: Heads, goal: Float[Tensor, "B D"]) -> Objective:
        """Return the objective, without its weight, for the model of `heads`; `goal` contains the agent's goal latents.

        Raises:
            ConfigError: the run lacks a head that the objective needs, or the head has the wrong size.
        """


OBJECTIVES: Registry[type[ObjectiveConfig]] = Registry("objective")
ObjectiveField = Annotated[SerializeAsAny[ObjectiveConfig], BeforeValidator(component_of(OBJECTIVES))]


@OBJECTIVES.register("goal")
class GoalConfig(ObjectiveConfig):
    """Reach the agent's goal to within `within` step lengths."""

    name: Literal["goal"] = "goal"
    within: float = Field(default=0.0, ge=0)
    last_weight: float = Field(default=1.0, ge=0)

    def build(self, title: str, heads: Heads, goal: Float[Tensor, "B D"]) -> planning.GoalObjective:
        """Return the cost for a model."""
        metric = planning.LatentL2(heads.geometry.step_length)
        return planning.GoalObjective(metric, goal, last_weight=self.last_weight, within=self.within)


@OBJECTIVES.register("vector")
class VectorConfig(ObjectiveConfig):
    """A probed quantity comes within `within` of a target."""

    name: Literal["vector"] = "vector"
    quantity: str
    target: tuple[float, ...] = Field(min_length=1)
    within: float = Field(default=0.0, ge=0)

    def build(self, title: str, heads: Heads, goal: Float[Tensor, "B D"]) -> planning.VectorGoal:
        """Return the cost for a model."""
        probe = probe_of(heads, title, self.quantity, len(self.target))
        return planning.VectorGoal(quantity=probe, target=goal.new_tensor(self.target), within=self.within)


@OBJECTIVES.register("region")
class RegionGoalConfig(ObjectiveConfig):
    """A probed quantity enters a region."""

    name: Literal["region"] = "region"
    quantity: str
    region: RegionField

    def build(self, title: str, heads: Heads, goal: Float[Tensor, "B D"]) -> planning.RegionGoal:
        """Return the cost for a model."""
        probe = probe_of(heads, title, self.quantity, self.region.size)
        return planning.RegionGoal(quantity=probe, region=self.region)


@OBJECTIVES.register("sequence")
class SequenceConfig(ObjectiveConfig):
    """Reach several stages in order; each stage is a `goal`, a `vector` or a `region`."""

    name: Literal["sequence"] = "sequence"
    stages: tuple[ObjectiveField, ...] = Field(min_length=1)

    @property
    def components(self) -> tuple[Rail | ObjectiveConfig, ...]:
        """The stages."""
        return self.stages

    def build(self, title: str, heads: Heads, goal: Float[Tensor, "B D"]) -> planning.InOrder:
        """Return the cost for a model."""
        return planning.InOrder(
            [_stage(stage, f"{title}, stage {n}", heads, goal) for n, stage in enumerate(self.stages)]
        )


@OBJECTIVES.register("avoid")
class AvoidConfig(ObjectiveConfig):
    """Avoid breaking a guardrail: each step costs its violation, up to the step where the stage `until` is reached."""

    name: Literal["avoid"] = "avoid"
    rail: RailField
    until: ObjectiveField | None = None

    @property
    def components(self) -> tuple[Rail | ObjectiveConfig, ...]:
        """The guardrail and the stage."""
        return (self.rail,) if self.until is None else (self.rail, self.until)

    def build(self, title: str, heads: Heads, goal: Float[Tensor, "B D"]) -> planning.Avoid:
        """Return the cost for a model."""
        until = None if self.until is None else _stage(self.until, f"{title}, until", heads, goal)
        return planning.Avoid(rail=self.rail.bind(title, "", heads), until=until)


@OBJECTIVES.register("effort")
class EffortConfig(ObjectiveConfig):
    """The mean square of all actions."""

    name: Literal["effort"] = "effort"

    def build(self, title: str, heads: Heads, goal: Float[Tensor, "B D"]) -> planning.Effort:
        """Return the cost for a model."""
        return planning.Effort()


@OBJECTIVES.register("smoothness")
class SmoothnessConfig(ObjectiveConfig):
    """The mean squared change of the actions from one environment step to the next."""

    name: Literal["smoothness"] = "smoothness"

    def build(self, title: str, heads: Heads, goal: Float[Tensor, "B D"]) -> planning.Smoothness:
        """Return the cost for a model."""
        return planning.Smoothness(size=heads.model.spec.action.size)


@OBJECTIVES.register("time")
class TimeConfig(ObjectiveConfig):
    """The fraction of the plan's steps before a stage is reached."""

    name: Literal["time"] = "time"
    until: ObjectiveField

    @property
    def components(self) -> tuple[Rail | ObjectiveConfig, ...]:
        """The stage."""
        return (self.until,)

    def build(self, title: str, heads: Heads, goal: Float[Tensor, "B D"]) -> planning.Elapsed:
        """Return the cost for a model."""
        return planning.Elapsed(stage=_stage(self.until, f"{title}, until", heads, goal))


@OBJECTIVES.register("information")
class InformationConfig(ObjectiveConfig):
    """Seek states where the separately trained models of `runs` disagree."""

    name: Literal["information"] = "information"
    runs: tuple[str, ...] = Field(min_length=1)

    @property
    def peers(self) -> tuple[str, ...]:
        """The runs."""
        return self.runs

    def build(self, title: str, heads: Heads, goal: Float[Tensor, "B D"]) -> planning.InformationGain:
        """Return the cost for a model."""
        models = tuple(heads.peer(run) for run in self.runs)
        return planning.InformationGain(models=models, step_length=heads.geometry.step_length)


def build_objective(
    configs: Mapping[str, ObjectiveConfig], heads: Heads, goal: Float[Tensor, "B D"], usual: Objective
) -> Objective:
    """Return the weighted sum of objectives; if none of them defines what to reach, `usual` is added.

    Raises:
        ConfigError: the run lacks a head that an objective needs, or the head has the wrong size.
    """
    parts = [(config.weight, config.build(title, heads, goal)) for title, config in configs.items()]
    if not any(part.aims for _, part in parts):
        parts.insert(0, (1.0, usual))
    return usual if len(parts) == 1 and parts[0][1] is usual else planning.WeightedSum(parts)


def _stage(config: ObjectiveConfig, title: str, heads: Heads, goal: Float[Tensor, "B D"]) -> Stage:
    stage = config.build(title, heads, goal)
    if not isinstance(stage, Stage):
        raise ConfigError(
            f"{title!r}: the objective {config.name!r} cannot be a stage; use 'goal', 'vector' or 'region'"
        )
    return stage
