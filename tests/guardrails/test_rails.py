"""What each guardrail limits, and by how much it says that it is broken."""

import copy
import itertools
import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor, nn

from worldloom.core.errors import CheckpointError, DataError, NoFeasiblePlan, PlanningError
from worldloom.core.types import Context, Rollouts
from worldloom.guardrails import (
    Agreed,
    Ball,
    BoundRail,
    Box,
    Custom,
    Familiar,
    KeepAway,
    KeepIn,
    KeepOut,
    Magnitude,
    Rate,
    Returnable,
    Unlike,
)
from worldloom.heads import Probe, ProbeConfig, fit_probe
from worldloom.planning import GoalObjective, LatentL2, Planner, violations_of
from worldloom.planning.solvers import CEM
from worldloom.testing import LinearWorld

WORLD = LinearWorld(block=2)


def exact(known: float = 100.0) -> Probe:
    """A probe that reads the latent itself, and knows what lies within `known` of the origin."""
    probe = Probe(2, 2, ProbeConfig(), errors=1, references=1)
    probe.network = nn.Identity()
    probe.support.known.fill_(known)
    return probe


def rolled(actions: Tensor, start: tuple[float, float] = (0.0, 0.0), taken: Tensor | None = None) -> Rollouts:
    """Roll out one environment's candidates, (S, T, 4)."""
    context = Context(latents=torch.tensor([[start]]), actions=torch.zeros(1, 0, 4), taken=taken)
    return Rollouts(context=context, actions=actions[None], latents=WORLD.rollout(context, actions[None]))


def straight(x: float, y: float, blocks: int = 3) -> Tensor:
    """A candidate that moves by (x, y) in each block."""
    return torch.tensor([x / 2, y / 2, x / 2, y / 2]).expand(1, blocks, 4)


points = st.tuples(st.floats(-5, 5), st.floats(-5, 5))


@given(points, st.tuples(st.floats(0.1, 5), st.floats(0.1, 5)), points, st.floats(0.1, 12))
def test_a_box_is_in_a_ball_if_its_corners_are(
    low: tuple[float, float], size: tuple[float, float], centre: tuple[float, float], radius: float
) -> None:
    box = Box(low=low, high=tuple(side + more for side, more in zip(low, size, strict=True)))
    corners = itertools.product(*zip(*box.corners, strict=True))
    farthest = max(math.dist(corner, centre) for corner in corners)
    assume(abs(farthest - radius) > 1e-9)
    assert box.within(Ball(centre=centre, radius=radius)) == (farthest < radius)


def test_boxes_of_many_values_are_compared_at_once() -> None:
    box = Box(low=(0.0,) * 1000, high=(1.0,) * 1000)
    assert box.within(Ball(centre=(0.5,) * 1000, radius=16.0))
    assert not box.within(Ball(centre=(0.5,) * 1000, radius=15.0))


@given(points, points, st.floats(0.1, 5))
def test_depths_are_ways_to_the_edge(point: tuple[float, float], centre: tuple[float, float], size: float) -> None:
    at = torch.tensor(point)
    assert Ball(centre=centre, radius=size).depth(at).item() == pytest.approx(size - math.dist(point, centre), abs=1e-4)
    low, high = tuple(value - size for value in centre), tuple(value + size for value in centre)
    depth = Box(low=low, high=high).depth(at).item()
    outside = math.hypot(*(max(lo - v, v - hi, 0) for v, lo, hi in zip(point, low, high, strict=True)))
    inside = min(min(v - lo, hi - v) for v, lo, hi in zip(point, low, high, strict=True))
    assert depth == pytest.approx(-outside if outside > 0 else inside, abs=1e-4)


def test_a_box_may_be_open() -> None:
    assert Box(low=(1.0, None)).depth(torch.tensor([3.0, 9.0])) == 2


def test_a_hazard_narrower_than_a_block_is_long_is_seen_on_the_way() -> None:
    rail = KeepOut(quantity="place", region=Ball(centre=(1.0, 0.0), radius=0.2)).over("post", exact())
    (violation,) = rail.violation(rolled(straight(2.0, 0.0)))
    assert violation[0, 0] == pytest.approx(0.2)  # it goes through the middle, and ends 1 beyond
    assert (violation[0, 1:] < 0).all()
    beside = rail.violation(rolled(straight(2.0, 1.0)))
    assert (beside < 0).all()


