"""The ledger of a consortium: what happened, signed, chained and countersigned, never the data itself.

Each entry of the chain is signed by whoever wrote it, over its content, its place and the hash of the entry before. A
chain alone lets its operator write all of it anew; the checkpoints that members countersign and keep show that.
"""

import base64
import itertools
import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from worldloom.core.chain import NOTHING, Chain, Entry, Head, canonical, entries, read_entry
from worldloom.core.errors import DataError
from worldloom.core.files import read_json, storage_errors, write_json
from worldloom.core.signing import SigningKey, verified
from worldloom.federation.record.envelope import SignedMessage, unseal
from worldloom.federation.record.story import printable
from worldloom.federation.rules.constitution import Constitution

_BY_COORDINATORS = (
    "constitution", "base", "contribution", "refusal", "round", "session", "survivors", "sum", "succession",
)  # fmt: skip
KINDS = (*_BY_COORDINATORS, "checkpoint", "exit", "return", "recompute")
"""What an entry may be; all but the last four are a coordinator's to write."""

_WORD = 2**13  # bytes of a member's word that it left
_LARGEST = 2**16  # characters of the facts of an entry: fingerprints and figures fit, data does not
_LONGEST = _LARGEST + 2**10  # of its line, which says who signed it and what it follows
_FIELDS = {"kind", "round", "facts", "key", "signature"}
_COUNTERSIGNED = "worldloom countersigned checkpoint"
CHECKPOINT = {"kind", "format", "length", "hash", "key", "signature"}
"""What a checkpoint holds, and nothing else."""


@dataclass(frozen=True, kw_only=True)
class LedgerVerdict:
    """What verification found: the first `length` entries are whole, and then all, or the next is `broken`, and why."""

    length: int
    head: Head
    broken: int | None = None
    why: str = ""


