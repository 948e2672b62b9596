"""Evaluation: benchmarks with named conventions, success rates with intervals, and results as files."""

from worldloom.evaluation.catalogue import (
    FIELD,
    LOGS,
    PROTOCOLS,
    RULES,
    FieldWorld,
    default_protocol,
    field_title,
    gym_protocol,
    register_protocol,
)
from worldloom.evaluation.foreign import ForeignPolicy, InfoPolicy, LentPolicy
from worldloom.evaluation.goals import draw_tasks
from worldloom.evaluation.intervals import wilson_interval
from worldloom.evaluation.protocol import Changes, Condition, Crossing, Limit, Protocol, Split, SuccessRule
from worldloom.evaluation.results import (
    DistanceBins,
    EpisodeResult,
    Latency,
    PooledResults,
    PooledRow,
    Recording,
    Results,
    Row,
    SuccessRate,
    pool,
    table_rows,
)
from worldloom.evaluation.runner import Witness, evaluate, explore
from worldloom.evaluation.world import ActingRules, Worlds, naming, open_world

__all__ = [
    "FIELD",
    "LOGS",
    "PROTOCOLS",
    "RULES",
    "ActingRules",
    "Changes",
    "Condition",
    "Crossing",
    "DistanceBins",
    "EpisodeResult",
    "FieldWorld",
    "ForeignPolicy",
    "InfoPolicy",
    "Latency",
    "LentPolicy",
    "Limit",
    "PooledResults",
    "PooledRow",
    "Protocol",
    "Recording",
    "Results",
    "Row",
    "Split",
    "SuccessRate",
    "SuccessRule",
    "Witness",
    "Worlds",
    "default_protocol",
    "draw_tasks",
    "evaluate",
    "explore",
    "field_title",
    "gym_protocol",
    "naming",
    "open_world",
    "pool",
    "register_protocol",
    "table_rows",
    "wilson_interval",
]
