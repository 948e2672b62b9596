"""The rules by which the entries of a ledger fit together, so that a reader need not trust the coordinator.

An entry about a contribution contains exactly what the member signed, for the base of that round and for this ledger.
The entry that ends a round names every contribution that was not refused. A base changes only by a round with
contributions of at least a quorum. A member accepts only one ledger, and contributes to a round only after it has seen
the round's base in that ledger. If the quorum is more than half of the members, any two quorums share a member. Two
ledgers can then differ in one round only, and at most one of them continues. A successor reads the sessions and
refusals that a lost coordinator recorded, so these are checked as well.

A member leaves by its own signed message for the current round, and returns by a contribution that it signed after the
ledger had recorded its exit.
"""

import math
import statistics
from collections.abc import Mapping
from typing import Any

from pydantic import TypeAdapter

from worldloom.core.chain import NOTHING, ChainHead, Entry
from worldloom.core.errors import DataError
from worldloom.federation.record.ledger_history import printable
from worldloom.federation.record.statements import SignedContribution, exit_fault
from worldloom.federation.rules.constitution import Constitution
from worldloom.federation.rules.ranges import Loss, Share, within

THE_SUM = "the sum of all"
"""The owner named in refusals that concern the sum of all contributions; no member can have this name."""

_LOSS, _SHARE = TypeAdapter(Loss), TypeAdapter(Share)
_ROUNDING = 1e-6  # a cap of 1/3 as a float is a little less than a third


class Fork(str):
    """A description of a fault in a ledger that shows that there are two different ledgers."""


