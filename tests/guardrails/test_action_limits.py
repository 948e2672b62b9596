"""Whatever an agent does in any branch, it obeys every guardrail on actions of every layer."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from worldloom.agents import PlanningAgent
from worldloom.core.errors import ConfigError
from worldloom.core.types import ActionSpec, Context, Goal, ModelSpec, Observations, ObservationSpec, Plan, Rollouts
from worldloom.guardrails import ActionLimits, BoundRail, Custom, Fallback, Infeasible, Magnitude, Rail, Rate, RuleLayer
from worldloom.guardrails import RuleSet as Rules
from worldloom.planning import GoalObjective, LatentL2, Planner
from worldloom.planning.solvers import CEM
from worldloom.testing import LinearWorld

NAMES = ("operator", "site", "community")
rails = st.lists(st.tuples(st.sampled_from(["magnitude", "rate"]), st.floats(0.05, 1.6)), max_size=2)


def stop(angle: float, length: float) -> dict[str, object]:
    return {"name": "stop", "action": [0.99 * length * math.cos(angle), 0.99 * length * math.sin(angle)]}


fallbacks = st.one_of(
    st.sampled_from([None, {"name": "stop"}, {"name": "hold"}, {"name": "retreat"}]),
    st.builds(stop, st.floats(0, 6.28), st.floats(0, 1)),
)


def layer(name: str, stated: list[tuple[str, float]], fallback: dict[str, object] | None) -> RuleLayer:
    guardrails = {f"{name} {n}": {"name": kind, "limit": limit} for n, (kind, limit) in enumerate(stated)}
    return RuleLayer.parse({"layer": name, "owner": name, "guardrails": guardrails, "fallback": fallback})


def smallest(rules: Rules, kind: type[Rail]) -> float:
    return min((rule.rail.limit for rule in rules.stated() if isinstance(rule.rail, kind)), default=math.inf)


@settings(max_examples=60, deadline=None)
@given(
    st.tuples(rails, rails, rails),
    fallbacks,
    st.sampled_from(NAMES),
    st.integers(1, 2),
    st.integers(1, 3),
    st.integers(0, 1000),
)
def test_no_branch_sends_an_action_outside_the_rails_on_actions(
    stated: tuple[list[tuple[str, float]], ...],
    fallback: dict[str, object] | None,
    of: str,
    block: int,
    replan: int,
    seed: int,
) -> None:
    layers = tuple(layer(n, each, fallback if n == of else None) for n, each in zip(NAMES, stated, strict=True))
    most = min((limit for each in stated for kind, limit in each if kind == "magnitude"), default=math.inf)
    if fallback is not None and "action" in fallback and math.hypot(*fallback["action"]) > most * 1.001:  # type: ignore[misc]
        with pytest.raises(ConfigError, match="forbids it"):
            Rules(layers=layers)
        return
    rules = Rules(layers=layers)
    draw = np.random.default_rng(seed)

    def shut(rollouts: Rollouts) -> Tensor:
        """Forbid every plan in the first environment, and in some rounds in the second."""
        found = torch.full_like(rollouts.latents[..., 0], -1.0)
        found[0] = 1.0
        if len(found) > 1 and closed:
            found[1] = 1.0
        return found

    world, closed = LinearWorld(block=block), False
    bound = [rule.rail.over(rule.title, 2) for rule in rules.stated()]
    planner = Planner(
        world, CEM(samples=16, iterations=2), horizon=3, guardrails=[*bound, Custom(function=shut).over("shut")]
    )
    agent = PlanningAgent(
        world,
        planner,
        lambda goal: GoalObjective(LatentL2(), goal),
        replan=min(replan, 3 * block),
        fallback=rules.fallback,
        seed=seed,
    )
    longest, change = smallest(rules, Magnitude), smallest(rules, Rate)
    agent.reset(Goal(observations=Observations(vector=torch.tensor([[9.0, -9.0], [-9.0, 9.0]]))))
    position = torch.zeros(2, 2)
    before: Tensor | None = None
    for _ in range(6):
        closed = bool(draw.random() < 0.5)
        action = agent.act(Observations(vector=position))
        if before is not None and draw.random() < 0.3:  # a control loop sends its safe action instead
            wish = draw.uniform(-1, 1, (2, 2)).astype(np.float32)
            pairs = zip(wish, before, strict=True)
            action = torch.stack([torch.from_numpy(agent.limited(one, last.numpy())) for one, last in pairs])
            agent.reset(Goal(observations=Observations(vector=-position)))
            agent.resume(action)
        assert (action.norm(dim=1) <= longest).all()
        assert action.abs().max() <= 1
        if before is not None:
            assert ((action - before).norm(dim=1) <= change).all()
        position, before = position + action, action.clone()


def test_a_fallback_that_an_upper_layer_forbids_is_refused_when_layers_are_joined() -> None:
    upper = RuleLayer.parse({
        "layer": "operator", "owner": "Acme", "guardrails": {"gently": {"name": "magnitude", "limit": 0.3}}
    })  # fmt: skip
    lower = RuleLayer.parse({
        "layer": "community", "owner": "village", "fallback": {"name": "stop", "action": [1.0, 1.0]}
    })  # fmt: skip
    with pytest.raises(ConfigError, match=r"community layer of 'village'.*'gently' of the operator layer .*forbids"):
        Rules(layers=(upper, lower))
    Rules(layers=(upper, lower.model_copy(update={"fallback": type(lower.fallback)(action=(0.18, 0.24))})))


class Sum(Rail):
    """A limit of another author: the sum of an action's values is at most 0.5."""

    name: str = "sum"
    of_actions = True

    def reads(self, title: str, heads: object) -> tuple[()]:
        return ()

    def violation(self, rollouts: Rollouts) -> Tensor:
        return rollouts.actions.unflatten(-1, (-1, 2)).sum(dim=-1).amax(dim=-1) - 0.5

    def _tightens(self, other: object) -> bool:
        return True


