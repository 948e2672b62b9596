"""The release of a base: the gates that it must pass to leave the consortium, and the files that go with it."""

import shutil
from pathlib import Path

from worldloom.core.errors import DataError
from worldloom.core.files import whole_folder, write_text
from worldloom.federation.record.ledger import model_card, read_ledger
from worldloom.federation.rounds.round_store import RoundStore
from worldloom.federation.rules.constitution import Constitution


def unmet(path: Path | str, constitution: Constitution) -> list[str]:
    """Return the constitution's gates that the newest base does not pass, each with its value and the one required.

    Raises:
        StorageError: there is no ledger.
        DataError: it does not verify.
    """
    records, gates = read_ledger(Path(path) / "ledger.jsonl", constitution), constitution.release
    newest = max(records.bases(), default=0)
    rounds = [entry.body["facts"] for entry in records.entries("round") if entry.body["round"] < newest]
    contributors = {owner for facts in rounds for owner, weight in facts["weights"].items() if weight > 0}
    judged = (rounds[-1].get("evaluation") if rounds else None) or {}
    named = max((entry.index for entry in records.entries("base") if entry.body["round"] == newest), default=0)
    members = set(constitution.member_keys().values())
    seen = members & {
        checkpoint["key"]
        for entry in records.entries("checkpoint")
        for checkpoint in entry.body["facts"]["countersigned"]
        if checkpoint["length"] > named
    }
    found = []
    if newest < gates.rounds:
        found.append(f"it has {newest} rounds; {gates.rounds} are required")
    if len(contributors) < gates.contributors:
        found.append(f"{len(contributors)} members contributed; {gates.contributors} are required")
    if gates.max_loss is not None and not judged.get("after", float("inf")) <= gates.max_loss:
        found.append(f"its held-out loss is {judged.get('after', 'unknown')}; at most {gates.max_loss} is required")
    if len(seen) < gates.countersigned:
        found.append(f"{len(seen)} members countersigned a ledger that names it; {gates.countersigned} are required")
    return found


def release(path: Path | str, constitution: Constitution, into: Path | str) -> Path:
    """Write the newest base, its model card and the ledger into a new folder, if it passes every gate.

    A consortium with other rules or other members can begin with that base.

    Raises:
        DataError: it does not pass, and each gate is named; or the base is not the one that the ledger names.
        StorageError: the folder exists already, or the disk refuses.
    """
    path, into = Path(path), Path(into)
    if missing := unmet(path, constitution):
        raise DataError(f"the base of {constitution.consortium} may not be released: {'; '.join(missing)}")
    records = read_ledger(path / "ledger.jsonl", constitution)
    bases = records.bases()
    number = max(bases)
    base = RoundStore(path).base(number, named=bases[number]["fingerprint"])
    with whole_folder(into) as begun:
        base.save_new(begun / "base", about={"round": number, "constitution": constitution.fingerprint})
        write_text(begun / "model_card.md", model_card(records))
        shutil.copy2(path / "ledger.jsonl", begun / "ledger.jsonl")
    return into
