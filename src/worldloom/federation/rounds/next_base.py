"""The next base as a deterministic function of a round's contributions, so that anyone can recompute it."""

import math
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from worldloom.core.chain import Entry
from worldloom.core.config import parse_component
from worldloom.core.errors import DataError, StorageError
from worldloom.core.files import read_bytes, read_document, storage_errors, write_document
from worldloom.core.progress import SILENT, Progress
from worldloom.federation.record.envelope import unseal_answer
from worldloom.federation.record.ledger import LedgerReader, read_ledger
from worldloom.federation.record.statements import SignedContribution
from worldloom.federation.rounds.aggregation import AGGREGATORS, Aggregate, Deltas, capped
from worldloom.federation.rounds.base import Base
from worldloom.federation.rounds.contribution import read_contribution
from worldloom.federation.rounds.outer import OUTER
from worldloom.federation.rounds.round_store import RoundStore
from worldloom.federation.rounds.secure_rounds import load_sum, reopen
from worldloom.federation.rules.constitution import Constitution

_MARK = "worldloom recomputed rounds"


@dataclass(frozen=True, kw_only=True, eq=False)
class NextBase:
    """The result of a round: the next base, the outer optimiser's momentum, and each owner's weight in the change."""

    base: Base
    momentum: Mapping[str, Tensor]
    weights: Mapping[str, float] = field(default_factory=dict)
    notes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


def aggregated(
    store: RoundStore, number: int, base: Base, constitution: Constitution, frames: Mapping[str, int]
) -> Aggregate | None:
    """Return the aggregated contributions to a round, or None if there are none.

    `frames` maps each included owner to its number of training frames.

    Raises:
        StorageError: a contribution is missing.
    """
    if not frames:
        return None
    sources = {owner: store.source(number, owner) for owner in sorted(frames)}
    power = {"equal": 0.0, "frames": 1.0, "sqrt-frames": 0.5}[constitution.weighting]
    # If `recompute` leaves out a member, the owners may be too few for the cap; the weights are then equal.
    cap = max(constitution.cap, 1 / len(sources))
    weights = capped({owner: float(frames[owner]) ** power for owner in sources}, cap)
    deltas = Deltas(sources=sources, weights=weights, shapes=base.shapes, cap=constitution.cap)
    return parse_component(AGGREGATORS, constitution.aggregation).aggregate(deltas)


def mean_of_sum(store: RoundStore, number: int, weights: Mapping[str, float]) -> Aggregate | None:
    """Return the mean of a round under secure aggregation, or None if no sum could be unmasked.

    `weights` maps each owner to its weight in the sum.

    Raises:
        CheckpointError: the sum is missing or damaged.
    """
    if not weights:
        return None
    total = math.fsum(weights.values())
    mean = {name: (tensor / total).float() for name, tensor in load_sum(store.path, number).items()}
    return Aggregate(tensors=mean, weights={owner: weight / total for owner, weight in sorted(weights.items())})


def next_base(
    store: RoundStore, number: int, base: Base, constitution: Constitution, change: Aggregate | None
) -> NextBase:
    """Return the base after a round; if `change` is None, the base does not change."""
    momentum = store.momentum(number)
    if change is None:
        return NextBase(base=base, momentum=momentum)
    moved, momentum = parse_component(OUTER, constitution.outer).step(base, change.tensors, momentum)
    return NextBase(base=moved, momentum=momentum, weights=change.weights, notes=change.notes)


