"""Plans once from a start to a goal, and returns the plan as JSON values."""

from pathlib import Path
from typing import Any

import torch

from worldloom.agents import PlanningAgent
from worldloom.core.errors import ConfigError, DataError
from worldloom.core.files import require_writable
from worldloom.core.progress import SILENT, Progress
from worldloom.core.registry import nearest
from worldloom.core.types import Goal, Observations
from worldloom.evaluation import PROTOCOLS, Worlds, draw_tasks
from worldloom.workflow.run import Run
from worldloom.workflow.session import Session, fast_planning, session_of


def plan_once(
    run: Run | Session,
    *,
    start: Path | None = None,
    goal: Path | None = None,
    protocol: str | None = None,
    split: str | None = None,
    episode: int = 0,
    method: str | None = None,
    picture: Path | None = None,
    progress: Progress = SILENT,
) -> dict[str, Any]:
    """Plan once, between two pictures or between a start and a goal from an episode of a protocol.

    If `picture` is a path, a figure of the plan is written there; see `worldloom.workflow.explaining.explain`.

    Returns:
        `actions` (one list per environment step), `cost`, `gap` and `predicted_gap` (the distance to the goal now and
        at the predicted end of the plan, in typical model steps), `milliseconds` (of a second call, after a warm-up),
        `rollouts`, `refused` (whether no plan satisfied the guardrails, so that the actions are the fallback's) and,
        with `picture`, `explained`.

    Raises:
        ConfigError: only one of the pictures is given, or the method does not plan.
        DataError: a picture has the wrong size, or the model needs more than pixels.
    """
    from worldloom.workflow.explaining import Considered, explain  # takes half a second to load

    session = session_of(run)
    run = session.run
    if picture is not None:
        require_writable(picture)
    if (start is None) != (goal is None):
        raise ConfigError("expected both --start and --goal, or neither; got one of them")
    if start is not None and goal is not None:
        observations, target = _picture(run, start), Goal(observations=_picture(run, goal))
    else:
        observations, target = _drawn(session, protocol, split, episode)
    considered = Considered()
    with fast_planning(run, environments=1):
        agent: PlanningAgent | None = session.agent(method).parts.get("")
        if agent is None:
            raise ConfigError(
                f"the method {method or run.recipe.default_method!r} does not plan; choose a method that plans"
            )
        for _ in range(2):
            agent.reset(target)
            agent.act(observations)
        plan, situation = agent.plan, agent.situation
        assert plan is not None
        assert situation is not None
        if picture is not None:
            agent.decide(situation, watch=considered)  # the same plan again, with the candidates that were considered
    explained: dict[str, Any] = {}
    if picture is not None:
        explained = explain(run, picture, observations, target, plan, considered, progress=progress)
    with torch.no_grad():
        here, there = (run.model.encode(each.to(run.device)) for each in (observations, target.observations))
    scale = run.heads.geometry.step_length
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
        raise DataError(
            "the model observes a vector, so pictures alone cannot define start and goal; take both from a protocol "
            "with --protocol"
        )
    return run.read_picture(path)


def _drawn(session: Session, protocol: str | None, split: str | None, episode: int) -> tuple[Observations, Goal]:
    chosen = session.run.usual_protocol if protocol is None else PROTOCOLS[protocol]
    if chosen is None:
        raise ConfigError(
            f"the run has no default protocol; pass two pictures with --start and --goal, or --protocol with one of "
            f"{', '.join(PROTOCOLS)}"
        )
    split = split or next(iter(chosen.splits))
    if split not in chosen.splits:
        raise ConfigError(f"protocol {chosen.title} has no split {split!r}; {nearest(split, chosen.splits)}")
    with Worlds(chosen, 1, session.acting()) as worlds:
        world, where = worlds.of(1), f"drawing episode {episode} of {split!r}"
        tasks, _ = draw_tasks(chosen, split, world, episode, where, guard=worlds.guard)
        tasks = tasks if worlds.repeats else tasks.unrepeated()
        return tasks.begin(chosen, split, world, "plan").observations, tasks.goal
