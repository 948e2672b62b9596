"""What a coordinator knows of its members beside what they contribute: what they saw of the ledger, and who left."""

import logging
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from torch import Tensor

from worldloom.core.chain import Head
from worldloom.core.errors import DataError
from worldloom.core.signing import SigningKey
from worldloom.federation.record.envelope import SignedMessage, seal, unseal
from worldloom.federation.record.ledger import CHECKPOINT, Ledger, checked, exit_facts
from worldloom.federation.rules.constitution import Constitution
from worldloom.federation.rules.partition import fingerprint
from worldloom.federation.transport.messages import Reply, Transport

_log = logging.getLogger(__name__)


class Members:
    """Asks all members, tells each what is new in the ledger, and keeps the heads that they countersign."""

    def __init__(self, constitution: Constitution, transport: Transport, ledger: Ledger, key: SigningKey) -> None:
        self._constitution, self._transport, self._ledger, self._key = constitution, transport, ledger, key
        self._names = {public: name for name, public in constitution.member_keys().items()}
        self._known: dict[str, int] = {}  # how many entries a member has, as far as it is known
        self._held: dict[str, str] = {}  # which base it was sent last
        self._left = {name for name in constitution.members if ledger.newest_of(name, "exit", "return") == "exit"}

    def nodes(self) -> list[str]:
        """Return the members that the transport can reach."""
        return [node for node in self._transport.nodes() if node in self._constitution.members]

    def exchange(
        self, nodes: Collection[str], body: Mapping[str, Any], tensors: Mapping[str, Tensor]
    ) -> Iterator[Reply]:
        """Ask members; tell each what is new in the ledger, and send the base that it is asked about if it lacks that.

        Those who turn out to lack more of the ledger, or the base, are asked again. Who left is asked, for it may be
        back, and not waited for.
        """
        base = fingerprint(tensors)
        asked = {**body, "constitution": self._constitution.fingerprint, "about": base}
        length = self._ledger.head.length  # what is heard meanwhile is added to the ledger, and told the next time
        for last in (False, False, True):
            sealed: dict[tuple[int, bool], bytes] = {}
            requests, behind = {}, []
            for node in nodes:
                how = min(self._known.get(node, 0), length), self._held.get(node) != base
                if how not in sealed:
                    begin, whole = how
                    told = {"begin": begin, "lines": self._ledger.lines(begin)[: length - begin]}
                    sealed[how] = seal("ask", {**asked, "ledger": told}, tensors if whole else {}, key=self._key)
                requests[node] = sealed[how]
            seconds, away = self._constitution.patience_seconds, self._left.intersection(requests)
            for reply in self._transport.exchange(requests, seconds=seconds, away=away):
                refusal = self._refusal(reply)
                said: Mapping[str, Any] = {} if refusal is None else refusal.body
                if refusal is None and reply.data is not None:
                    self._known[reply.node], self._held[reply.node] = length, base
                elif not last and self._lacks(reply.node, said):
                    behind.append(reply.node)
                    continue
                yield reply
            if not behind:
                return
            nodes = behind

    def ask(self, what: str, number: int, tensors: Mapping[str, Tensor], *, kind: str) -> dict[str, SignedMessage]:
        """Return what each member that answers says; what it countersigned goes into the ledger.

        One whose answer is none, or of another ledger than this, is left out, with the cause in the log.
        """
        head, answers = self._ledger.head, {}
        for reply in self.exchange(self.nodes(), {"what": what, "round": number}, tensors):
            try:
                answers[reply.node] = self._answer(reply, kind, number, head)
            except DataError as error:
                self._known.pop(reply.node, None)
                _log.warning("round %d: %s is not heard: %s", number, reply.node, error)
        if answers:
            seen = [answer.body["countersigned"] for _, answer in sorted(answers.items())]
            self._ledger.append("checkpoint", {"countersigned": seen}, round=number)
        return answers

    def _lacks(self, node: str, said: Mapping[str, Any]) -> bool:
        """Note what of the ledger, or of the base, a member says that it lacks; return whether it does."""
        has: Any = said.get("length")
        if type(has) is int and has >= 0:
            self._known[node] = has
            return True
        if said.get("lacks") is True and node in self._held:
            del self._held[node]
            return True
        return False

    def has_left(self, reply: Reply, number: int) -> bool:
        """Say whether a reply is a member's word that it left, or none since; the ledger holds that word, once."""
        if reply.data is None and reply.node in self._left:
            _log.info("round %d: %s, who left: %s", number, reply.node, reply.error)
            return True
        facts = exit_facts(reply.data or b"", reply.node, number, self._constitution)
        if facts is None:
            return False
        if reply.node not in self._left:
            self._left.add(reply.node)
            self._ledger.append("exit", facts, round=number)
        return True

    def are_here(self, owners: Collection[str], number: int) -> None:
        """Note which of those who had left take part again."""
        for owner in sorted(self._left.intersection(owners)):
            self._left.discard(owner)
            self._ledger.append("return", {"owner": owner}, round=number)

    def _answer(self, reply: Reply, kind: str, number: int, head: Head) -> SignedMessage:
        if reply.data is None:
            raise DataError(reply.error)
        if (refusal := self._refusal(reply)) is not None:
            self.has_left(reply, number)
            raise DataError(f"it refuses: {refusal.body.get('why')}")
        answer = unseal(reply.data, kind=kind, known=self._names, limit=self._constitution.largest_bytes)
        if answer.sender != reply.node:
            raise DataError(f"{answer.sender} signed it; expected its own word")
        # What stands in the ledger must verify: only a checkpoint of exactly what was sent gets there.
        signed: Any = answer.body.get("countersigned")
        if not isinstance(signed, dict) or set(signed) != CHECKPOINT:
            raise DataError("it countersigned nothing, or more than a ledger")
        if checked(signed, self._constitution) != head or signed["key"] != answer.key:
            raise DataError("it countersigned another ledger than the one that it was sent")
        return answer

    def _refusal(self, reply: Reply) -> SignedMessage | None:
        try:
            return unseal(reply.data or b"", kind="refusal", known=self._names, limit=self._constitution.largest_bytes)
        except DataError:
            return None
