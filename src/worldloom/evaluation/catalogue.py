"""The named evaluation protocols, and a protocol for any Gymnasium id."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from worldloom.core.registry import Registry
from worldloom.evaluation.protocol import Condition, Crossing, Limit, Protocol, Split, SuccessRule

PROTOCOLS: Registry[Protocol] = Registry("protocol")


def register_protocol(protocol: Protocol) -> Protocol:
    """Add a protocol to `PROTOCOLS` under its title."""
    return PROTOCOLS.register(protocol.title)(protocol)


def default_protocol(env_id: str | None) -> str | None:
    """Return the title of a world's default protocol; None if the world has no protocol.

    A protocol with the world's own goals comes first, then the one with the smallest goal offset and the shortest
    title.
    """

    def rank(title: str) -> tuple[int, int, str]:
        splits = PROTOCOLS[title].splits.values()
        return max(split.goal_offset or 0 for split in splits), len(title), title

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

# The settings of the field: a goal 25 steps ahead in 50 steps, and later goals in 50 steps more than the goal is away.
BUDGETS = {25: 50, 50: 100, 75: 125, 100: 150}
RULES = ("historical", "moderate", "strict")


@dataclass(frozen=True, kw_only=True)
class FieldWorld:
    """A world of the field's tables; docs/field.md explains the three rules.

    `historical`, `moderate` and `strict` are the success rules under which figures are published: the historical rule
    counts pairs that the start already satisfies, the others skip them. The corrected rules may also choose pairs by
    `crossing`. A world has only the rules that are given, and the offsets `offsets`. Episodes start after up to
    `start_steps` steps of the policy that chooses the goals.
    """

    env_id: str
    historical: SuccessRule
    moderate: SuccessRule | None = None
    strict: SuccessRule | None = None
    crossing: Crossing | None = None
    offsets: tuple[int, ...] = tuple(BUDGETS)
    start_steps: int = 75
    env_kwargs: Mapping[str, Any] = field(default_factory=dict)


_TURN = 2 * math.pi
# stable-worldmodel's rule: disc and block together within 20 px of the 512-px table, the angle within 20 degrees.
_BLOCK_AND_DISC = SuccessRule(
    source="info",
    name="agent+block",
    radius=20.0,
    unit="px",
    also=(Condition(name="angle", radius=math.pi / 9, unit="rad", period=_TURN),),
)
_BLOCK_ALONE = SuccessRule(
    source="info",
    name="block",
    radius=10.0,
    unit="px",
    also=(Condition(name="angle", radius=math.pi / 18, unit="rad", period=_TURN),),
    hold=3,
)
# stable-worldmodel's rule: each joint within 0.05 rad. Only the shoulder turns all the way round.
_JOINTS = SuccessRule(source="info", name="joints", radius=0.05, unit="rad", largest=True, period=_TURN)
_JOINTS_WITH_A_STOP = _JOINTS.model_copy(update={"period": (_TURN, 0.0)})
_FINGERTIP = SuccessRule(source="info", name="fingertip", radius=0.01, unit="m", hold=2)
# OGBench's rule, which stable-worldmodel uses too: the cube within 4 cm. The position of the arm does not count.
_WITHIN_4_CM = SuccessRule(source="info", name="block", radius=0.04, unit="m")
_CUBE_POSE = SuccessRule(
    source="info",
    name="block",
    radius=0.03,
    unit="m",
    also=(Condition(name="quaternion", radius=math.pi / 12, unit="rad", size=4, symmetry="cube"),),
    hold=3,
)

FIELD = {
    "pusht": FieldWorld(
        env_id="worldloom/PushT-v0", historical=_BLOCK_AND_DISC, moderate=_BLOCK_AND_DISC, strict=_BLOCK_ALONE
    ),
    "two-room": FieldWorld(
        env_id="worldloom/TwoRoom-v0",
        historical=_WITHIN_3_PIXELS,
        moderate=_WITHIN_3_PIXELS,
        strict=_WITHIN_3_PIXELS.model_copy(update={"radius": 8 / 224 * 64}),
        # The wall is 4 px thick and the agent's radius is 2.5 px, so nearer to its middle the agent is in the door.
        crossing=Crossing(name="position", at=32.0, clearance=4.5, unit="px"),
        start_steps=25,
    ),
    "reacher": FieldWorld(
        env_id="worldloom/Reacher-v0", historical=_JOINTS, moderate=_JOINTS_WITH_A_STOP, strict=_FINGERTIP
    ),
    # A quarter of a cell. With Gymnasium-Robotics' 0.45 m, many starts would already satisfy a goal 25 steps ahead.
    "point-maze": FieldWorld(
        env_id="worldloom/PointMaze-v0",
        historical=SuccessRule(source="info", name="position", radius=0.25, unit="m"),
        offsets=(25, 100),
        env_kwargs={"layout": "medium"},
    ),
    "cube": FieldWorld(env_id="worldloom/Cube-v0", historical=_WITHIN_4_CM, moderate=_WITHIN_4_CM, strict=_CUBE_POSE),
    # The vector is for the logging policy only; an encoder of pixels ignores it.
    "cube-pixels": FieldWorld(
        env_id="worldloom/Cube-v0",
        historical=_WITHIN_4_CM,
        moderate=_WITHIN_4_CM,
        strict=_CUBE_POSE,
        env_kwargs={"observation": "both"},
    ),
}

# The policy that chooses the goals of each world and log. Protocols of weak logs do not name their log.
LOGS = {
    ("pusht", "weak"): "near-object",
    ("pusht", "expert"): "pusht-expert",
    ("two-room", "weak"): "directed-walk",
    ("two-room", "expert"): "two-room-expert",
    ("reacher", "weak"): "directed-walk",
    ("reacher", "expert"): "reacher-expert",
    ("point-maze", "weak"): "directed-walk",
    ("cube", "weak"): "cube-walk",
    ("cube", "expert"): "cube-expert",
    ("cube-pixels", "weak"): "cube-walk",
    ("cube-pixels", "expert"): "cube-expert",
}


def field_title(world: str, log: str, offset: int, rule: str) -> str:
    """Return the title of a protocol of the field's tables: `WORLD[-LOG]-OFFSET[-RULE]@1`.

    Weak logs and the historical rule are not named, as in `pusht-25@1`; others are, as in `pusht-expert-25-strict@1`.
    """
    parts = [world, "" if log == "weak" else log, str(offset), "" if rule == "historical" else rule]
    return f"{'-'.join(part for part in parts if part)}@1"


def _register_field(world: str, log: str, policy: str) -> None:
    """Register the protocols of a world of the field's tables for one kind of log."""
    one = FIELD[world]
    for offset in one.offsets:
        pairs = field_title(world, log, offset, "historical").removesuffix("@1")
        for rule in RULES:
            success: SuccessRule | None = getattr(one, rule)
            if success is None:
                continue
            corrected = rule != "historical"
            register_protocol(
                Protocol(
                    name=field_title(world, log, offset, rule).removesuffix("@1"),
                    env_id=one.env_id,
                    env_kwargs=dict(one.env_kwargs),
                    goal_source="logged-policy",
                    splits={f"{offset} steps ahead": Split(goal_offset=offset, start_steps=one.start_steps)},
                    policy=policy,
                    success=success,
                    count_solved=not corrected,
                    crossing=one.crossing if corrected else None,
                    pairs_of=pairs if corrected else "",
                    budget=BUDGETS[offset],
                )
            )


for (_world, _log), _policy in LOGS.items():
    _register_field(_world, _log, _policy)