class LedgerRules:
    """The state of a ledger up to its last entry, against which the next entry is checked."""

    def __init__(self, constitution: Constitution) -> None:
        self._constitution = constitution
        self._hashes = [NOTHING]  # at each length
        self._round, self._base, self._named = -1, "", 0  # the newest base, and the ledger's length with its entry
        self._left: dict[str, int] = {}  # member that left -> length of the ledger with its exit
        self._exits = set[str]()  # the members' signed messages in exits
        self._epsilon: dict[str, float] = {}  # owner -> the spent privacy that it reported last
        self._sessions = 0  # of secure sums in this round, also before a succession
        self._seen = 0  # length of the ledger that the member of the contribution checked last had seen
        self._begin()

    def _begin(self) -> None:
        """Begin a round, or begin it again after a succession."""
        # owner and, in a secure sum, attempt -> length of the ledger that the owner had seen
        self._contributed: dict[tuple[str, int | None], int] = {}
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
        if kind == "constitution":
            return "" if number is None else "is a constitution that belongs to a round"
        if kind == "base":
            return self._base_fault(number, facts)
        if number != self._round or self._round < 0:
            return f"is a {kind} of round {printable(number)[:20]}; expected round {self._round}"
        if self._changed is not None and kind != "succession":
            return f"is a {kind} after the end of its round"
        if kind == "contribution":
            return self._contribution_fault(number, facts)
        if kind == "refusal":
            return self._refusal_fault(facts)
        if kind == "session":
            return self._session_fault(facts)
        if kind == "exit":
            return self._exit_fault(number, facts)
        if kind == "return":
            return self._return_fault(facts)
        if kind == "succession" and facts.get("base") != self._base:
            return "is a succession whose base is not the newest base in the ledger"
        if kind in ("survivors", "sum"):
            return self._sum_fault(kind, facts)
        return self._round_fault(facts) if kind == "round" else ""

    def add(self, entry: Entry) -> None:
        """Add the next entry; call `fault` with its body immediately before, and add the entry only if it fits."""
        body, facts = entry.body, entry.body["facts"]
        if body["kind"] == "base":
            self._round, self._base, self._named = body["round"], str(facts.get("fingerprint")), entry.index + 1
            self._sessions = 0
        if body["kind"] in ("base", "succession"):
            self._begin()
        elif body["kind"] == "session":
            self._sessions += 1
        elif body["kind"] == "contribution":
            self._contributed[str(facts.get("owner")), facts.get("attempt")] = self._seen
            self._epsilon[str(facts.get("owner"))] = epsilon_in(facts["spent"])
        elif body["kind"] == "refusal" and "what" not in facts:
            self._refused.add(str(facts.get("owner")))
        elif body["kind"] == "exit":
            self._left[facts["owner"]] = entry.index + 1
            self._exits.add(facts["word"])
        elif body["kind"] == "return":
            del self._left[facts["owner"]]
        elif body["kind"] == "sum":
            self._summed = _names(facts.get("weights"))
        elif body["kind"] == "round":
            self._changed = bool(facts.get("weights"))
        self._hashes.append(entry.hash)

    def _base_fault(self, number: Any, facts: Mapping[str, Any]) -> str:
        if not isinstance(facts.get("fingerprint"), str):
            return "is a base without a fingerprint"
        if number != self._round + 1:
            return f"is the base of round {printable(number)[:20]}; expected the base of round {self._round + 1}"
        if number > self._constitution.rounds:
            return f"is the base of round {number}; the constitution ends after {self._constitution.rounds} rounds"
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
        if signed.facts["data_class"] not in self._constitution.classes:
            return (
                f"is a contribution of {signed.facts['owner']} from {printable(signed.facts['data_class'])[:64]} data, "
                f"which may not train the base"
            )
        if signed.base != self._base or signed.seen.length < self._named:
            return f"is a contribution of {signed.facts['owner']} that does not start from the base of its round"
        if (signed.facts["owner"], signed.facts.get("attempt")) in self._contributed:
            return f"is a second contribution of {signed.facts['owner']} to its round"
        if epsilon_in(signed.facts["spent"]) < self._epsilon.get(signed.facts["owner"], 0.0):
            return f"is a contribution of {signed.facts['owner']} that reports less spent privacy than an earlier one"
        self._seen = signed.seen.length
        return ""

    def _refusal_fault(self, facts: Mapping[str, Any]) -> str:
        if facts.get("owner") not in (THE_SUM, *self._constitution.members):
            return "is a refusal that names no member as the owner of the contribution"
        if "said_by" in facts and facts["said_by"] not in tuple(self._constitution.members):
            return "is a refusal that names an accuser that is not a member"
        return ""

    def _session_fault(self, facts: Mapping[str, Any]) -> str:
        attempt = facts.get("attempt")
        if type(attempt) is not int or attempt != self._sessions:
            return f"is session {printable(attempt)[:20]} of its round; expected session {self._sessions}"
        return ""

    def _exit_fault(self, number: int, facts: Mapping[str, Any]) -> str:
        if why := exit_fault(facts, number, self._constitution):
            return why
        if facts["owner"] in self._left or facts["word"] in self._exits:
            return f"repeats an earlier exit of {facts['owner']}"
        return ""

    def _return_fault(self, facts: Mapping[str, Any]) -> str:
        owner = str(facts.get("owner"))
        if facts != {"owner": owner}:
            return "is a return that contains more than the name of its member"
        seen = max((length for (name, _), length in self._contributed.items() if name == owner), default=0)
        if owner not in self._left or seen < self._left[owner]:
            return f"is a return of {printable(owner)[:64]}, which did not sign a contribution after an exit"
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
        if not _is_evaluation(facts.get("evaluation"), self._constitution):
            return "is a round whose 'evaluation' is not the losses of its members and their medians"
        weights, left_out = _names(weights), {str(owner) for owner in left_out}
        owners = (self._summed or set()) if secure else {owner for owner, _ in self._contributed}
        named = weights | left_out
        if weights & left_out or not owners - self._refused <= named <= owners:
            return f"is a round of {_list(named)}; the members that signed contributions are {_list(owners)}"
        # If no weights remain, the quality gate may have left all out; otherwise each has a reason of its own.
        if weights and (silent := left_out - self._refused):
            return f"is a round that leaves out {_list(silent)} without a recorded reason"
        least = self._constitution.threshold if secure else self._constitution.quorum
        if weights and len(weights) < least:
            return f"is a round of only {len(weights)} members; the constitution requires {least}"
        shares = [within(_SHARE, weight) for weight in facts["weights"].values()]
        if any(share is None or share > self._constitution.cap + _ROUNDING for share in shares):
            return f"is a round with a weight that is not a number from 0 to the cap, {self._constitution.cap:g}"
        return ""


def epsilon_in(spent: Mapping[str, Any]) -> float:
    """Return the epsilon in a report of spent privacy: infinite if it is unbounded, and 0 in an empty report."""
    epsilon = spent.get("epsilon") if spent else 0.0
    return math.inf if epsilon is None else float(epsilon)


def _is_evaluation(value: Any, constitution: Constitution) -> bool:
    """Whether a value is None, or has each member's losses before and after a round, and the medians of both."""
    if value is None:
        return True
    if not isinstance(value, Mapping) or not isinstance(value.get("owners"), Mapping):
        return False
    pairs = list(value["owners"].values())
    if not constitution.members.keys() >= value["owners"].keys() or not all(
        isinstance(pair, list) and len(pair) == 2 for pair in pairs
    ):
        return False
    for place, when in enumerate(("before", "after")):
        known = [pair[place] for pair in pairs if pair[place] is not None]
        if not known or any(within(_LOSS, loss) is None for loss in known):
            return False
        if type(value.get(when)) is bool or value.get(when) != statistics.median(known):
            return False
    return True


def _names(value: Any) -> set[str]:
    return {str(name) for name in value} if isinstance(value, Mapping) else set()


def _list(names: set[str]) -> str:
    return printable(", ".join(sorted(names)))[:200] or "none"
