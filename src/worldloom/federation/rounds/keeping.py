"""What a member keeps of a consortium beside its own: the ledger as it saw it, and the newest base.

With them it can show that a ledger was written anew, go on alone, and coordinate where the coordinator is lost.
"""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from worldloom.core.chain import Head
from worldloom.core.errors import CheckpointError, DataError
from worldloom.core.files import storage_errors, write_atomic
from worldloom.core.signing import SigningKey
from worldloom.federation.record.ledger import LedgerReader, countersign, read_countersigned, save_countersigned
from worldloom.federation.rules.constitution import Constitution
from worldloom.federation.rules.partition import fingerprint
from worldloom.models import load_tensors, save_tensors

_log = logging.getLogger(__name__)
_LEDGER, _SEEN, _BASE, _CAME = "ledger.jsonl", "countersigned.json", "base", "came"


class Missing(DataError):
    """Entries before those that came are not here; `length` says how many are."""

    def __init__(self, length: int) -> None:
        super().__init__(f"the ledger is known here up to entry {length}; send what follows it")
        self.length = length


class Absent(DataError):
    """A message is about a base that it does not bring, and that is not here."""


class Forked(DataError):
    """Another ledger came than the one that was countersigned."""


class Keeping:
    """A member's own copy of the ledger, what it countersigned, and the newest base that it was given."""

    def __init__(self, path: Path | str, constitution: Constitution, key: SigningKey) -> None:
        self.path, self._constitution, self._key = Path(path), constitution, key
        self.ledger = self.path / _LEDGER
        self._read = LedgerReader(self.ledger, constitution), b""  # what was read last, and verified

    @property
    def seen(self) -> Head | None:
        """How much of the ledger the member countersigned; None before the first time."""
        path = self.path / _SEEN
        return read_countersigned(path, self._constitution) if path.is_file() else None

    def follow(self, begin: int, lines: Sequence[str]) -> dict[str, Any]:
        """Take over entries, the first of them the ledger's `begin`-th, and return the countersigned head.

        Raises:
            Missing: entries before them are not here.
            DataError: they do not go on from what is here, or do not verify; what is here stays.
        """
        content = self._content()
        own = content.splitlines(keepends=True)
        if begin < 0 or begin > len(own):
            raise Missing(len(own))
        new = [line.encode("ascii", "replace") + b"\n" for line in lines]
        known = own[begin : begin + len(new)]  # of a message that was long on its way, fewer than are here
        if new[: len(known)] != known:
            raise Forked(
                "the ledger that came is not the one that this member countersigned: it was written anew. Keep both, "
                "and ask the other members which they know"
            )
        if added := b"".join(new[len(known) :]):
            content += added
            # What does not verify is never in place of what does.
            self._verified(content, "the ledger that came")
            write_atomic(self.ledger, lambda temporary: temporary.write_bytes(content))
        if not content:
            raise DataError("no ledger came with the message, and none is known here; send it from its first entry")
        checkpoint = countersign(self._verified(content, str(self.ledger)).head, self._key)
        save_countersigned(self.path / _SEEN, checkpoint)
        return checkpoint

    def _content(self) -> bytes:
        with storage_errors(self.ledger):
            return self.ledger.read_bytes() if self.ledger.is_file() else b""

    def _verified(self, content: bytes, what: str) -> LedgerReader:
        """Return what a ledger says that verifies, also against what was countersigned; only what is new is checked.

        Raises:
            DataError: it does not verify.
        """
        reading, before = self._read
        if not content.startswith(before):
            reading, before = LedgerReader(self.ledger, self._constitution), b""
        self._read = LedgerReader(self.ledger, self._constitution), b""  # until all is found to be whole
        why = reading.take(content[len(before) :].splitlines(keepends=True))
        seen = self.seen
        verdict = reading.verdict(why, [] if seen is None else [seen])
        if verdict.broken is not None:
            raise DataError(f"{what} does not verify: entry {verdict.broken} {verdict.why}")
        self._read = reading, content
        return reading

    def keep(self, number: int, base: Mapping[str, Tensor]) -> None:
        """Keep the base that a round begins with, in place of the one before.

        Raises:
            DataError: the ledger, as it is known here, does not name it as the base of that round.
        """
        if not self.names(number, fingerprint(base)):
            raise DataError(f"the base that came for round {number} is not the one that the ledger names; ask for that")
        if self.known and number < (newest := self.base()[0]):
            raise DataError(f"round {number} is over: the base of round {newest} is known here; ask for that")
        save_tensors(self.path / _BASE, base, {"round": number}, kind=_BASE)

    def names(self, number: int, known: str) -> bool:
        """Say whether the ledger, as it is known here, names the base of a round by this fingerprint."""
        content = self._content()
        said = self._verified(content, str(self.ledger)).bases() if content else {}
        return number in said and said[number]["fingerprint"] == known

    def about(self, base: str, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return the base that a message is about, by its fingerprint: what it brings, or what the last one brought.

        What only came, to be judged perhaps, is not what `base` returns.

        Raises:
            Absent: neither is.
            DataError: the message brings another one.
        """
        came = self.path / _CAME
        if tensors:
            if (brought := fingerprint(tensors)) != base:
                raise DataError(f"the message is about the base {base[:16]} and brings {brought[:16]}; ask again")
            save_tensors(came, tensors, {}, kind=_CAME)
            return tensors
        try:
            held = load_tensors(came, kind=_CAME)[0]
            if fingerprint(held) == base:
                return held
        except CheckpointError as error:  # missing or damaged: it comes again
            _log.info("%s", error)
        raise Absent(f"the base {base[:16]} is not held here; send it")

    @property
    def known(self) -> bool:
        """Whether a base came yet."""
        return (self.path / f"{_BASE}.json").is_file()

    def has(self, number: int) -> bool:
        """Say whether the base that a round begins with is the newest here."""
        return self.known and self.base()[0] == number

    def base(self) -> tuple[int, dict[str, Tensor]]:
        """Return the newest base, and the round that begins with it.

        Raises:
            DataError: no base came yet.
            CheckpointError: it is damaged.
        """
        if not self.known:
            raise DataError(f"{self.path} holds no base yet; take part in a round first")
        base, metadata = load_tensors(self.path / _BASE, kind=_BASE)
        return int(metadata["round"]), base

    def read(self) -> bytes:
        """Return the ledger as it is kept, verified against what was countersigned.

        Raises:
            StorageError: there is none.
            DataError: it does not verify.
        """
        with storage_errors(self.ledger):
            content = self.ledger.read_bytes()
        self._verified(content, str(self.ledger))
        return content
