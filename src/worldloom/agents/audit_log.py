"""The audit log: each decision of an agent, its inputs, prediction, chosen plan and broken guardrails, and the outcome.

A log is a directory. `log.jsonl` is a hash-chained file (see `worldloom.core.chain`) with one entry per event. The
entry of a decision is on disk before the agent acts on the decision. `situations/` contains all inputs of each
decision, in a file named by the digest in the decision's entry, so that the decision can be reproduced.
"""

import copy
import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from jaxtyping import Float
from torch import Tensor

from worldloom.agents.audit_entries import FORGED, FORMAT, DecidedBody, check_entry, parse_body
from worldloom.agents.situation import Situation
from worldloom.core.chain import Chain, Entry, canonical, entries
from worldloom.core.closing import Closing
from worldloom.core.errors import DataError
from worldloom.core.files import read_bytes, storage_errors, write_atomic
from worldloom.core.progress import SILENT, Progress
from worldloom.core.seams import WorldModel
from worldloom.core.types import Context, Goal, Observations, Plan
from worldloom.guardrails import BoundRail, seen_violations

_LOG, _SITUATIONS = "log.jsonl", "situations"
_LARGEST = 2**30  # bytes of a situation
_ROUNDING = 1e-4  # of an observation's encoding, relative
_NOT_REPEATED = ("event", "part", "situation", "happened")  # of an entry
_OF_CONTEXT = ("latents", "actions", "taken")
_TENSORS = {  # of a situation: dtype and number of axes
    "pixels": (torch.uint8, 4),
    "vector": (torch.float32, 2),
    "context/latents": (torch.float32, 3),
    "context/actions": (torch.float32, 3),
    "context/taken": (torch.float32, 2),
    "goal": (torch.float32, 2),
    "initial": (torch.float32, 4),
    "safe": (torch.float32, 2),
    "stages": (torch.int64, 1),
    "randomness": (torch.uint8, 1),
    "stretch": (torch.float64, 1),
}
_OF_SITUATION = ("goal", "initial", "safe", "stages", "randomness")


def log_path(folder: Path | str) -> Path:
    """Return the path of an audit log's hash chain."""
    return Path(folder) / _LOG


def log_entries(folder: Path | str, *, progress: Progress = SILENT) -> Iterator[Entry]:
    """Read the entries of an audit log; each entry is verified before it is yielded.

    Raises:
        StorageError: the folder has no log.
        DataError: an entry does not verify, has an unknown format version, or lacks a key.
    """
    for entry in entries(log_path(folder), progress=progress):
        try:
            check_entry(entry)
        except DataError as error:
            raise DataError(f"{folder}: {error}") from None
        yield entry