class Wild(Fallback):
    """A fallback of another author that ignores every limit."""

    name: str = "wild"

    def plan(self, infeasible: Infeasible) -> Plan:
        actions = torch.ones(
            infeasible.context.batch, infeasible.planner.horizon, infeasible.planner.model.spec.block_size
        )
        latents = infeasible.planner.model.rollout(infeasible.context, actions[:, None])[:, 0]
        return Plan(actions=actions, latents=latents, cost=torch.zeros(len(actions)))


def shut_agent(*rails: BoundRail, world: LinearWorld | None = None) -> PlanningAgent:
    world = world or LinearWorld(block=2)
    shut = Custom(function=lambda rollouts: torch.ones_like(rollouts.latents[..., 0])).over("shut")
    planner = Planner(world, CEM(samples=8, iterations=1), horizon=3, guardrails=[*rails, shut])
    return PlanningAgent(world, planner, lambda goal: GoalObjective(LatentL2(), goal), replan=2, fallback=Wild())


def test_rails_and_fallbacks_of_other_authors_are_covered() -> None:
    agent = shut_agent(Sum().over("sum"), Magnitude(limit=0.9).over("gently", 2))
    agent.reset(Goal(observations=Observations(vector=torch.zeros(1, 2))))
    action = agent.act(Observations(vector=torch.zeros(1, 2)))
    assert 0.4 < action.sum() <= 0.5
    assert agent.plan is not None
    gone = LinearWorld(block=2).rollout(agent.situation.context, agent.plan.actions[:, None])[:, 0]  # type: ignore[union-attr]
    assert torch.equal(agent.plan.latents, gone)  # what is predicted belongs to what is done
    assert agent.limited(np.ones(2, np.float32), None).sum() <= 0.5


def test_what_obeys_already_is_not_touched() -> None:
    spec = LinearWorld(block=2).spec
    context = Context(latents=torch.zeros(1, 1, 2), actions=torch.zeros(1, 0, 4), taken=torch.tensor([[0.1, 0.0]]))
    actions = torch.tensor([[[0.3, 0.0, 0.3, 0.1]]])
    for rails in ((), (Magnitude(limit=0.4).over("m", 2), Rate(limit=0.25).over("r", 2))):
        assert ActionLimits(rails, spec).nearest(actions, context) is actions


