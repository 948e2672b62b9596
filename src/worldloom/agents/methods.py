"""Methods: the configurations of agents, and the parts that agents are built from."""

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from worldloom.agents.audit_log import AuditLog
from worldloom.agents.behaviour_cloning import BehaviourCloningAgent, CloningPolicy
from worldloom.agents.goal_inverse import GoalInverse, GoalInverseAgent, GoalInverseProposer
from worldloom.agents.guarded_policy import GuardedPolicy
from worldloom.agents.guides.curiosity import CuriosityConfig, CuriosityGuide
from worldloom.agents.guides.hierarchy import HierarchyConfig, HierarchyGuide
from worldloom.agents.guides.landmarks import FollowConfig, LandmarkGuide
from worldloom.agents.mpc import ExploringAgent, Guide, PlanningAgent, Proposer
from worldloom.agents.random import RandomAgent
from worldloom.agents.reactive import PolicyProposer, ReactiveAgent, ReactivePolicy
from worldloom.agents.remembering import Rememberer, recall_landmarks
from worldloom.core.config import Component
from worldloom.core.errors import ConfigError
from worldloom.core.registry import Registry
from worldloom.core.seams import Agent, Metric, Objective, Policy
from worldloom.core.seeds import torch_generator
from worldloom.core.types import ModelSpec
from worldloom.guardrails import BoundRail, BoundRules, Margins, Recalibration
from worldloom.heads import Heads, predict_arrival
from worldloom.memory import EpisodicMemory, LandmarkConfig, LandmarkGraph
from worldloom.planning import Avoid, GoalObjective, LatentL2, Planner, Unusual, WeightedSum
from worldloom.planning.solvers import CEM, Solver, SolverField, TreeSearch


@dataclass(frozen=True, kw_only=True)
class AgentParts:
    """The parts that an agent is built from.

    Attributes:
        heads: the world model and the heads that were fitted on it.
        rules: the rule set that the agent obeys, bound to the heads.
        margins: margins that replace the margins calibrated for the rules and the method.
        memory: the agent's episodic memory; without a memory, the agent forgets everything when it ends.
        auditor: records each decision.
    """

    heads: Heads
    rules: BoundRules | None = None
    margins: Margins | None = None
    memory: EpisodicMemory | None = None
    auditor: AuditLog | None = None


class MethodConfig(Component):
    """The configuration of one kind of agent. To add a kind, register a subclass with `build` in `METHODS`."""

    @property
    def guarded(self) -> bool:
        """Whether the method's agents obey the guardrails of a rule set."""
        return False

    @abstractmethod
    def build(self, parts: AgentParts, *, seed: int) -> Agent:
        """Build the agent.

        Raises:
            CheckpointError: a head that the agent needs is missing, damaged, or was fitted on another model.
            ConfigError: a setting does not fit the run.
        """


Guard = Literal["calibrated", "per candidate", "uncalibrated", "penalty", "none"]

METHODS: Registry[type[MethodConfig]] = Registry("method")


@METHODS.register("random")
class RandomMethod(MethodConfig):
    """A random walk."""

    name: Literal["random"] = "random"

    def build(self, parts: AgentParts, *, seed: int) -> Agent:
        """Build the agent."""
        return RandomAgent(parts.heads.model.spec.action, seed=seed)


@METHODS.register("behaviour-cloning")
class CloningMethod(MethodConfig):
    """Goal-conditioned imitation of the world model's training data, with a separate encoder."""

    name: Literal["behaviour-cloning"] = "behaviour-cloning"

    def build(self, parts: AgentParts, *, seed: int) -> Agent:
        """Build the agent."""
        heads = parts.heads
        return BehaviourCloningAgent(CloningPolicy.load(heads.stem("cloning"), heads.model))


@METHODS.register("reactive")
class ReactiveMethod(MethodConfig):
    """The reactive policy without planning (mode 1); an agent that is stuck takes a random block."""

    name: Literal["reactive"] = "reactive"

    def build(self, parts: AgentParts, *, seed: int) -> Agent:
        """Build the agent."""
        heads = parts.heads
        return ReactiveAgent(heads.model, _reactive(heads), step_length=heads.geometry.step_length, seed=seed)


@METHODS.register("goal-inverse")
class GoalInverseMethod(MethodConfig):
    """Goal-conditioned inverse dynamics without planning (GC-IDM); executes `blocks` blocks of each prediction."""

    name: Literal["goal-inverse"] = "goal-inverse"
    blocks: int = Field(default=1, ge=1)

    def build(self, parts: AgentParts, *, seed: int) -> Agent:
        """Build the agent."""
        return GoalInverseAgent(parts.heads.model, _goal_inverse(parts.heads), blocks=self.blocks)


