"""Guardrails in a search on a GPU: what is chosen there holds by the word of a CPU."""

import copy

import pytest
import torch

from linear_geometry import linear_geometry
from worldloom.core.errors import NoFeasiblePlan
from worldloom.core.types import Context, Rollouts
from worldloom.guardrails import Ball, BoundRail, Familiar, KeepOut, Magnitude, Rate
from worldloom.heads import Probe, ProbeConfig, fit_probe
from worldloom.planning import GoalObjective, LatentL2, Planner, violations_of
from worldloom.planning.solvers import SOLVERS
from worldloom.testing import LinearWorld

pytestmark = pytest.mark.gpu


def places(device: str) -> torch.Tensor:
    return 12 * torch.rand(400, 2, generator=torch.Generator().manual_seed(0)).to(device) - 6


def rails(probe: Probe, device: str) -> list[BoundRail]:
    """Return one guardrail of each kind that needs tensors of its own, or none."""
    return [
        KeepOut(quantity="place", region=Ball(centre=(2.0, 0.0), radius=1.0)).over(
            "disc", copy.deepcopy(probe).to(device)
        ),
        Familiar().over("known", places(device), 2.0, 1.0),
        Magnitude(limit=1.2).over("force", 2),
        Rate(limit=2.0).over("jerk", 2),
    ]


@pytest.mark.parametrize("name", sorted(SOLVERS))
def test_what_is_chosen_on_a_gpu_holds_by_the_word_of_a_cpu(name: str) -> None:
    latents = torch.tensor([[[0.0, 0.0]], [[-3.0, 2.0]]])
    goal = torch.tensor([[4.0, 0.5], [3.0, -1.0]])
    there = [tensor.to("cuda") for tensor in (latents, goal)]
    world = LinearWorld(torch.eye(2, device="cuda"), block=2)
    geometry = linear_geometry(world)
    geometry.inverse.to("cuda")
    probe = fit_probe(places("cuda"), places("cuda"), ProbeConfig(steps=300), seed=0)
    planner = Planner(world, SOLVERS[name](), horizon=6, geometry=geometry, guardrails=rails(probe, "cuda"))
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
    latents = LinearWorld(block=2).rollout(here, actions)
    again = violations_of(rails(probe, "cpu"), Rollouts(context=here, actions=actions, latents=latents))
    for rail, violation in again.items():
        torch.testing.assert_close(violation[:, 0], plan.violations[rail].cpu(), rtol=1e-3, atol=1e-3)
    assert bool(plan.feasible[[row for row in range(2) if row not in refused]].all())
