"""Follows a ledger while another process writes it."""

from pathlib import Path

from worldloom.core.chain import Tail
from worldloom.federation.record.ledger import LedgerReader, broken
from worldloom.federation.record.ledger_history import describe, read_history
from worldloom.federation.rules.constitution import Constitution


class LedgerWatch:
    """Follows the ledger in a folder of rounds, and verifies each new entry; `history` has the rounds so far."""

    def __init__(self, rounds: Path | str, constitution: Constitution) -> None:
        self.ledger = Path(rounds) / "ledger.jsonl"
        self._tail, self._reader = Tail(self.ledger), LedgerReader(self.ledger, constitution)
        self.history = read_history((), constitution)

    def look(self) -> list[str]:
        """Read the new entries; return one line of text for each event.

        Raises:
            DataError: an entry does not verify; see `read_ledger`.
            StorageError: the file cannot be read.
        """
        if not (new := self._tail.new()):
            return []
        for entry in new:
            if why := self._reader.add(entry):
                raise broken(self.ledger, entry.index, why)
        self.history = read_history(self._reader.entries(), self._reader.constitution)
        return [line for entry in new if (line := describe(entry, self.history))]
