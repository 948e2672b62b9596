"""Guardrails in a search on a GPU: what is chosen there holds by the word of a CPU."""

import pytest
import torch
from linear_geometry import linear_geometry

from worldloom.core.errors import NoFeasiblePlan
from worldloom.core.types import Context, Rollouts
from worldloom.planning import (
    SOLVERS,
    Ball,
    Familiar,
    GoalObjective,
    KeepOut,
    LatentL2,
    Magnitude,
    Planner,
    Probe,
    ProbeConfig,
    Rail,
    Rate,
    fit_probe,
)
from worldloom.planning.problem import violations_of
from worldloom.testing import LinearWorld

pytestmark = pytest.mark.gpu

WORLD = LinearWorld(block=2)


def rails(device: str) -> list[Rail]:
    """Return one guardrail of each kind that needs tensors of its own, or none."""
    torch.manual_seed(0)
    places = 12 * torch.rand(400, 2) - 6
    probe: Probe = fit_probe(places.to(device), places.to(device), ProbeConfig(steps=300), seed=0)
    return [
        KeepOut(name="disc", probe=probe, region=Ball((2.0, 0.0), 1.0)),
        Familiar(name="known", data=places.to(device), distance=2.0, step_length=1.0),
        Magnitude(name="force", limit=1.2, size=2),
        Rate(name="jerk", limit=2.0, size=2),
    ]


@pytest.mark.parametrize("name", sorted(SOLVERS))
def test_what_is_chosen_on_a_gpu_holds_by_the_word_of_a_cpu(name: str) -> None:
    latents = torch.tensor([[[0.0, 0.0]], [[-3.0, 2.0]]])
    goal = torch.tensor([[4.0, 0.5], [3.0, -1.0]])
    there = [tensor.to("cuda") for tensor in (latents, goal)]
    geometry = linear_geometry(WORLD)
    geometry.inverse.to("cuda")
    planner = Planner(WORLD, SOLVERS[name](), horizon=6, geometry=geometry, guardrails=rails("cuda"))
    context = Context(latents=there[0], actions=torch.zeros(2, 0, 4, device="cuda"))
    objective = GoalObjective(LatentL2(2.0), there[1])
    try:
        plan, refused = planner.plan(context, objective, generator=torch.Generator("cuda").manual_seed(0)), ()
    except NoFeasiblePlan as error:
        plan, refused = error.plan, error.rows
    assert plan.actions.device.type == "cuda"
    assert len(refused) < 2
    here = Context(latents=latents, actions=torch.zeros(2, 0, 4))
    actions = plan.actions.cpu()[:, None]
    again = violations_of(rails("cpu"), Rollouts(context=here, actions=actions, latents=WORLD.rollout(here, actions)))
    for rail, violation in again.items():
        # The probe of a CPU is another one, fitted on the same places.
        torch.testing.assert_close(violation[:, 0], plan.violations[rail].cpu(), rtol=0.05, atol=0.1)
    assert bool(plan.feasible[[row for row in range(2) if row not in refused]].all())
