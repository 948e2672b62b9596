"""A member's copies of the ledger and of the newest base.

With these copies a member can prove that a ledger was rewritten, continue training alone, and replace a lost
coordinator. If a coordinator sends a ledger that does not continue this copy, or that breaks a rule, the member stores
the entries that prove it.
"""

import base64
import hashlib
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from worldloom.core.chain import ChainHead
from worldloom.core.errors import CheckpointError, DataError, StorageError
from worldloom.core.files import read_json, write_atomic, write_document, write_json
from worldloom.core.signing import SigningKey
from worldloom.federation.record.ledger import LedgerReader, LedgerVerdict, is_signed, ledger_lines
from worldloom.federation.record.ledger_rules import Fork
from worldloom.federation.record.statements import checked, countersign
from worldloom.federation.rounds.base import Base
from worldloom.federation.rules.constitution import Constitution

_log = logging.getLogger(__name__)
_EVIDENCE = "worldloom evidence against a coordinator"
_LONGEST, _LONGEST_REQUEST = 2**17, 2**20  # characters of an entry in evidence, and bytes of a request

# Files of evidence. A coordinator cannot use up the places of what proves most: that it signed two ledgers.
_MOST_UNSIGNED, _MOST_SIGNED, _MOST_FORKS = 10, 50, 100
_LEDGER, _SEEN, _BASE, _RECEIVED = "ledger.jsonl", "countersigned.json", "base", "received"


class EntriesMissing(DataError):
    """A member's copy of the ledger lacks entries before the received ones; `length` is the copy's length."""

    def __init__(self, length: int) -> None:
        super().__init__(f"this copy of the ledger has only {length} entries; send the entries from index {length} on")
        self.length = length


class BaseMissing(DataError):
    """A message refers to a base that is neither in the message nor stored here."""


class LedgerRefused(DataError):
    """The received ledger breaks a rule.

    `evidence` is the file that proves it, or None if there is too much evidence already.
    """

    def __init__(self, message: str, evidence: Path | None) -> None:
        super().__init__(message)
        self.evidence = evidence

    @property
    def place(self) -> str:
        """A sentence that says where the evidence is."""
        return place_of(self.evidence)


def place_of(evidence: Path | None) -> str:
    """Return a sentence that says where evidence is."""
    return f"The evidence is in {evidence}" if evidence else "No evidence is stored, because there is enough already"


class LedgerForked(LedgerRefused):
    """There are two ledgers: the received one differs from this copy, or from what another member has signed."""