_NEWER = frozenset({"nearest", "certified", "prior"})  # settings that the first margins did not contain


class PlannedMethod(MethodConfig):
    """A method that plans, and can obey the guardrails of a rule set. `solver` searches `horizon` blocks ahead.

    With `noise`, a plan must also satisfy the guardrails from perturbed states; `noise` is the size of the perturbation
    in typical model steps (see `Planner`). With a rate `recalibrate`, calibrated margins grow while prediction errors
    are larger than during calibration (see `Recalibration`).

    `certified` selects the blocks whose errors determine the margins: all blocks of the "plan", or only those that are
    "followed" before the agent plans again. In the second case, the later blocks have the margin of the last followed
    block, although errors grow along a plan. Whatever is selected, all blocks must satisfy the guardrails with their
    margins.
    """

    solver: SolverField = CEM()
    horizon: int = Field(default=6, ge=1)
    noise: float = Field(default=0.0, ge=0)
    recalibrate: float = Field(default=0.0, ge=0)
    certified: Literal["plan", "followed"] = "plan"

    @property
    def guarding(self) -> Guard:
        """How the method applies guardrails; one of `Guard`."""
        return "calibrated"

    @property
    def guarded(self) -> bool:
        """Whether the method's agents obey the guardrails of a rule set."""
        return self.guarding == "calibrated"

    def guarded_policy(self, parts: AgentParts, policy: Policy, *, seed: int = 0) -> GuardedPolicy:
        """Return the policy behind a safety filter, which applies the rule set as this method does."""
        toward = partial(GoalObjective, LatentL2(parts.heads.geometry.step_length))
        return GuardedPolicy(policy, partial(self.planning_agent, parts, toward, solver=CEM(), replan=1, seed=seed))

    @property
    def calibrated_as(self) -> dict[str, Any]:
        """The settings that calibration depends on: all except `recalibrate`.

        Newer settings are left out if they have their defaults, because older margins do not contain them.
        """
        fields = type(self).model_fields
        unset = {name for name in _NEWER & fields.keys() if getattr(self, name) == fields[name].default}
        return self.model_dump(mode="json", exclude={"recalibrate", *unset})

    def own_margins(self, spec: ModelSpec) -> int:
        """Return the number of blocks that have margins of their own."""
        return self.horizon if self.certified == "plan" else 1

    def margins(self, parts: AgentParts) -> Margins | None:
        """Return the margins of the guardrails, or None if none were calibrated for the rules and this method."""
        if parts.margins is not None or parts.rules is None:
            return parts.margins
        return parts.rules.margins(self.calibrated_as)

    def rails(self, parts: AgentParts) -> tuple[BoundRail, ...]:
        """Return the guardrails of the rule set, with the margins that this method uses.

        Raises:
            ConfigError: the rule set has a risk, but no margins were calibrated for this method. See also
                `BoundRules.rails`.
        """
        rules = parts.rules
        if rules is None or self.guarding == "none":
            return ()
        stated = rules.rule_set
        if self.guarding in ("uncalibrated", "penalty") or stated.risk is None or not stated.titles:
            return rules.rails()
        margins = self.margins(parts)
        if margins is None:
            raise ConfigError(
                f"the rule set has a risk of {stated.risk:g}, but no margins were calibrated for this rule set "
                f"and method. Run 'worldloom calibrate' first, or remove the risk from the rule set"
            )
        return rules.rails(margins)

    def planner(self, heads: Heads, rails: Sequence[BoundRail] = (), solver: Solver | None = None) -> Planner:
        """Return the planner of the world model under these guardrails."""
        geometry = heads.geometry
        return Planner(
            heads.model,
            solver or self.solver,
            horizon=self.horizon,
            geometry=geometry,
            guardrails=rails,
            noise=self.noise * geometry.step_length / math.sqrt(heads.model.spec.latent_dim),
        )

    def recalibration(self, parts: AgentParts, rails: tuple[BoundRail, ...]) -> Recalibration | None:
        """Return the recalibration of the margins; None if it is not configured or there are no margins."""
        margins = self.margins(parts) if self.recalibrate and self.guarding == "calibrated" else None
        if margins is None:
            return None
        model = parts.heads.model
        return Recalibration(rails, usual=margins.usual, risk=margins.risk, model=model, rate=self.recalibrate)

    def planning_agent(
        self,
        parts: AgentParts,
        toward: Callable[[Float[Tensor, "B D"]], Objective],
        *,
        objective: Callable[[Float[Tensor, "B D"]], Objective] | None = None,
        solver: Solver | None = None,
        replan: int = 0,
        costs: Sequence[tuple[float, Objective]] = (),
        proposer: Proposer | None = None,
        guide: Guide | None = None,
        observer: Rememberer | None = None,
        explorer: ExploringAgent | None = None,
        seed: int,
    ) -> PlanningAgent:
        """Build an agent that plans under the rule set.

        `toward` returns the objective of reaching latents. The agent minimises this objective as the rule set extends
        or replaces it (see `build_objective`), plus the weighted `costs`; or only `objective`, if it is given. `replan`
        is in environment steps; 0 means one block.
        """
        rails, rules = self.rails(parts), parts.rules

        def stated(goal: Float[Tensor, "B D"]) -> Objective:
            usual = toward(goal)
            whole = usual if rules is None else rules.objective(goal, usual)
            return WeightedSum([(1.0, whole), *costs]) if costs else whole

        return PlanningAgent(
            parts.heads.model,
            self.planner(parts.heads, () if self.guarding == "penalty" else rails, solver),
            objective or stated,
            replan=replan or parts.heads.model.spec.block,
            proposer=proposer,
            guide=guide,
            observer=observer,
            fallback=None if rules is None else rules.rule_set.fallback,
            toward=toward,
            auditor=parts.auditor,
            recalibration=self.recalibration(parts, rails),
            explorer=explorer,
            seed=seed,
        )


