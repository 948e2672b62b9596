"""Workflow: runs, sessions, and the jobs that make and use them."""

from worldloom.workflow.calibration import calibrate, uses_margins
from worldloom.workflow.deployment import check_plant, read_goal, store_report
from worldloom.workflow.jobs import collect, evaluate, evaluate_together, explore, report_path, train
from worldloom.workflow.memories import encode_picture, remember
from worldloom.workflow.network import (
    CoordinatorConfig,
    NodeConfig,
    come_back,
    coordinate,
    leave,
    make_keys,
    pilot,
    take_over,
    take_part,
)
from worldloom.workflow.replay import replay_entry
from worldloom.workflow.run import Run, find_runs
from worldloom.workflow.session import Session
from worldloom.workflow.simulation import ConsortiumConfig, simulate
from worldloom.workflow.single_plan import plan_once

__all__ = [
    "ConsortiumConfig",
    "CoordinatorConfig",
    "NodeConfig",
    "Run",
    "Session",
    "calibrate",
    "check_plant",
    "collect",
    "come_back",
    "coordinate",
    "encode_picture",
    "evaluate",
    "evaluate_together",
    "explore",
    "find_runs",
    "leave",
    "make_keys",
    "pilot",
    "plan_once",
    "read_goal",
    "remember",
    "replay_entry",
    "report_path",
    "simulate",
    "store_report",
    "take_over",
    "take_part",
    "train",
    "uses_margins",
]