class Records:
    """What a ledger says, read without writing it."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)

    def entries(self, kind: str | None = None) -> Iterator[Entry]:
        """Read the entries, or those of a kind, in order.

        Raises:
            DataError: an entry does not verify; it is named.
        """
        return (entry for entry in self._all() if kind is None or entry.body.get("kind") == kind)

    def _all(self) -> Iterable[Entry]:
        return entries(self.path)

    def of(self, kind: str, round: int) -> list[Mapping[str, Any]]:
        """Return the facts of a kind in a round; of those before a succession nothing was handed over."""
        found: list[Mapping[str, Any]] = []
        for entry in self.entries():
            if entry.body["round"] == round and entry.body["kind"] in (kind, "succession"):
                found = [*found, entry.body["facts"]] if entry.body["kind"] == kind else []
        return found

    def contributions(self, round: int) -> list[Mapping[str, Any]]:
        """Return the facts of the contributions to a round; see `of`."""
        return self.of("contribution", round)

    def newest_of(self, owner: str, *kinds: str) -> str | None:
        """Return which of these kinds the newest entry about an owner is of; None if there is none."""
        found = None
        for entry in self.entries():
            if entry.body["kind"] in kinds and entry.body["facts"].get("owner") == owner:
                found = str(entry.body["kind"])
        return found

    def lines(self, begin: int = 0) -> list[str]:
        """Return every entry from the `begin`-th as it is written."""
        return [entry.line() for entry in itertools.islice(self.entries(), begin, None)]

    def bases(self) -> dict[int, Mapping[str, Any]]:
        """Return the facts of the base of each round; of one that was made again, the newest."""
        return {entry.body["round"]: entry.body["facts"] for entry in self.entries("base")}

    def spent(self, owner: str) -> Mapping[str, Any]:
        """Return the privacy that an owner had spent at its last contribution; empty if none."""
        spent: Mapping[str, Any] = {}
        for entry in self.entries("contribution"):
            if entry.body["facts"].get("owner") == owner:
                spent = entry.body["facts"].get("spent") or spent
        return spent


class Ledger(Records):
    """A ledger that is written, by one process at a time.

    Raises:
        StorageError: another process writes it, or the storage refuses.
        DataError: it does not verify.
    """

    def __init__(self, path: Path | str, key: SigningKey, *, durable: bool = True) -> None:
        super().__init__(path)
        self._key, self._chain = key, Chain(path, durable=durable)
        self._written, self._stood = list[Entry](), (-1, -1)

    @property
    def head(self) -> Head:
        """How long the ledger is, and the hash of its last entry."""
        return self._chain.head

    def append(self, kind: str, facts: Mapping[str, Any], *, round: int | None = None) -> Entry:
        """Sign an entry, write it and return it.

        Raises:
            DataError: the kind is unknown, or the facts are too large or no plain JSON; or somebody else changed the
                file since it was opened.
            StorageError: the disk refuses; the ledger is as it was.
        """
        self._all()
        if kind not in KINDS:
            raise DataError(f"{kind!r} is no kind of entry; expected one of {', '.join(KINDS)}")
        if (size := len(canonical(dict(facts)))) > _LARGEST:
            raise DataError(f"the facts of an entry have {size} characters; expected at most {_LARGEST}: no data")
        said = {"kind": kind, "round": round, "facts": dict(facts), "key": self._key.public}
        signature = self._key.sign(_signed(said, self.head.length, self.head.hash))
        # As it will be read: tuples are lists, and nobody else holds a part of it.
        entry = self._chain.append(json.loads(canonical({**said, "signature": signature})))
        self._written.append(entry)
        self._stood = self._stands()
        return entry

    def _all(self) -> Iterable[Entry]:
        if self._stands() != self._stood:  # at first, or where somebody else wrote it
            written = list(entries(self.path))
            if self.head != Head(length=len(written), hash=written[-1].hash if written else NOTHING):
                raise DataError(f"{self.path} was changed while it was open; keep it as evidence, and restore a copy")
            self._written, self._stood = written, self._stands()
        return tuple(self._written)

    def _stands(self) -> tuple[int, int]:
        with storage_errors(self.path):
            found = self.path.stat()
        return found.st_size, found.st_mtime_ns

    def close(self) -> None:
        """Let go of the file."""
        self._chain.close()

    def __enter__(self) -> "Ledger":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def countersign(head: Head, key: SigningKey) -> dict[str, Any]:
    """Return a checkpoint: that the signer saw a ledger of this length with this hash."""
    values = {"kind": _COUNTERSIGNED, "format": 1, "length": head.length, "hash": head.hash, "key": key.public}
    return {**values, "signature": key.sign(canonical(values).encode("ascii"))}


def save_countersigned(path: Path | str, checkpoint: Mapping[str, Any]) -> None:
    """Keep a checkpoint in a file of the member's own."""
    write_json(Path(path), dict(checkpoint))


def is_countersigned(values: Any) -> bool:
    """Whether values claim to be a checkpoint that somebody countersigned; `verify_ledger` says whether they are."""
    return isinstance(values, Mapping) and values.get("kind") == _COUNTERSIGNED


def read_countersigned(path: Path | str, constitution: Constitution) -> Head:
    """Return what a kept checkpoint saw.

    Raises:
        StorageError: it cannot be read.
        DataError: it is not signed by one whom the constitution names.
    """
    return checked(read_json(Path(path)), constitution)


class LedgerReader(Records):
    """The entries of a ledger that verify by a constitution, each checked once, as it comes."""

    def __init__(self, path: Path | str, constitution: Constitution) -> None:
        super().__init__(path)
        self._constitution = constitution
        self._taken: list[Entry] = []
        self._hashes = [NOTHING]  # at each length

    @property
    def head(self) -> Head:
        """How many entries were taken, and the hash of the last."""
        return Head(length=len(self._taken), hash=self._hashes[-1])

    def take(self, lines: Iterable[bytes]) -> str:
        """Take the lines that follow, up to the first that is broken; return what is wrong with that."""
        for line in lines:
            if len(line) > _LONGEST:
                return f"has {len(line)} characters; expected at most {_LONGEST}: no data"
            entry, why = read_entry(line, len(self._taken), self._hashes[-1])
            if entry is not None:
                why = _fault(entry, self._constitution, self._hashes)
            if entry is None or why:
                return why
            self._taken.append(entry)
            self._hashes.append(entry.hash)
        return ""

    def verdict(self, why: str = "", kept: Iterable[Head] = ()) -> LedgerVerdict:
        """Return what was found: that all is whole, or why what follows is not; what `kept` heads saw must be there."""
        length, kept = len(self._taken), list(kept)
        broken = length if why else None
        anew = [one.length - 1 for one in kept if 0 < one.length <= length and self._hashes[one.length] != one.hash]
        if anew:
            broken, why = min(anew), "is not the one that a member countersigned: the ledger was written anew"
        elif not why and (seen := max((one.length for one in kept), default=0)) > length:
            broken, why = length, f"and all after it are gone: a member countersigned {seen} entries"
        elif not why and length:
            *_, ratified = [None, *self.entries("constitution")]
            if ratified is None or ratified.body["facts"].get("fingerprint") != self._constitution.fingerprint:
                broken = 0 if ratified is None else ratified.index
                why = "does not name the constitution that it is verified by"
        length = length if broken is None else broken
        return LedgerVerdict(length=length, head=Head(length=length, hash=self._hashes[length]), broken=broken, why=why)

    def _all(self) -> Iterable[Entry]:
        return tuple(self._taken)


