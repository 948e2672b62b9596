"""The coordinator's exchanges with its members, and its record of what each member received and which members left."""

import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

from worldloom.core.chain import ChainHead
from worldloom.core.errors import DataError
from worldloom.core.signing import SigningKey
from worldloom.federation.record.envelope import Refusal, SignedMessage, seal, unseal_answer
from worldloom.federation.record.ledger import Ledger
from worldloom.federation.record.ledger_history import printable
from worldloom.federation.record.ledger_rules import epsilon_in
from worldloom.federation.record.statements import CHECKPOINT, checked, exit_facts
from worldloom.federation.rounds.base import Base
from worldloom.federation.rules.constitution import Constitution
from worldloom.federation.transport.messages import Reply, Transport

_log = logging.getLogger(__name__)
LONGEST_REASON = 1000
"""The largest number of characters of a reason in the ledger and in a log, because a member chooses its length."""


class NoAnswer(DataError):
    """A member sent no answer."""


Answer = tuple[str, SignedMessage | DataError]
"""A member's name, and its answer or, in its place, an error such as a `Refusal`."""


class Members:
    """Sends requests and new ledger entries to members, and records the heads that they countersign."""

    def __init__(self, constitution: Constitution, transport: Transport, ledger: Ledger, key: SigningKey) -> None:
        self._constitution, self._transport, self._ledger, self._key = constitution, transport, ledger, key
        self._names = constitution.member_names()
        self._known: dict[str, int] = {}  # member -> number of ledger entries that it confirmed
        self._held: dict[str, str] = {}  # member -> fingerprint of the base that it was sent last
        exits = {name: ledger.exit_of(name) for name in constitution.members}
        self._left = {name: exit.index for name, exit in exits.items() if exit}  # member that left -> entry of its exit

    def nodes(self) -> list[str]:
        """Return the members that the transport can reach."""
        return [node for node in self._transport.nodes() if node in self._constitution.members]

    def exchange(self, nodes: Collection[str], body: Mapping[str, Any], base: Base, *, kind: str) -> Iterator[Answer]:
        """Send members a request about a base, with the ledger entries that each member lacks and, if needed, the base.

        If a member answers that it lacks entries or the base, the request is sent again with the missing part. Members
        that left are asked too, in case they have returned, but the round does not wait for them.
        """
        asked = {**body, "constitution": self._constitution.fingerprint, "base": base.fingerprint}
        length = self._ledger.head.length  # entries that are added meanwhile are sent with the next exchange
        for last in (False, False, True):
            sealed: dict[tuple[int, bool], bytes] = {}
            requests, behind = {}, []
            for node in nodes:
                how = min(self._known.get(node, 0), length), self._held.get(node) != base.fingerprint
                if how not in sealed:
                    begin, whole = how
                    entries = {"begin": begin, "lines": self._ledger.lines(begin)[: length - begin]}
                    tensors = base.tensors if whole else {}
                    sealed[how] = seal("ask", {**asked, "ledger": entries}, tensors, key=self._key)
                requests[node] = sealed[how]
            for node, answer in self._exchange(requests, kind):
                if isinstance(answer, SignedMessage):
                    self._known[node], self._held[node] = length, base.fingerprint
                elif not last and self._lacks(node, answer):
                    behind.append(node)
                    continue
                yield node, answer
            if not behind:
                return
            nodes = behind

    def exchange_each(self, bodies: Mapping[str, Mapping[str, Any]], *, kind: str) -> Iterator[Answer]:
        """Send each member its own request, without ledger and base."""
        common = {"constitution": self._constitution.fingerprint}
        requests = {node: seal("ask", {**common, **body}, {}, key=self._key) for node, body in bodies.items()}
        return self._exchange(requests, kind)

    def collect(
        self,
        answers: Iterable[Answer],
        number: int,
        accept: Callable[[SignedMessage], None],
        *,
        phase: str = "",
        **facts: Any,
    ) -> dict[str, Exception | None]:
        """Pass each answer to `accept`, which raises `DataError` to refuse it; record refusals in the ledger.

        An arithmetic error in `accept` is a refusal too, because only the answer can have caused the error.

        Returns the members whose answers do not count, each with the error, or None for a member that has left.
        """
        failed: dict[str, Exception | None] = {}
        for node, answer in answers:
            if self._has_left(node, answer, number):
                failed[node] = None
                continue
            try:
                accept(_message(answer))
            except (DataError, ArithmeticError) as error:
                failed[node] = error
                reason = f"{phase}{error}"[:LONGEST_REASON]
                _log.warning("round %d: %s: %s", number, node, reason)
                refusal = {"owner": node, "reason": reason, **facts}
                self._ledger.append("refusal", refusal, round=number)
        return failed

    def ask(self, what: str, number: int, base: Base, *, kind: str) -> dict[str, SignedMessage]:
        """Send all members a request about a base; return their answers, and record the checkpoints in the ledger.

        Answers that are missing or invalid, or have a checkpoint of a different ledger, are left out; invalid ones are
        recorded in the ledger (see `refuse`).
        """
        head, answers = self._ledger.head, {}
        for node, answer in self.exchange(self.nodes(), {"what": what, "round": number}, base, kind=kind):
            self._has_left(node, answer, number)
            try:
                answers[node] = self._countersigned(_message(answer), head)
            except DataError as error:
                self._known.pop(node, None)
                if isinstance(error, NoAnswer | Refusal):
                    why = str(error)[:LONGEST_REASON]
                    _log.warning("round %d: the answer of %s does not count: %s", number, node, why)
                else:
                    self.refuse(node, what, error, number)
        if answers:
            seen = [answer.body["countersigned"] for _, answer in sorted(answers.items())]
            self._ledger.append("checkpoint", {"countersigned": seen}, round=number)
        return answers

    def refuse(self, owner: str, what: str, why: Exception, number: int) -> None:
        """Record in the ledger, once per round and reason, that a member's answer to the request `what` is invalid.

        This is for requests other than those for contributions; see `collect`.
        """
        reason = f"{what}: {why}"[:LONGEST_REASON]
        _log.warning("round %d: the answer of %s does not count: %s", number, owner, reason)
        refusal = {"owner": owner, "reason": reason, "what": what}
        if refusal not in self._ledger.of("refusal", number):
            self._ledger.append("refusal", refusal, round=number)

    def check_seen(self, owner: str, seen: ChainHead) -> None:
        """Check that the ledger head (length and last hash) in a contribution lies on the chain, not before the base.

        Otherwise every reader would refuse the ledger with this contribution.

        Raises:
            DataError: the member has seen a different ledger, or no base of this round.
        """
        if not self._ledger.has(seen):
            raise DataError(
                f"{owner} has seen a different ledger: it has {seen.length} entries, and the hash of the last one is "
                f"{printable(seen.hash)[:64]}; compare both ledgers with 'worldloom weave ledger compare'"
            )

        begun = max(entry.index for entry in self._ledger.entries("base"))
        if seen.length <= begun:
            raise DataError(
                f"{owner} signed a contribution after it had seen {seen.length} entries of the ledger; expected at "
                f"least {begun + 1}, with the base of this round. Run the same version on both sides"
            )

    def check_spent(self, owner: str, spent: Mapping[str, Any]) -> None:
        """Check that the privacy that a member reports as spent has not fallen.

        Raises:
            DataError: an earlier contribution reports more.
        """
        before, now = epsilon_in(self._ledger.spent(owner)), epsilon_in(spent)
        if now < before:
            raise DataError(
                f"{owner} reports a spent epsilon of {now:.4g}, but has reported {before:.4g} before; its folder "
                f"contains the count of spent privacy: restore the folder from a copy"
            )

    def mark_present(self, owner: str, seen: ChainHead, number: int) -> None:
        """If a member had left, record in the ledger that it has returned.

        `seen` is the head in the member's contribution to this round. If this head is older than the member's exit, the
        contribution is not a return.
        """
        if owner in self._left and seen.length > self._left[owner]:
            del self._left[owner]
            self._ledger.append("return", {"owner": owner}, round=number)

    def _exchange(self, requests: Mapping[str, bytes], kind: str) -> Iterator[Answer]:
        seconds, away = self._constitution.timeout_seconds, self._left.keys() & requests.keys()
        for reply in self._transport.exchange(requests, seconds=seconds, away=away):
            yield reply.node, self._open(reply, kind)

    def _open(self, reply: Reply, kind: str) -> SignedMessage | DataError:
        """Check a reply on receipt: signature, digest, size, kind and sender."""
        if reply.data is None:
            return NoAnswer(reply.error[:LONGEST_REASON])
        limit = self._constitution.largest_bytes
        try:
            return unseal_answer(reply.data, kind=kind, sender=reply.node, known=self._names, limit=limit)
        except DataError as error:
            return error

    def _lacks(self, node: str, answer: DataError) -> bool:
        """Return whether an answer reports missing ledger entries or a missing base, and record what is missing."""
        if not isinstance(answer, Refusal):
            return False
        if (length := answer.body.get("length")) is not None:
            self._known[node] = length
            return True
        if answer.body.get("lacks") is True and node in self._held:
            del self._held[node]
            return True
        return False

    def _has_left(self, node: str, answer: SignedMessage | DataError, number: int) -> bool:
        """Return whether a member has left, and record a new exit in the ledger."""
        if isinstance(answer, NoAnswer) and node in self._left:
            _log.info("round %d: %s has left the consortium: %s", number, node, answer)
            return True
        if not isinstance(answer, Refusal):
            return False
        facts = exit_facts(answer.message.data, node, number, self._constitution)
        if facts is None:
            return False
        if node not in self._left:
            if any(entry.body["facts"]["word"] == facts["word"] for entry in self._ledger.entries("exit")):
                return False  # it left, returned and left in one round: the ledger has this exit, so this is a refusal
            self._left[node] = self._ledger.append("exit", facts, round=number).index
        return True

    def _countersigned(self, message: SignedMessage, head: ChainHead) -> SignedMessage:
        # The ledger must stay valid: accept only a checkpoint of exactly the ledger that was sent.
        signed: Any = message.body.get("countersigned")
        if not isinstance(signed, dict) or set(signed) != CHECKPOINT:
            raise DataError("the answer has no valid checkpoint; run the same version on both sides")
        if checked(signed, self._constitution) != head or signed["key"] != message.key:
            raise DataError(
                "the answer countersigns a different ledger from the one that was sent; compare both ledgers"
            )
        return message


def _message(answer: SignedMessage | DataError) -> SignedMessage:
    if isinstance(answer, DataError):
        raise answer
    return answer
