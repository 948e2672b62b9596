"""A fast policy distilled from the model: it acts directly (mode 1), or proposes plans to the search (mode 2)."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor

from worldloom.agents.policy_agent import PolicyAgent
from worldloom.core.actions import Walk
from worldloom.core.config import Sizes
from worldloom.core.errors import PlanningError
from worldloom.core.progress import SILENT, Progress
from worldloom.core.seams import WorldModel
from worldloom.core.seeds import seeded_weights, torch_generator
from worldloom.core.types import ActionBounds, Context, Goal, ModelSpec
from worldloom.heads import (
    FitConfig,
    Head,
    InverseModel,
    InverseModelConfig,
    LatentEpisodes,
    LatentGeometry,
    dream,
    still,
)
from worldloom.planning import GoalObjective, LatentL2, Planner
from worldloom.planning.solvers import SolverField, TreeSearch

_log = logging.getLogger(__name__)
_PROBLEMS_AT_ONCE = 128
_AWAY = Walk(drift=0, renewal=0, slowest=1, fastest=1)  # straight, because a straight block leads farthest away
_STUCK = 0.3  # step lengths; an agent that moved less in its last block is stuck


class ReactiveConfig(FitConfig):
    """The reactive policy's network, and the plans and logs that it imitates.

    `teacher` makes `problems` plans of `horizon` blocks. Each plan leads from one imagined state to another, in the
    world of the same episode. If a plan comes within `arrival` step lengths of its goal, the policy imitates the plan
    up to there. The fraction `hindsight` of a batch comes from the episodes: recorded blocks, each with a later state
    as its goal.
    """

    hidden: Sizes = Field(default=(256, 256), min_length=1)
    teacher: SolverField = TreeSearch(branches=32, near=0.0)
    problems: int = Field(default=2048, ge=1)
    horizon: int = Field(default=20, ge=1)
    arrival: float = Field(default=2.8, gt=0)
    hindsight: float = Field(default=0.1, ge=0, le=1)
    steps: int = Field(default=1200, ge=1)
    walk: Walk = Walk()


class ReactivePolicy(Head[ReactiveConfig]):
    """Maps a latent and a goal latent to the next action block: inverse dynamics with a goal many steps away."""

    kind = "reactive-policy"
    config_type = ReactiveConfig

    def __init__(self, spec: ModelSpec, config: ReactiveConfig) -> None:
        super().__init__()
        self.config = config
        self.inverse = InverseModel(spec, InverseModelConfig(hidden=config.hidden))

    def forward(self, latents: Float[Tensor, "*axes D"], goal: Float[Tensor, "*axes D"]) -> Float[Tensor, "*axes A"]:
        """Return a block within bounds, in environment units."""
        block: Tensor = self.inverse(latents, goal)
        return block


def fit_reactive(
    model: WorldModel,
    episodes: LatentEpisodes,
    geometry: LatentGeometry,
    config: ReactiveConfig,
    *,
    seed: int,
    progress: Progress = SILENT,
) -> ReactivePolicy:
    """Distil the plans that a teacher (a planner) makes in the model into a policy; no environment is needed."""
    device = episodes.latents.device
    generator = torch_generator(seed, "reactive", device=device)
    with seeded_weights(seed, "reactive", "weights"):
        policy = ReactivePolicy(model.spec, config).to(device)
    states, goals, blocks = _lessons(model, episodes, geometry, config, generator, progress)
    seen_states, seen_goals, seen_blocks = _hindsight(episodes, config, generator)
    if len(states) < 2:
        _log.warning(
            "none of the teacher's %d plans reached its goal: the reactive policy imitates only the episodes. Train "
            "the world model longer, or increase the teacher's horizon",
            config.problems,
        )
        states, goals, blocks = seen_states, seen_goals, seen_blocks
    policy.inverse.mean.copy_(blocks.mean(0))
    policy.inverse.std.copy_(torch.maximum(blocks.std(0), 0.02 * policy.inverse.std))
    taught = config.batch - round(config.hindsight * config.batch)

    def loss(step: int) -> Tensor:
        lesson = torch.randint(len(states), (taught,), generator=generator, device=device)
        seen = torch.randint(len(seen_states), (config.batch - taught,), generator=generator, device=device)
        state = torch.cat([states[lesson], seen_states[seen]])
        goal = torch.cat([goals[lesson], seen_goals[seen]])
        block = policy.inverse.normalise(torch.cat([blocks[lesson], seen_blocks[seen]]))
        return (policy.inverse.normalised(state, goal) - block).square().mean()

    policy.fit(loss, progress)
    return policy


def _lessons(
    model: WorldModel,
    episodes: LatentEpisodes,
    geometry: LatentGeometry,
    config: ReactiveConfig,
    generator: torch.Generator,
    progress: Progress,
) -> tuple[Float[Tensor, "M D"], Float[Tensor, "M D"], Float[Tensor, "M A"]]:
    """Return states along the teacher's plans, their goals, and the blocks planned in these states."""
    planner = Planner(model, config.teacher, horizon=config.horizon, geometry=geometry)
    metric = LatentL2(geometry.step_length)
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    with progress.task("lessons", config.problems, "plan") as task:
        for first in range(0, config.problems, _PROBLEMS_AT_ONCE):
            count = min(_PROBLEMS_AT_ONCE, config.problems - first)
            layouts = episodes[_below(len(episodes), count, generator)]
            start, goal = (_somewhere(model, layouts, config, generator) for _ in range(2))
            plan = planner.plan(still(start, model), GoalObjective(metric, goal), generator=generator)
            # Cloned outside inference mode, because training data must be normal tensors.
            latents, blocks = plan.latents.clone(), plan.actions.clone()
            states = torch.cat([start[:, None], latents[:, :-1]], dim=1)
            # Imitate up to the state closest to the goal, if that is close enough.
            time = torch.arange(config.horizon, device=start.device)
            gap = metric(latents, goal[:, None])
            stop = (gap + 0.1 * time).argmin(dim=1, keepdim=True)
            used = (gap.gather(1, stop) < config.arrival) & (time <= stop)
            parts.append((states[used], goal[:, None].expand_as(states)[used], blocks[used]))
            task.advance(count)
    states, goals, blocks = (torch.cat(column) for column in zip(*parts, strict=True))
    return states, goals, blocks


