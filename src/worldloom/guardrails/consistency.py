"""Detects guardrails that cannot be satisfied together, before the agent acts."""

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
    """Check that some known state satisfies the guardrails when the agent does nothing.

    Each guardrail, each pair and all of them together must be satisfied in some state of the data, as the model
    predicts it under the action nearest to zero.

    Raises:
        ConfigError: no state satisfies them; the message names the guardrail or the pair.
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
    said = f"in none of {len(states)} states of the data, even if the agent does nothing"
    for name, kept in holds.items():
        if not bool(kept.any()):
            raise ConfigError(
                f"the guardrail {name!r} is satisfied {said}. Ask its owner to relax it, or recalibrate its margin"
            )
    for (one, first), (other, second) in combinations(holds.items(), 2):
        if not bool((first & second).any()):
            raise ConfigError(
                f"the guardrails {one!r} and {other!r} contradict each other: each is satisfied in some states, but "
                f"both are satisfied {said}. Ask their owners to relax one of them"
            )
    if not bool(torch.stack(list(holds.values())).all(dim=0).any()):
        raise ConfigError(
            f"the guardrails {', '.join(map(repr, holds))} are satisfied together {said}. Ask their owners to relax "
            f"one of them"
        )
