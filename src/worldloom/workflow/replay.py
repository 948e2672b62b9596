"""Replays decisions from a run's audit log."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from worldloom.agents import (
    FORGED,
    METHODS,
    AgentDescription,
    AgentParts,
    DecidedBody,
    EntryBody,
    PlannedMethod,
    PlanningAgent,
    Situation,
    WentOnBody,
    happened_after,
    log_entries,
    parse_body,
    read_situation,
    replay,
)
from worldloom.core.chain import Entry, canonical
from worldloom.core.config import parse_component
from worldloom.core.errors import DataError, StorageError
from worldloom.core.hardware import use_threads
from worldloom.core.progress import SILENT, Progress
from worldloom.core.types import ModelSpec, Observations, Plan
from worldloom.guardrails import BoundRail, Margins, RuleLayer, RuleSet
from worldloom.workflow.run import Run

_LARGEST_NUMBER = 100_000  # in the settings of a recorded method
_INPUTS = "whether the inputs were true: the observation, the goal, the history, the random numbers and the times"
_LARGEST_SEARCH = 2**31  # values that a recorded search may hold at once
_LONGEST_SEARCH = 10**8  # predicted steps of a recorded search
_MOST_INITIAL = 1024  # plans that a recorded search may start from
_MOST_PARTS = 256  # of each list or mapping in a recorded rule layer


@dataclass(frozen=True, kw_only=True)
class Replayed:
    """A repeated decision.

    Attributes:
        plan: the plan of the repetition.
        body: the body of the recorded entry.
        differ: the names of the entry's values that the repetition does not reproduce bit for bit.
        unchecked: descriptions of what a repetition cannot confirm.
    """

    plan: Plan
    body: Mapping[str, Any]
    differ: Sequence[str]
    unchecked: Sequence[str]


@dataclass(kw_only=True)
class _Place:
    """A decision in its log: its entry, the 'opened' entry that describes the agent, and the previous decision's entry.

    `selections` are the indices of the environments that went on after the previous decision, one list per time that
    environments ended.
    """

    entry: Entry
    opened: Entry
    previous: Entry | None
    selections: Sequence[Sequence[int]]


def _find(folder: Path, index: int, progress: Progress) -> _Place:
    """Return the entry `index` of a log with the entries that it depends on.

    Raises:
        StorageError: the log does not exist.
        DataError: the entry does not exist, or this entry or an earlier one does not verify.
    """
    opened: Entry | None = None
    previous: dict[str, Entry] = {}  # the last decision of each part of the agent in its current episodes
    selections: dict[str, list[list[int]]] = {}
    for entry in log_entries(folder, progress=progress):
        body = parse_body(entry, EntryBody)
        if body.event == "opened":
            opened, previous = entry, {}
        if entry.index == index and opened is not None:
            return _Place(
                entry=entry,
                opened=opened,
                previous=previous.get(body.part),
                selections=selections.get(body.part, []),
            )
        if body.event == "began":
            previous.pop(body.part, None)
        elif body.event == "decided":
            previous[body.part], selections[body.part] = entry, []
        elif body.event == "went on":
            selections.setdefault(body.part, []).append(parse_body(entry, WentOnBody).environments)
    raise DataError(
        f"{folder} has no entry {index}, or the entry comes before the first 'opened' entry, which describes the "
        f"agent; 'worldloom audit show' lists the entries"
    )


def replay_entry(folder: Path, index: int, *, run: Path | None = None, progress: Progress = SILENT) -> Replayed:
    """Repeat a decision of a log, and compare it with its entry.

    The agent is built from the method, the rule set's layers and the margins in the log. `run` is the run folder, if it
    has been moved since. The previous decision is repeated too, because the entry also records its outcome.

    Raises:
        DataError: the entry is not a decision, the run now contains a different model, or a part of the log is missing,
            wrong or too large.
        StorageError: the run or the recorded situation is missing.
    """
    place = _find(folder, index, progress)
    entry, opened = place.entry, place.opened
    about = parse_body(opened, AgentDescription)
    observations, situation = read_situation(folder, entry)
    if _most_parts(about.layers) > _MOST_PARTS:
        raise DataError(f"a rule layer in entry {opened.index} has more than {_MOST_PARTS} parts in one list; {FORGED}")
    try:
        there = Run.open(run or about.run)
    except (OSError, ValueError) as error:  # no file can have the recorded path
        raise StorageError(
            f"the run of entry {opened.index} cannot be opened ({error}); pass its folder with --run"
        ) from None
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
                f"of the same length for each guardrail; {FORGED}"
            )
        found = torch.tensor(values, dtype=torch.float32)
        margins = Margins(values=found, risk=rules.rule_set.risk or 0.5, episodes=0)
    method = parse_component(METHODS, about.method)
    if not isinstance(method, PlannedMethod):
        raise DataError(f"entry {opened.index} names the method {method.name!r}, which does not plan; {FORGED}")
    _check_sizes(method, observations, situation, there.model.spec, there.device)
    parts = AgentParts(heads=there.heads, rules=rules, margins=margins)
    agent = method.build(parts, seed=0).parts
    name = parse_body(entry, EntryBody).part
    if name not in agent:
        raise DataError(f"entry {index} names the part {name!r} of the agent; expected one of {sorted(agent)}")
    unchecked = [_INPUTS, f"the values in entry {opened.index} that only inform readers, such as the owners of rules"]
    with use_threads(about.threads):  # the last bit of a sum depends on the number of threads
        plan, differ = replay(folder, entry, agent[name].decide, there.model)
        happened: Mapping[str, Any] | None = None
        if place.previous is not None:
            if parse_body(place.previous, DecidedBody).cut_short:
                unchecked.append("'happened', because a deadline ended the previous decision")
                happened = entry.body["happened"]
            else:
                here = situation.context.latents[:, -1].to(there.device)
                happened = _happened(folder, place, method, agent[name], there, method.rails(parts), here)
    if canonical([happened]) != canonical([entry.body["happened"]]):
        differ = [*differ, "happened"]
    return Replayed(plan=plan, body=entry.body, differ=differ, unchecked=unchecked)


def _happened(
    folder: Path,
    place: _Place,
    method: PlannedMethod,
    agent: PlanningAgent,
    run: Run,
    rails: Sequence[BoundRail],
    here: Tensor,
) -> dict[str, Any] | None:
    """Repeat the previous decision, and return what happened after it (see `happened_after`); `here` is the new latent.

    Returns None if the previous decision was for another number of environments.

    Raises:
        DataError: the previous decision does not fit the model, or it lacks an environment that went on after it.
    """
    assert place.previous is not None
    observations, before = read_situation(folder, place.previous)
    _check_sizes(method, observations, before, run.model.spec, run.device)
    plan, _ = replay(folder, place.previous, agent.decide, run.model)
    before = before.to(run.device)
    for environments in place.selections:
        if max(environments, default=0) >= len(before.goal):
            raise DataError(
                f"after entry {place.previous.index}, the environments {environments} went on, but that decision is "
                f"for only {len(before.goal)} environments; {FORGED}"
            )
        before, plan = before[environments], plan[environments]
    if len(before.goal) != len(here):
        return None
    block, whole = agent.followed
    return happened_after(rails, before, plan, here, block=block, whole=whole)


def _check_sizes(
    method: PlannedMethod, observations: Observations, situation: Situation, spec: ModelSpec, device: torch.device
) -> None:
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
    seen = spec.observation
    if seen.pixels is not None:
        expected["pixels"] = observations.pixels, (batch, *seen.pixels)
    if seen.vector:
        expected["vector"] = observations.vector, (batch, seen.vector)
    for name, (tensor, shape) in expected.items():
        if tensor is None and name in ("pixels", "vector"):
            raise DataError(f"the recorded observation has no {name}, but the model needs it; {FORGED}")
        if tensor is not None and tuple(tensor.shape) != shape:
            raise DataError(
                f"the recorded {name!r} has shape {tuple(tensor.shape)}; expected {shape} for this model and method; "
                f"{FORGED}"
            )
    values = method.model_dump(mode="json")
    own = [value for value in values.values() if isinstance(value, int)]
    nested = [number for value in values.values() for number in _whole_numbers(value)]
    size = batch * max(own) * max(nested, default=1) * (spec.latent_dim + spec.block_size)
    # The two largest numbers of a solver are its samples and iterations, or what corresponds to them.
    steps = batch * max(own) * math.prod(sorted(nested)[-2:])
    starts = 0 if initial is None else initial.shape[1]
    too_large = max(*own, *nested) > _LARGEST_NUMBER or size > _LARGEST_SEARCH
    if too_large or steps > _LONGEST_SEARCH or starts > _MOST_INITIAL:
        raise DataError(
            f"the recorded search is too large to repeat: the largest number in the settings is {max(own)}, in "
            f"nested settings {max(nested, default=1)}, for {batch} environments. If you trust the log, repeat the "
            f"decision in Python"
        )


def _most_parts(values: Any) -> int:
    """Return the length of the longest of nested mappings and lists."""
    parts = values.values() if isinstance(values, Mapping) else values if isinstance(values, list) else ()
    return max([len(parts), *(_most_parts(part) for part in parts)])


def _whole_numbers(values: Any) -> list[int]:
    """Return all whole numbers in nested mappings and lists."""
    parts = values.values() if isinstance(values, Mapping) else values if isinstance(values, list) else ()
    found = [number for part in parts for number in _whole_numbers(part)]
    return [values] if isinstance(values, int) else found
