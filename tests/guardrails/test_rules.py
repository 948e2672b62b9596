"""Rules as data: what is tighter is tighter everywhere, and what contradicts itself is found before anything acts."""

import math
from collections.abc import Mapping, Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from linear_geometry import linear_geometry
from worldloom.core.config import parse_component
from worldloom.core.errors import ConfigError
from worldloom.core.types import Context, Rollouts
from worldloom.guardrails import (
    GUARDRAILS,
    REGIONS,
    Ball,
    Box,
    KeepAway,
    KeepIn,
    KeepOut,
    Magnitude,
    ObjectiveConfig,
    build_objective,
    check_consistent,
)
from worldloom.guardrails.objective_configs import RegionGoalConfig, SequenceConfig, VectorConfig
from worldloom.heads import Heads, LatentGeometry, Probe, ProbeConfig, Support
from worldloom.planning import GoalObjective, InOrder, LatentL2, Planner, WeightedSum
from worldloom.planning.solvers import Adam
from worldloom.testing import LinearWorld

WORLD = LinearWorld(block=2)


class _Known(Heads):
    """The heads of a world whose latents are places: the probes read them as they are."""

    def __init__(self) -> None:
        self.model = WORLD
        self.support = Support(torch.rand(400, 2, generator=torch.Generator().manual_seed(0)) * 10 - 5, 1.0)
        self.distance = LatentL2(1.0)

    @property
    def geometry(self) -> LatentGeometry:
        return linear_geometry(WORLD)

    @property
    def probes(self) -> Mapping[str, Probe]:
        probe = Probe(2, 2, ProbeConfig(), errors=1, references=1)
        probe.network = nn.Identity()
        probe.support.known.fill_(100.0)
        return {"place": probe, "hazard": probe}

    def examples(self, names: Sequence[str]) -> Tensor:
        return torch.stack([torch.full((2,), float(name)) for name in names])

    def peer(self, name: str) -> LinearWorld:
        return WORLD


KNOWN = _Known()
coordinate = st.floats(-4, 4)
# As plain values, which a strategy may draw: the type checks of a configuration draw from `random`.
balls = st.fixed_dictionaries({
    "name": st.just("ball"), "centre": st.tuples(coordinate, coordinate), "radius": st.floats(0.1, 4)
})  # fmt: skip


@st.composite
def boxes(draw: st.DrawFn) -> dict[str, object]:
    low = draw(st.tuples(coordinate, coordinate))
    high = tuple(value + draw(st.floats(0.1, 4)) for value in low)
    opened = draw(st.tuples(st.booleans(), st.booleans()))
    high_or_none = tuple(None if free else value for free, value in zip(opened, high, strict=True))
    if high_or_none == (None, None):
        return {"name": "box", "low": low}
    return {"name": "box", "low": low, "high": high_or_none}


regions = st.one_of(balls, boxes())
points = torch.rand(3000, 2, generator=torch.Generator().manual_seed(1)) * 16 - 8


@given(regions, regions)
def test_what_lies_within_lies_nowhere_else(first: dict[str, object], second: dict[str, object]) -> None:
    one, other = (parse_component(REGIONS, values) for values in (first, second))
    if one.within(other):
        assert bool((one.depth(points) <= other.depth(points) + 1e-4).all())
    assert one.within(one)


limits = st.floats(0.1, 5)


def rule(name: str, **options: st.SearchStrategy[object]) -> st.SearchStrategy[dict[str, object]]:
    return st.fixed_dictionaries({"name": st.just(name), **options})


rails = st.one_of(
    rule("keep-out", quantity=st.just("place"), region=regions, margin=st.floats(0, 1)),
    rule("keep-in", quantity=st.just("place"), region=regions, margin=st.floats(0, 1)),
    rule("magnitude", limit=limits),
    rule("rate", limit=limits),
    rule("returnable", steps=limits),
    rule("familiar", times=limits),
    rule("unlike", pictures=st.sampled_from([("1",), ("1", "2")]), distance=limits),
)


def imagined(seed: int) -> Rollouts:
    generator = torch.Generator().manual_seed(seed)
    actions = torch.rand(1, 64, 3, 4, generator=generator) * 2 - 1
    context = Context(latents=torch.rand(1, 1, 2, generator=generator) * 8 - 4, actions=torch.zeros(1, 0, 4))
    return Rollouts(context=context, actions=actions, latents=WORLD.rollout(context, actions))


@given(rails, rails, st.integers(0, 100))
def test_a_tighter_rule_is_broken_wherever_a_looser_one_is(
    first: dict[str, object], second: dict[str, object], seed: int
) -> None:
    one, other = (parse_component(GUARDRAILS, values) for values in (first, second))
    if one.tightens(other):
        rollouts = imagined(seed)
        tight, loose = (each.bind("rule", "owner", KNOWN).violation(rollouts) for each in (one, other))
        assert bool(((tight > -1e-4) | (loose <= 1e-4)).all())
    assert one.tightens(one)


@given(rails)
def test_another_kind_is_never_tighter(values: dict[str, object]) -> None:
    rule = parse_component(GUARDRAILS, values)
    other = KeepAway(quantity="place", other="hazard", distance=1.0)
    assert not rule.tightens(other)
    assert not other.tightens(rule)


