"""What a coordinator knows of its members beside what they contribute: what they saw of the ledger, and who left."""

import logging
from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor

from worldloom.core.chain import Head
from worldloom.core.errors import DataError
from worldloom.core.signing import SigningKey
from worldloom.federation.constitution import Constitution
from worldloom.federation.envelope import Message, seal, unseal
from worldloom.federation.ledger import Ledger, checked
from worldloom.federation.transport import Reply, Transport

_log = logging.getLogger(__name__)


class _Behind(DataError):
    """A member lacks entries before those that it was sent."""


class Members:
    """Asks all members, tells each what is new in the ledger, and keeps the heads that they countersign."""

    def __init__(self, constitution: Constitution, transport: Transport, ledger: Ledger, key: SigningKey) -> None:
        self._constitution, self._transport, self._ledger, self._key = constitution, transport, ledger, key
        self._names = {public: name for name, public in constitution.member_keys().items()}
        self._known: dict[str, int] = {}  # how many entries a member has, as far as it is known
        self._left = {name for name in constitution.members if ledger.newest_of(name, "exit", "return") == "exit"}

    def nodes(self) -> list[str]:
        """Return the members that the transport can reach."""
        return [node for node in self._transport.nodes() if node in self._constitution.members]

    def ask(self, what: str, number: int, tensors: Mapping[str, Tensor], *, kind: str) -> dict[str, Message]:
        """Return what each member that answers says; what it countersigned goes into the ledger.

        One whose answer is none, or of another ledger than this, is left out, with the cause in the log.
        """
        head, lines = self._ledger.head, self._ledger.lines()
        body = {"what": what, "round": number, "constitution": self._constitution.fingerprint}
        answers, asked = {}, self.nodes()
        for _ in range(2):  # who lacks more entries than was thought is asked once more
            sealed: dict[int, bytes] = {}
            requests = {}
            for node in asked:
                begin = min(self._known.get(node, 0), len(lines))
                if begin not in sealed:
                    told = {"begin": begin, "lines": lines[begin:]}
                    sealed[begin] = seal("ask", {**body, "ledger": told}, tensors, key=self._key)
                requests[node] = sealed[begin]
            asked = []
            for reply in self._transport.exchange(requests, seconds=self._constitution.patience_seconds):
                try:
                    answers[reply.node] = self._answer(reply, kind, number, head)
                    self._known[reply.node] = head.length
                except _Behind:
                    asked.append(reply.node)
                except DataError as error:
                    _log.warning("round %d: %s is not heard: %s", number, reply.node, error)
            if not asked:
                break
        if answers:
            seen = [answer.body["countersigned"] for _, answer in sorted(answers.items())]
            self._ledger.append("checkpoint", {"countersigned": seen}, round=number)
        return answers

    def has_left(self, reply: Reply, number: int) -> bool:
        """Say whether a reply is a member's word that it left; the ledger says so, the first time."""
        refusal = self._refusal(reply)
        if refusal is None or refusal.sender != reply.node or refusal.body.get("left") is not True:
            return False
        if reply.node not in self._left:
            self._left.add(reply.node)
            facts = {"owner": reply.node, "reason": str(refusal.body.get("why"))[:1000], "message": refusal.digest}
            self._ledger.append("exit", facts, round=number)
        return True

    def are_here(self, owners: Collection[str], number: int) -> None:
        """Note which of those who had left take part again."""
        for owner in sorted(self._left.intersection(owners)):
            self._left.discard(owner)
            self._ledger.append("return", {"owner": owner}, round=number)

    def _answer(self, reply: Reply, kind: str, number: int, head: Head) -> Message:
        if reply.data is None:
            raise DataError(reply.error)
        refusal = self._refusal(reply)
        if refusal is not None:
            if type(length := refusal.body.get("length")) is int:
                self._known[reply.node] = length
                raise _Behind(str(refusal.body.get("why")))
            self.has_left(reply, number)
            raise DataError(f"it refuses: {refusal.body.get('why')}")
        answer = unseal(reply.data, kind=kind, known=self._names, limit=self._constitution.largest_bytes)
        if answer.sender != reply.node:
            raise DataError(f"{answer.sender} signed it; expected its own word")
        # What stands in the ledger must verify: only a checkpoint of exactly what was sent gets there.
        signed: Any = answer.body.get("countersigned")
        if checked(signed, self._constitution) != head or signed["key"] != answer.key:
            raise DataError("it countersigned another ledger than the one that it was sent")
        return answer

    def _refusal(self, reply: Reply) -> Message | None:
        try:
            return unseal(reply.data or b"", kind="refusal", known=self._names, limit=self._constitution.largest_bytes)
        except DataError:
            return None
