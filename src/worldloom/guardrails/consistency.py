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
    """Check that the guardrails do not contradict each other.

    For each guardrail, each pair of guardrails, and all guardrails together, the data must contain a state that
    satisfies them. A state satisfies guardrails if the prediction from this state, for the action nearest to zero,
    violates none of them.

    Raises:
        ConfigError: there is no such state for a guardrail, a pair or all together; the message names the guardrails.
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
    none = f"none of {len(states)} states of the data satisfies"
    idle = ", even if the agent does nothing"
    for name, kept in holds.items():
        if not bool(kept.any()):
            raise ConfigError(
                f"{none} the guardrail {name!r}{idle}. Ask the guardrail's owner to relax it, or recalibrate the "
                f"margins"
            )
    for (one, first), (other, second) in combinations(holds.items(), 2):
        if not bool((first & second).any()):
            raise ConfigError(
                f"the guardrails {one!r} and {other!r} contradict each other: some states satisfy one "
                f"of them, but {none} both{idle}. Ask their owners to relax one of them"
            )
    if not bool(torch.stack(list(holds.values())).all(dim=0).any()):
        raise ConfigError(
            f"the guardrails {', '.join(map(repr, holds))} contradict each other: {none} all of them{idle}. Ask their "
            f"owners to relax one of them"
        )