def test_contradictory_rules_are_named_before_anything_acts() -> None:
    stay = KeepIn(quantity="place", region=Ball(centre=(0.0, 0.0), radius=2.0)).bind("stay", "a", KNOWN)
    away = KeepOut(quantity="place", region=Ball(centre=(0.0, 0.0), radius=3.0)).bind("away", "b", KNOWN)
    slow = Magnitude(limit=0.5).bind("slow", "c", KNOWN)
    check_consistent([stay, slow], WORLD, KNOWN.support)
    with pytest.raises(ConfigError, match="'stay' and 'away' contradict"):
        check_consistent([stay, slow, away], WORLD, KNOWN.support)


def test_what_was_asked_of_rules_before_does_not_keep_a_gradient_solver_from_them() -> None:
    stay = KeepIn(quantity="place", region=Box(high=(2.0, None))).bind("stay", "a", KNOWN)
    away = KeepOut(quantity="place", region=Ball(centre=(0.0, 9.0), radius=1.0)).bind("away", "b", KNOWN)
    check_consistent([stay, away], WORLD, KNOWN.support)  # without gradients, by what is then kept
    planner = Planner(WORLD, Adam(), horizon=4, guardrails=[stay, away])
    context = Context(latents=torch.zeros(1, 1, 2), actions=torch.zeros(1, 0, 4))
    goal = GoalObjective(LatentL2(1.0), torch.tensor([[6.0, 0.0]]))
    plan = planner.plan(context, goal, generator=torch.Generator().manual_seed(0))
    assert bool(plan.feasible.all())
    assert plan.latents[0, -1, 0] > 0.5


def test_a_rule_that_holds_nowhere_is_named() -> None:
    nowhere = KeepIn(quantity="place", region=Box(low=(50.0, None))).bind("far", "a", KNOWN)
    with pytest.raises(ConfigError, match=r"none of \d+ states of the data satisfies the guardrail 'far'"):
        check_consistent([nowhere], WORLD, KNOWN.support)


def test_three_that_hold_only_two_by_two_are_found() -> None:
    sides = [
        KeepOut(quantity="place", region=Box(low=(low, None), high=(high, None))).bind(name, "a", KNOWN)
        for name, low, high in (("left", -9.0, -1.5), ("middle", -1.6, 1.6), ("right", 1.5, 9.0))
    ]
    for pair in (sides[:2], sides[1:], sides[::2]):
        check_consistent(pair, WORLD, KNOWN.support)
    with pytest.raises(ConfigError, match="contradict each other: none of"):
        check_consistent(sides, WORLD, KNOWN.support)


def test_a_margin_that_leaves_nothing_is_a_contradiction() -> None:
    stay = KeepIn(quantity="place", region=Ball(centre=(0.0, 0.0), radius=2.0)).bind("stay", "a", KNOWN)
    with pytest.raises(ConfigError, match="calibrate"):
        check_consistent([stay.with_margin(2.5)], WORLD, KNOWN.support)


def test_a_quantity_without_a_probe_is_said_with_the_nearest() -> None:
    rule = KeepIn(quantity="plaice", region=Ball(centre=(0.0, 0.0), radius=2.0))
    with pytest.raises(ConfigError, match="did you mean 'place'"):
        rule.bind("stay", "a", KNOWN)


def test_a_region_of_another_size_is_refused() -> None:
    rule = KeepIn(quantity="place", region=Ball(centre=(0.0,), radius=2.0))
    with pytest.raises(ConfigError, match="with 1 values, but the run's probe has 2"):
        rule.bind("stay", "a", KNOWN)


@pytest.mark.parametrize(
    "values",
    [
        {"name": "box"},
        {"name": "box", "low": [1.0], "high": [0.0]},
        {"name": "box", "low": [1.0], "high": [2.0, 3.0]},
        {"name": "ball", "centre": [0.0], "radius": 0.0},
        {"name": "ball", "centre": [0.0], "radius": math.inf},
    ],
)
def test_a_region_that_is_none_is_refused(values: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        KeepIn.parse({"quantity": "place", "region": values})


def test_objectives_go_beside_the_goal_unless_they_say_what_is_to_be_reached() -> None:
    goal = torch.zeros(1, 2)
    usual = GoalObjective(LatentL2(1.0), goal)
    assert build_objective({}, KNOWN, goal, usual) is usual
    effort: dict[str, ObjectiveConfig] = {"gently": VectorConfig(quantity="place", target=(1.0, 1.0), weight=0.5)}
    alone = build_objective(effort, KNOWN, goal, usual)
    assert isinstance(alone, WeightedSum)
    assert [weight for weight, _ in alone.parts] == [0.5]
    tour = SequenceConfig(
        stages=(
            VectorConfig(quantity="place", target=(1.0, 0.0), within=0.1),
            RegionGoalConfig(quantity="place", region=Ball(centre=(2.0, 0.0), radius=0.2)),
        )
    )
    found = build_objective({"tour": tour}, KNOWN, goal, usual)
    assert isinstance(found, WeightedSum)
    assert isinstance(found.parts[0][1], InOrder)
