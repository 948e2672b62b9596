"""Model predictive control: plan, act on the beginning of the plan, look, plan again."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from worldloom.agents.environment_batch import EnvironmentBatch
from worldloom.agents.history import History
from worldloom.core.errors import NoFeasiblePlan, PlanningError
from worldloom.core.seams import Guardrail, Objective, Staged, WorldModel
from worldloom.core.seeds import torch_generator
from worldloom.core.types import Context, Goal, Observations, Plan
from worldloom.guardrails import Fallback, Rail, Recalibration, Stop
from worldloom.planning import Planner


@runtime_checkable
class Proposer(Protocol):
    """Proposes plans for the search to start from."""

    def __call__(self, context: Context, goal: Float[Tensor, "B D"], horizon: int) -> Float[Tensor, "B I T A"]:
        """Return at least one plan of `horizon` blocks for each environment."""
        ...


@runtime_checkable
class Guide(Protocol):
    """Says what to aim at now on the way to a far goal: a landmark, a coarser model's next state, something new."""

    def reset(self, goal: Float[Tensor, "B D"]) -> None:
        """Begin an episode toward a goal for each environment."""
        ...

    def select(self, places: Sequence[int]) -> None:
        """Narrow to these environments, given by their places in the last batch, in this order."""
        ...

    def __call__(self, context: Context, followed: Plan | None, blocks: int) -> Float[Tensor, "B D"]:
        """Return the subgoal of each environment, asked for once before each plan.

        `followed` is the last plan, of which so many whole blocks were done (0: not a whole one); None at the start.
        """
        ...


@runtime_checkable
class Observer(Protocol):
    """Sees what a planning agent sees: an episodic memory's writer."""

    def begin(self, environments: int) -> None:
        """Begin an episode in so many environments."""
        ...

    def select(self, places: Sequence[int]) -> None:
        """Narrow to these environments, given by their places in the last batch, in this order."""
        ...

    def __call__(self, observations: Observations, context: Context, followed: Plan | None, blocks: int) -> None:
        """See what is there before a new plan is followed; see `Guide` for the last one."""
        ...


