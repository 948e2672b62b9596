"""A member's copies of what it shares with its consortium: the ledger as it saw it, and the newest base.

With them it can show that a ledger was rewritten, train on alone, and coordinate in place of a lost coordinator.
"""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from worldloom.core.chain import ChainHead
from worldloom.core.errors import CheckpointError, DataError
from worldloom.core.files import read_json, storage_errors, write_atomic, write_json
from worldloom.core.signing import SigningKey
from worldloom.federation.record.ledger import LedgerReader, checked, countersign
from worldloom.federation.rounds.base import Base
from worldloom.federation.rules.constitution import Constitution

_log = logging.getLogger(__name__)
_LEDGER, _SEEN, _BASE, _RECEIVED = "ledger.jsonl", "countersigned.json", "base", "received"


class EntriesMissing(DataError):
    """Ledger entries before those that came are not here; `length` is the number of entries here."""

    def __init__(self, length: int) -> None:
        super().__init__(f"the ledger is known here up to entry {length}; send the entries from there on")
        self.length = length


class BaseMissing(DataError):
    """A message names a base that it does not bring, and that is not here."""


class LedgerForked(DataError):
    """The ledger that came is not the one that was countersigned."""


class MemberStore:
    """A member's copy of the ledger, the head that it countersigned, and the newest base that it was given.

    `like` gives the names, shapes and dtypes of the base of the member's own model; without it a store takes no base
    from messages.
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
        self._read = LedgerReader(self.ledger, constitution), b""  # what was verified last
        self._received: Base | None = None

    @property
    def seen(self) -> ChainHead | None:
        """The head of the ledger that the member countersigned; None before the first time."""
        path = self.path / _SEEN
        return checked(read_json(path), self._constitution) if path.is_file() else None

    def follow(self, begin: int, lines: Sequence[str]) -> dict[str, Any]:
        """Append entries, the first of them the ledger's `begin`-th, and return the countersigned head.

        Raises:
            EntriesMissing: entries before them are not here.
            DataError: they do not continue the ledger here, or do not verify; the ledger here is unchanged.
        """
        content = self._content()
        own = content.splitlines(keepends=True)
        if begin < 0 or begin > len(own):
            raise EntriesMissing(len(own))
        new = [line.encode("ascii", "replace") + b"\n" for line in lines]
        known = own[begin : begin + len(new)]  # a delayed message may bring fewer entries than are here
        if new[: len(known)] != known:
            raise LedgerForked(
                "the ledger that came is not the one that this member countersigned: it was rewritten. Save both, "
                "and ask the other members which one they know"
            )
        if added := b"".join(new[len(known) :]):
            content += added
            # Verified before it replaces the file.
            self._verified(content, "the ledger that came")
            write_atomic(self.ledger, lambda temporary: temporary.write_bytes(content))
        if not content:
            raise DataError("no ledger came with the message, and none is known here; send it from its first entry")
        checkpoint = countersign(self._verified(content, str(self.ledger)).head, self._key)
        write_json(self.path / _SEEN, checkpoint)
        return checkpoint

    def _content(self) -> bytes:
        with storage_errors(self.ledger):
            return self.ledger.read_bytes() if self.ledger.is_file() else b""

    def _verified(self, content: bytes, what: str) -> LedgerReader:
        """Verify a ledger, also against the countersigned head; entries that were verified before are not repeated.

        Raises:
            DataError: it does not verify.
        """
        reader, before = self._read
        if not content.startswith(before):
            reader, before = LedgerReader(self.ledger, self._constitution), b""
        self._read = LedgerReader(self.ledger, self._constitution), b""  # until all of it is verified
        why = reader.take(content[len(before) :].splitlines(keepends=True))
        seen = self.seen
        verdict = reader.verdict(why, [] if seen is None else [seen])
        if verdict.broken is not None:
            raise DataError(f"{what} does not verify: entry {verdict.broken} {verdict.why}")
        self._read = reader, content
        return reader

    def receive(self, named: str, tensors: Mapping[str, Tensor]) -> Base:
        """Return the base that a message names by its fingerprint: it brings it, or an earlier message did.

        This is the trust boundary of a node: nothing behind it checks the base again. A received base, which may only
        be a trial, is not the one that `base` returns.

        Raises:
            BaseMissing: neither message brought it.
            DataError: the message brings another base, or one of another model, or one that is not finite.
        """
        path = self.path / _RECEIVED
        if tensors:
            base = Base.of(tensors, like=self._like, named=named, what="the base in the message")
            base.save(path, {})
            self._received = base
        elif self._received is None or self._received.fingerprint != named:
            try:
                self._received = Base.load(path, like=self._like, named=named)
            except (CheckpointError, DataError) as error:  # missing, damaged or another: the coordinator sends it
                _log.info("%s", error)
                raise BaseMissing(f"the base {named[:16]} is not here; send it") from None
        return self._received

    def save_base(self, number: int, base: Base) -> None:
        """Store the base that a round begins with, in place of the one before.

        Raises:
            DataError: the ledger here does not name it as the base of that round, or a later base is here.
        """
        if not self.names(number, base.fingerprint):
            raise DataError(f"the base that came for round {number} is not the one that the ledger names; send that")
        if (newest := self.number) is not None and number < newest:
            raise DataError(f"round {number} is over: the base of round {newest} is here")
        base.save(self.path / _BASE, {"round": number})

    def names(self, number: int, fingerprint: str) -> bool:
        """Return whether the ledger here names a base, by its fingerprint, as that of a round."""
        content = self._content()
        bases = self._verified(content, str(self.ledger)).bases() if content else {}
        return number in bases and bases[number]["fingerprint"] == fingerprint

    @property
    def number(self) -> int | None:
        """The round that begins with the newest base; None before a base came."""
        path = self.path / f"{_BASE}.json"
        if not path.is_file():
            return None
        try:
            return int(read_json(path)["metadata"]["round"])
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{path} is damaged ({error}); restore it, or wait for the next base") from None

    def base(self) -> tuple[int, Base]:
        """Return the newest base, and the round that begins with it.

        Raises:
            DataError: no base came yet.
            CheckpointError: it is damaged.
        """
        if (number := self.number) is None:
            raise DataError(f"{self.path} holds no base yet; take part in a round first")
        return number, Base.load(self.path / _BASE)

    def read(self) -> bytes:
        """Return the ledger as it is stored, verified against the countersigned head.

        Raises:
            StorageError: there is none.
            DataError: it does not verify.
        """
        with storage_errors(self.ledger):
            content = self.ledger.read_bytes()
        self._verified(content, str(self.ledger))
        return content
