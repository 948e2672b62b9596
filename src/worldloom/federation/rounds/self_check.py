"""A member compares the ledger with what it sent itself, and so detects a coordinator that misrepresents the member."""

import logging
from collections.abc import Collection
from pathlib import Path

from pydantic import Field

from worldloom.core.chain import Entry
from worldloom.core.config import Config, check_shape
from worldloom.core.files import read_json, write_json
from worldloom.federation.record.ledger import LedgerReader
from worldloom.federation.rounds.member_store import MemberStore, place_of

_log = logging.getLogger(__name__)


class _State(Config):
    """What was compared already, and what is needed to compare the rest.

    Rounds below `rounds` and exits among the first `entries` entries were compared. After a return `entries` is None:
    the member's genuine exit may be anywhere in the ledger that the member receives next, so the exits in that ledger
    are not compared. `losses` has the losses that the member sent, by the fingerprint of the base.
    """

    rounds: int
    entries: int | None
    losses: dict[str, list[float]] = Field(default_factory=dict)


class SelfCheck:
    """Reports false statements about the member in a ledger, and stores the entries as evidence.

    The caller holds the lock of the member's folder.
    """

    def __init__(self, path: Path, name: str, store: MemberStore) -> None:
        self._path, self._name, self._store = path, name, store

    def begin(self) -> None:
        """Start the comparison after the entries that the member has; do nothing if it was started before."""
        if not self._path.is_file():
            records = self._store.records
            self._write(_State(rounds=max(records.bases(), default=-1) + 1, entries=records.head.length))

    def returns(self) -> None:
        """Record that the member returns after an exit."""
        self.begin()
        self._write(self._state().model_copy(update={"entries": None}))

    def sends_loss(self, base: str, loss: float) -> None:
        """Record a held-out loss before it is sent; `base` is the fingerprint of the evaluated base."""
        state = self._state()
        known = state.losses.get(base, [])
        if loss not in known:
            self._write(state.model_copy(update={"losses": {**state.losses, base: [*known, loss]}}))

    def compare(self, sent: Collection[int]) -> None:
        """Compare the new entries of the stored ledger; `sent` are the newest rounds to which the member contributed.

        A round is compared once its next base is known.
        """
        state, records = self._state(), self._store.records
        bases = {number: str(facts["fingerprint"]) for number, facts in records.bases().items()}
        known = records.head.length if state.entries is None else state.entries
        for entry in records.entries("exit"):
            if entry.index >= known and entry.body["facts"]["owner"] == self._name:
                self._accuse(f"says that {self._name} left, which {self._name} did not", entry)
        made = {entry.body["round"]: entry for entry in records.entries("round")}
        rounds = [number for number in sorted(made) if number >= state.rounds and number + 1 in bases]
        for number in rounds:
            if number in sent:
                self._compare_contribution(records, made[number])
            judged = (made[number].body["facts"].get("evaluation") or {}).get("owners", {}).get(self._name, [])
            for loss, base in zip(judged or (None, None), (bases[number], bases[number + 1]), strict=True):
                if loss is None and base in state.losses:
                    _log.warning("round %d: the ledger lacks a held-out loss that %s sent", number, self._name)
                if loss is not None and loss not in state.losses.get(base, []):
                    self._accuse(f"has a held-out loss of {self._name} that {self._name} did not send", made[number])
        following = max(rounds, default=state.rounds - 1) + 1
        losses = {base: loss for base, loss in state.losses.items() if not rounds or base == bases[following]}
        changed = _State(rounds=following, entries=records.head.length, losses=losses)
        if changed != state:
            self._write(changed)

    def _compare_contribution(self, records: LedgerReader, entry: Entry) -> None:
        outcome, reason = records.outcome(self._name, entry.body["round"])
        if outcome == "dropped":
            self._accuse(f"has neither the contribution of {self._name} nor a reason for its refusal", entry)
        elif outcome != "counted":
            _log.warning("round %d: the contribution of %s does not count: %s", entry.body["round"], self._name, reason)

    def _accuse(self, why: str, entry: Entry) -> None:
        why = f"entry {entry.index} of the ledger, round {entry.body['round']}, {why}"
        evidence = self._store.save_evidence(why, entry.index, received=f"{entry.line()}\n".encode("ascii"))
        _log.error("%s; the coordinator is at fault. %s", why, place_of(evidence))

    def _state(self) -> _State:
        return check_shape(read_json(self._path), _State, self._path)

    def _write(self, state: _State) -> None:
        write_json(self._path, state.model_dump(mode="json"))
