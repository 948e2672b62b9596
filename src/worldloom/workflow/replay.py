"""Replays decisions from a run's audit log."""

from pathlib import Path
from typing import Any

import torch

from worldloom.agents import METHODS, AgentParts, log_entries, replay
from worldloom.core.chain import Entry
from worldloom.core.config import parse_component
from worldloom.core.errors import DataError
from worldloom.core.progress import SILENT, Progress
from worldloom.core.types import Plan
from worldloom.guardrails import Margins, RuleLayer, RuleSet
from worldloom.workflow.run import Run


def read_entry(folder: Path, index: int, *, progress: Progress = SILENT) -> tuple[Entry, Entry]:
    """Return an entry of a log, and the last earlier entry that describes the agent.

    Raises:
        StorageError: the log does not exist.
        DataError: the entry does not exist, or this entry or an earlier one does not verify.
    """
    opened: Entry | None = None
    for entry in log_entries(folder, progress=progress):
        if entry.body.get("event") == "opened":
            opened = entry
        if entry.index == index and opened is not None:
            return entry, opened
    raise DataError(
        f"{folder} has no entry {index} that follows a description of the agent; 'worldloom audit show' lists the "
        "entries"
    )


def replay_entry(
    folder: Path, index: int, *, run: Path | None = None, progress: Progress = SILENT
) -> tuple[Plan, bool, dict[str, Any]]:
    """Replay a decision of a log; return its plan, whether the plan is bit-identical, and the body of its entry.

    The agent is built from the method, the rule set's layers and the margins in the log. `run` is the run folder, if it
    has been moved since.

    Raises:
        DataError: the entry is not a decision, or the run now contains a different model.
        StorageError: the run or the recorded situation is missing.
    """
    entry, opened = read_entry(folder, index, progress=progress)
    about = opened.body
    there = Run.open(run or about["run"])
    if there.model.spec.fingerprint != about["model"]:
        raise DataError(
            f"the model in {there.path} is not the model that made the decision; pass that model's run with --run"
        )
    layers, values = tuple(RuleLayer.parse(layer) for layer in about["layers"]), about["margins"]
    rules = there.bind(RuleSet(layers=layers)) if layers else None
    margins = None
    if rules is not None and values is not None:
        values = torch.tensor(values, dtype=torch.float32)
        margins = Margins(values=values, risk=rules.rule_set.risk or 0.5, episodes=0)
    torch.set_num_threads(about["threads"])  # the last bit of a sum depends on the number of threads
    parts = AgentParts(heads=there.heads, rules=rules, margins=margins)
    agent = parse_component(METHODS, about["method"]).build(parts, seed=0)
    plan, same = replay(folder, entry, agent.parts[entry.body.get("part", "")].decide, there.device)
    return plan, same, dict(entry.body)
