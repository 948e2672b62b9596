"""One plan from a start to a goal, as JSON values."""

from pathlib import Path
from typing import Any

import torch

from worldloom.agents import PlanningAgent
from worldloom.core.errors import ConfigError, DataError
from worldloom.core.registry import nearest
from worldloom.core.types import Goal, Observations
from worldloom.data import read_picture
from worldloom.evaluation import PROTOCOLS, EvaluationWorld, default_protocol, draw_tasks
from worldloom.workflow.explaining import Considered, explain
from worldloom.workflow.run import Run


def plan_once(
    run: Run,
    *,
    start: Path | None = None,
    goal: Path | None = None,
    protocol: str | None = None,
    split: str | None = None,
    episode: int = 0,
    method: str | None = None,
    picture: Path | None = None,
) -> dict[str, Any]:
    """Plan once: between two pictures, or between a start and a goal that a protocol draws.

    Returns `actions` (environment steps, each a list), `cost`, `predicted_gap` (how far from the goal the plan is
    predicted to end, in typical model steps), `gap` (how far it is now), `milliseconds` (of a second planning, the
    first one warming up), `rollouts`, and `refused`: whether no plan held and this is the fallback. With a path for a
    `picture`, `explained` as well: see `worldloom.workflow.explaining.explain`.

    Raises:
        ConfigError: only one of the pictures is given, or the method does not plan.
        DataError: a picture is not what the model was trained on.
    """
    agent: PlanningAgent | None = run.agent(method).parts.get("")
    if agent is None:
        raise ConfigError(f"method {method!r} does not plan; choose one of the planners in the recipe's methods")
    if (start is None) != (goal is None):
        raise ConfigError("give both --start and --goal, or neither")
    if start is not None and goal is not None:
        observations, target = _picture(run, start), Goal(observations=_picture(run, goal))
    else:
        observations, target = _drawn(run, protocol, split, episode)
    for _ in range(2):
        agent.reset(target)
        agent.act(observations)
    plan, situation, considered = agent.plan, agent.situation, Considered()
    assert plan is not None
    assert situation is not None
    explained: dict[str, Any] = {}
    if picture is not None:
        agent.decide(situation, watch=considered)  # the same plan again, and what was considered for it
        explained = explain(run, picture, observations, target, plan, considered)
    with torch.no_grad():
        here, there = (run.model.encode(each.to(run.device)) for each in (observations, target.observations))
    scale = run.geometry.step_length
    return {
        "method": method or run.recipe.default_method,
        "milliseconds": round(1e3 * agent.statistics["plan_seconds"][-1], 2),
        "rollouts": int(agent.statistics["plan_rollouts"][-1]),
        "cost": round(plan.cost.item(), 4),
        "gap": round((here - there).norm().item() / scale, 3),
        "predicted_gap": round((plan.latents[0, -1] - there[0]).norm().item() / scale, 3),
        "refused": bool(agent.refused),
        **({"explained": explained} if explained else {}),
        "actions": plan.actions.reshape(-1, run.model.spec.action.size).tolist(),
    }


def _picture(run: Run, path: Path) -> Observations:
    expected = run.model.spec.observation.pixels
    if expected is None or run.model.spec.observation.vector:
        raise DataError("the model does not see by pictures alone; name a protocol that draws start and goal")
    return read_picture(path, expected)


def _drawn(run: Run, protocol: str | None, split: str | None, episode: int) -> tuple[Observations, Goal]:
    name = protocol or run.recipe.protocol or default_protocol(run.environment.get("id"))
    if name is None:
        raise ConfigError("give --start and --goal, or a --protocol that draws them")
    chosen = PROTOCOLS[name]
    split = split or next(iter(chosen.splits))
    if split not in chosen.splits:
        raise ConfigError(f"protocol {name} has no split {split!r}; {nearest(split, chosen.splits)}")
    with EvaluationWorld(chosen, 1) as world:
        tasks, _ = draw_tasks(chosen, split, world, episode, f"drawing episode {episode} of {split!r}")
        return tasks.begin(chosen, split, world, "plan").observations, tasks.goal
