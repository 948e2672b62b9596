"""Audit logs of runs: shown, verified, and their decisions made again."""

from pathlib import Path
from typing import Any

import torch

from worldloom.agents import METHODS, log_path, replay
from worldloom.core.chain import Entry, entries
from worldloom.core.config import parse_component
from worldloom.core.errors import DataError
from worldloom.core.types import Plan
from worldloom.guardrails import Margins, RuleLayer, RuleSet
from worldloom.training import RunFolder
from worldloom.workflow.run import Run


def read_entry(folder: Path, index: int) -> tuple[Entry, Entry]:
    """Return an entry of a log, and the last one before it that says of which agent.

    Raises:
        StorageError: there is no log.
        DataError: there is no such entry, or one up to it does not verify.
    """
    opened: Entry | None = None
    for entry in entries(log_path(folder)):
        if entry.body.get("event") == "opened":
            opened = entry
        if entry.index == index and opened is not None:
            return entry, opened
    raise DataError(f"{folder} has no entry {index} of an agent; worldloom audit show lists them")


def replay_entry(folder: Path, index: int, *, run: Path | None = None) -> tuple[Plan, bool, dict[str, Any]]:
    """Make a decision of a log again; return it, whether it is the same bit for bit, and what the log says of it.

    The agent is built from what the log records: method, layers of the rule set and margins. `run` names the run if it
    was moved since.

    Raises:
        DataError: the entry is no decision, or of another model than the run has now.
        StorageError: the run or the situation is gone.
    """
    entry, opened = read_entry(folder, index)
    about = opened.body
    there = Run(RunFolder.open(run or about["run"]))
    if there.model.spec.fingerprint != about["model"]:
        raise DataError(f"{there.path} holds another model than the one that decided; name the run that does (--run)")
    layers = tuple(RuleLayer.parse(layer) for layer in about["layers"])
    rules, margins = RuleSet(layers=layers) if layers else None, None
    if rules is not None and about["margins"] is not None:
        values = torch.tensor(about["margins"], dtype=torch.float32)
        margins = Margins(values=values, risk=rules.risk or 0.5, episodes=0)
    torch.set_num_threads(about["threads"])  # how sums are split among threads decides their last bit
    agent = parse_component(METHODS, about["method"]).build(there.under(rules, margins), seed=0)
    plan, same = replay(folder, entry, agent.parts[entry.body.get("part", "")], there.device)
    return plan, same, dict(entry.body)
