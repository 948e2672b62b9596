"""Evaluation: named protocols, success with intervals, results and reports."""

from worldloom.evaluation.evaluate import Explorer, Exploring, Narrowing, Timed, Witness, evaluate, explore
from worldloom.evaluation.foreign import ForeignPolicy, InfoPolicy, LentPolicy
from worldloom.evaluation.intervals import wilson_interval
from worldloom.evaluation.protocols import (
    PROTOCOLS,
    Condition,
    Limit,
    Protocol,
    Split,
    SuccessRule,
    default_protocol,
    gym_protocol,
    register_protocol,
)
from worldloom.evaluation.results import (
    DistanceBins,
    EpisodeResult,
    Latency,
    PooledResults,
    PooledRow,
    Rate,
    Recording,
    Results,
    Row,
    pool,
    table_rows,
)

__all__ = [
    "PROTOCOLS",
    "Condition",
    "DistanceBins",
    "EpisodeResult",
    "Explorer",
    "Exploring",
    "ForeignPolicy",
    "InfoPolicy",
    "Latency",
    "LentPolicy",
    "Limit",
    "Narrowing",
    "PooledResults",
    "PooledRow",
    "Protocol",
    "Rate",
    "Recording",
    "Results",
    "Row",
    "Split",
    "SuccessRule",
    "Timed",
    "Witness",
    "default_protocol",
    "evaluate",
    "explore",
    "gym_protocol",
    "pool",
    "register_protocol",
    "table_rows",
    "wilson_interval",
]
