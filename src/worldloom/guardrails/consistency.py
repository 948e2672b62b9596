"""Finds guardrails that cannot hold together, before anything acts."""

from collections.abc import Sequence
from itertools import combinations

import torch

from worldloom.core.actions import project
from worldloom.core.errors import ConfigError
from worldloom.core.seams import Guardrail, WorldModel
from worldloom.core.types import ActionBounds, Rollouts
from worldloom.heads import Support, still
from worldloom.planning import violations_of

_STATES = 512


def check_consistent(guardrails: Sequence[Guardrail], model: WorldModel, support: Support) -> None:
    """Refuse guardrails that no state the model knows satisfies when nothing is done.

    Each guardrail, each pair and all of them together must hold in some state of the data, as the model predicts it
    under the action nearest to zero.

    Raises:
        ConfigError: they hold in none; the guardrail, or the pair, is named.
    """
    if not guardrails:
        return
    states = support.references[:_STATES]
    spec = model.spec
    bounds = ActionBounds.of(spec, states.device)
    actions = project(states.new_zeros(len(states), 1, 1, spec.block_size), spec, bounds)
    context = still(states, model)
    with torch.inference_mode():
        rollouts = Rollouts(context=context, actions=actions, latents=model.rollout(context, actions))
        found = violations_of(guardrails, rollouts)
    holds = {name: (violation <= 0).all(dim=-1)[:, 0] for name, violation in found.items()}
    said = f"in none of {len(states)} states that the model knows, even if nothing is done"
    for name, kept in holds.items():
        if not bool(kept.any()):
            raise ConfigError(f"the guardrail {name!r} holds {said}. Ask its owner, or calibrate it anew")
    for (one, first), (other, second) in combinations(holds.items(), 2):
        if not bool((first & second).any()):
            raise ConfigError(
                f"the guardrails {one!r} and {other!r} contradict each other: each holds somewhere, but both {said}. "
                f"Their owners must agree"
            )
    if not bool(torch.stack(list(holds.values())).all(dim=0).any()):
        raise ConfigError(f"the guardrails {', '.join(map(repr, holds))} hold together {said}. Their owners must agree")