def verify_ledger(
    path: Path | str, constitution: Constitution, checkpoints: Collection[Mapping[str, Any]] = ()
) -> LedgerVerdict:
    """Check every entry and signature, and that what the checkpoints saw is still there; nothing else is needed.

    Raises:
        StorageError: there is no such file.
        DataError: a checkpoint is not signed by one whom the constitution names.
    """
    kept = [checked(checkpoint, constitution) for checkpoint in checkpoints]
    reading = LedgerReader(path, constitution)
    with storage_errors(path), Path(path).open("rb") as file:
        why = reading.take(file)
    return reading.verdict(why, kept)


def model_card(path: Path | str, constitution: Constitution) -> str:
    """Return the card of the newest base in Markdown, written from a ledger that verifies.

    Raises:
        StorageError: there is no such file.
        DataError: the ledger does not verify.
    """
    verdict = verify_ledger(path, constitution)
    if verdict.broken is not None:
        raise DataError(f"{path} does not verify: entry {verdict.broken} {verdict.why}. No card is written from it")
    records = Records(path)
    bases, contributions = records.bases(), list(records.entries("contribution"))
    used = [entry.body["facts"].get("weights") or {} for entry in records.entries("round")]
    newest = max(bases, default=None, key=lambda number: -1 if number is None else number)
    base = "none yet" if newest is None else f"`{_cell(bases[newest].get('fingerprint'))}` (round {newest})"
    lines = [f"# {_cell(constitution.consortium)}", "", f"- Base: {base}"]
    lines += [
        f"- Constitution: `{constitution.fingerprint}`",
        f"- Ledger: {verdict.length} entries, `{verdict.head.hash}`",
    ]
    lines += [
        "",
        "## Contributors",
        "",
        "| owner | class | rounds | mean weight | privacy spent |",
        "|---|---|---|---|---|",
    ]
    for owner in sorted({str(entry.body["facts"].get("owner")) for entry in contributions}):
        own = [entry.body for entry in contributions if str(entry.body["facts"].get("owner")) == owner]
        classes = ", ".join(sorted({str(body["facts"].get("data_class")) for body in own}))
        weights = [weights[owner] for weights in used if isinstance(weights.get(owner), int | float)]
        weight = f"{sum(weights) / len(weights):.4g}" if weights else "none"
        rounds = len({body["round"] for body in own})
        cells = [owner, classes, rounds, weight, _figures(records.spent(owner)) or "none"]
        lines.append("| " + " | ".join(_cell(cell) for cell in cells) + " |")
    lines += ["", "## Evaluations", ""]
    judged = [(entry.body["round"], entry.body["facts"].get("evaluation")) for entry in records.entries("round")]
    lines += [f"- Round {number}: {_cell(_figures(found))}" for number, found in judged if found] or ["None."]
    lines += ["", "## Refusals", ""]
    lines += [
        f"- Round {entry.body['round']}: {_cell(entry.body['facts'].get('owner'))}: "
        f"{_cell(entry.body['facts'].get('reason'))}"
        for entry in records.entries("refusal")
    ] or ["None."]
    return "\n".join(lines) + "\n"


def _signed(said: Mapping[str, Any], index: int, previous: str) -> bytes:
    return canonical({**said, "index": index, "previous": previous}).encode("ascii")


