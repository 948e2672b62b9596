"""What members sign themselves: contributions, exits, and the heads of the ledger that they have seen.

The ledger contains these statements, so that any reader can verify them with the members' keys. A coordinator cannot
forge them.
"""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from worldloom.core.chain import ChainHead, canonical
from worldloom.core.errors import DataError
from worldloom.core.signing import Domain, SigningKey, verified
from worldloom.federation.record.bodies import CONTRIBUTION_FORMAT, check_answer
from worldloom.federation.record.envelope import SignedMessage, read_statement, unseal
from worldloom.federation.rules.constitution import Constitution

CHECKPOINT = {"kind", "format", "length", "hash", "key", "signature"}
"""The keys that a checkpoint must have, and no others."""

_COUNTERSIGNED = "worldloom countersigned checkpoint"
_FORMAT = 2  # of checkpoints; format 1 signed without a domain
_LARGEST = 2**13  # bytes of a statement


def countersign(head: ChainHead, key: SigningKey) -> dict[str, Any]:
    """Return a checkpoint: the signer's statement that it received a ledger of this length with this hash."""
    values = {"kind": _COUNTERSIGNED, "format": _FORMAT, "length": head.length, "hash": head.hash, "key": key.public}
    return {**values, "signature": key.sign(canonical(values).encode("ascii"), Domain.CHECKPOINT)}


def is_countersigned(values: Any) -> bool:
    """Return whether values are labelled as a countersigned checkpoint; `checked` checks the signature."""
    return isinstance(values, Mapping) and values.get("kind") == _COUNTERSIGNED


def checked(checkpoint: Any, constitution: Constitution) -> ChainHead:
    """Verify a checkpoint, and return the head that it contains.

    Raises:
        DataError: the checkpoint is incomplete, the signer is not in the constitution, or the signature is invalid.
    """
    try:
        values = {name: checkpoint[name] for name in ("kind", "format", "length", "hash", "key")}
        content = canonical(values).encode("ascii")
        signed = verified(content, checkpoint["signature"], checkpoint["key"], Domain.CHECKPOINT)
        whole = (values["kind"], values["format"]) == (_COUNTERSIGNED, _FORMAT) and type(values["length"]) is int
        whole = whole and values["length"] >= 0
    except (KeyError, TypeError, DataError):
        signed = whole = False
    if not signed or not whole or checkpoint["key"] not in constitution.known():
        raise DataError(
            "a checkpoint is incomplete, was changed, or is not signed with a key in the constitution; ask the "
            "member that signed the checkpoint for an unchanged copy"
        )
    return ChainHead(length=values["length"], hash=values["hash"])


def origin(constitution: Constitution, seen: Mapping[str, Any]) -> dict[str, Any]:
    """Return the part of a contribution's body that says where it belongs: format, constitution and ledger head.

    `seen` is the checkpoint that the member countersigned last; it contains that head.
    """
    head = {"length": seen["length"], "hash": seen["hash"]}
    return {"format": CONTRIBUTION_FORMAT, "constitution": constitution.fingerprint, "seen": head}


