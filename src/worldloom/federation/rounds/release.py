"""When a base may leave the consortium, and what goes with it."""

import shutil
from pathlib import Path

from worldloom.core.errors import DataError, StorageError
from worldloom.core.files import whole_folder, write_text
from worldloom.federation.record.ledger import Records, model_card, verify_ledger
from worldloom.federation.rounds.coordinator import Rounds, save_base
from worldloom.federation.rules.constitution import Constitution
from worldloom.federation.rules.partition import fingerprint


def unmet(path: Path | str, constitution: Constitution) -> list[str]:
    """Return which of the constitution's gates the newest base does not pass, each with what it is and what is asked.

    Raises:
        StorageError: there is no ledger.
        DataError: it does not verify.
    """
    ledger = Path(path) / "ledger.jsonl"
    verdict = verify_ledger(ledger, constitution)
    if verdict.broken is not None:
        raise DataError(f"{ledger} does not verify: entry {verdict.broken} {verdict.why}")
    records, gates = Records(ledger), constitution.release
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
        found.append(f"it is of {newest} rounds; {gates.rounds} are asked")
    if len(contributors) < gates.contributors:
        found.append(f"{len(contributors)} members have a part in it; {gates.contributors} are asked")
    if gates.max_loss is not None and not judged.get("after", float("inf")) <= gates.max_loss:
        found.append(f"its held-out loss is {judged.get('after', 'not known')}; at most {gates.max_loss} is asked")
    if len(seen) < gates.countersigned:
        found.append(f"{len(seen)} members countersigned a ledger that names it; {gates.countersigned} are asked")
    return found


def release(path: Path | str, constitution: Constitution, into: Path | str) -> Path:
    """Write the newest base, its model card and the ledger into a new folder, if it passes every gate.

    A consortium under other rules, or of other members, can begin with that base.

    Raises:
        DataError: it does not pass; each gate is named. Or the base is not the one that the ledger names.
        StorageError: the folder is there already, or the disk refuses.
    """
    path, into = Path(path), Path(into)
    if into.exists():
        raise StorageError(f"{into} is there already; choose another folder to release into")
    if missing := unmet(path, constitution):
        raise DataError(f"the base of {constitution.consortium} may not be released: {'; '.join(missing)}")
    records = Records(path / "ledger.jsonl")
    number = max(records.bases())
    base = Rounds(path).base(number)
    if fingerprint(base) != records.bases()[number]["fingerprint"]:
        raise DataError(f"the base of round {number} is not the one that the ledger names; recompute it")
    with whole_folder(into) as begun:
        save_base(begun / "base", base, about={"round": number, "constitution": constitution.fingerprint})
        write_text(begun / "model_card.md", model_card(path / "ledger.jsonl", constitution))
        shutil.copy2(path / "ledger.jsonl", begun / "ledger.jsonl")
    return into
