"""The named evaluation protocols, and a protocol for any Gymnasium id."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from worldloom.core.registry import Registry
from worldloom.evaluation.protocol import Condition, Limit, Protocol, Split, SuccessRule

PROTOCOLS: Registry[Protocol] = Registry("protocol")


def register_protocol(protocol: Protocol) -> Protocol:
    """Add a protocol to `PROTOCOLS` under its title."""
    return PROTOCOLS.register(protocol.title)(protocol)


def default_protocol(env_id: str | None) -> str | None:
    """Return the title of a world's default protocol; None if the world has no protocol.

    A protocol with the world's own goals comes first, then the one with the smallest goal offset.
    """

    def rank(title: str) -> tuple[int, str]:
        splits = PROTOCOLS[title].splits.values()
        return max(split.goal_offset or 0 for split in splits), title

    return min((title for title in PROTOCOLS if PROTOCOLS[title].env_id == env_id), key=rank, default=None)


def gym_protocol(
    env_id: str,
    *,
    success: str,
    goal_offset: int | Sequence[int] = 25,
    budget: int | None = None,
    episodes: int = 100,
    **conventions: Any,
) -> Protocol:
    """Return a protocol for any Gymnasium id; each goal is a frame that the logging policy reaches from the start.

    The default budget is four times the longest `goal_offset`. `conventions` are other fields of `Protocol`, such as
    `policy`, `env_kwargs`, `min_distance`, `frame_skip` or `seed`.

    Raises:
        ConfigError: the success rule is invalid, a convention does not exist, or a value is out of range.
    """
    offsets = [goal_offset] if isinstance(goal_offset, int) else list(goal_offset)
    return Protocol.parse(
        {
            "name": f"logged-goals/{env_id}",
            "env_id": env_id,
            "goal_source": "logged-policy",
            "splits": {f"{steps} steps away": {"episodes": episodes, "goal_offset": steps} for steps in offsets},
            "success": SuccessRule.parse_text(success),
            "budget": budget or 4 * max(offsets),
            **conventions,
        }
    )


_WITHIN_3_PIXELS = SuccessRule(source="info", name="position", radius=3.0, unit="px")


def _register(name: str, world: str, splits: Mapping[str, Split | Mapping[str, Any]], **conventions: Any) -> None:
    """Register a protocol of one of our worlds; each split is a `Split` or the task of one.

    By default, the agent must come within 3 pixels of a goal at least 10 pixels away; `conventions` override this.
    """
    whole = {title: split if isinstance(split, Split) else Split(task=dict(split)) for title, split in splits.items()}
    usual = {"success": _WITHIN_3_PIXELS, "min_distance": 10.0}
    register_protocol(Protocol(name=name, env_id=f"worldloom/{world}", splits=whole, **{**usual, **conventions}))


_ROOMS = {"cross-room": {"split": "cross-room"}, "same-room": {"split": "same-room"}}
_register("two-room", "TwoRoom-v0", _ROOMS, budget=150)
_register("four-rooms", "FourRooms-v0", _ROOMS, budget=200)
_register("maze-far", "Maze-v0", {"far": {"split": "any", "min_steps": 101}}, budget_over_shortest=4.0)

# Far goals: 100, 200 and 400 steps away at full speed, to within 5%, in mazes that are not in the training data.
_EXPLORED = {"never seen": 0, "2,000 steps explored": 2000, "covered": 8000}
for _steps in (100, 200, 400):
    _far = {"split": "any", "min_steps": 0.95 * _steps, "max_steps": 1.05 * _steps}
    _register(
        f"maze-{_steps}",
        "Maze-v0",
        {name: Split(episodes=50, task=_far, exploration=exploration) for name, exploration in _EXPLORED.items()},
        env_kwargs={"factors": {"cells": 6, "agent_speed": 0.6}},
        budget_over_shortest=4.0,
    )

_DOORS = {"split": "cross-room", "min_steps": 20}
_register(
    "closing-door",
    "FourRooms-v0",
    {
        "door closes": Split(
            task={**_DOORS, "closes_after": 8}, exploration=2000, exploration_task={"closes_after": 1_000_000}
        ),
        "door stays open": Split(task=_DOORS, exploration=2000),
    },
    budget=250,
)

# Falling into a pit ends an episode. Half of the goals of 'pits' have a pit on the straight line.
_PITS: dict[str, Any] = {"limits": (Limit(name="pit_depth", unit="px"),), "min_distance": 20.0, "budget": 100}
_register("pits", "Pits-v0", {"behind a pit": {"obstructed": True}, "in the open": {"obstructed": False}}, **_PITS)
_register("pits-within", "Pits-v0", {f"{end} in a pit": {"in_a_pit": end} for end in ("goal", "start")}, **_PITS)

# Safety-Gymnasium's goal is a disc of radius 0.3 m.
_register(
    "point-hazards",
    "PointHazards-v0",
    {"behind a hazard": {"obstructed": True}, "in the open": {"obstructed": False}},
    env_kwargs={"layout": 0},
    success=SuccessRule(name="position", radius=0.3, unit="m"),
    limits=(Limit(name="hazard_depth", unit="m"),),
    min_distance=1.0,
    budget=150,
)

# The two common settings: a goal 25 steps ahead in 50 steps, and 100 ahead in 150 (docs/protocols.md).
_FIELD = {25: 50, 100: 150}


def _register_field(name: str, world: str, success: SuccessRule, *, start_steps: int = 75, **conventions: Any) -> None:
    for offset, budget in _FIELD.items():
        _register(
            f"{name}-{offset}",
            world,
            {f"{offset} steps ahead": Split(goal_offset=offset, start_steps=start_steps)},
            goal_source="logged-policy",
            success=success,
            min_distance=None,
            count_solved=True,
            budget=budget,
            **conventions,
        )


# stable-worldmodel's rule: disc and block together within 20 px of the 512-px table, the angle within 20 degrees.
_register_field(
    "pusht",
    "PushT-v0",
    SuccessRule(
        source="info",
        name="agent+block",
        radius=20.0,
        unit="px",
        also=(Condition(name="angle", radius=math.pi / 9, unit="rad", period=2 * math.pi),),
    ),
    policy="near-object",
)
_register_field("two-room", "TwoRoom-v0", _WITHIN_3_PIXELS, start_steps=25)
# stable-worldmodel's rule: each joint within 0.05 rad.
_register_field(
    "reacher",
    "Reacher-v0",
    SuccessRule(source="info", name="joints", radius=0.05, unit="rad", largest=True, period=2 * math.pi),
)
# A quarter of a cell. With Gymnasium-Robotics' 0.45 m, many starts would already satisfy a goal 25 steps ahead.
_register_field(
    "point-maze",
    "PointMaze-v0",
    SuccessRule(source="info", name="position", radius=0.25, unit="m"),
    env_kwargs={"layout": "medium"},
)
# OGBench's rule, which stable-worldmodel uses too: the cube within 4 cm. The position of the arm does not count.
_WITHIN_4_CM = SuccessRule(source="info", name="block", radius=0.04, unit="m")
_register_field("cube", "Cube-v0", _WITHIN_4_CM, policy="cube-walk")
# The vector is for the logging policy only; an encoder of pixels ignores it.
_register_field("cube-pixels", "Cube-v0", _WITHIN_4_CM, env_kwargs={"observation": "both"}, policy="cube-walk")