def test_keeping_in_and_keeping_away_are_measured_on_the_way() -> None:
    inside = KeepIn(quantity="place", region=Box(low=(-1.0, -1.0), high=(3.0, 1.0))).over("yard", exact())
    assert inside.violation(rolled(straight(2.0, 0.0)))[0, 0].tolist() == pytest.approx([-1, 1, 3], abs=1e-4)
    still = exact()
    still.network = nn.Linear(2, 2)  # the other one stands at (1, 1)
    with torch.no_grad():
        still.network.weight.zero_()
        still.network.bias.fill_(1.0)
    apart = KeepAway(quantity="place", other="person", distance=1.5).over("person", exact(), still)
    violation = apart.violation(rolled(straight(2.0, 0.0)))[0, 0]
    assert violation.tolist() == pytest.approx(
        [0.5, 1.5 - math.dist((2.5, 0), (1, 1)), 1.5 - math.dist((4.5, 0), (1, 1))]
    )


def test_what_a_probe_does_not_know_is_broken() -> None:
    rail = KeepOut(quantity="place", region=Ball(centre=(0.0, 50.0), radius=0.2)).over("post", exact(known=3.0))
    violation = rail.violation(rolled(straight(2.0, 0.0)))[0, 0]
    assert violation[0] < 0
    assert violation[1:].tolist() == pytest.approx([1 / 3, 1.0])


@given(
    value=st.sampled_from([torch.nan, torch.inf, -torch.inf, -1.0, 0.0]),
    where=st.sampled_from(["known", "references"]),
    place=st.integers(0, 1),
)
def test_a_probe_whose_support_is_not_finite_knows_nothing(value: float, where: str, place: int) -> None:
    probe = exact()
    assert (violations_of([_post(probe)], rolled(straight(2.0, 0.0)))["post"] < 0).all()
    if where == "known":
        probe.support.known.fill_(value)
    elif abs(value) <= 1:
        return
    else:
        probe.support.references[0, place] = value
    found = violations_of([_post(probe)], rolled(straight(2.0, 0.0)))["post"]
    assert (found > 0).all()


def _post(probe: Probe) -> BoundRail:
    return KeepOut(quantity="place", region=Ball(centre=(0.0, 50.0), radius=0.2)).over("post", probe)


def test_margins_are_added_for_each_step_and_the_last_goes_on() -> None:
    stated = KeepOut(quantity="place", region=Ball(centre=(0.0, 50.0), radius=0.2), reason="it breaks")
    rail = stated.over("post", exact(), owner="site")
    rollouts = rolled(straight(2.0, 0.0, blocks=4))
    raw = rail.violation(rollouts)
    assert torch.allclose(rail.with_margin(0.7).violation(rollouts), raw + 0.7)
    stepped = rail.with_margin(torch.tensor([0.1, 0.3]))
    assert torch.allclose(stepped.violation(rollouts) - raw, torch.tensor([0.1, 0.3, 0.3, 0.3]), atol=1e-5)
    assert torch.allclose(
        stepped.stretched(2.0).violation(rollouts) - raw, torch.tensor([0.2, 0.6, 0.6, 0.6]), atol=1e-5
    )
    own = stated.model_copy(update={"margin": 0.5}).over("post", exact())
    assert torch.allclose(own.violation(rollouts), raw + 0.5)
    assert (stepped.owner, stepped.rail.reason) == ("site", "it breaks")


def test_likeness_and_familiarity_are_two_sides() -> None:
    examples = torch.tensor([[4.0, 0.0]])
    rollouts = rolled(straight(2.0, 0.0))
    forbidden = Unlike(pictures=("one",), distance=2.0).over("images", examples, 0.5)
    assert forbidden.violation(rollouts)[0, 0].tolist() == pytest.approx([-2.0, 2.0, -2.0])
    data = Familiar().over("data", examples, 2.0, 0.5)
    assert torch.allclose(data.violation(rollouts), -forbidden.violation(rollouts))


def test_models_that_disagree_are_not_trusted() -> None:
    other = LinearWorld(((1.5, 0.0), (0.0, 1.0)), block=2)
    rail = Agreed(runs=("one", "two"), spread=1.0).over("ensemble", 0.5, (WORLD, other))
    assert rail.violation(rolled(straight(1.0, 0.0)))[0, 0].tolist() == pytest.approx([0.0, 1.0, 2.0])


def test_what_cannot_be_undone_in_time_is_broken() -> None:
    rail = Returnable(steps=5.0).over("pit", LatentL2(0.5))
    assert rail.violation(rolled(straight(1.0, 0.0)))[0, 0].tolist() == pytest.approx([-3.0, -1.0, 1.0])