def _somewhere(
    model: WorldModel, layouts: LatentEpisodes, config: ReactiveConfig, generator: torch.Generator
) -> Float[Tensor, "E D"]:
    """Return, for each episode, a late state of an imagined random walk; two such states are often far apart."""
    walks = dream(model, layouts, per_episode=1, horizon=config.horizon, walk=config.walk, generator=generator)
    early = config.horizon // 2
    late = early + _below(config.horizon + 1 - early, len(layouts), generator)
    return walks.latents[torch.arange(len(layouts), device=late.device), late]


def _hindsight(
    episodes: LatentEpisodes, config: ReactiveConfig, generator: torch.Generator
) -> tuple[Float[Tensor, "M D"], Float[Tensor, "M D"], Float[Tensor, "M A"]]:
    """Return recorded states, later states within `horizon` blocks, and the blocks recorded in the earlier ones."""
    count = config.problems * config.horizon
    episode = _below(len(episodes), count, generator)
    last = episodes.lengths[episode] - 1
    share, ahead = torch.rand(2, count, generator=generator, device=last.device)
    frame = (share * last).long()
    later = frame + 1 + (ahead * (last - frame).clamp_max(config.horizon)).long()
    return episodes.latents[episode, frame], episodes.latents[episode, later], episodes.blocks[episode, frame]


def _below(limit: int, count: int, generator: torch.Generator) -> Int[Tensor, "_"]:
    return torch.randint(limit, (count,), generator=generator, device=generator.device)


@dataclass(frozen=True, kw_only=True)
class PolicyProposer:
    """Proposes the plan that the policy would follow in the model."""

    model: WorldModel
    policy: ReactivePolicy

    def __call__(self, context: Context, goal: Float[Tensor, "B D"], horizon: int) -> Float[Tensor, "B 1 T A"]:
        """Return the policy's plan: its actions when it is rolled out in the model for `horizon` blocks."""
        latents, actions = list(context.latents.unbind(1)), list(context.actions.unbind(1))
        size, plan = len(latents), []
        for _ in range(horizon):
            block = self.policy(latents[-1], goal)
            between = torch.stack(actions, dim=1) if actions else context.actions
            now = Context(latents=torch.stack(latents, dim=1), actions=between)
            following = self.model.rollout(now, block[:, None, None])[:, 0, 0]
            plan.append(block)
            latents, actions = [*latents, following][-size:], [*actions, block][len(actions) + 2 - size :]
        return torch.stack(plan, dim=1)[:, None]


class ReactiveAgent(PolicyAgent):
    """Applies the policy without planning; observes every `every` environment steps, by default after each block.

    The policy is deterministic, so an agent that it presses against a wall would stay there forever. With a
    `step_length` (the typical length of a model step), an agent is stuck if its last block moved it by less than 0.3
    step lengths, and its goal is farther away than a step length. It then takes a straight block in a random direction.

    Raises:
        PlanningError: `every` is below 1 or longer than a block.
    """

    def __init__(
        self,
        model: WorldModel,
        policy: ReactivePolicy,
        *,
        every: int | None = None,
        step_length: float | None = None,
        seed: int = 0,
    ) -> None:
        block = model.spec.block
        if every is not None and not 1 <= every <= block:
            raise PlanningError(
                f"expected 'every' from 1 to {block} environment steps, the length of a block; got {every}"
            )
        super().__init__(
            lambda observations: model.encode(observations.to(model.device)),
            lambda latents, goal: self._next(latents, goal).view(len(latents), block, -1)[:, :every],
        )
        self._spec, self._reactive, self._step_length = model.spec, policy, step_length
        self._part = (every or block) / block
        self._generator = torch_generator(seed, "reactive-agent", device=model.device)
        self._before: Float[Tensor, "B D"] | None = None

    def reset(self, goal: Goal) -> None:
        """Set a new goal for each environment."""
        super().reset(goal)
        self._before = None

    def select(self, rows: Sequence[int]) -> None:
        """Keep only these environments, given by their places in the last batch, in this order."""
        super().select(rows)
        self._before = None if self._before is None else self._before[list(rows)]

    def _next(self, latents: Float[Tensor, "B D"], goal: Float[Tensor, "B D"]) -> Float[Tensor, "B A"]:
        """Return the policy's blocks, or random ones for environments that are stuck."""
        blocks: Tensor = self._reactive(latents, goal)
        before, self._before = self._before, latents
        if self._step_length is None or before is None:
            return blocks
        still_there = (latents - before).norm(dim=-1) < _STUCK * self._part * self._step_length
        stuck = still_there & ((goal - latents).norm(dim=-1) > self._step_length)
        if not stuck.any():
            return blocks
        bounds = ActionBounds.of(self._spec, latents.device)
        walks = _AWAY.sample(self._spec, bounds, (len(latents), 1, 1), self._generator)[:, 0, 0]
        return torch.where(stuck[:, None], walks, blocks)
