"""The release of a base: the constitution's conditions for it, and the files that are written."""

import shutil
from pathlib import Path

from worldloom.core.errors import DataError
from worldloom.core.files import whole_folder, write_text
from worldloom.federation.record.ledger import model_card, read_ledger
from worldloom.federation.record.ledger_history import read_history
from worldloom.federation.rounds.round_store import RoundStore
from worldloom.federation.rules.constitution import Constitution


def unmet(path: Path | str, constitution: Constitution) -> list[str]:
    """Return the release conditions that the newest base does not meet, each with the actual and required value.

    Raises:
        StorageError: there is no ledger.
        DataError: the ledger does not verify.
    """
    records, gates = read_ledger(Path(path) / "ledger.jsonl", constitution), constitution.release
    newest = max(records.bases(), default=0)
    rounds = [round for round in read_history(records.entries(), constitution).rounds if round.number < newest]
    contributors = {owner for round in rounds for owner, weight in round.weights.items() if weight > 0}
    loss = rounds[-1].median[1] if rounds and rounds[-1].median else None
    named = max((entry.index for entry in records.entries("base") if entry.body["round"] == newest), default=0)
    members = set(constitution.member_keys().values())
    seen = members & {
        checkpoint["key"]
        for entry in records.entries("checkpoint")
        for checkpoint in entry.body["facts"].get("countersigned", [])
        if checkpoint["length"] > named
    }
    found = []
    if newest < gates.rounds:
        found.append(f"{newest} rounds are done; {gates.rounds} are required")
    if len(contributors) < gates.contributors:
        found.append(f"{len(contributors)} members contributed; {gates.contributors} are required")
    measured = sum(after is not None for _, after in rounds[-1].losses.values()) if rounds else 0
    if gates.max_loss is not None and measured < constitution.quorum:
        found.append(f"the held-out loss is known of {measured} members; {constitution.quorum} are required")
    if gates.max_loss is not None and (loss is None or loss > gates.max_loss):
        found.append(f"the held-out loss is {'unknown' if loss is None else loss}; the limit is {gates.max_loss}")
    if len(seen) < gates.countersigned:
        found.append(f"{len(seen)} members countersigned a ledger with this base; {gates.countersigned} are required")
    return found


def release(path: Path | str, constitution: Constitution, into: Path | str) -> Path:
    """Write the newest base, its model card and the ledger into a new folder, if every release condition is met.

    A consortium with other rules or members can start from this base.

    Raises:
        DataError: conditions are not met (the message lists them), or the base does not match the ledger.
        StorageError: the folder exists already, or cannot be written.
    """
    path, into = Path(path), Path(into)
    if missing := unmet(path, constitution):
        raise DataError(
            f"the base of {constitution.consortium} may not be released yet: {'; '.join(missing)}. "
            f"Continue the rounds, or agree on other conditions"
        )
    records = read_ledger(path / "ledger.jsonl", constitution)
    bases = records.bases()
    if not bases:
        raise DataError(f"{path / 'ledger.jsonl'} has no base; check the path, or restore the file from a copy")
    number = max(bases)
    base = RoundStore(path).base(number, named=bases[number]["fingerprint"])
    with whole_folder(into) as begun:
        base.save_new(begun / "base", about={"round": number, "constitution": constitution.fingerprint})
        write_text(begun / "model_card.md", model_card(records))
        shutil.copy2(path / "ledger.jsonl", begun / "ledger.jsonl")
    return into
