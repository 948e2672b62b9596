"""Model predictive control: plan, execute the beginning of the plan, observe, plan again."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Float32
from torch import Tensor

from worldloom.agents.audit_log import AuditLog
from worldloom.agents.environment_batch import EnvironmentBatch
from worldloom.agents.history import History
from worldloom.agents.remembering import Rememberer
from worldloom.agents.situation import Situation
from worldloom.core.errors import NoFeasiblePlan, PlanningError
from worldloom.core.seams import Actor, Agent, Objective, WorldModel
from worldloom.core.seeds import torch_generator
from worldloom.core.types import Batched, Context, Goal, Observations, Plan
from worldloom.guardrails import ActionLimits, BoundRail, Fallback, Infeasible, Recalibration, Stop
from worldloom.planning import Planner, Watch, as_objective

_STATISTICS = ("plan_seconds", "plan_environments", "plan_rollouts", "plan_cut_short", "plan_refused")

# Proposes plans for the search to start from. Maps a context, goal latents (B, D) and a horizon in blocks to at least
# one plan for each environment (B, I, T, A).
Proposer = Callable[[Context, Tensor, int], Tensor]


@runtime_checkable
class Guide(Protocol):
    """Chooses a subgoal on the way to a far goal: a landmark, a state of a coarser model's plan, or a new state."""

    def reset(self, goal: Float[Tensor, "B D"]) -> None:
        """Begin an episode with a goal for each environment."""
        ...

    def select(self, places: Sequence[int]) -> None:
        """Keep only these environments, given by their places in the last batch, in this order."""
        ...

    def __call__(self, context: Context, followed: Plan | None, blocks: int) -> Float[Tensor, "B D"]:
        """Return the subgoal of each environment; called once before each plan.

        `followed` is the last plan, or None at the start of an episode; `blocks` complete blocks of it were executed.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class AgentState(Batched):
    """The state of each environment during an episode: the goal, the history and the last decision.

    `plan` is the plan that was decided in `situation`; `safe` is the state in which each environment last had a plan
    that satisfied the guardrails. All three are None before the first plan.
    """

    goal: Float[Tensor, "B D"]
    history: History
    situation: Situation | None = None
    plan: Plan | None = None
    safe: Float[Tensor, "B D"] | None = None


class PlanningAgent(Agent):
    """Plans every `replan` environment steps and executes the plan's actions in between.

    Args:
        model: encodes observations and goals.
        planner: searches for plans.
        objective: returns the objective of reaching goal latents (B, D).
        replan: the number of environment steps between plans. Each search starts from the last plan, shifted by the
            steps that were executed.
        proposer: proposes further plans for the search to start from, such as those of a reactive policy.
        guide: replaces the goal by a subgoal for each plan.
        observer: remembers the observations at each plan.
        fallback: acts when no plan satisfies the planner's guardrails; its actions are corrected where they break a
            guardrail on actions.
        toward: returns the objective of reaching a state, for the fallback; `objective` by default.
        auditor: records each decision before the agent acts on it; an exception that it raises stops the agent.
        recalibration: stretches the margins of the guardrails while errors are larger than in calibration.
        explorer: explores for this agent, if a protocol includes exploration.
        seed: seeds the searches.
        budget: the number of seconds after which a search ends with the best plan so far; unlimited by default.

    Attributes:
        guide: the guide, or None.
        statistics: one entry per plan: `plan_seconds`, `plan_environments`, `plan_rollouts` (candidates),
            `plan_cut_short` (1 if the deadline ended the search) and `plan_refused` (the number of environments that
            used the fallback).

    Raises:
        PlanningError: `replan` is below 1 or longer than a plan, or the budget is not above 0.
        ConfigError: the fallback does not fit the model.
    """

    narrows = True

    def __init__(
        self,
        model: WorldModel,
        planner: Planner,
        objective: Callable[[Float[Tensor, "B D"]], Objective],
        *,
        replan: int,
        proposer: Proposer | None = None,
        guide: Guide | None = None,
        observer: Rememberer | None = None,
        fallback: Fallback | None = None,
        toward: Callable[[Float[Tensor, "B D"]], Objective] | None = None,
        auditor: AuditLog | None = None,
        recalibration: Recalibration | None = None,
        explorer: "ExploringAgent | None" = None,
        seed: int = 0,
        budget: float | None = None,
    ) -> None:
        longest = planner.horizon * model.spec.block
        if not 1 <= replan <= longest:
            raise PlanningError(
                f"expected replan from 1 to {longest} environment steps, the length of a plan; got {replan}"
            )
        if budget is not None and not budget > 0:
            raise PlanningError(f"expected a planning budget above 0 seconds, or None for no limit; got {budget}")
        self.planner, self._budget = planner, budget
        self._model, self._objective, self._toward = model, objective, toward or objective
        self._replan, self._proposer, self.guide, self._observer = replan, proposer, guide, observer
        self._fallback, self._auditor, self._recalibration = fallback or Stop(), auditor, recalibration
        self._explorer, self.explores = explorer, explorer is not None
        self._fallback.check(model.spec)
        self._limits = ActionLimits(planner.guardrails, model.spec, bounds=planner.bounds, device=model.device)
        self._generator = torch_generator(seed, "planning-agent", device=model.device)
        self._batch = EnvironmentBatch()
        self._state: AgentState | None = None
        self._step = 0
        self.statistics: dict[str, list[float]] = {name: [] for name in _STATISTICS}

    @property
    def parts(self) -> Mapping[str, "PlanningAgent"]:
        """The agent itself, under the name "", and the exploring agent (if any), under "exploring"."""
        return {"": self} if self._explorer is None else {"": self, "exploring": self._explorer.planning}

    @property
    def followed(self) -> tuple[int, bool]:
        """The index of the last block that is begun before the agent plans again, and whether it is executed whole."""
        return self._into(self._replan)

    @property
    def rails(self) -> tuple[BoundRail, ...]:
        """The guardrails of the rule set, with their calibrated margins."""
        return tuple(rail for rail in self.planner.guardrails if isinstance(rail, BoundRail))

    @property
    def situation(self) -> Situation | None:
        """The inputs of the current plan."""
        return None if self._state is None else self._state.situation

    @property
    def plan(self) -> Plan | None:
        """The current plan."""
        return None if self._state is None else self._state.plan

    @property
    def refused(self) -> tuple[int, ...]:
        """The places of the environments in which no plan satisfied the guardrails and the fallback acts."""
        return () if self.plan is None else self.plan.refused

    def reset(self, goal: Goal) -> None:
        """Forget the last episode and set a new goal for each environment."""
        self._batch.start(goal)
        self._step = 0
        if self._recalibration is not None:
            self._recalibration.reset()
        if self._auditor is not None:
            self._auditor.begin(goal)
        with torch.inference_mode():
            latents = self._model.encode(goal.observations.to(self._model.device))
        self._state = AgentState(goal=latents, history=History(model=self._model))
        if self.guide is not None:
            self.guide.reset(latents)
        if self._observer is not None:
            self._observer.begin(len(latents))

    def resume(self, taken: Float[Tensor, "B A"]) -> None:
        """Receive the environment actions that are applied at present; see `Actor.resume`."""
        assert self._state is not None
        self._state = replace(self._state, history=self._state.history.corrected(taken))

    def limited(
        self, action: Float32[np.ndarray, "A"], taken: Float32[np.ndarray, "A"] | None
    ) -> Float32[np.ndarray, "A"]:
        """Return the nearest action that satisfies the guardrails on actions; `taken` is the action before it."""
        return self._limits.after(action, taken)

    def select(self, rows: Sequence[int]) -> None:
        """Keep only these environments, given by their places in the last batch, in this order."""
        places = self._batch.select(rows)
        assert self._state is not None
        self._state = self._state[places]
        for part in (self.guide, self._observer, self._auditor):
            if part is not None:
                part.select(places)

    def conclude(self, rows: Sequence[int], observations: Observations, outcomes: Sequence[str]) -> None:
        """Record with the auditor how the episodes of some environments ended, and their final observations."""
        if self._auditor is None or self._step == 0:
            return
        with torch.inference_mode():
            here = self._model.encode(observations.to(self._model.device))
        block, whole = self._into((self._step - 1) % self._replan + 1)
        self._auditor.ended(rows, here, outcomes, block=block, whole=whole)

    def explorer(self) -> Actor:
        """Return an agent that explores other environments, and adds what it learns to this agent's memory.

        See `explores`.
        """
        if self._explorer is None:
            return super().explorer()
        self._explorer.begin()
        return self._explorer

    def act(self, observations: Observations) -> Float[Tensor, "B A"]:
        """Return the next environment action of the plan; replan every `replan` environment steps.

        Raises:
            PlanningError: `reset` was not called, or the last `reset` had a different number of environments.
        """
        return self.act_by(math.inf, observations)

    def act_by(self, deadline: float, observations: Observations) -> Float[Tensor, "B A"]:
        """Return the next action of the best plan that is found by `deadline`; see `act`.

        `deadline` is in seconds of `time.monotonic`.
        """
        self._batch.check(observations)
        assert self._state is not None
        state = replace(self._state, history=self._state.history.seen(observations))
        place = self._step % self._replan
        if place == 0:
            state = self._planned(state, observations, deadline)
        assert state.plan is not None
        action = self._steps(state.plan.actions)[:, place].clone()
        self._state = replace(state, history=state.history.acted(action))
        self._step += 1
        return action

    def _planned(self, state: AgentState, observations: Observations, deadline: float) -> AgentState:
        """Return the state with a new plan, and record its statistics."""
        if self._budget is not None:
            deadline = min(deadline, time.monotonic() + self._budget)
        began = time.perf_counter()
        with torch.inference_mode():
            context = state.history.context()
            here, last = context.latents[:, -1], state.situation
            blocks, goal = self._replan // self._model.spec.block, state.goal
            if self.guide is not None:
                goal = self.guide(context, state.plan, blocks)
            if self._observer is not None:
                self._observer(observations, context, state.plan, blocks)
            objective = as_objective(self._objective(goal))
            situation = Situation(
                context=context,
                goal=goal,
                initial=self._initial(state, context, goal),
                safe=here if state.safe is None else state.safe,
                stages=objective.progress(context, None if last is None else last.stages),
                randomness=self._generator.get_state(),
                stretch=self._recalibrated(state, here, blocks),
            )
            plan = self.decide(situation, objective=objective, deadline=deadline)
            safe = torch.where(plan.feasible[:, None], here, situation.safe)
        if self._model.device.type == "cuda":
            torch.cuda.synchronize(self._model.device)
        seconds = time.perf_counter() - began
        figures = (seconds, context.batch, plan.rollouts, plan.cut_short, len(plan.refused))
        for name, figure in zip(_STATISTICS, figures, strict=True):
            self.statistics[name].append(float(figure))
        if self._auditor is not None:
            block, whole = self.followed
            self._auditor.decided(observations, situation, plan, block=block, whole=whole)
        return replace(state, situation=situation, plan=plan, safe=safe)

    def decide(
        self,
        situation: Situation,
        *,
        objective: Objective | None = None,
        deadline: float | None = None,
        watch: Watch | None = None,
    ) -> Plan:
        """Return the plan to follow; without a deadline, it depends only on the situation.

        `objective` is the objective of the situation's goal, if it is already built; `watch` is called with the
        candidates that the search scores.
        """
        self._generator.set_state(situation.randomness)
        planner = self.planner.stretched(situation.stretch)
        with torch.inference_mode():
            if objective is None:
                objective = as_objective(self._objective(situation.goal))
            try:
                return planner.plan(
                    situation.context,
                    objective if situation.stages is None else objective.since(situation.stages),
                    initial=situation.initial,
                    generator=self._generator,
                    deadline=deadline,
                    watch=watch,
                )
            except NoFeasiblePlan as refused:
                return self._fall_back(planner, refused.plan, situation, deadline)

    def _recalibrated(self, state: AgentState, here: Float[Tensor, "B D"], blocks: int) -> float:
        """Compare the last plan's prediction with the outcome; return the new factor on the margins."""
        if self._recalibration is None:
            return 1.0
        if state.plan is not None and state.situation is not None and blocks == 1:
            followed = torch.nonzero(state.plan.feasible).flatten()
            if len(followed):
                before = state.situation.context.latents[followed, -1]
                self._recalibration.see(state.plan[followed], before, here[followed])
        return self._recalibration.stretch

    def _fall_back(self, planner: Planner, plan: Plan, situation: Situation, deadline: float | None) -> Plan:
        """Return the plan with the fallback's actions where no plan satisfied the guardrails."""
        rows = list(plan.refused)
        infeasible = Infeasible(
            planner=planner,
            context=situation.context[rows],
            safe=situation.safe[rows],
            objective=self._toward,
            generator=self._generator,
            deadline=deadline,
        )
        instead = self._fallback.plan(infeasible)
        permitted = self._limits.nearest(instead.actions, infeasible.context)
        if permitted is not instead.actions:
            predicted = self._model.rollout(infeasible.context, permitted[:, None])[:, 0]
            instead = replace(instead, actions=permitted, latents=predicted)
        actions, latents, cost = plan.actions.clone(), plan.latents.clone(), plan.cost.clone()
        actions[rows], latents[rows], cost[rows] = instead.actions, instead.latents, instead.cost
        return replace(plan, actions=actions, latents=latents, cost=cost, cut_short=plan.cut_short or instead.cut_short)

    def _initial(
        self, state: AgentState, context: Context, goal: Float[Tensor, "B D"]
    ) -> Float[Tensor, "B I T A"] | None:
        """Return the plans that a search starts from: the last plan and the proposals.

        The last plan is shifted by the executed steps, and its last action is repeated.
        """
        candidates: list[Tensor] = []
        if state.plan is not None:
            steps = self._steps(state.plan.actions)
            rest = steps[:, -1:].expand(-1, self._replan, -1)
            shifted = torch.cat([steps[:, self._replan :], rest], dim=1)
            candidates.append(shifted.reshape(state.plan.actions.shape)[:, None])
        if self._proposer is not None:
            candidates.append(self._proposer(context, goal, self.planner.horizon))
        return torch.cat(candidates, dim=1) if candidates else None

    def _into(self, steps: int) -> tuple[int, bool]:
        """Return the block of a plan that `steps` environment steps lead into, and whether they complete that block."""
        block = self._model.spec.block
        return (steps - 1) // block, steps % block == 0

    def _steps(self, blocks: Float[Tensor, "B T A"]) -> Float[Tensor, "B N _"]:
        """Return blocks as a sequence of environment actions."""
        return blocks.reshape(len(blocks), -1, self._model.spec.action.size)


class ExploringAgent(Actor):
    """Explores B environments at once, without a goal: acts through `planning`, whose guide sets new goals."""

    def __init__(self, planning: PlanningAgent) -> None:
        self.planning, self._begun = planning, False
        self._taken: Float[Tensor, "B A"] | None = None

    def begin(self) -> None:
        """Begin in other environments, or at other places in the same ones; keep what was learned."""
        self._begun, self._taken = False, None

    def act(self, observations: Observations) -> Float[Tensor, "B A"]:
        """Return the next environment action, within bounds."""
        if not self._begun:
            self.planning.reset(Goal(observations=observations))
            self._begun = True
        if self._taken is not None:
            self.planning.resume(self._taken)
        return self.planning.act(observations)

    def resume(self, taken: Float[Tensor, "B A"]) -> None:
        """Receive the environment actions that are applied at present; see `Actor.resume`."""
        self._taken = taken

    def limited(
        self, action: Float32[np.ndarray, "A"], taken: Float32[np.ndarray, "A"] | None
    ) -> Float32[np.ndarray, "A"]:
        """Return the nearest action that the guardrails permit after `taken`; see `Actor.limited`."""
        return self.planning.limited(action, taken)