@dataclass(frozen=True, kw_only=True)
class SignedContribution:
    """A contribution as its member signed it, without its tensors.

    `facts` are the facts of its entry in the ledger, which contain the member's `statements`. `base` is the fingerprint
    of the base that the contribution starts from, and `seen` is the head of the member's ledger when it signed.
    """

    facts: Mapping[str, Any]
    base: str
    seen: ChainHead

    @classmethod
    def of(cls, statements: Sequence[bytes], number: int, constitution: Constitution) -> "SignedContribution":
        """Verify a member's statements about its contribution to a round, and return the contribution.

        A statement is the signed part of a message. A contribution has one statement; under secure aggregation it has
        two, from the answers to `advertise` and to `mask`.

        Raises:
            DataError: a statement is not signed by the member, belongs to another consortium, round or base, or is
                incomplete.
        """
        kinds = ("advertised", "masked") if constitution.secure_aggregation else ("contribution",)
        if len(statements) != len(kinds):
            raise DataError(
                f"it contains {len(statements)} messages that the member signed; expected {len(kinds)} "
                f"({' and '.join(kinds)})"
            )
        known = constitution.member_names()
        said = [
            read_statement(statement, kind=kind, known=known, limit=_LARGEST)
            for statement, kind in zip(statements, kinds, strict=True)
        ]
        first, last = said[0], said[-1]
        for message in said:
            check_answer(message.kind, message.body, message.sender)
        check_origin(first, constitution)
        for message in said:
            expected = {"owner": first.sender, "round": number, "constitution": constitution.fingerprint}
            expected |= {"base": first.body.get("base"), "attempt": first.body.get("attempt")}
            wrong = [name for name, value in expected.items() if message.body.get(name) != value]
            if wrong or message.sender != first.sender:
                raise DataError(
                    f"a message that {message.sender} signed does not belong to this contribution: it has a different "
                    f"{', '.join(wrong) or 'sender'}"
                )
        names = ["owner", "steps", "frames", "data_class", *(["attempt"] if len(kinds) > 1 else [])]
        facts = {name: first.body[name] for name in names} | {"spent": last.body["spent"], "bytes": last.size}
        if not len(last.statement) <= last.size <= constitution.largest_bytes:
            raise DataError(
                f"the contribution of {first.sender} states {last.size} bytes; expected {len(last.statement)} to "
                f"{constitution.largest_bytes}"
            )
        texts = [base64.b64encode(statement).decode("ascii") for statement in statements]
        return cls(facts={**facts, "statements": texts}, base=first.body["base"], seen=seen_in(first))

    @classmethod
    def read(cls, facts: Mapping[str, Any], number: int, constitution: Constitution) -> "SignedContribution":
        """Verify the facts in a contribution's ledger entry, and return the contribution.

        Raises:
            DataError: the entry has no valid statement of its member, or its facts are not what the member signed.
        """
        owner = facts.get("owner")
        texts = facts.get("statements")
        if not isinstance(texts, list):
            raise DataError(f"it contains no statement that {str(owner)[:64]} signed")
        read = cls.of([_decoded(text) for text in texts], number, constitution)
        if read.facts != facts:
            raise DataError(f"it differs from what {read.facts['owner']} signed")
        return read

    @staticmethod
    def statements(facts: Mapping[str, Any]) -> list[bytes]:
        """Return the signed statements in the facts of a contribution's entry; `read` must have verified the facts."""
        return [_decoded(text) for text in facts["statements"]]


def check_origin(message: SignedMessage, constitution: Constitution) -> None:
    """Check that a contribution is for this constitution.

    Raises:
        DataError: the contribution is for a different constitution; the error names the member.
    """
    if message.body["constitution"] != constitution.fingerprint:
        raise DataError(
            f"the contribution of {message.sender} is for a different constitution from this one; start its node with "
            f"the coordinator's constitution"
        )


def seen_in(message: SignedMessage) -> ChainHead:
    """Return the ledger head that a contribution names."""
    return ChainHead(length=message.body["seen"]["length"], hash=message.body["seen"]["hash"])


def exit_facts(word: bytes, owner: str, number: int, constitution: Constitution) -> dict[str, Any] | None:
    """Return the facts of an exit entry for the message `word`; None if it is not the owner's exit in this round.

    The entry contains the message, so that only the member itself can declare its exit.
    """
    try:
        message = unseal(word, kind="refusal", known=constitution.member_names(), limit=_LARGEST)
    except DataError:
        return None
    stated = (message.sender, *(message.body.get(key) for key in ("round", "constitution", "left")))
    if stated != (owner, number, constitution.fingerprint, True):
        return None
    return {"owner": owner, "reason": str(message.body.get("why")), "word": base64.b64encode(word).decode("ascii")}


def exit_fault(facts: Mapping[str, Any], number: int, constitution: Constitution) -> str:
    """Return what is wrong with an exit entry that a coordinator signed; an empty string if it is valid."""
    try:
        word = _decoded(facts.get("word"))
    except DataError:
        return "is an exit without the member's signed message"
    if exit_facts(word, str(facts.get("owner")), number, constitution) != facts:
        return "is an exit that differs from the member's signed message"
    return ""


def _decoded(text: Any) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (TypeError, ValueError):
        raise DataError("a statement is not valid Base64; ask for an intact copy of the ledger") from None