@METHODS.register("plan")
class PlanMethod(PlannedMethod):
    """Model predictive control.

    `metric` is latent L2 or the learned temporal distance. The cost is the mean distance along the plan plus
    `last_weight` times the final distance or, with `nearest`, the smallest distance along the plan. `replan` is in
    environment steps; 0 means one block. With `propose`, the search also starts from the reactive policy's plan (mode
    2), or with "goal-inverse" from plans of goal-conditioned inverse dynamics. `prior` is the weight of a cost for
    blocks that are unusual in the logs (see `Unusual`).

    `guard` selects how the guardrails of a rule set are applied: "calibrated" as limits, with margins calibrated for
    the chosen plans. The other values are baselines: "per candidate" margins, "uncalibrated" (no margins), "penalty" (a
    cost of `penalty` times the violation) or "none".
    """

    name: Literal["plan"] = "plan"
    metric: Literal["latent", "distance"] = "latent"
    last_weight: float = Field(default=1.0, ge=0)
    nearest: bool = False
    replan: int = Field(default=0, ge=0)
    propose: bool | Literal["goal-inverse"] = False
    prior: float = Field(default=0.0, ge=0)
    guard: Guard = "calibrated"
    penalty: float = Field(default=10.0, gt=0)

    @property
    def guarding(self) -> Guard:
        """How the method applies guardrails; one of `Guard`."""
        return self.guard

    def own_margins(self, spec: ModelSpec) -> int:
        """Return the number of blocks that have margins of their own."""
        return self.horizon if self.certified == "plan" else max(1, math.ceil(self.replan / spec.block))

    def build(self, parts: AgentParts, *, seed: int) -> Agent:
        """Build the agent."""
        heads = parts.heads
        metric: Metric = LatentL2(heads.geometry.step_length) if self.metric == "latent" else heads.distance
        penalised = self.rails(parts) if self.guard == "penalty" else ()
        costs: list[tuple[float, Objective]] = [(self.penalty, Avoid(rail=rail)) for rail in penalised]
        costs += [(self.prior, Unusual(prior=heads.behaviour_prior))] if self.prior else []
        return self.planning_agent(
            parts,
            partial(GoalObjective, metric, last_weight=self.last_weight, nearest=self.nearest),
            replan=self.replan,
            costs=costs,
            proposer=self._proposer(heads, seed),
            seed=seed,
        )

    def _proposer(self, heads: Heads, seed: int) -> Proposer | None:
        if self.propose == "goal-inverse":
            generator = torch_generator(seed, "proposals", device=heads.model.device)
            return GoalInverseProposer(policy=_goal_inverse(heads), generator=generator)
        return PolicyProposer(model=heads.model, policy=_reactive(heads)) if self.propose else None