class AuditLog(Closing):
    """Writes the decisions of one agent; `about` describes the agent: its run, model, method, rule set and margins.

    `chain` is the log's hash chain, with its head.

    Raises:
        StorageError: another process is writing to the log, or the storage fails.
        DataError: the log does not verify.
    """

    def __init__(
        self, folder: Path | str, model: WorldModel, guardrails: Sequence[BoundRail] = (), *, about: Mapping[str, Any]
    ) -> None:
        self.folder, self._model, self._guardrails = Path(folder), model, tuple(guardrails)
        with storage_errors(self.folder):
            (self.folder / _SITUATIONS).mkdir(parents=True, exist_ok=True)
        self.chain = Chain(log_path(self.folder))
        self._before: tuple[Situation, Plan] | None = None
        self._part: dict[str, str] = {}
        self.chain.append({"event": "opened", "format": FORMAT, **about})

    def part(self, name: str) -> "AuditLog":
        """Return a writer to the same log whose entries name this part of the agent."""
        other = copy.copy(self)
        other._before, other._part = None, {"part": name}
        return other

    def begin(self, goal: Goal) -> None:
        """Record the start of episodes and the digest of their goals."""
        self._before = None
        pictures = [part for part in (goal.observations.pixels, goal.observations.vector) if part is not None]
        self._write("began", {"environments": len(pictures[0]), "goal": _digest(pictures)})

    def select(self, places: Sequence[int]) -> None:
        """Record which environments continue."""
        places = list(places)
        if self._before is not None:
            situation, plan = self._before
            self._before = situation[places], plan[places]
        self._write("went on", {"environments": places})

    def ended(
        self, places: Sequence[int], here: Float[Tensor, "E D"], outcomes: Sequence[str], *, block: int, whole: bool
    ) -> None:
        """Record how the episodes of some environments ended, with their final latents `here`.

        The episodes ended in block `block` of the last plan. The distance between the final and the predicted latents
        is recorded only if the complete block was executed (`whole`).
        """
        happened = None
        if self._before is not None:
            situation, plan = self._before
            rows = list(places)
            happened = happened_after(self._guardrails, situation[rows], plan[rows], here, block=block, whole=whole)
        self._write("ended", {"environments": list(places), "outcomes": list(outcomes), "happened": happened})

    def decided(self, observations: Observations, situation: Situation, plan: Plan, *, block: int, whole: bool) -> None:
        """Record a decision, and the outcome of the previous decision.

        `block` is the last block of the previous plan (if any) that was executed, `whole` whether it was executed to
        its end.
        """
        self._write("decided", {
            "situation": self._keep(observations, situation),
            **_decision(situation, plan),
            "happened": self._happened(situation, block=block, whole=whole),
        })  # fmt: skip
        self._before = situation, plan

    def close(self) -> None:
        """Close the log."""
        self.chain.close()

    def _happened(self, now: Situation, *, block: int, whole: bool) -> dict[str, Any] | None:
        """Return the latent distance of the outcome from the last plan's prediction, and the observed violations."""
        if self._before is None or len(self._before[0].goal) != len(now.goal):
            return None
        here = now.context.latents[:, -1]
        return happened_after(self._guardrails, *self._before, here, block=block, whole=whole)

    def _write(self, event: str, body: Mapping[str, Any]) -> None:
        self.chain.append({"event": event, **self._part, **body})

    def _keep(self, observations: Observations, situation: Situation) -> str:
        """Write the situation under its digest, and return the digest."""
        parts: dict[str, Tensor | None] = {
            "pixels": observations.pixels,
            "vector": observations.vector,
            **{f"context/{name}": getattr(situation.context, name) for name in _OF_CONTEXT},
            **{name: getattr(situation, name) for name in _OF_SITUATION},
            "stretch": torch.tensor([situation.stretch], dtype=torch.float64),
        }
        tensors = {name: part.detach().cpu().contiguous().clone() for name, part in parts.items() if part is not None}
        payload = safetensors.torch.save(tensors)
        digest = hashlib.sha256(payload).hexdigest()
        path = self.folder / _SITUATIONS / f"{digest}.safetensors"
        if not path.is_file():
            write_atomic(path, lambda temporary: temporary.write_bytes(payload))
        return digest


def happened_after(
    guardrails: Sequence[BoundRail],
    before: Situation,
    plan: Plan,
    here: Float[Tensor, "B D"],
    *,
    block: int,
    whole: bool,
) -> dict[str, Any]:
    """Return the outcome of a plan as an entry records it; the plan was made in the situation `before`.

    `here` are the latents that were observed in or at the end of block `block` of the plan. `gap` is their distance
    from the predicted latents, or None unless the `whole` block was executed. `seen` is by how much they break each
    guardrail.
    """
    with torch.inference_mode():
        found = seen_violations(guardrails, plan, block, before.context, here)
    gap = _numbers((here - plan.latents[:, block]).norm(dim=1)) if whole else None
    return {"gap": gap, "seen": {name: _numbers(violation) for name, violation in found.items()}}


def read_situation(
    folder: Path | str, entry: Entry, device: torch.device | str = "cpu"
) -> tuple[Observations, Situation]:
    """Return the observations and the other inputs of a decision.

    Raises:
        DataError: the entry does not record a decision, or its situation was changed.
        StorageError: the situation is missing.
    """
    if entry.body.get("event") != "decided":
        raise DataError(f"entry {entry.index} does not record a decision; choose an entry whose event is 'decided'")
    digest = parse_body(entry, DecidedBody).situation
    path = Path(folder) / _SITUATIONS / f"{digest}.safetensors"
    payload = read_bytes(path, _LARGEST)
    if hashlib.sha256(payload).hexdigest() != digest:
        raise DataError(
            f"{path} was changed: its digest differs from the one in the log. Keep the file and the log as evidence"
        )
    try:
        tensors = safetensors.torch.load(payload)
    except safetensors.SafetensorError as error:
        raise DataError(f"{path} is not a file of tensors ({error}); {FORGED}") from None
    needed = ("context/latents", "context/actions", "goal", "safe", "randomness", "stretch")
    if missing := [name for name in needed if name not in tensors]:
        raise DataError(f"{path} has no {' and no '.join(map(repr, missing))}; {FORGED}")
    for name, tensor in tensors.items():
        expected = _TENSORS.get(name)
        if (tensor.dtype, tensor.ndim) != expected:
            raise DataError(
                f"{path} has a tensor {name[:80]!r} of {tensor.dtype} with {tensor.ndim} axes; expected {expected}; "
                f"{FORGED}"
            )
    if tensors["stretch"].numel() != 1:
        raise DataError(f"{path} has {tensors['stretch'].numel()} values of 'stretch'; expected one; {FORGED}")
    there = {name: tensor if name == "randomness" else tensor.to(device) for name, tensor in tensors.items()}
    observations = Observations(pixels=tensors.get("pixels"), vector=tensors.get("vector"))
    around: dict[str, Any] = {name: there.get(f"context/{name}") for name in _OF_CONTEXT}
    parts: dict[str, Any] = {name: there.get(name) for name in _OF_SITUATION}
    return observations, Situation(context=Context(**around), stretch=float(there["stretch"]), **parts)


