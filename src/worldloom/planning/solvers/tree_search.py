"""Two-sided search in the model's predictions."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from worldloom.core.actions import Walk
from worldloom.core.errors import PlanningError
from worldloom.core.types import Context, Rollouts
from worldloom.heads import LatentGeometry, still
from worldloom.planning.problem import FORBIDDEN, PlanningProblem, rank
from worldloom.planning.solvers.cem import CEM
from worldloom.planning.solvers.solver import SOLVERS, Solution, Solver, SolverField, better_of

# The number of node pairs that are scored at a time on a CPU, so that their scores fit its cache.
_CPU_PAIRS = 2**20


Weight = Annotated[float, Field(gt=0)]


@SOLVERS.register("tree-search")
class TreeSearch(Solver):
    """Imagine walks from the state and walks from the goal, and join two walks that nearly meet.

    The cost of a pair of nodes is the steps from the state to the first node, plus the steps from the second node to
    the goal, plus a weight times the squared latent gap between the nodes, in typical step lengths. A branch from the
    goal is walked in reverse, with actions that inverse dynamics compute from the branch's latents. If the measured
    geometry says that dynamics cannot be reversed, all branches start from the state.

    For each of `gap_weights`, the best pairs of `checked` different branches are rolled out completely, and so are the
    initial candidates. This detects a join through a wall, or a step that the reversed branch cannot repeat forward. A
    rollout may stop at any of its states, at the cost of the steps so far plus the first weight times the squared gap
    to the goal. The plan is the cheapest rollout, cut at its cheapest state and padded with the actions nearest to
    zero. Each side covers half of the horizon. Branches end where they break a guardrail. The guardrails are evaluated
    on the padded plan.

    If a state is nearer to the goal than `near` step lengths, `near_solver` plans over at most `near_horizon` blocks.
    The returned cost is in blocks; near the goal, the cost of the objective is returned instead.
    """

    name: Literal["tree-search"] = "tree-search"
    branches: int = Field(default=64, ge=1)
    gap_weights: tuple[Weight, ...] = Field(default=(1.0, 8.0), min_length=1)
    checked: int = Field(default=4, ge=1)
    walk: Walk = Walk()
    near: float = Field(default=4.0, ge=0)
    near_solver: SolverField = CEM()
    near_horizon: int = Field(default=4, ge=1)

    def solve(
        self, problem: PlanningProblem, *, initial: Float[Tensor, "B I T A"] | None, generator: torch.Generator
    ) -> Solution:
        """Search from both sides; see `Solver.solve`.

        Raises:
            PlanningError: the objective has no goal, or the planner has no geometry.
        """
        geometry = problem.geometry
        if geometry is None:
            raise PlanningError(
                "tree search needs the latent geometry; pass the result of measure_geometry(...) to the planner as "
                "'geometry'"
            )
        if initial is None:
            initial = problem.latents.new_empty(problem.batch, 0, problem.horizon, len(problem.bounds.low))
        initial = problem.project(initial)
        near = (problem.goal - problem.latents).norm(dim=-1) < self.near * geometry.step_length
        if not near.any():
            return self._search(problem, geometry, initial, generator)
        if near.all():
            return self._approach(problem, initial, generator)
        actions = initial.new_empty(problem.batch, problem.horizon, initial.shape[-1])
        cost = initial.new_empty(problem.batch)
        (close,), (far,) = torch.where(near), torch.where(~near)
        approach = self._approach(problem.select(close), initial[close], generator)
        search = self._search(problem.select(far), geometry, initial[far], generator)
        actions[close], actions[far] = approach.actions, search.actions
        cost[close], cost[far] = approach.cost, search.cost
        return Solution(actions=actions, cost=cost)

    def _approach(
        self, problem: PlanningProblem, initial: Float[Tensor, "B I T A"], generator: torch.Generator
    ) -> Solution:
        horizon = min(self.near_horizon, problem.horizon)
        near = problem.select(slice(None), horizon=horizon)
        solution = self.near_solver.solve(near, initial=initial[:, :, :horizon], generator=generator)
        actions = functional.pad(solution.actions, (0, 0, 0, problem.horizon - horizon))
        length = torch.full((problem.batch,), horizon, device=problem.device)
        return Solution(actions=_rest_after(actions, length, problem), cost=solution.cost)

    def _search(
        self,
        problem: PlanningProblem,
        geometry: LatentGeometry,
        initial: Float[Tensor, "B I T A"],
        generator: torch.Generator,
    ) -> Solution:
        two_sided = geometry.reversibility.reversible and problem.horizon > 1
        depth = (problem.horizon + 1) // 2 if two_sided else problem.horizon
        scales = [weight / geometry.step_length**2 for weight in self.gap_weights]
        forward = self._grow(problem, problem.latents, problem.context, depth, generator)
        if two_sided and not problem.deadline.reached():
            backward = self._grow(
                problem, problem.goal, still(problem.goal, problem.model), problem.horizon - depth, generator
            )
        else:
            backward = _Tree.bare(problem.goal)
        joins = _best_joins(forward, backward, scales, self.checked)
        plans, lengths = _assemble(forward, backward, joins, geometry, problem)
        plans = torch.cat([plans, initial], dim=1)
        lengths = torch.cat([lengths, torch.full_like(lengths[:, :1], problem.horizon).expand(-1, initial.shape[1])], 1)
        # Roll out the complete plans: the cost is that of the best place to stop.
        longest = int(lengths.max())
        latents = problem.imagine(problem.context, plans[:, :, :longest])
        steps = torch.arange(1, longest + 1, device=lengths.device)
        cost = (latents - problem.goal[:, None, None]).square().sum(-1) * scales[0] + steps
        cost, stop = cost.masked_fill(steps > lengths[..., None], torch.inf).nan_to_num(nan=torch.inf).min(-1)
        plans = _rest_after(plans, stop + 1, problem)
        if problem.guardrails:
            cost = rank(cost, problem.violation(problem.rollout(plans)).amax(dim=-1))
        return better_of(None, plans, cost)

    def _grow(
        self,
        problem: PlanningProblem,
        root: Float[Tensor, "B D"],
        context: Context,
        depth: int,
        generator: torch.Generator,
    ) -> "_Tree":
        shape = (problem.batch, self.branches, depth)
        actions = self.walk.sample(problem.model.spec, problem.bounds, shape, generator)
        latents = problem.imagine(context, actions)
        broken = problem.violation(Rollouts(context=context, actions=actions, latents=latents)).cummax(dim=-1).values
        return _Tree(root=root, latents=latents, actions=actions, broken=broken > 0)


@dataclass(frozen=True, kw_only=True)
class _Tree:
    """N branches of H nodes from one root. Node 0 is the root; node 1 + n H + h is h + 1 steps along branch n."""

    root: Float[Tensor, "B D"]
    latents: Float[Tensor, "B N H D"]
    actions: Float[Tensor, "B N H A"]
    broken: Bool[Tensor, "B N H"]  # whether a guardrail is broken at this node or before it on the branch

    @classmethod
    def bare(cls, root: Float[Tensor, "B D"]) -> "_Tree":
        """Return a tree without branches."""
        none = root.new_empty(len(root), 0, 0, root.shape[-1])
        return cls(root=root, latents=none, actions=none, broken=none[..., 0].bool())

    @property
    def nodes(self) -> Float[Tensor, "B M D"]:
        return torch.cat([self.root[:, None], self.latents.flatten(1, 2)], dim=1)

    @property
    def steps(self) -> Float[Tensor, "B M"]:
        """The steps to each node; more than any plan has if a guardrail is broken on the way."""
        along = torch.arange(1, self.latents.shape[2] + 1, device=self.root.device, dtype=self.root.dtype)
        return functional.pad(torch.where(self.broken, FORBIDDEN, along).flatten(1), (1, 0))

    def locate(self, node: Int[Tensor, "B K"]) -> tuple[Int[Tensor, "B K"], Int[Tensor, "B K"]]:
        """Return the branch and the number of steps of each node; the root is at 0 steps on branch 0."""
        depth = max(1, self.latents.shape[2])
        place = (node - 1).clamp_min(0)
        return place // depth, torch.where(node > 0, place % depth + 1, 0)


def _best_joins(
    forward: _Tree, backward: _Tree, scales: Sequence[float], count: int
) -> tuple[Int[Tensor, "B K"], Int[Tensor, "B K"]]:
    """Return, for each scale, the cheapest pair of each of the `count` best forward branches, as node numbers.

    The cost of a pair of nodes f and b is the steps to both, plus scale |f - b|^2. The square is expanded, so that all
    scales share one matrix product; each scale then needs one minimum over the nodes of the goal's side.
    """
    ours, theirs = forward.nodes, backward.nodes
    ours_squared, theirs_squared = ours.square().sum(-1), theirs.square().sum(-1)[:, None]
    per_environment = ours.shape[1] * theirs.shape[1]
    at_once = max(1, _CPU_PAIRS // per_environment) if ours.device.type == "cpu" else len(ours)
    minima: list[list[tuple[Tensor, Tensor]]] = [[] for _ in scales]
    for rows in torch.arange(len(ours), device=ours.device).split(at_once):
        product = ours[rows] @ theirs[rows].transpose(1, 2)
        for found, scale in zip(minima, scales, strict=True):
            offset = scale * theirs_squared[rows] + backward.steps[rows, None]
            found.append(torch.add(offset, product, alpha=-2 * scale).min(dim=2))
    branches, depth = forward.latents.shape[1:3]
    first = torch.arange(branches, device=ours.device) * depth + 1
    joins = []
    for found, scale in zip(minima, scales, strict=True):
        lowest, partner = (torch.cat(column) for column in zip(*found, strict=True))
        cost = lowest + scale * ours_squared + forward.steps
        # The best node of each branch; the root is a branch of its own.
        along, step = cost[:, 1:].unflatten(1, (branches, depth)).min(-1)
        node = functional.pad(first + step, (1, 0))
        best = torch.cat([cost[:, :1], along], dim=1).topk(min(count, 1 + branches), dim=1, largest=False).indices
        node = node.gather(1, best)
        joins.append((node, partner.gather(1, node)))
    nodes, partners = (torch.cat(column, dim=1) for column in zip(*joins, strict=True))
    return nodes, partners


def _assemble(
    forward: _Tree,
    backward: _Tree,
    joins: tuple[Int[Tensor, "B K"], Int[Tensor, "B K"]],
    geometry: LatentGeometry,
    problem: PlanningProblem,
) -> tuple[Float[Tensor, "B K T A"], Int[Tensor, "B K"]]:
    """Return the plan through each pair of nodes, and its length: out along one branch, back along the other."""
    row = torch.arange(problem.batch, device=problem.device)[:, None]
    branch, out = forward.locate(joins[0])
    depth = forward.actions.shape[2]
    plans = functional.pad(forward.actions[row, branch], (0, 0, 0, problem.horizon - depth))
    length = out
    if backward.latents.shape[1]:
        branch, home = backward.locate(joins[1])
        path = torch.cat(
            [backward.root[:, None, None].expand(-1, out.shape[1], 1, -1), backward.latents[row, branch]], 2
        )
        blocks = geometry.inverse(path[:, :, 1:], path[:, :, :-1])  # blocks[h] leads from h + 1 steps away to h
        length = out + home
        time = torch.arange(problem.horizon, device=problem.device)
        place = (length[..., None] - 1 - time).clamp(0, blocks.shape[2] - 1)
        homeward = blocks.gather(2, place[..., None].expand(-1, -1, -1, blocks.shape[-1]))
        plans = torch.where((time < out[..., None])[..., None], plans, homeward)
    length = length.clamp_min(1)
    return _rest_after(plans, length, problem), length


def _rest_after(
    plans: Float[Tensor, "*axes T A"], length: Int[Tensor, "*axes"], problem: PlanningProblem
) -> Float[Tensor, "*axes T A"]:
    """Return the plans with all actions after each plan's length replaced by the allowed action nearest to zero."""
    rest = problem.project(torch.zeros_like(problem.bounds.low))
    over = torch.arange(plans.shape[-2], device=plans.device) >= length[..., None]
    return torch.where(over[..., None], rest, plans)
