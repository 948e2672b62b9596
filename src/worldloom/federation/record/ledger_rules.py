"""The rules by which the entries of a ledger fit together, so that a reader need not trust the coordinator.

An entry about a contribution contains exactly what the member signed, for the base of that round and for this ledger.
The entry that ends a round names every contribution that was not refused. A base changes only by a round with
contributions of at least a quorum. If the quorum is more than half of the members, two ledgers can therefore differ in
one round only, and at most one of them continues: a member contributes to a round only after it has seen the round's
base in its ledger, and a member accepts only one ledger.
"""

from collections.abc import Mapping
from typing import Any

from worldloom.core.chain import NOTHING, ChainHead, Entry
from worldloom.core.errors import DataError
from worldloom.federation.record.ledger_history import printable
from worldloom.federation.record.statements import SignedContribution
from worldloom.federation.rules.constitution import Constitution

_OF_THE_ROUND = ("contribution", "round", "session", "survivors", "sum", "succession")


class Fork(str):
    """A fault that shows that there are two different ledgers."""


class LedgerRules:
    """The state of a ledger up to its last entry, against which the next entry is checked."""

    def __init__(self, constitution: Constitution) -> None:
        self._constitution = constitution
        self._hashes = [NOTHING]  # at each length
        self._round, self._base, self._named = -1, "", 0  # the newest base, and the ledger's length with its entry
        self._begin()

    def _begin(self) -> None:
        """Begin a round, or begin it again after a succession."""
        self._contributed = set[tuple[str, int | None]]()  # owner and, in a secure sum, attempt
        self._refused = set[str]()  # owners with a recorded reason why they do not count
        self._summed: set[str] | None = None  # the owners in the sum
        self._changed: bool | None = None  # whether the round may change the base; None before its end

    def has(self, head: ChainHead) -> bool:
        """Return whether a head lies on the chain of the entries so far."""
        return head.length < len(self._hashes) and self._hashes[head.length] == head.hash

    def hash_at(self, length: int) -> str:
        """Return the hash of the ledger's first `length` entries."""
        return self._hashes[length]

    @property
    def head(self) -> ChainHead:
        """The number of entries so far, and the hash of the last one."""
        return ChainHead(length=len(self._hashes) - 1, hash=self._hashes[-1])

    def fault(self, body: Mapping[str, Any]) -> str:
        """Return why the next entry does not fit; an empty string if it fits."""
        kind, number, facts = body["kind"], body["round"], body["facts"]
        if kind == "base":
            return self._base_fault(number, facts)
        if kind not in _OF_THE_ROUND:
            return ""
        if number != self._round or self._round < 0:
            return f"is a {kind} of round {number}; expected round {self._round}"
        if self._changed is not None and kind != "succession":
            return f"is a {kind} after the end of its round"
        if kind == "contribution":
            return self._contribution_fault(number, facts)
        if kind == "succession" and facts.get("base") != self._base:
            return "is a succession whose base is not the newest base in the ledger"
        if kind in ("survivors", "sum"):
            return self._sum_fault(kind, facts)
        return self._round_fault(facts) if kind == "round" else ""

    def add(self, entry: Entry) -> None:
        """Take the next entry, which has no fault."""
        body, facts = entry.body, entry.body["facts"]
        if body["kind"] == "base":
            self._round, self._base, self._named = body["round"], str(facts.get("fingerprint")), entry.index + 1
        if body["kind"] in ("base", "succession"):
            self._begin()
        elif body["kind"] == "contribution":
            self._contributed.add((str(facts.get("owner")), facts.get("attempt")))
        elif body["kind"] == "refusal" and body["round"] == self._round and "what" not in facts:
            self._refused.add(str(facts.get("owner")))
        elif body["kind"] == "sum":
            self._summed = _names(facts.get("weights"))
        elif body["kind"] == "round":
            self._changed = bool(facts.get("weights"))
        self._hashes.append(entry.hash)

    def _base_fault(self, number: Any, facts: Mapping[str, Any]) -> str:
        if not isinstance(facts.get("fingerprint"), str):
            return "is a base without a fingerprint"
        if number != self._round + 1:
            return f"is the base of round {number}; expected the base of round {self._round + 1}"
        if number == 0:
            return ""
        if self._changed is None:
            return f"is a base, but no entry before it ends round {self._round}"
        if facts.get("previous") != self._base:
            return "is a base that does not follow the previous base"
        if not self._changed and facts.get("fingerprint") != self._base:
            return "changes the base, but its round has no contributions"
        return ""

    def _contribution_fault(self, number: int, facts: Mapping[str, Any]) -> str:
        try:
            signed = SignedContribution.read(facts, number, self._constitution)
        except DataError as error:
            return f"is not a contribution that a member signed: {printable(error)}"
        if not self.has(signed.seen):
            return Fork(
                f"contains a contribution that {signed.facts['owner']} signed for a different ledger: "
                f"{signed.facts['owner']} saw {signed.seen.length} entries with the hash "
                f"{printable(signed.seen.hash)[:64]}"
            )
        if signed.base != self._base or signed.seen.length < self._named:
            return f"is a contribution of {signed.facts['owner']} that does not start from the base of its round"
        return ""

    def _sum_fault(self, kind: str, facts: Mapping[str, Any]) -> str:
        attempt = facts.get("attempt")
        if kind == "survivors" and not all(isinstance(facts.get(what), Mapping) for what in ("advertise", "share")):
            return "names survivors, but not the digests of their answers"
        if kind == "sum" and not isinstance(facts.get("unmask"), Mapping):
            return "is a sum without the digests of the answers that unmasked it"
        owners = {owner for owner, of in self._contributed if of == attempt}
        named = _names(facts.get("mask" if kind == "survivors" else "weights"))
        if named != owners or len(owners) < self._constitution.threshold:
            return (
                f"is a {kind} of {_list(named)}; the members that signed contributions are {_list(owners)}, and at "
                f"least {self._constitution.threshold} are required"
            )
        return ""

    def _round_fault(self, facts: Mapping[str, Any]) -> str:
        secure = self._constitution.secure_aggregation
        weights, left_out = facts.get("weights"), facts.get("left_out")
        if not isinstance(weights, Mapping) or not isinstance(left_out, list):
            return "is a round without a mapping 'weights' and a list 'left_out'"
        if not _is_evaluation(facts.get("evaluation")):
            return "is a round whose 'evaluation' does not contain a loss before and after for each member"
        weights, left_out = _names(weights), {str(owner) for owner in left_out}
        owners = (self._summed or set()) if secure else {owner for owner, _ in self._contributed}
        named = weights | left_out
        if weights & left_out or not owners - self._refused <= named <= owners:
            return f"is a round of {_list(named)}; the members that signed contributions are {_list(owners)}"
        least = self._constitution.threshold if secure else self._constitution.quorum
        if weights and len(weights) < least:
            return f"is a round of only {len(weights)} members; the constitution requires {least}"
        return ""


def _is_evaluation(value: Any) -> bool:
    """Return whether a value is None, or contains each member's losses before and after a round."""
    if value is None:
        return True
    owners = value.get("owners", {}) if isinstance(value, Mapping) else None
    pairs = list(owners.values()) if isinstance(owners, Mapping) else [None]
    return all(
        isinstance(pair, list) and len(pair) == 2 and all(isinstance(loss, int | float | None) for loss in pair)
        for pair in pairs
    )


def _names(value: Any) -> set[str]:
    return {str(name) for name in value} if isinstance(value, Mapping) else set()


def _list(names: set[str]) -> str:
    return printable(", ".join(sorted(names)))[:200] or "none"
