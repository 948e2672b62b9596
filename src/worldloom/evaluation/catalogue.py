"""The named evaluation protocols, and one for any Gymnasium id."""

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
    """Return the title of a world's usual protocol: goals that it draws itself, else the nearest logged ones."""

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
    policy: str = "directed-walk",
    policy_options: Mapping[str, Any] | None = None,
    env_kwargs: Mapping[str, Any] | None = None,
    min_distance: float | None = None,
    frame_skip: int = 1,
    seed: int = 0,
) -> Protocol:
    """Return a protocol for any Gymnasium id, with goals that the logging policy reached from the same seed.

    The budget is four times the longest `goal_offset` unless given.

    Raises:
        ConfigError: the success rule is not understood, or a value is out of range.
    """
    offsets = [goal_offset] if isinstance(goal_offset, int) else list(goal_offset)
    return Protocol.parse(
        {
            "name": f"logged-goals/{env_id}",
            "env_id": env_id,
            "env_kwargs": dict(env_kwargs or {}),
            "goal_source": "logged-policy",
            "splits": {f"{steps} steps away": {"episodes": episodes, "goal_offset": steps} for steps in offsets},
            "policy": policy,
            "policy_options": dict(policy_options or {}),
            "success": SuccessRule.parse_text(success),
            "min_distance": min_distance,
            "budget": budget or 4 * max(offsets),
            "frame_skip": frame_skip,
            "seed": seed,
        }
    )


_WITHIN_3_PIXELS = SuccessRule(source="info", name="position", radius=3.0, unit="px")

register_protocol(
    Protocol(
        name="two-room",
        env_id="worldloom/TwoRoom-v0",
        splits={
            "cross-room": Split(task={"split": "cross-room"}),
            "same-room": Split(task={"split": "same-room"}),
        },
        success=_WITHIN_3_PIXELS,
        min_distance=10.0,
        budget=150,
    )
)
register_protocol(
    Protocol(
        name="four-rooms",
        env_id="worldloom/FourRooms-v0",
        splits={
            "cross-room": Split(task={"split": "cross-room"}),
            "same-room": Split(task={"split": "same-room"}),
        },
        success=_WITHIN_3_PIXELS,
        min_distance=10.0,
        budget=200,
    )
)
register_protocol(
    Protocol(
        name="maze-far",
        env_id="worldloom/Maze-v0",
        splits={"far": Split(task={"split": "any", "min_steps": 101})},
        success=_WITHIN_3_PIXELS,
        min_distance=10.0,
        budget_over_shortest=4.0,
    )
)

# Far goals: 100, 200 and 400 steps away at full speed, to within 5%, in mazes that no training has seen.
_EXPLORED = {"never seen": 0, "2,000 steps explored": 2000, "covered": 8000}
for _steps in (100, 200, 400):
    register_protocol(
        Protocol(
            name=f"maze-{_steps}",
            env_id="worldloom/Maze-v0",
            env_kwargs={"factors": {"cells": 6, "agent_speed": 0.6}},
            splits={
                name: Split(
                    episodes=50,
                    task={"split": "any", "min_steps": 0.95 * _steps, "max_steps": 1.05 * _steps},
                    exploration=exploration,
                )
                for name, exploration in _EXPLORED.items()
            },
            success=_WITHIN_3_PIXELS,
            min_distance=10.0,
            budget_over_shortest=4.0,
        )
    )

register_protocol(
    Protocol(
        name="closing-door",
        env_id="worldloom/FourRooms-v0",
        splits={
            "door closes": Split(
                task={"split": "cross-room", "min_steps": 20, "closes_after": 8},
                exploration=2000,
                exploration_task={"closes_after": 1_000_000},
            ),
            "door stays open": Split(task={"split": "cross-room", "min_steps": 20}, exploration=2000),
        },
        success=_WITHIN_3_PIXELS,
        min_distance=10.0,
        budget=250,
    )
)