@dataclass(frozen=True, kw_only=True)
class Situation:
    """All that a plan follows from, beside what the agent is made of: the same situation gives the same plan.

    `goal` is where to aim, `initial` what the search starts from, `safe` where each environment last had a plan that
    held, `stages` how many stages of a sequence lie behind each, `randomness` the state of the generator, and `stretch`
    how many times the calibrated margins are kept.
    """

    context: Context
    goal: Float[Tensor, "B D"]
    initial: Float[Tensor, "B I T A"] | None
    safe: Float[Tensor, "B D"]
    stages: Int[Tensor, "B"] | None
    randomness: UInt8[Tensor, "_"]
    stretch: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What is followed; for the environments in `refused` it is the fallback, no plan having held.

    `plan.violations` are those of the best plan found, also where it was refused.
    """

    plan: Plan
    refused: tuple[int, ...] = ()
    rollouts: int = 0


@runtime_checkable
class Auditor(Protocol):
    """Is told of every decision, before it is acted on; what it raises ends the agent."""

    def begin(self, goal: Goal) -> None:
        """Episodes begin, with these goals."""
        ...

    def select(self, places: Sequence[int]) -> None:
        """Only these environments go on, by their places in the last batch."""
        ...

    def decided(
        self, observations: Observations, situation: Situation, decision: Decision, *, block: int, whole: bool
    ) -> None:
        """See what was seen, and what was decided; the plan before it, if any, was followed into this block."""
        ...

    def ended(
        self, places: Sequence[int], here: Float[Tensor, "E D"], outcomes: Sequence[str], *, block: int, whole: bool
    ) -> None:
        """See how the episodes of some environments ended, in this block of the plan, and what is there."""
        ...

    def part(self, name: str) -> "Auditor":
        """Return what is told of the decisions of another part of the agent."""
        ...


class PlanningAgent:
    """Plans every `replan` environment steps and takes the plan's actions in between.

    `objective` makes an objective of goal latents (B, D). Each search starts from the last plan, shifted by what
    was done of it, and from what `proposer` gives, if there is one (mode 2). A `guide` puts a subgoal in the goal's
    place for each plan; an `observer` is shown what each plan begins from, an `auditor` what was decided. Where no plan
    keeps the planner's guardrails, `fallback` says what is done instead, and `refused` which environments met that;
    `toward` makes the objective of being at a state, where that one needs it, and is `objective` by default.
    With `recalibration` the margins of the guardrails stretch while predictions err more than they did. A search ends
    after `budget` seconds with the best plan so far; by default it is never cut short.

    Raises:
        PlanningError: `replan` is below 1 or longer than a plan.
        ConfigError: the fallback does not fit the model.
    """

    def __init__(
        self,
        model: WorldModel,
        planner: Planner,
        objective: Callable[[Float[Tensor, "B D"]], Objective],
        *,
        replan: int,
        proposer: Proposer | None = None,
        guide: Guide | None = None,
        observer: Observer | None = None,
        fallback: Fallback | None = None,
        toward: Callable[[Float[Tensor, "B D"]], Objective] | None = None,
        auditor: Auditor | None = None,
        recalibration: Recalibration | None = None,
        seed: int = 0,
        budget: float | None = None,
    ) -> None:
        longest = planner.horizon * model.spec.block
        if not 1 <= replan <= longest:
            raise PlanningError(f"replan must be 1 to {longest} environment steps, the length of a plan; got {replan}")
        if budget is not None and not budget > 0:
            raise PlanningError(f"a plan needs a budget above 0 seconds, or None; got {budget}")
        self._budget = budget
        self._model, self._planner, self._make_objective = model, planner, objective
        self._replan, self._proposer, self._guide, self._observer = replan, proposer, guide, observer
        self._fallback, self._safe = fallback or Stop(), torch.empty(0, 0)
        self._fallback.check(model.spec)
        self._toward = toward or objective
        self._auditor, self._recalibration = auditor, recalibration
        self._rails, self._seen = planner.guardrails, torch.empty(0, 0)
        self._stages: Tensor | None = None
        self.refused: tuple[int, ...] = ()
        self._device = torch.device(getattr(model, "device", "cpu"))
        self._generator = torch_generator(seed, "planning-agent", device=self._device)
        self._batch, self._history = EnvironmentBatch(), History(model)
        self._goal: Tensor | None = None
        self._plan: Plan | None = None
        self._step = 0
        self._statistics: dict[str, list[float]] = {
            "plan_seconds": [],
            "plan_environments": [],
            "plan_rollouts": [],
            "plan_cut_short": [],
            "plan_refused": [],
        }

    @property
    def statistics(self) -> Mapping[str, Sequence[float]]:
        """One entry a plan: `plan_seconds`, `plan_environments`, `plan_rollouts` (candidates), and two more.

        `plan_cut_short` is 1 where the deadline ended the search; `plan_refused` counts the environments that took
        the fallback.
        """
        return self._statistics

    @property
    def planner(self) -> Planner:
        """What it plans with."""
        return self._planner

    @property
    def rails(self) -> tuple[Rail, ...]:
        """The guardrails that it keeps, with their margins as they were calibrated."""
        return tuple(rail for rail in self._rails if isinstance(rail, Rail))

    @property
    def plan(self) -> Plan | None:
        """The plan that is being followed."""
        return self._plan

    def reset(self, goal: Goal) -> None:
        """Forget the last episode and take a new goal for each environment."""
        self._batch.start(goal)
        self._history.clear()
        self._plan, self._step, self.refused = None, 0, ()
        self._safe, self._stages, self._seen = torch.empty(0, 0), None, torch.empty(0, 0)
        if self._recalibration is not None:
            self._recalibration.reset()
        if self._auditor is not None:
            self._auditor.begin(goal)
        with torch.inference_mode():
            self._goal = self._model.encode(goal.observations.to(self._device))
        if self._guide is not None:
            self._guide.reset(self._goal)
        if self._observer is not None:
            self._observer.begin(len(self._goal))

    def select(self, rows: Sequence[int]) -> None:
        """Narrow to these environments, given by their places in the last batch, in this order."""
        places = self._batch.select(rows)
        self._history.select(places)
        if self._guide is not None:
            self._guide.select(places)
        if self._observer is not None:
            self._observer.select(places)
        if self._goal is not None:
            self._goal = self._goal[places]
        if self._auditor is not None:
            self._auditor.select(places)
        self.refused = tuple(new for new, old in enumerate(places) if old in self.refused)
        self._safe = self._safe[places] if len(self._safe) else self._safe
        self._seen = self._seen[places] if len(self._seen) else self._seen
        self._stages = None if self._stages is None else self._stages[places]
        if self._plan is not None:
            self._plan = self._plan[places]

    def conclude(self, rows: Sequence[int], observations: Observations, outcomes: Sequence[str]) -> None:
        """Be told how the episodes of some environments, by their places in the last batch, ended, and what is seen."""
        if self._auditor is None or self._step == 0:
            return
        with torch.inference_mode():
            here = self._model.encode(observations.to(self._device))
        block, whole = self._into((self._step - 1) % self._replan + 1)
        self._auditor.ended(rows, here, outcomes, block=block, whole=whole)

    def act(self, observations: Observations) -> Float[Tensor, "B A"]:
        """Return the next environment action of the plan, made anew when it is time.

        Raises:
            PlanningError: before `reset`, or for another number of environments.
        """
        return self._act(observations, None)

    def act_by(self, deadline: float, observations: Observations) -> Float[Tensor, "B A"]:
        """Return what `act` does, of the best plan that is found by `deadline`, a moment of `time.monotonic`."""
        return self._act(observations, deadline)

    def _act(self, observations: Observations, deadline: float | None) -> Float[Tensor, "B A"]:
        self._batch.check(observations)
        self._history.see(observations)
        place = self._step % self._replan
        if place == 0:
            self._plan = self._make_plan(observations, deadline)
        assert self._plan is not None
        action = self._steps(self._plan.actions)[:, place].clone()
        self._history.did(action)
        self._step += 1
        return action

    def _make_plan(self, observations: Observations, deadline: float | None) -> Plan:
        assert self._goal is not None
        if self._budget is not None:
            spent = time.monotonic() + self._budget
            deadline = spent if deadline is None else min(deadline, spent)
        began = time.perf_counter()
        with torch.inference_mode():
            context = self._history.context()
            blocks, goal = self._replan // self._model.spec.block, self._goal
            if self._guide is not None:
                goal = self._guide(context, self._plan, blocks)
            if self._observer is not None:
                self._observer(observations, context, self._plan, blocks)
            objective = self._make_objective(goal)
            if isinstance(objective, Staged):
                self._stages = objective.progress(context, self._stages)
            situation = Situation(
                context=context,
                goal=goal,
                initial=self._initial(context, goal),
                safe=self._safe if len(self._safe) else context.latents[:, -1],
                stages=self._stages,
                randomness=self._generator.get_state(),
                stretch=self._recalibrated(context, blocks),
            )
            decision = self.decide(situation, deadline=deadline)
            self.refused = decision.refused
            self._remember_safe(context)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self._statistics["plan_seconds"].append(time.perf_counter() - began)
        self._statistics["plan_environments"].append(float(context.batch))
        self._statistics["plan_rollouts"].append(float(decision.rollouts))
        self._statistics["plan_cut_short"].append(float(decision.plan.cut_short))
        self._statistics["plan_refused"].append(float(len(self.refused)))
        if self._auditor is not None:
            block, whole = self._into(self._replan)
            self._auditor.decided(observations, situation, decision, block=block, whole=whole)
        return decision.plan

    def decide(self, situation: Situation, *, deadline: float | None = None) -> Decision:
        """Return what to follow; but for a deadline it depends on the situation alone."""
        self._generator.set_state(situation.randomness)
        context = situation.context
        self._planner.guardrails = self._stretched(situation.stretch)
        with torch.inference_mode():
            problem = self._planner.problem(context, self._objective(situation), deadline=deadline)
            try:
                plan = self._planner.solve(problem, initial=situation.initial, generator=self._generator)
            except NoFeasiblePlan as refused:
                return Decision(
                    plan=self._fall_back(refused, situation, deadline),
                    refused=refused.rows,
                    rollouts=problem.count.rollouts,
                )
        return Decision(plan=plan, rollouts=problem.count.rollouts)

    def _recalibrated(self, context: Context, blocks: int) -> float:
        """Compare what the last plan predicted with what it led to; return how to stretch the margins from now on."""
        here, before = context.latents[:, -1], self._seen
        self._seen = here
        if self._recalibration is None:
            return 1.0
        if self._plan is not None and blocks == 1:
            followed = [row for row in range(len(here)) if row not in self.refused]
            if followed:
                self._recalibration.see(self._plan[followed], before[followed], here[followed])
        return self._recalibration.stretch

    def _stretched(self, stretch: float) -> tuple[Guardrail, ...]:
        """Return the guardrails with their margins so far stretched."""
        if stretch == 1:
            return self._rails
        return tuple(
            rail.with_margin(rail.margin * stretch) if isinstance(rail, Rail) else rail for rail in self._rails
        )

    def _objective(self, situation: Situation) -> Objective:
        objective = self._make_objective(situation.goal)
        if situation.stages is not None and isinstance(objective, Staged):
            return objective.since(situation.stages)
        return objective

    def _fall_back(self, refused: NoFeasiblePlan, situation: Situation, deadline: float | None) -> Plan:
        """Return the plans that hold, and in the others' place what the fallback does."""
        rows, plan = list(refused.rows), refused.plan
        assert isinstance(plan, Plan)
        instead = self._fallback.plan(
            self._planner,
            situation.context[rows],
            situation.safe[rows],
            self._toward,
            generator=self._generator,
            deadline=deadline,
        )
        actions, latents, cost = plan.actions.clone(), plan.latents.clone(), plan.cost.clone()
        actions[rows], latents[rows], cost[rows] = instead.actions, instead.latents, instead.cost
        return replace(plan, actions=actions, latents=latents, cost=cost, cut_short=plan.cut_short or instead.cut_short)

    def _remember_safe(self, context: Context) -> None:
        """Note where each environment is that has a plan that holds."""
        here = context.latents[:, -1]
        if len(self._safe) != len(here):
            self._safe = here.clone()
            return
        held = torch.ones(len(here), dtype=torch.bool, device=here.device)
        held[list(self.refused)] = False
        self._safe = torch.where(held[:, None], here, self._safe)

    def _initial(self, context: Context, goal: Float[Tensor, "B D"]) -> Float[Tensor, "B I T A"] | None:
        """Return the last plan shifted by what was done of it, its last action repeated, and what is proposed."""
        candidates: list[Tensor] = []
        if self._plan is not None:
            steps = self._steps(self._plan.actions)
            rest = steps[:, -1:].expand(-1, self._replan, -1)
            shifted = torch.cat([steps[:, self._replan :], rest], dim=1)
            candidates.append(shifted.reshape(self._plan.actions.shape)[:, None])
        if self._proposer is not None:
            candidates.append(self._proposer(context, goal, self._planner.horizon))
        return torch.cat(candidates, dim=1) if candidates else None

    def _into(self, steps: int) -> tuple[int, bool]:
        """Return into which block of a plan so many environment steps lead, and whether to its end."""
        block = self._model.spec.block
        return (steps - 1) // block, steps % block == 0

    def _steps(self, blocks: Float[Tensor, "B T A"]) -> Float[Tensor, "B N _"]:
        """Return blocks as environment actions in order."""
        return blocks.reshape(len(blocks), -1, self._model.spec.action.size)
