"""Replays decisions from a run's audit log."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from worldloom.agents import (
    METHODS,
    AgentDescription,
    AgentParts,
    PlannedMethod,
    Situation,
    log_entries,
    parse_body,
    read_situation,
    replay,
)
from worldloom.core.chain import Entry
from worldloom.core.config import parse_component
from worldloom.core.errors import DataError
from worldloom.core.hardware import use_threads
from worldloom.core.progress import SILENT, Progress
from worldloom.core.types import ModelSpec, Plan
from worldloom.guardrails import Margins, RuleLayer, RuleSet
from worldloom.workflow.run import Run

_LARGEST_NUMBER = 100_000  # in the settings of a recorded method
_LARGEST_SEARCH = 2**31  # values that a recorded search may hold at once


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
        f"{folder} has no entry {index}, or the entry comes before the first 'opened' entry, which describes the "
        f"agent; 'worldloom audit show' lists the entries"
    )


def replay_entry(
    folder: Path, index: int, *, run: Path | None = None, progress: Progress = SILENT
) -> tuple[Plan, bool, dict[str, Any]]:
    """Replay a logged decision; return the plan, whether it is bit-identical to the recorded one, and the entry's body.

    The agent is built from the method, the rule set's layers and the margins in the log. `run` is the run folder, if it
    has been moved since.

    Raises:
        DataError: the entry is not a decision, the run now contains a different model, or a part of the log is missing,
            wrong or too large.
        StorageError: the run or the recorded situation is missing.
    """
    entry, opened = read_entry(folder, index, progress=progress)
    about = parse_body(opened, AgentDescription)
    _, situation = read_situation(folder, entry)
    there = Run.open(run or about.run)
    if there.model.spec.fingerprint != about.model:
        raise DataError(
            f"the model in {there.path} is not the model that made the decision; pass that model's run with --run"
        )
    layers, values = tuple(RuleLayer.parse(layer) for layer in about.layers), about.margins
    rules = there.bind(RuleSet(layers=layers)) if layers else None
    margins = None
    if rules is not None and values is not None:
        if len(values) != len(rules.rule_set.titles) or len({len(row) for row in values}) > 1:
            raise DataError(
                f"entry {opened.index} has {len(values)} rows of margins; expected {len(rules.rule_set.titles)}, one "
                f"of the same length for each guardrail. The log was not written by worldloom, or was forged"
            )
        found = torch.tensor(values, dtype=torch.float32)
        margins = Margins(values=found, risk=rules.rule_set.risk or 0.5, episodes=0)
    method = parse_component(METHODS, about.method)
    if not isinstance(method, PlannedMethod):
        raise DataError(
            f"entry {opened.index} names the method {method.name!r}, which does not plan; the log was not written by "
            f"worldloom, or was forged"
        )
    _check_sizes(method, situation, there.model.spec, there.device)
    parts = AgentParts(heads=there.heads, rules=rules, margins=margins)
    agent = method.build(parts, seed=0).parts
    name = entry.body.get("part", "")
    if name not in agent:
        raise DataError(f"entry {index} names the part {name!r} of the agent; expected one of {sorted(agent)}")
    with use_threads(about.threads):  # the last bit of a sum depends on the number of threads
        plan, same = replay(folder, entry, agent[name].decide, there.device)
    return plan, same, dict(entry.body)


def _check_sizes(method: PlannedMethod, situation: Situation, spec: ModelSpec, device: torch.device) -> None:
    """Check that a recorded situation fits the model, and that the recorded search fits into memory.

    Raises:
        DataError: a tensor of the situation has a wrong shape, or the search is too large.
    """
    batch, context = len(situation.goal), situation.context
    expected: dict[str, tuple[Tensor | None, tuple[int, ...]]] = {
        "context/latents": (context.latents, (batch, spec.context, spec.latent_dim)),
        "context/actions": (context.actions, (batch, spec.context - 1, spec.block_size)),
        "context/taken": (context.taken, (batch, spec.action.size)),
        "goal": (situation.goal, (batch, spec.latent_dim)),
        "safe": (situation.safe, (batch, spec.latent_dim)),
        "stages": (situation.stages, (batch,)),
        "randomness": (situation.randomness, tuple(torch.Generator(device).get_state().shape)),
    }
    if (initial := situation.initial) is not None:
        expected["initial"] = initial, (batch, *initial.shape[1:2], method.horizon, spec.block_size)
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise DataError(
                f"the recorded {name!r} has shape {tuple(tensor.shape)}; expected {shape} for this model and method. "
                f"The log was not written by worldloom, or was forged"
            )
    values = method.model_dump(mode="json")
    own = [value for value in values.values() if isinstance(value, int)]
    nested = [number for value in values.values() for number in _whole_numbers(value)]
    size = batch * max(own) * max(nested, default=1) * (spec.latent_dim + spec.block_size)
    if max(*own, *nested) > _LARGEST_NUMBER or size > _LARGEST_SEARCH:
        raise DataError(
            f"the recorded search is too large to repeat: the largest number in the settings is {max(own)}, in "
            f"nested settings {max(nested, default=1)}, for {batch} environments. If you trust the log, repeat the "
            f"decision in Python"
        )


def _whole_numbers(values: Any) -> list[int]:
    """Return all whole numbers in nested mappings and lists."""
    parts = values.values() if isinstance(values, Mapping) else values if isinstance(values, list) else ()
    found = [number for part in parts for number in _whole_numbers(part)]
    return [values] if isinstance(values, int) else found