# Half of the goals have a pit on the straight way; a fall ends an episode.
register_protocol(
    Protocol(
        name="pits",
        env_id="worldloom/Pits-v0",
        splits={
            "behind a pit": Split(task={"obstructed": True}),
            "in the open": Split(task={"obstructed": False}),
        },
        success=_WITHIN_3_PIXELS,
        limits=(Limit(name="pit_depth", unit="px"),),
        min_distance=20.0,
        budget=100,
    )
)

register_protocol(
    Protocol(
        name="pits-within",
        env_id="worldloom/Pits-v0",
        splits={
            "goal in a pit": Split(task={"in_a_pit": "goal"}),
            "start in a pit": Split(task={"in_a_pit": "start"}),
        },
        success=_WITHIN_3_PIXELS,
        limits=(Limit(name="pit_depth", unit="px"),),
        min_distance=20.0,
        budget=100,
    )
)

# Safety-Gymnasium's goal is a place of 0.3 m around.
register_protocol(
    Protocol(
        name="point-hazards",
        env_id="worldloom/PointHazards-v0",
        env_kwargs={"layout": 0},
        splits={
            "behind a hazard": Split(task={"obstructed": True}),
            "in the open": Split(task={"obstructed": False}),
        },
        success=SuccessRule(name="position", radius=0.3, unit="m"),
        limits=(Limit(name="hazard_depth", unit="m"),),
        min_distance=1.0,
        budget=150,
    )
)

# The field's two settings: a goal 25 steps ahead in 50 steps, and 100 ahead in 150 (docs/protocols.md).
_FIELD = {25: 50, 100: 150}


def _register_field(
    name: str,
    env_id: str,
    success: SuccessRule,
    *,
    env_kwargs: Mapping[str, Any] | None = None,
    policy: str = "directed-walk",
    start_steps: int = 75,
) -> None:
    for offset, budget in _FIELD.items():
        register_protocol(
            Protocol(
                name=f"{name}-{offset}",
                env_id=env_id,
                env_kwargs=dict(env_kwargs or {}),
                goal_source="logged-policy",
                splits={f"{offset} steps ahead": Split(goal_offset=offset, start_steps=start_steps)},
                policy=policy,
                success=success,
                count_solved=True,
                budget=budget,
            )
        )


# stable-worldmodel's rule: disc and block together within 20 px of the 512-px table, the angle within 20 degrees.
_register_field(
    "pusht",
    "worldloom/PushT-v0",
    SuccessRule(
        source="info",
        name="agent+block",
        radius=20.0,
        unit="px",
        also=(Condition(name="angle", radius=math.pi / 9, unit="rad", period=2 * math.pi),),
    ),
    policy="near-object",
)
_register_field("two-room", "worldloom/TwoRoom-v0", _WITHIN_3_PIXELS, start_steps=25)
# stable-worldmodel's rule: each joint within 0.05 rad.
_register_field(
    "reacher",
    "worldloom/Reacher-v0",
    SuccessRule(source="info", name="joints", radius=0.05, unit="rad", largest=True, period=2 * math.pi),
)
# A quarter of a cell; Gymnasium-Robotics asks for 0.45 m, which many goals 25 steps ahead satisfy at the start.
_register_field(
    "point-maze",
    "worldloom/PointMaze-v0",
    SuccessRule(source="info", name="position", radius=0.25, unit="m"),
    env_kwargs={"layout": "medium"},
)
# OGBench's rule, which stable-worldmodel keeps: the cube within 4 cm. Where the arm ends does not count.
_WITHIN_4_CM = SuccessRule(source="info", name="block", radius=0.04, unit="m")
_register_field("cube", "worldloom/Cube-v0", _WITHIN_4_CM, policy="cube-walk")
# The vector beside the pixels is for the logging policy; an encoder of pixels does not read it.
_register_field(
    "cube-pixels", "worldloom/Cube-v0", _WITHIN_4_CM, env_kwargs={"observation": "both"}, policy="cube-walk"
)