@METHODS.register("hierarchy")
class HierarchyMethod(PlannedMethod):
    """Model predictive control toward subgoals of coarser models, for far goals; see `HierarchyGuide`.

    `solver` plans `horizon` blocks with the world model, `coarse_solver` plans `coarse_horizon` steps with each
    coarser model.
    """

    name: Literal["hierarchy"] = "hierarchy"
    coarse_solver: SolverField = TreeSearch(branches=256)
    coarse_horizon: int = Field(default=12, ge=1)
    follow: HierarchyConfig = HierarchyConfig()

    def build(self, parts: AgentParts, *, seed: int) -> Agent:
        """Build the agent."""
        toward = partial(GoalObjective, LatentL2(parts.heads.geometry.step_length))
        return self.planning_agent(parts, toward, guide=self.guide(parts.heads, seed=seed), seed=seed)

    def guide(self, heads: Heads, *, seed: int) -> HierarchyGuide:
        """Build the guide that chooses subgoals.

        Raises:
            ConfigError: the recipe has no coarser models.
        """
        if not heads.hierarchy:
            raise ConfigError(
                "the method 'hierarchy' needs coarser models, but the recipe trains none. Add at least one, such as "
                'hierarchy=[{"stride": 4}], and resume training in the same folder'
            )
        levels, strides = [self.planner(heads)], [1]
        for coarse, geometry in heads.hierarchy:
            levels.append(Planner(coarse, self.coarse_solver, horizon=self.coarse_horizon, geometry=geometry))
            strides.append(strides[-1] * coarse.config.stride)
        return HierarchyGuide(levels, strides, self.follow, step_length=heads.geometry.step_length, seed=seed)


@METHODS.register("landmarks")
class LandmarkMethod(PlannedMethod):
    """Model predictive control over landmarks of observed states, for far goals.

    The agent can explore before a goal is set. Exploration obeys the guardrails of the rule set too; it uses the solver
    `exploring`, or `solver` if `exploring` is None. Where no route to the goal is known, `beyond` (if given) chooses
    subgoals. The graph is kept in the agent's memory; an agent without a memory keeps the graph until the agent ends.
    """

    name: Literal["landmarks"] = "landmarks"
    horizon: int = Field(default=4, ge=1)
    landmarks: LandmarkConfig = LandmarkConfig()
    follow: FollowConfig = FollowConfig()
    curiosity: CuriosityConfig = CuriosityConfig()
    exploring: SolverField | None = None
    beyond: HierarchyMethod | None = None

    def build(self, parts: AgentParts, *, seed: int) -> Agent:
        """Build the agent with the landmarks of its memory, or with none."""
        model, geometry, memory = parts.heads.model, parts.heads.geometry, parts.memory
        graph = LandmarkGraph(
            model.spec,
            self.landmarks,
            step_length=geometry.step_length,
            reversible=geometry.reversibility.reversible,
        )
        check, block = partial(predict_arrival, model, geometry), model.spec.block
        if memory is not None:
            graph = recall_landmarks(memory, graph, block=block, check=check)
        toward = partial(GoalObjective, LatentL2(geometry.step_length))
        explorer = self.planning_agent(
            parts if parts.auditor is None else replace(parts, auditor=parts.auditor.part("exploring")),
            toward,
            objective=toward,
            solver=self.exploring,
            guide=CuriosityGuide(model, graph, self.curiosity, check=check, seed=seed),
            observer=None if memory is None else Rememberer(memory, graph, replan=block),
            seed=seed,
        )
        beyond = None if self.beyond is None else self.beyond.guide(parts.heads, seed=seed)
        guide = LandmarkGuide(graph, self.follow, check=check, beyond=beyond)
        return self.planning_agent(
            parts,
            toward,
            guide=guide,
            observer=None if memory is None else Rememberer(memory, graph, replan=block, events=lambda: guide.events),
            explorer=ExploringAgent(explorer),
            seed=seed,
        )


def _reactive(heads: Heads) -> ReactivePolicy:
    return ReactivePolicy.load(heads.stem("reactive"), heads.model)


def _goal_inverse(heads: Heads) -> GoalInverse:
    return GoalInverse.load(heads.stem("goal-inverse"), heads.model)


def default_methods() -> dict[str, MethodConfig]:
    """Return the methods of a recipe that does not set `methods`: the standard baselines and planners."""
    return {
        "random": RandomMethod(),
        "behaviour cloning": CloningMethod(),
        "reactive policy": ReactiveMethod(),
        "CEM, latent L2": PlanMethod(),
        "CEM, learned distance": PlanMethod(metric="distance"),
        "tree search": PlanMethod(solver=TreeSearch(), horizon=24),
    }