def test_actions_are_limited_in_length_and_in_change() -> None:
    rail = Magnitude(limit=1.0).over("force", 2)
    actions = torch.tensor([[[0.6, 0.8, 0.0, 0.0], [0.9, 0.9, 0.1, 0.0]]])
    assert rail.violation(rolled(actions))[0, 0].tolist() == pytest.approx([0.0, math.hypot(0.9, 0.9) - 1])
    rate = Rate(limit=1.0).over("jerk", 2)
    assert rate.violation(rolled(actions))[0, 0, 0].item() == pytest.approx(0.0)
    assert rate.violation(rolled(actions))[0, 0, 1].item() == pytest.approx(math.hypot(0.9, 0.9) - 1, abs=1e-5)
    taken = torch.tensor([[-0.6, -0.8]])
    assert rate.violation(rolled(actions, taken=taken))[0, 0, 0].item() == pytest.approx(1.0)


def test_any_function_of_rollouts_may_limit() -> None:
    each = Custom(function=lambda rollouts: rollouts.latents[..., 0] - 3).over("mine")
    assert each.violation(rolled(straight(2.0, 0.0)))[0, 0].tolist() == pytest.approx([-1, 1, 3])
    whole = Custom(function=lambda rollouts: rollouts.latents[..., 0].sum(-1) - 3).over("mine")
    assert whole.violation(rolled(straight(2.0, 0.0)))[0, 0].tolist() == [-math.inf, -math.inf, pytest.approx(9.0)]
    with pytest.raises(PlanningError, match="expected violations of shape"):
        Custom(function=lambda rollouts: rollouts.latents).violation(rolled(straight(2.0, 0.0)))


def test_a_function_that_works_in_place_hides_nothing_from_the_others() -> None:
    def careless(rollouts: Rollouts) -> Tensor:
        rollouts.actions.zero_()
        return rollouts.latents.mul_(0.0).sum(-1) - 1.0

    rails = [Custom(function=careless).over("careless"), Custom(function=lambda r: r.latents[..., 0] - 2).over("line")]
    context = Context(latents=torch.zeros(1, 1, 2), actions=torch.zeros(1, 0, 4))
    objective = GoalObjective(LatentL2(2.0), torch.tensor([[6.0, 0.5]]))
    plan = Planner(WORLD, CEM(), horizon=4, guardrails=rails).plan(
        context, objective, generator=torch.Generator().manual_seed(0)
    )
    really = WORLD.rollout(context, plan.actions[:, None])[0, 0, :, 0]
    assert plan.actions.norm() > 0
    assert 0.5 < really.max() <= 2.0


@pytest.mark.parametrize(
    "rail",
    [
        KeepOut(quantity="place", region=Ball(centre=(3.0, 0.0), radius=1.0)).over("post", exact()),
        KeepIn(quantity="place", region=Box(low=(-1.0, -1.0), high=(4.0, 4.0))).over("yard", exact()),
        Unlike(pictures=("one",), distance=2.0).over("images", torch.tensor([[3.0, 0.0]]), 0.5),
        Magnitude(limit=0.8).over("force", 2),
        Rate(limit=0.4).over("jerk", 2),
        Returnable(steps=6.0).over("pit", LatentL2(0.5)),
    ],
    ids=lambda rail: rail.name,
)
def test_a_planner_keeps_them(rail: BoundRail) -> None:
    context = Context(latents=torch.zeros(1, 1, 2), actions=torch.zeros(1, 0, 4), taken=torch.zeros(1, 2))
    objective = GoalObjective(LatentL2(2.0), torch.tensor([[6.0, 0.5]]))
    solver = CEM(samples=128, iterations=6)
    free = Planner(WORLD, solver, horizon=4).plan(context, objective, generator=torch.Generator().manual_seed(0))
    unbound = Rollouts(context=context, actions=free.actions[:, None], latents=free.latents[:, None])
    assert rail.violation(unbound).max() > 0
    planner = Planner(WORLD, solver, horizon=4, guardrails=[rail])
    plan = planner.plan(context, objective, generator=torch.Generator().manual_seed(0))
    assert plan.violations[rail.name].max() <= 0
    assert plan.latents[0, -1, 0] > 0.3