def damaged_situations(folder: Path | str, *, progress: Progress = SILENT) -> list[int]:
    """Return the indices of the entries whose situation is missing or was changed."""
    damaged = []
    for entry in log_entries(folder, progress=progress):
        if entry.body.get("event") != "decided":
            continue
        digest = parse_body(entry, DecidedBody).situation
        path = Path(folder) / _SITUATIONS / f"{digest}.safetensors"
        if not path.is_file() or _file_digest(path) != digest:
            damaged.append(entry.index)
    return damaged


def unrecorded_situations(folder: Path | str) -> int:
    """Return the number of situations that no entry names.

    A process that is killed after it wrote a situation, but before it wrote the entry, leaves such a situation behind.
    So does the removal of an entry.
    """
    named = {f"{entry.body['situation']}.safetensors" for entry in log_entries(folder) if "situation" in entry.body}
    with storage_errors(Path(folder)):
        return sum(path.name not in named for path in (Path(folder) / _SITUATIONS).glob("*.safetensors"))


def replay(
    folder: Path | str, entry: Entry, decide: Callable[[Situation], Plan], model: WorldModel
) -> tuple[Plan, list[str]]:
    """Repeat a decision with `decide`, the method of a `PlanningAgent`.

    Returns the plan, and the names of the entry's values that are not identical, bit for bit, to those of the repeated
    decision. "observation" is one of the names if the model's encoding of the recorded observation differs from the
    recorded latents by more than rounding. The entry's `happened` is not compared, because it depends on the previous
    decision.

    Raises:
        DataError: the entry does not record a decision, its situation was changed, or a deadline cut the decision
            short.
    """
    observations, situation = read_situation(folder, entry, model.device)
    if parse_body(entry, DecidedBody).cut_short:
        raise DataError(
            f"a deadline ended the search of the decision in entry {entry.index}, so the decision depends on the clock "
            f"and cannot be repeated. Use 'worldloom audit show' to see the recorded plan"
        )
    plan = decide(situation)
    again = _decision(situation, plan)
    recorded = {name: value for name, value in entry.body.items() if name not in _NOT_REPEATED}
    names = sorted(again.keys() | recorded.keys())
    differ = [name for name in names if canonical([again.get(name)]) != canonical([recorded.get(name)])]
    here = situation.context.latents[:, -1]
    with torch.inference_mode():
        encoded = model.encode(observations.to(model.device))
    alike = encoded.shape == here.shape and ((encoded - here).norm(dim=1) <= _ROUNDING * here.norm(dim=1)).all()
    if not bool(alike):
        differ.append("observation")
    return plan, differ


def _decision(situation: Situation, plan: Plan) -> dict[str, Any]:
    """Return the part of an entry that describes a decision."""
    return {
        "actions": _digest([plan.actions]),
        "plan": _digest([plan.actions, plan.latents, *(plan.violations[name] for name in sorted(plan.violations))]),
        "first": [_numbers(row) for row in plan.actions[:, 0]],
        "cost": _numbers(plan.cost),
        "violations": {name: _numbers(violation.amax(dim=1)) for name, violation in plan.violations.items()},
        "refused": list(plan.refused),
        "cut short": plan.cut_short,
        "stretch": situation.stretch,
    }


def _file_digest(path: Path) -> str:
    with storage_errors(path), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest(tensors: Sequence[Tensor]) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(str((tuple(tensor.shape), str(tensor.dtype))).encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _numbers(values: Tensor) -> list[float | None]:
    """Return values for JSON; values that are not finite become None."""
    return [value if math.isfinite(value) else None for value in values.detach().cpu().double().flatten().tolist()]
