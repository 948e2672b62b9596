"""The methods of an evaluation: what acts, built from what a run has learned."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Literal

from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from worldloom.agents.behaviour_cloning import BehaviourCloningAgent, CloningPolicy
from worldloom.agents.guides.curiosity import CuriosityConfig, ExploringAgent, LandmarkAgent
from worldloom.agents.guides.hierarchy import HierarchyConfig, HierarchyGuide
from worldloom.agents.guides.landmarks import FollowConfig, LandmarkGuide, arrival_check
from worldloom.agents.mpc import Auditor, PlanningAgent
from worldloom.agents.random import RandomAgent
from worldloom.agents.reactive import PolicyProposer, ReactiveAgent, ReactivePolicy
from worldloom.agents.remembering import Rememberer, recall_landmarks
from worldloom.core.chain import canonical
from worldloom.core.config import Component
from worldloom.core.errors import ConfigError
from worldloom.core.registry import Registry
from worldloom.core.seams import Agent, Metric, Objective
from worldloom.guardrails import BoundRail, Margins, Recalibration, RuleSet
from worldloom.heads import CoarseModel, LatentGeometry, Probe, Support, TemporalDistance
from worldloom.memory import EpisodicMemory, LandmarkConfig, LandmarkGraph
from worldloom.models import JEPA
from worldloom.planning import Avoid, GoalObjective, LatentL2, Planner, WeightedSum
from worldloom.planning.solvers import CEM, Solver, SolverField, TreeSearch


class Learned(ABC):
    """What a finished run offers."""

    @property
    @abstractmethod
    def model(self) -> JEPA:
        """The world model."""

    @property
    @abstractmethod
    def geometry(self) -> LatentGeometry:
        """Step length, inverse dynamics and reversibility."""

    @property
    @abstractmethod
    def distance(self) -> TemporalDistance:
        """The learned temporal distance."""

    @property
    @abstractmethod
    def hierarchy(self) -> Sequence[tuple[CoarseModel, LatentGeometry]]:
        """The coarser models, each of the one before it; there may be none."""

    @property
    @abstractmethod
    def probes(self) -> Mapping[str, Probe]:
        """Probes of named quantities; there may be none."""

    @property
    @abstractmethod
    def reactive(self) -> ReactivePolicy:
        """The reactive policy."""

    @property
    @abstractmethod
    def cloning(self) -> CloningPolicy:
        """The policy cloned from the same data."""

    @property
    @abstractmethod
    def support(self) -> Support:
        """The latents of the data."""

    @abstractmethod
    def examples(self, names: Sequence[str]) -> Float[Tensor, "N D"]:
        """Return the latents of pictures, by their paths."""

    @abstractmethod
    def peer(self, name: str) -> JEPA:
        """Return the model of another run, by its path."""

    @property
    def memory(self) -> EpisodicMemory | None:
        """The memory that its agents write and recall; without one they forget when they end."""
        return None

    @property
    def rules(self) -> RuleSet | None:
        """What its agents keep: guardrails, objectives and a fallback; without one they keep none."""
        return None

    def margins(self, method: "MethodConfig") -> Margins | None:
        """Return the margins that were calibrated for its rule set and a method, if any were."""
        return None

    def auditor(self, method: "MethodConfig", guardrails: Sequence[BoundRail]) -> Auditor | None:
        """Return what writes down the decisions of an agent of a method; without one nobody does."""
        return None


class MethodConfig(Component):
    """One way to act; a new one is a subclass with `build`, registered in `METHODS`."""

    @property
    def guarded(self) -> bool:
        """Whether its agents keep the guardrails of a rule set."""
        return False

    @abstractmethod
    def build(self, learned: Learned, *, seed: int) -> Agent:
        """Build the agent."""


Guard = Literal["calibrated", "per candidate", "uncalibrated", "penalty", "none"]

METHODS: Registry[type[MethodConfig]] = Registry("method")


@METHODS.register("random")
class RandomMethod(MethodConfig):
    """A random walk."""

    name: Literal["random"] = "random"

    def build(self, learned: Learned, *, seed: int) -> Agent:
        """Build the agent."""
        return RandomAgent(learned.model.spec.action, seed=seed)


@METHODS.register("behaviour-cloning")
class CloningMethod(MethodConfig):
    """Goal-conditioned imitation of the same data, from observations, with an encoder of its own."""

    name: Literal["behaviour-cloning"] = "behaviour-cloning"

    def build(self, learned: Learned, *, seed: int) -> Agent:
        """Build the agent."""
        return BehaviourCloningAgent(learned.cloning)


@METHODS.register("reactive")
class ReactiveMethod(MethodConfig):
    """The reactive policy alone (mode 1)."""

    name: Literal["reactive"] = "reactive"

    def build(self, learned: Learned, *, seed: int) -> Agent:
        """Build the agent."""
        return ReactiveAgent(learned.model, learned.reactive)


class PlannedMethod(MethodConfig):
    """A method that plans, and so guarding the guardrails of a rule set: `solver` searches `horizon` blocks ahead.

    With `noise` a plan has to hold as well as predicted from states around the present one, so many typical model steps
    away (see `Planner`). At a rate `recalibrate`, calibrated margins stretch while predictions err more than they did
    (see `Recalibration`).
    """

    solver: SolverField = CEM()
    horizon: int = Field(default=6, ge=1)
    noise: float = Field(default=0.0, ge=0)
    recalibrate: float = Field(default=0.0, ge=0)

    @property
    def guarding(self) -> Guard:
        """How the guardrails of a rule set are kept."""
        return "calibrated"

    @property
    def guarded(self) -> bool:
        """Whether its agents keep the guardrails of a rule set."""
        return self.guarding == "calibrated"

    @property
    def calibrated_as(self) -> str:
        """What margins are calibrated for: all but how they stretch later."""
        return canonical(self.model_dump(mode="json", exclude={"recalibrate"}))

    def rails(self, learned: Learned) -> tuple[BoundRail, ...]:
        """Return the guardrails of the rule set as they are kept.

        Raises:
            ConfigError: the rule set states a risk, and no margins were calibrated for this method.
        """
        rules = learned.rules
        if rules is None or self.guarding == "none":
            return ()
        if self.guarding in ("uncalibrated", "penalty") or rules.risk is None or not rules.titles:
            return rules.rails(learned)
        margins = learned.margins(self)
        if margins is None:
            raise ConfigError(
                f"the rule set states a risk of {rules.risk:g}, and there are no margins for it and this method: "
                f"calibrate first (worldloom calibrate), or state no risk"
            )
        return rules.rails(learned, margins.values)

    def planner(self, learned: Learned, rails: Sequence[BoundRail], solver: Solver | None = None) -> Planner:
        """Return the planner of the fast model, which guarding these guardrails."""
        geometry = learned.geometry
        return Planner(
            learned.model,
            solver or self.solver,
            horizon=self.horizon,
            geometry=geometry,
            guardrails=rails,
            noise=self.noise * geometry.step_length / math.sqrt(learned.model.spec.latent_dim),
        )

    def recalibration(self, learned: Learned, rails: tuple[BoundRail, ...]) -> Recalibration | None:
        """Return what stretches the margins, where that is asked for."""
        margins = learned.margins(self) if self.recalibrate and self.guarding == "calibrated" else None
        if margins is None:
            return None
        return Recalibration(rails, usual=margins.usual, risk=margins.risk, model=learned.model, rate=self.recalibrate)


def minded(learned: Learned, goal: Float[Tensor, "B D"], plain: Objective) -> Objective:
    """Return what the rule set makes of an objective."""
    return plain if learned.rules is None else learned.rules.objective(learned, goal, plain)


@METHODS.register("plan")
class PlanMethod(PlannedMethod):
    """Model predictive control.

    `metric` is latent L2 or the learned temporal distance; `replan` counts environment steps, 0 for one block;
    `propose` lets the search start from the reactive policy's plan as well (mode 2). `guard` says how the guardrails of
    a rule set are applied: as limits with the margins that were calibrated for the chosen plans; or, as baselines, with
    per-candidate margins, without margins, as a cost of `penalty` times the violation, or not at all.
    """

    name: Literal["plan"] = "plan"
    metric: Literal["latent", "distance"] = "latent"
    last_weight: float = Field(default=1.0, ge=0)
    replan: int = Field(default=0, ge=0)
    propose: bool = False
    guard: Guard = "calibrated"
    penalty: float = Field(default=10.0, gt=0)

    @property
    def guarding(self) -> Guard:
        """How the guardrails of a rule set are kept."""
        return self.guard

    def build(self, learned: Learned, *, seed: int) -> Agent:
        """Build the agent; see `rails` for what is refused."""
        model = learned.model
        metric: Metric = LatentL2(learned.geometry.step_length) if self.metric == "latent" else learned.distance
        rails = self.rails(learned)
        costs = rails if self.guard == "penalty" else ()

        def toward(goal: Float[Tensor, "B D"]) -> Objective:
            return GoalObjective(metric, goal, last_weight=self.last_weight)

        def objective(goal: Float[Tensor, "B D"]) -> Objective:
            whole = minded(learned, goal, toward(goal))
            parts = [(self.penalty, Avoid(rail=rail)) for rail in costs]
            return WeightedSum([(1.0, whole), *parts]) if parts else whole

        return PlanningAgent(
            model,
            self.planner(learned, () if costs else rails),
            objective,
            replan=self.replan or model.spec.block,
            proposer=PolicyProposer(model=model, policy=learned.reactive) if self.propose else None,
            fallback=None if learned.rules is None else learned.rules.fallback,
            toward=toward,
            auditor=learned.auditor(self, rails),
            recalibration=self.recalibration(learned, rails),
            seed=seed,
        )


@METHODS.register("hierarchy")
class HierarchyMethod(PlannedMethod):
    """Model predictive control toward subgoals of coarser models, for far goals; see `HierarchyGuide`.

    `solver` plans `horizon` blocks for the fast model, `coarse_solver` plans `coarse_horizon` steps for each other.
    """

    name: Literal["hierarchy"] = "hierarchy"
    coarse_solver: SolverField = TreeSearch(branches=256)
    coarse_horizon: int = Field(default=12, ge=1)
    follow: HierarchyConfig = HierarchyConfig()

    def build(self, learned: Learned, *, seed: int) -> Agent:
        """Build the agent.

        Raises:
            ConfigError: the recipe has no coarser models; see `rails` for more.
        """
        rails, metric = self.rails(learned), LatentL2(learned.geometry.step_length)
        return PlanningAgent(
            learned.model,
            self.planner(learned, rails),
            lambda goal: minded(learned, goal, GoalObjective(metric, goal)),
            replan=learned.model.spec.block,
            guide=self.guide(learned, seed=seed),
            fallback=None if learned.rules is None else learned.rules.fallback,
            toward=lambda state: GoalObjective(metric, state),
            auditor=learned.auditor(self, rails),
            recalibration=self.recalibration(learned, rails),
            seed=seed,
        )

    def guide(self, learned: Learned, *, seed: int) -> HierarchyGuide:
        """Build what says where to aim."""
        if not learned.hierarchy:
            raise ConfigError(
                "the method 'hierarchy' needs coarser models and the recipe trains none; give it some, such as "
                'hierarchy=[{"stride": 4}], and train again into the same folder with resume'
            )
        levels, strides = [self.planner(learned, ())], [1]
        for coarse, geometry in learned.hierarchy:
            levels.append(Planner(coarse, self.coarse_solver, horizon=self.coarse_horizon, geometry=geometry))
            strides.append(strides[-1] * coarse.config.stride)
        step = learned.geometry.step_length
        return HierarchyGuide(
            levels,
            strides,
            lambda goal: GoalObjective(LatentL2(step), goal),
            self.follow,
            step_length=step,
            seed=seed,
        )


@METHODS.register("landmarks")
class LandmarkMethod(PlannedMethod):
    """Model predictive control over landmarks of what was seen, for far goals; it explores where it may.

    It explores under the guardrails of the rule set as well, with a solver of its own if `exploring` is given. Where no
    way is known, `beyond` aims, if it is given. The graph lives as long as the agent, or as the memory.
    """

    name: Literal["landmarks"] = "landmarks"
    horizon: int = Field(default=4, ge=1)
    landmarks: LandmarkConfig = LandmarkConfig()
    follow: FollowConfig = FollowConfig()
    curiosity: CuriosityConfig = CuriosityConfig()
    exploring: SolverField | None = None
    beyond: HierarchyMethod | None = None

    def build(self, learned: Learned, *, seed: int) -> Agent:
        """Build the agent, with the landmarks of its memory, or with none."""
        model, geometry, memory = learned.model, learned.geometry, learned.memory
        graph = LandmarkGraph(
            model.spec,
            self.landmarks,
            step_length=geometry.step_length,
            reversible=geometry.reversibility.reversible,
        )
        check, block = arrival_check(model, geometry), model.spec.block
        if memory is not None:
            graph = recall_landmarks(memory, graph, block=block, check=check)
        beyond = None if self.beyond is None else self.beyond.guide(learned, seed=seed)
        guide = LandmarkGuide(graph, self.follow, check=check, beyond=beyond)
        metric, rails = LatentL2(geometry.step_length), self.rails(learned)
        auditor = learned.auditor(self, rails)
        fallback = None if learned.rules is None else learned.rules.fallback
        planning = PlanningAgent(
            model,
            self.planner(learned, rails),
            lambda goal: minded(learned, goal, GoalObjective(metric, goal)),
            replan=block,
            guide=guide,
            observer=None if memory is None else Rememberer(memory, graph, replan=block, events=lambda: guide.events),
            fallback=fallback,
            toward=lambda state: GoalObjective(metric, state),
            auditor=auditor,
            recalibration=self.recalibration(learned, rails),
            seed=seed,
        )
        explorer = ExploringAgent(
            self.planner(learned, rails, self.exploring),
            graph,
            self.curiosity,
            check=check,
            observer=None if memory is None else Rememberer(memory, graph, replan=block),
            fallback=fallback,
            auditor=None if auditor is None else auditor.part("exploring"),
            recalibration=self.recalibration(learned, rails),
            seed=seed,
        )
        return LandmarkAgent(planning, guide, explorer)


def default_methods() -> dict[str, MethodConfig]:
    """Return the baselines and the planners that every table shows."""
    return {
        "random": RandomMethod(),
        "behaviour cloning": CloningMethod(),
        "reactive policy": ReactiveMethod(),
        "CEM, latent L2": PlanMethod(),
        "CEM, learned distance": PlanMethod(metric="distance"),
        "tree search": PlanMethod(solver=TreeSearch(), horizon=24),
    }