def labelled(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Latents of five dimensions that hold a place in a square in two of them, bent."""
    generator = torch.Generator().manual_seed(seed)
    places = 2 * torch.rand(count, 2, generator=generator) - 1
    noise = torch.randn(count, 3, generator=generator)
    return torch.cat([places + 0.3 * places.square().flip(1), 0.1 * noise], dim=1), 10 * places


@pytest.fixture(scope="module")
def probe() -> Probe:
    return fit_probe(*labelled(600), ProbeConfig(steps=600), seed=0)


def test_a_probe_reads_what_it_was_shown_and_knows_by_how_much_it_errs(probe: Probe) -> None:
    latents, values = labelled(4000, seed=1)
    with torch.no_grad():
        errors = (probe(latents) - values).norm(dim=1)
    assert errors.mean() < 1.0  # in a square of 20
    for risk in (0.2, 0.05):
        share = float((errors > probe.error(risk)).float().mean())
        assert risk / 3 < share < 1.8 * risk
    assert probe.error(1e-4) == math.inf  # of 180 frames nothing so rare is known
    assert probe.error(0.5) <= probe.error(0.1)


def test_a_probe_knows_where_it_was_calibrated(probe: Probe) -> None:
    latents, _ = labelled(500, seed=2)
    assert (probe.support.gap(latents) <= 1).float().mean() > 0.95
    assert (probe.support.gap(latents + 3.0) > 1).all()


def test_a_probe_is_kept_with_its_model(probe: Probe, tmp_path) -> None:
    world = LinearWorld(torch.eye(5).tolist())
    probe.save(tmp_path / "place", world)
    loaded = Probe.load(tmp_path / "place", world)
    latents, _ = labelled(10, seed=3)
    assert torch.equal(loaded(latents), probe(latents))
    assert loaded.error(0.1) == probe.error(0.1)
    assert torch.equal(loaded.support.gap(latents), probe.support.gap(latents))


@pytest.mark.parametrize("name", ["mean", "scale", "errors", "support.references", "support.known"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_probe_with_values_that_are_not_finite_is_not_loaded(probe: Probe, tmp_path, name: str, value: float) -> None:
    broken, world = copy.deepcopy(probe), LinearWorld(torch.eye(5).tolist())
    broken.state_dict()[name].view(-1)[0] = value
    broken.save(tmp_path / "place", world)
    with pytest.raises(
        CheckpointError, match=r"expected finite values in '.*'; got NaN or infinity; fit the head again"
    ):
        Probe.load(tmp_path / "place", world)


@pytest.mark.parametrize("known", [0.0, -1.0])
def test_a_probe_that_knows_everything_is_not_loaded(probe: Probe, tmp_path, known: float) -> None:
    broken, world = copy.deepcopy(probe), LinearWorld(torch.eye(5).tolist())
    broken.support.known.fill_(known)
    broken.save(tmp_path / "place", world)
    with pytest.raises(CheckpointError, match="largest gap that counts as near the data, must be above 0"):
        Probe.load(tmp_path / "place", world)


def test_frames_of_one_episode_are_not_on_both_sides() -> None:
    latents, values = labelled(40)
    groups = torch.arange(4).repeat_interleave(10)
    assert len(fit_probe(latents, values, ProbeConfig(steps=2), groups=groups, seed=0).errors) == 10
    with pytest.raises(DataError, match="at least 4 episodes"):
        fit_probe(latents, values, ProbeConfig(), groups=groups.clamp_max(2), seed=0)
    with pytest.raises(DataError, match="expected finite labels"):
        fit_probe(latents, values * torch.nan, ProbeConfig(), seed=0)


def test_what_no_plan_keeps_is_refused_by_name() -> None:
    rail = Custom(function=lambda rollouts: rollouts.actions.norm(dim=-1) + 0.1).over("no motion")
    context = Context(latents=torch.zeros(1, 1, 2), actions=torch.zeros(1, 0, 4))
    with pytest.raises(NoFeasiblePlan, match="'no motion' by 0.1"):
        Planner(WORLD, CEM(), horizon=2, guardrails=[rail]).plan(
            context, GoalObjective(LatentL2(), torch.ones(1, 2)), generator=torch.Generator().manual_seed(0)
        )


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_breaks_a_limit_on_actions_too(value: float) -> None:
    rollouts = rolled(torch.zeros(2, 3, 4))
    rollouts.latents[0, 1, 2, 0] = value
    found = violations_of([Magnitude(limit=1.0).over("force", 2)], rollouts)["force"]
    expected = torch.full((1, 2, 3), -1.0)
    expected[0, 1, 2] = torch.inf
    assert torch.equal(found, expected)