def recompute(
    path: Path | str,
    constitution: Constitution,
    *,
    into: Path | str,
    without: Collection[str] = (),
    progress: Progress = SILENT,
) -> dict[int, str]:
    """Recompute all bases from the stored contributions, in another folder; return their fingerprints by round.

    With all members, the recomputed bases must equal the bases in the ledger. `without` excludes members. The
    contributions of the others stay as they are, although they were trained from bases that the excluded members had
    influenced. Each message is checked again. Under secure aggregation each sum is unmasked again, from the masked
    contributions and the shares that members sent.

    Raises:
        DataError: the ledger does not verify, a message, base or weight does not match it, or a member of a secure sum
            is excluded.
        StorageError: a contribution is missing, or the target has files that an earlier call did not write.
    """
    if os.path.realpath(path) == os.path.realpath(into):
        raise StorageError(f"{into} contains the rounds themselves; choose another folder for the result")
    stored, made = RoundStore(path), RoundStore(into)
    if made.ledger.exists():
        raise StorageError(f"{into} contains the rounds of a coordinator; choose another folder for the result")
    _mark(made.path)
    records = read_ledger(stored.ledger, constitution)
    again = _Recomputation(stored, made, records, constitution, without)
    published = {number: str(facts["fingerprint"]) for number, facts in records.bases().items()}
    if not published:
        raise DataError(f"{stored.ledger} has no base; check the path, or restore the file from a copy")
    # The folder of a successor has the base that its rounds start from, but no earlier rounds.
    begun = max((entry.body["round"] for entry in records.entries("succession")), default=0)
    base = stored.base(begun, named=published[begun])
    made.save(begun, base, {})
    found = {begun: base.fingerprint}
    # If a round ran both before and after a succession, the second run counts.
    # After a kill, the base of the last round may not have been recorded yet.
    woven = [entry for entry in records.entries("round") if entry.body["round"] >= begun]
    rounds = {entry.body["round"]: entry for entry in woven if entry.body["round"] + 1 in published}
    with progress.task("recomputing", len(rounds), "round") as task:
        for number, entry in sorted(rounds.items()):
            # Contributions start from the published base; without a member the recomputed one differs.
            given = base if base.fingerprint == published[number] else stored.base(number, named=published[number])
            change = (again.sum if constitution.secure_aggregation else again.aggregate)(entry, given)
            result = next_base(made, number, base, constitution, change)
            base = result.base
            made.save(number + 1, base, result.momentum)
            found[number + 1] = base.fingerprint
            if not without and base.fingerprint != published[number + 1]:
                raise DataError(
                    f"the base of round {number + 1} is not the result of the stored contributions; a contribution "
                    f"or the base was changed. Restore the folder from a copy"
                )
            if not without and dict(result.weights) != entry.body["facts"]["weights"]:
                raise DataError(
                    f"the weights of round {number} in the ledger are not the weights of the stored contributions; ask "
                    f"the coordinator why it recorded other weights"
                )
            task.advance()
    return found


def _mark(folder: Path) -> None:
    """Mark a folder as the target of a recomputation.

    Raises:
        StorageError: the folder is not empty and has no such mark, so its files could not be recomputed.
    """
    mark = folder / "recomputed.json"
    if mark.is_file():
        read_document(mark, _MARK)
        return
    with storage_errors(folder):
        if folder.exists() and any(folder.iterdir()):
            raise StorageError(f"{folder} has other content; choose an empty folder for the result")
    write_document(mark, _MARK, {})


@dataclass(frozen=True)
class _Recomputation:
    """Recomputes the change of a round from stored messages; `given` is the base that the contributions start from."""

    stored: RoundStore
    made: RoundStore
    records: LedgerReader
    constitution: Constitution
    without: Collection[str]

    def aggregate(self, entry: Entry, given: Base) -> Aggregate | None:
        number, frames = entry.body["round"], {}
        recorded = {facts["owner"]: facts for facts in self.records.of("contribution", number)}
        known, limit = self.constitution.member_names(), self.constitution.largest_bytes
        for owner in entry.body["facts"]["weights"]:
            if owner in self.without:
                continue
            data = read_bytes(self.stored.message(number, owner), limit)
            try:
                message = unseal_answer(data, kind="contribution", sender=owner, known=known, limit=limit)
            except DataError as error:
                raise DataError(
                    f"the contribution of {owner} to round {number} is damaged ({error}); restore "
                    f"{self.stored.message(number, owner)} from a copy"
                ) from None
            delta = read_contribution(message, number, given, self.constitution)
            if SignedContribution.statements(recorded[owner]) != [message.statement]:
                raise DataError(
                    f"the contribution of {owner} to round {number} does not match the ledger; restore it from a copy"
                )
            frames[owner] = recorded[owner]["frames"]
            self.made.save_delta(number, owner, delta)
        return aggregated(self.made, number, given, self.constitution, frames)

    def sum(self, entry: Entry, given: Base) -> Aggregate | None:
        number, weights = entry.body["round"], entry.body["facts"]["weights"]
        if inside := sorted({*weights} & {*self.without}):
            raise DataError(
                f"round {number} was summed under secure aggregation, so the single contribution of "
                f"{', '.join(inside)} is not known and cannot be excluded. Train again without that member"
            )
        if weights:
            weights = reopen(self.stored.path, self.records, self.constitution, number, given, into=self.made.path)
        return mean_of_sum(self.made, number, weights)