def _fault(entry: Entry, constitution: Constitution, hashes: list[str]) -> str:
    """Return what is wrong with an entry of which the hash is right; empty if nothing."""
    body = entry.body
    if not isinstance(body, dict) or set(body) != _FIELDS or not isinstance(body["facts"], dict):
        return "is no entry of a ledger"
    if not isinstance(body["key"], str) or not isinstance(body["signature"], str) or body["kind"] not in KINDS:
        return "is no entry of a ledger"
    if body["round"] is not None and type(body["round"]) is not int:
        return "is no entry of a ledger"
    who = constitution.known().get(body["key"])
    if who is None:
        return f"is signed by {body['key']}, whom the constitution does not name"
    if body["kind"] in _BY_COORDINATORS and body["key"] not in constitution.coordinator_keys().values():
        return f"is a {body['kind']} by {who}, who is no coordinator"
    said = {name: body[name] for name in ("kind", "round", "facts", "key")}
    if not verified(_signed(said, entry.index, entry.previous), body["signature"], body["key"]):
        return f"is not what {who} signed"
    if body["kind"] == "exit" and who != body["facts"].get("owner"):
        return _exit_fault(body, constitution)
    found = body["facts"].get("countersigned", []) if body["kind"] == "checkpoint" else []
    try:
        seen = [checked(checkpoint, constitution) for checkpoint in found]
    except (DataError, TypeError):
        return "holds a checkpoint that no member countersigned"
    if any(head.length >= len(hashes) or hashes[head.length] != head.hash for head in seen):
        return "holds a checkpoint of another ledger"
    return ""


def exit_facts(word: bytes, owner: str, number: int, constitution: Constitution) -> dict[str, Any] | None:
    """Return what an exit says, which holds the member's signed word that it left; None if that is another word."""
    said = _word(word, constitution)
    expected = (owner, number, constitution.fingerprint, True)
    if said is None or (said.sender, *(said.body.get(key) for key in ("round", "constitution", "left"))) != expected:
        return None
    return {"owner": owner, "reason": str(said.body.get("why")), "word": base64.b64encode(word).decode("ascii")}


def _exit_fault(body: Mapping[str, Any], constitution: Constitution) -> str:
    """Return what is wrong with an exit: nobody can say of a member that it left, but the member."""
    facts = body["facts"]
    try:
        word = base64.b64decode(facts["word"], validate=True)
    except (KeyError, TypeError, ValueError):
        return "is an exit without the member's own word"
    if exit_facts(word, str(facts.get("owner")), body["round"], constitution) != facts:
        return "is an exit that is not what the member said"
    return ""


def _word(data: bytes, constitution: Constitution) -> SignedMessage | None:
    known = {public: name for name, public in constitution.member_keys().items()}
    try:
        return unseal(data, kind="refusal", known=known, limit=_WORD)
    except DataError:
        return None


def checked(checkpoint: Any, constitution: Constitution) -> Head:
    """Return what a checkpoint saw.

    Raises:
        DataError: it is not signed by one whom the constitution names.
    """
    try:
        values = {name: checkpoint[name] for name in ("kind", "format", "length", "hash", "key")}
        signed = verified(canonical(values).encode("ascii"), checkpoint["signature"], checkpoint["key"])
        whole = (values["kind"], values["format"]) == (_COUNTERSIGNED, 1) and type(values["length"]) is int
        whole = whole and values["length"] >= 0
    except (KeyError, TypeError):
        signed = whole = False
    if not signed or not whole or checkpoint["key"] not in constitution.known():
        raise DataError(
            "a checkpoint is not signed by one whom the constitution names; ask the member for its own file"
        )
    return Head(length=values["length"], hash=values["hash"])


def _figures(values: Any) -> str:
    if not isinstance(values, Mapping):
        return "" if values is None else str(values)
    return ", ".join(f"{name} {_figure(value)}" for name, value in values.items())


def _figure(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"({_figures(value)})"
    if isinstance(value, list):
        return " to ".join(map(_figure, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _cell(value: Any) -> str:
    """Return text that stays in its cell and line, whoever wrote it."""
    return printable(value).replace("|", "\\|").replace("<", "&lt;")