def test_bounds_without_zero_and_margins_of_the_owner() -> None:
    spec = LinearWorld(low=0.2, high=1.0).spec
    context = Context(latents=torch.zeros(1, 1, 2), actions=torch.zeros(1, 0, 2))
    limits = ActionLimits([Magnitude(limit=0.6, margin=0.1).over("m", 2)], spec)
    found = limits.nearest(torch.tensor([[[1.0, 0.2]]]), context)
    assert found.norm().item() == pytest.approx(0.5, abs=1e-5)
    assert found.min() >= 0.2


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.floats(1e-6, 1e300), min_size=1, max_size=2),
    st.floats(1e-6, 1e14),
    st.lists(st.floats(-1, 1), min_size=2, max_size=2),
    st.one_of(st.just(math.nan), st.just(math.inf), st.floats(-1e38, 1e38)),
)
def test_any_limit_and_any_bounds_give_a_finite_action_that_is_permitted(
    limits: list[float], bound: float, start: list[float], odd: float
) -> None:
    spec = LinearWorld(low=-bound, high=bound).spec
    rails = [kind(limit=limit).over(kind.__name__, 2) for kind, limit in zip((Magnitude, Rate), limits, strict=False)]
    taken = np.array(start, np.float32) * np.float32(min(bound, limits[0] / 2))
    asked = np.array([odd, bound], np.float32)
    found = ActionLimits(rails, spec).after(asked, taken).astype(np.float64)
    assert np.isfinite(found).all()
    if not np.array_equal(found, asked):
        assert (np.abs(found) <= np.float32(bound)).all()
    assert math.hypot(*found) <= limits[0] * (1 + 1e-5)
    if len(limits) == 2:
        far = math.hypot(*(found - taken))
        assert far <= limits[1] * (1 + 1e-5) + 1e-6 * math.hypot(*taken)


@pytest.mark.parametrize("bound", [1e-20, 1e20])
def test_bounds_in_which_lengths_cannot_be_computed_are_refused(bound: float) -> None:
    with pytest.raises(ConfigError, match="Use other units for actions"):
        ActionLimits([Magnitude(limit=0.3).over("m", 2)], LinearWorld(low=-bound, high=bound).spec)
    ActionLimits([], LinearWorld(low=-bound, high=bound).spec)


def test_a_choice_stays_a_choice() -> None:
    spec = ModelSpec(
        observation=ObservationSpec(vector=1),
        action=ActionSpec(low=(0.0,) * 3, high=(1.0,) * 3, discrete=True),
        block=1,
        context=1,
        latent_dim=1,
    )
    taken = torch.tensor([[0.0, 1.0, 0.0]])
    context = Context(latents=torch.zeros(1, 1, 1), actions=torch.zeros(1, 0, 3), taken=taken)
    wish = torch.eye(3)[[2, 0, 0]][None]
    found = ActionLimits([Rate(limit=0.5).over("r", 3)], spec).nearest(wish, context)
    assert torch.equal(found[0], taken.expand(3, 3))


def test_what_is_not_finite_is_replaced_by_rest() -> None:
    limits = ActionLimits([Magnitude(limit=0.4).over("m", 2)], LinearWorld().spec)
    context = Context(latents=torch.zeros(2, 1, 2), actions=torch.zeros(2, 0, 2))
    found = limits.nearest(torch.tensor([[[math.nan, 1.0]], [[0.9, 0.0]]]), context)
    assert torch.equal(found[0], torch.zeros(1, 2))
    assert found[1, 0].tolist() == pytest.approx([0.4, 0.0], abs=1e-5)


def test_a_large_action_with_a_small_rate_stays_within_it() -> None:
    spec = LinearWorld(low=-1000.0, high=1000.0).spec
    limits, at = ActionLimits([Rate(limit=1e-3).over("r", 2)], spec), np.array([999.0, -999.0], np.float32)
    for _ in itertools.repeat(None, 50):
        after = limits.after(np.zeros(2, np.float32), at)
        assert np.linalg.norm(after - at) <= 1e-3
        at = after