class MemberStore:
    """A member's copy of the ledger, the head that it countersigned, and the newest base that it received.

    `like` are tensors with the names, shapes and dtypes of the member's own base; received bases must match them.
    """

    def __init__(
        self,
        path: Path | str,
        constitution: Constitution,
        key: SigningKey,
        *,
        like: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.path, self._constitution, self._key, self._like = Path(path), constitution, key, like
        self.ledger = self.path / _LEDGER
        self._read = LedgerReader(self.ledger, self._constitution), b""  # the content that was verified last
        self._received: Base | None = None

    @property
    def seen(self) -> ChainHead | None:
        """The ledger head that the member countersigned last; None if it has not countersigned any.

        Raises:
            DataError: the file does not contain a head that this member signed.
        """
        path = self.path / _SEEN
        if not path.is_file():
            return None
        checkpoint = read_json(path)
        head = checked(checkpoint, self._constitution)
        if checkpoint["key"] != self._key.public:
            raise DataError(
                f"{_SEEN} in the folder of this member is signed with the key of another member; restore the file from "
                f"a copy of this folder"
            )
        return head

    def follow(self, begin: int, lines: Sequence[str], *, request: bytes = b"") -> dict[str, Any]:
        """Append entries, the first with index `begin`, and return the countersigned head.

        `request` is the signed part of the coordinator's message that contains the entries.

        Raises:
            EntriesMissing: this copy lacks earlier entries.
            LedgerForked: the entries do not continue this copy, or another member has signed a different ledger.
            LedgerRefused: the entries do not verify; the copy is unchanged.
            DataError: there are no entries, or this copy is damaged.
        """
        own = self._intact()
        content = b"".join(own)
        if begin < 0 or begin > len(own):
            raise EntriesMissing(len(own))
        new = [line.encode("ascii", "replace") + b"\n" for line in lines]
        known = own[begin : begin + len(new)]  # a delayed message may contain fewer entries than this copy
        if other := [place for place, line in enumerate(known) if new[place] != line]:
            place = begin + other[0]
            why = f"the received ledger is not the one that this member countersigned: entry {place} was rewritten"
            both = {"received": new[other[0]], "held": known[other[0]]}
            raise self._refused(LedgerForked, why, place, request=request, **both)
        if added := b"".join(new[len(known) :]):
            content += added
            # Verified before it replaces the file.
            verdict = self._take(content)
            if (index := verdict.broken) is not None and len(own) <= index < begin + len(new):
                why = f"the received ledger does not verify: entry {index} {verdict.why}"
                kind = LedgerForked if isinstance(verdict.why, Fork) else LedgerRefused
                raise self._refused(kind, why, index, request=request, received=new[index - begin])
            self._verified(content, "the received ledger")
            write_atomic(self.ledger, lambda temporary: temporary.write_bytes(content))
        if not content:
            raise DataError(
                "the message has no ledger entries, and no ledger is stored here; send all entries from the first"
            )
        checkpoint = countersign(self._verified(content, str(self.ledger)).head, self._key)
        write_json(self.path / _SEEN, checkpoint)
        return checkpoint

    def _intact(self) -> list[bytes]:
        """Return the lines of this copy up to the first damaged one; the coordinator then sends the others again."""
        content = self._content()
        lines = content.splitlines(keepends=True)
        if content != self._read[1]:
            reader = LedgerReader(self.ledger, self._constitution)
            if why := reader.take(lines):
                _log.warning("%s is damaged: entry %d %s", self.ledger, reader.head.length, why)
                lines = lines[: reader.head.length]
            self._read = reader, b"".join(lines)
        return lines

    def _content(self) -> bytes:
        return b"".join(ledger_lines(self.ledger)) if self.ledger.is_file() else b""

    def _verified(self, content: bytes, what: str) -> LedgerReader:
        """Verify a ledger, also against the countersigned head; entries that were verified before are not read again.

        Raises:
            DataError: the ledger does not verify.
        """
        verdict = self._take(content)
        if verdict.broken is not None:
            raise DataError(
                f"{what} does not verify: entry {verdict.broken} {verdict.why}. Get an intact copy from another member"
            )
        return self._read[0]

    def _take(self, content: bytes) -> LedgerVerdict:
        reader, before = self._read
        if not content.startswith(before):
            reader, before = LedgerReader(self.ledger, self._constitution), b""
        self._read = LedgerReader(self.ledger, self._constitution), b""  # until all of it is verified
        why = reader.take(content[len(before) :].splitlines(keepends=True))
        seen = self.seen
        verdict = reader.verdict(why, [] if seen is None else [seen])
        if verdict.broken is None:
            self._read = reader, content
        return verdict

    def _refused(self, kind: type[LedgerRefused], why: str, index: int, **lines: bytes) -> LedgerRefused:
        path = self.save_evidence(why, index, fork=kind is LedgerForked, **lines)
        return kind(f"{why}. Compare ledgers with the other members: 'worldloom weave ledger compare'", path)

    def save_evidence(
        self,
        why: str,
        index: int,
        *,
        received: bytes,
        held: bytes | None = None,
        request: bytes = b"",
        fork: bool = False,
    ) -> Path | None:
        """Write a file that proves a fault of a coordinator; return its path.

        The file contains the received entry `index`, the different entry in this copy (`held`) if there is one, the
        signed part of the coordinator's message (`request`) if the entry was just received, and the head that this
        member countersigned.

        Returns None, and writes nothing, if there are too many such files already. The limit is highest for a `fork`,
        which proves that there are two ledgers, and lowest for an entry without the coordinator's signature.
        """
        name = hashlib.sha256(received).hexdigest()[:16]
        path = self.path / f"evidence-{index:06d}-{name}.json"
        if path.is_file():
            return path
        signed = is_signed(received, self._constitution)
        most = _MOST_UNSIGNED if not signed else _MOST_FORKS if fork else _MOST_SIGNED
        if len(list(self.path.glob("evidence-*.json"))) >= most:
            return None
        values = {
            "constitution": self._constitution.fingerprint,
            "why": why,
            "index": index,
            "received": received[:_LONGEST].decode("ascii", "replace"),
            "held": None if held is None else held.decode("ascii", "replace"),
            "request": base64.b64encode(request).decode("ascii") if len(request) <= _LONGEST_REQUEST else "",
            "countersigned": read_json(self.path / _SEEN) if (self.path / _SEEN).is_file() else None,
        }
        write_document(path, _EVIDENCE, values)
        return path

    @property
    def records(self) -> LedgerReader:
        """The verified entries of this copy."""
        return self._verified(self._content(), str(self.ledger))

    def receive(self, named: str, tensors: Mapping[str, Tensor]) -> Base:
        """Return the base with the fingerprint `named`, from the tensors of this message or of an earlier one.

        This is a node's trust boundary: later code does not check the base again. The base may be only a candidate for
        the next base, so `MemberStore.base` does not return it until `save_base` is called.

        Raises:
            BaseMissing: no message contained the base.
            DataError: the tensors have another fingerprint, belong to another model, or are not finite.
        """
        path = self.path / _RECEIVED
        if tensors:
            base = Base.of(tensors, like=self._like, named=named, what="the base in the message")
            base.save(path, {})
            self._received = base
        elif self._received is None or self._received.fingerprint != named:
            try:
                self._received = Base.load(path, like=self._like, named=named)
            except (
                CheckpointError,
                DataError,
            ) as error:  # missing, damaged or a different base: the coordinator must send it
                _log.info("%s", error)
                raise BaseMissing(f"the base {named[:16]} is not stored here; send it") from None
        return self._received

    def save_base(self, number: int, base: Base) -> None:
        """Store the base that a round starts from, and replace the previous one.

        Raises:
            DataError: the ledger names a different base for that round, or a later base is stored already.
        """
        if not self.names(number, base.fingerprint):
            raise DataError(
                f"the base received for round {number} ({base.fingerprint[:16]}) does not match the ledger; the "
                f"coordinator must send the base that the ledger names"
            )
        if (newest := self.number) is not None and number < newest:
            raise DataError(
                f"round {number} is over: this node has the base of round {newest}; send requests for round {newest}"
            )
        base.save(self.path / _BASE, {"round": number})

    def names(self, number: int, fingerprint: str) -> bool:
        """Return whether this copy of the ledger names a base with this fingerprint for a round."""
        bases = self.records.bases()
        return number in bases and bases[number]["fingerprint"] == fingerprint

    @property
    def number(self) -> int | None:
        """The round that starts from the newest base; None before the first base, or if its file is damaged."""
        path = self.path / f"{_BASE}.json"
        if not path.is_file():
            return None
        try:
            return int(read_json(path)["metadata"]["round"])
        except (StorageError, KeyError, TypeError, ValueError) as error:
            _log.warning("%s is damaged (%s); the next base replaces it", path, error)
            return None

    def base(self) -> tuple[int, Base]:
        """Return the newest base, and the round that starts from it.

        Raises:
            DataError: no base has been received yet, or its file is damaged.
            CheckpointError: the base's tensors are damaged.
        """
        if (number := self.number) is None:
            raise DataError(f"{self.path} has no base, or a damaged one; take part in a round first")
        return number, Base.load(self.path / _BASE)

    def read(self) -> bytes:
        """Return the ledger as it is stored, verified against the countersigned head.

        Raises:
            StorageError: no ledger is stored.
            DataError: the ledger does not verify.
        """
        content = b"".join(ledger_lines(self.ledger))
        self._verified(content, str(self.ledger))
        return content
