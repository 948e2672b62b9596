"""Replaying decisions from the audit log of a run."""

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
    """Return an entry of a log, and the last entry before it that describes the agent.

    Raises:
        StorageError: there is no log.
        DataError: there is no such entry, or an entry up to it does not verify.
    """
    opened: Entry | None = None
    for entry in log_entries(folder, progress=progress):
        if entry.body.get("event") == "opened":
            opened = entry
        if entry.index == index and opened is not None:
            return entry, opened
    raise DataError(f"{folder} has no entry {index}; 'worldloom audit show' lists the entries")


def replay_entry(
    folder: Path, index: int, *, run: Path | None = None, progress: Progress = SILENT
) -> tuple[Plan, bool, dict[str, Any]]:
    """Replay a decision of a log; return its plan, whether it is equal bit for bit, and the body of its entry.

    The agent is built from what the log records: the method, the layers of the rule set, and the margins. `run` is the
    run folder, if it was moved since.

    Raises:
        DataError: the entry is not a decision, or the run holds another model now.
        StorageError: the run or the recorded situation is missing.
    """
    entry, opened = read_entry(folder, index, progress=progress)
    about = opened.body
    there = Run.open(run or about["run"])
    if there.model.spec.fingerprint != about["model"]:
        raise DataError(
            f"the model in {there.path} is not the model that made the decision; name the run of that model with --run"
        )
    layers, values = tuple(RuleLayer.parse(layer) for layer in about["layers"]), about["margins"]
    rules = there.bind(RuleSet(layers=layers)) if layers else None
    margins = None
    if rules is not None and values is not None:
        values = torch.tensor(values, dtype=torch.float32)
        margins = Margins(values=values, risk=rules.rule_set.risk or 0.5, episodes=0)
    torch.set_num_threads(about["threads"])  # how sums are split among threads decides their last bit
    parts = AgentParts(heads=there.heads, rules=rules, margins=margins)
    agent = parse_component(METHODS, about["method"]).build(parts, seed=0)
    plan, same = replay(folder, entry, agent.parts[entry.body.get("part", "")].decide, there.device)
    return plan, same, dict(entry.body)
