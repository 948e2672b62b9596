"""The ledger of a consortium: signed, chained and countersigned events, never the data itself.

The coordinator signs the content of an entry, its index and the hash of the previous entry. A contribution or exit also
contains what the member itself signed. A contribution names the head of the ledger that its member had seen: the number
of entries and the hash of the newest one. A coordinator could still rewrite the complete ledger, or show different
ledgers to different members; the heads that members sign and store reveal this.
"""

import itertools
import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter

from worldloom.core.chain import NOTHING, Chain, ChainHead, Entry, canonical, entries, parse_entry, read_entry
from worldloom.core.closing import Closing
from worldloom.core.errors import DataError
from worldloom.core.files import storage_errors
from worldloom.core.signing import Domain, SigningKey, verified
from worldloom.core.text import markdown, one_line
from worldloom.federation.record.ledger_history import printable
from worldloom.federation.record.ledger_rules import THE_SUM, Fork, LedgerRules
from worldloom.federation.record.statements import checked
from worldloom.federation.rules.constitution import Constitution
from worldloom.federation.rules.ranges import Number, Share, within

KINDS = (
    "constitution", "base", "contribution", "refusal", "round", "session", "survivors", "sum", "succession",
    "checkpoint", "exit", "return",
)  # fmt: skip
"""The kinds of entries. Only coordinators write entries."""

FORMAT = 3
"""The version of the ledger's format. In format 1 signatures had no domain; in 1 and 2 members signed no entries."""

_NUMBER, _SHARE = TypeAdapter(Number), TypeAdapter(Share)
_LARGEST = 2**16  # characters of the facts of an entry: enough for fingerprints and figures, not for data
_LONGEST = _LARGEST + 2**10  # characters of the line of an entry, with signer and previous hash
_FIELDS = {"kind", "round", "facts", "key", "signature"}


@dataclass(frozen=True, kw_only=True)
class LedgerVerdict:
    """The result of verifying a ledger.

    `length` is the number of valid entries. `broken` is the index of the first invalid entry, or None if all are valid,
    and `why` describes what is wrong with that entry.
    """

    length: int
    head: ChainHead
    broken: int | None = None
    why: str = ""


Outcome = Literal["open", "counted", "refused", "left", "dropped"]
"""What became of a contribution. "left": its member left; "dropped": its round ended without it or a reason."""


class Records:
    """Read access to a ledger of which only the hash chain is verified; `read_ledger` also verifies all signatures."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)

    def entries(self, kind: str | None = None) -> Iterator[Entry]:
        """Yield the entries in order, or only the entries of one kind.

        Raises:
            DataError: an entry does not verify; the message names the entry.
        """
        return (entry for entry in self._all() if kind is None or entry.body.get("kind") == kind)

    def _all(self) -> Iterable[Entry]:
        return entries(self.path)

    def of(self, kind: str, round: int) -> list[Mapping[str, Any]]:
        """Return the facts of a round's entries of one kind, in order.

        If a new coordinator took over during the round (a succession), only the entries after the takeover count.
        """
        found: list[Mapping[str, Any]] = []
        for entry in self.entries():
            if entry.body["round"] == round and entry.body["kind"] in (kind, "succession"):
                found = [*found, entry.body["facts"]] if entry.body["kind"] == kind else []
        return found

    def exit_of(self, owner: str, before: int | None = None) -> Entry | None:
        """Return the entry of an owner's exit; None if the owner never left, or has returned since.

        If `before` is given, only the first `before` entries count.
        """
        found = None
        for entry in itertools.islice(self.entries(), before):
            if entry.body["kind"] in ("exit", "return") and entry.body["facts"].get("owner") == owner:
                found = entry if entry.body["kind"] == "exit" else None
        return found

    def lines(self, begin: int = 0) -> list[str]:
        """Return the lines of the entries from index `begin` on."""
        return [entry.line() for entry in itertools.islice(self.entries(), begin, None)]

    def bases(self) -> dict[int, Mapping[str, Any]]:
        """Return the facts of each round's base; for a round with two bases, the facts of the newer base."""
        found = self.entries("base")
        return {
            entry.body["round"]: entry.body["facts"]
            for entry in found
            if within(_NUMBER, entry.body["round"]) is not None
        }

    def spent(self, owner: str) -> Mapping[str, Any]:
        """Return the spent privacy that an owner reported last; empty if no contribution of the owner reports it."""
        spent: Mapping[str, Any] = {}
        for entry in self.entries("contribution"):
            if entry.body["facts"].get("owner") == owner:
                spent = entry.body["facts"].get("spent") or spent
        return spent


class Ledger(Records, Closing):
    """Write access to a ledger, for one process at a time.

    Raises:
        StorageError: another process is writing the ledger, or the ledger cannot be read or written.
        DataError: the ledger does not verify.
    """

    def __init__(self, path: Path | str, key: SigningKey, *, durable: bool = True) -> None:
        super().__init__(path)
        self._key, self._chain = key, Chain(path, durable=durable)
        self._written, self._stat = list[Entry](), (-1, -1)

    @property
    def head(self) -> ChainHead:
        """The length of the ledger, and the hash of its last entry."""
        return self._chain.head

    def has(self, head: ChainHead) -> bool:
        """Return whether a head lies on this ledger's chain."""
        entries = tuple(self._all())
        return 1 <= head.length <= len(entries) and entries[head.length - 1].hash == head.hash

    def append(self, kind: str, facts: Mapping[str, Any], *, round: int | None = None) -> Entry:
        """Sign an entry, write it and return it.

        Raises:
            DataError: the kind is unknown, the facts are too large or not plain JSON, or another process changed the
                file since it was opened.
            StorageError: writing failed; the ledger is unchanged.
        """
        self._all()
        if kind not in KINDS:
            raise DataError(f"unknown kind of entry {kind!r}; expected one of {', '.join(KINDS)}")
        if (size := len(canonical(dict(facts)))) > _LARGEST:
            raise DataError(
                f"the facts of an entry have {size} characters; expected at most {_LARGEST}. Record a fingerprint of "
                f"the data instead"
            )
        content = {"kind": kind, "round": round, "facts": dict(facts), "key": self._key.public}
        signature = self._key.sign(_signed(content, self.head.length, self.head.hash), Domain.LEDGER_ENTRY)
        # Stored in the form that is read back: tuples become lists, and the caller's objects are copied.
        entry = self._chain.append(json.loads(canonical({**content, "signature": signature})))
        self._written.append(entry)
        self._stat = self._stat_now()
        return entry

    def _all(self) -> Iterable[Entry]:
        if self._stat_now() != self._stat:  # at first, or after another process wrote the file
            written = list(entries(self.path))
            if self.head != ChainHead(length=len(written), hash=written[-1].hash if written else NOTHING):
                raise DataError(
                    f"{self.path} was changed by another process; keep this file as evidence, and restore a copy"
                )
            self._written, self._stat = written, self._stat_now()
        return tuple(self._written)

    def _stat_now(self) -> tuple[int, int]:
        with storage_errors(self.path):
            found = self.path.stat()
        return found.st_size, found.st_mtime_ns

    def close(self) -> None:
        """Close the file."""
        self._chain.close()


def constitution_facts(constitution: Constitution) -> dict[str, Any]:
    """Return the facts of a ledger's first entry: its format and the constitution's fingerprint."""
    return {"format": FORMAT, "fingerprint": constitution.fingerprint}


class LedgerReader(Records):
    """The valid entries of a ledger under a constitution; each entry is checked once, when it is read."""

    def __init__(self, path: Path | str, constitution: Constitution) -> None:
        super().__init__(path)
        self.constitution = constitution
        self._taken: list[Entry] = []
        self._rules = LedgerRules(constitution)

    @property
    def head(self) -> ChainHead:
        """The number of entries read so far, and the hash of the last one."""
        return self._rules.head

    def has(self, head: ChainHead) -> bool:
        """Return whether a head lies on the chain of the entries read so far."""
        return self._rules.has(head)

    def take(self, lines: Iterable[bytes]) -> str:
        """Read lines up to the first invalid line; return what is wrong with that line, or an empty string."""
        for line in lines:
            if len(line) > _LONGEST:
                return f"has {len(line)} characters; expected at most {_LONGEST}"
            entry, why = read_entry(line, self.head)
            if entry is None or (why := self.add(entry)):
                return why
        return ""

    def add(self, entry: Entry) -> str:
        """Take the next entry of the chain, if it is valid; return what is wrong with it, or an empty string."""
        if why := _fault(entry, self):
            return why
        self._taken.append(entry)
        self._rules.add(entry)
        return ""

    def fit_fault(self, body: Mapping[str, Any]) -> str:
        """Return why the next entry does not fit the entries before it, or an empty string; see `LedgerRules`."""
        return self._rules.fault(body)

    def outcome(self, owner: str, number: int) -> tuple[Outcome, str]:
        """Return what became of a member's contribution to a round, and the reason if it does not count."""
        made = [entry for entry in self.entries("round") if entry.body["round"] == number]
        if not made:
            return "open", ""
        facts = made[-1].body["facts"]
        reasons = [
            printable(refusal.get("reason"))
            for refusal in self.of("refusal", number)
            if refusal.get("owner") in (owner, THE_SUM) and "what" not in refusal  # other answers than contributions
        ]
        if owner in facts["weights"]:
            return "counted", ""
        if owner in facts["left_out"] or reasons:
            return "refused", reasons[-1] if reasons else "the quality gate left all contributions out"
        if left := self.exit_of(owner, made[-1].index):
            return "left", f"{owner} left in round {left.body['round']} and has not returned, according to the ledger"
        return "dropped", ""

    def verdict(self, why: str = "", seen: Iterable[ChainHead] = ()) -> LedgerVerdict:
        """Return the verdict on the entries read so far.

        `why` describes what is wrong with the next line, and is empty if the next line is valid or missing. `seen` are
        the heads that members countersigned.
        """
        length, seen = self.head.length, list(seen)
        broken = length if why else None
        rewritten = [one.length - 1 for one in seen if 0 < one.length <= length and not self.has(one)]
        longest = max((one.length for one in seen), default=0)
        if rewritten:
            broken, why = min(rewritten), Fork("is not the entry that a member countersigned: the ledger was rewritten")
        elif not why and longest > length:
            broken, why = length, f"and all later entries are missing: a member countersigned {longest} entries"
        length = length if broken is None else broken
        return LedgerVerdict(
            length=length,
            head=ChainHead(length=length, hash=self._rules.hash_at(length)),
            broken=broken,
            why=why,
        )

    def _all(self) -> Iterable[Entry]:
        return tuple(self._taken)


def verify_ledger(
    path: Path | str, constitution: Constitution, checkpoints: Collection[Mapping[str, Any]] = ()
) -> LedgerVerdict:
    """Verify all entries and signatures of a ledger, also against countersigned checkpoints; return the verdict.

    Raises:
        StorageError: there is no such file.
        DataError: a checkpoint is invalid.
    """
    return _read(path, constitution, checkpoints)[1]


def read_ledger(
    path: Path | str,
    constitution: Constitution,
    checkpoints: Collection[Mapping[str, Any]] = (),
    *,
    growing: bool = False,
) -> LedgerReader:
    """Verify a ledger, and return its entries; see `verify_ledger`.

    With `growing`, an incomplete last line, which another process is still writing, is ignored.

    Raises:
        StorageError: there is no such file.
        DataError: the ledger does not verify, or a checkpoint is invalid.
    """
    reading, verdict = _read(path, constitution, checkpoints, growing=growing)
    if verdict.broken is not None:
        raise broken(path, verdict.broken, verdict.why)
    return reading


def ledger_lines(path: Path | str) -> Iterator[bytes]:
    """Yield the lines of a ledger's file; the last one is a line that is too long, cut off.

    Raises:
        StorageError: there is no such file.
    """
    with storage_errors(path), Path(path).open("rb") as file:
        while line := file.readline(_LONGEST + 1):
            yield line
            if len(line) > _LONGEST:
                return


def broken(path: Path | str, index: int, why: str) -> DataError:
    """Return the error for a ledger whose entry `index` is invalid."""
    return DataError(
        f"{path} does not verify: entry {index} {why}. Pass the constitution of this ledger, or restore the ledger "
        f"from an intact copy; every node has one"
    )


def _read(
    path: Path | str,
    constitution: Constitution,
    checkpoints: Collection[Mapping[str, Any]],
    *,
    growing: bool = False,
) -> tuple[LedgerReader, LedgerVerdict]:
    seen = [checked(checkpoint, constitution) for checkpoint in checkpoints]
    reading = LedgerReader(path, constitution)
    lines = ledger_lines(path)
    why = reading.take(line for line in lines if not growing or line.endswith(b"\n") or len(line) > _LONGEST)
    return reading, reading.verdict(why, seen)


Comparison = Literal["same", "ahead", "different"]
"""Where a signed head lies: on the ledger's chain ("same"), beyond its end ("ahead"), or on another ("different")."""


def compare_heads(
    reader: LedgerReader, checkpoints: Collection[Mapping[str, Any]]
) -> list[tuple[str, ChainHead, Comparison]]:
    """Compare a ledger with the heads that members signed; return each signer's name and head, and the result.

    Raises:
        DataError: a checkpoint is invalid.
    """
    names, found = reader.constitution.known(), list[tuple[str, ChainHead, Comparison]]()
    for checkpoint in checkpoints:
        head = checked(checkpoint, reader.constitution)
        ahead = head.length > reader.head.length
        found.append(
            (names[checkpoint["key"]], head, "ahead" if ahead else "same" if reader.has(head) else "different")
        )
    return found


def model_card(records: LedgerReader) -> str:
    """Return the model card of the newest base, in Markdown, from a verified ledger; see `read_ledger`."""
    constitution, head = records.constitution, records.head
    bases, contributions = records.bases(), list(records.entries("contribution"))
    used = [_mapping(entry.body["facts"].get("weights")) for entry in records.entries("round")]
    newest = max(bases, default=None)
    base = "none yet" if newest is None else f"{_code(bases[newest].get('fingerprint'))} (round {newest})"
    lines = [
        f"# {_cell(constitution.consortium)}",
        "",
        f"- Base: {base}",
        f"- Constitution: `{constitution.fingerprint}`",
        f"- Ledger: {head.length} entries, `{head.hash}`",
        "",
        "## Contributors",
        "",
        "| owner | class | rounds | mean weight | privacy spent |",
        "|---|---|---|---|---|",
    ]
    for owner in sorted({str(entry.body["facts"].get("owner")) for entry in contributions}):
        own = [entry.body for entry in contributions if str(entry.body["facts"].get("owner")) == owner]
        classes = ", ".join(sorted({str(body["facts"].get("data_class")) for body in own}))
        weights = [weight for weights in used if (weight := within(_SHARE, weights.get(owner))) is not None]
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


def _signed(content: Mapping[str, Any], index: int, previous: str) -> bytes:
    return canonical({**content, "index": index, "previous": previous}).encode("ascii")


def _fault(entry: Entry, reader: LedgerReader) -> str:
    """Return what is wrong with the next entry, which has a correct hash; an empty string if it is valid."""
    body, constitution = entry.body, reader.constitution
    if not _is_of_ledgers(body):
        return "is not an entry of a ledger"
    if (body["kind"] == "constitution") != (entry.index == 0):
        return f"is a {body['kind']}; expected the constitution as the first entry, and nowhere else"
    if body["kind"] == "constitution" and (found := body["facts"].get("format")) != FORMAT:
        return (
            f"has ledger format {printable(found)[:20]}; this version of worldloom reads format {FORMAT}. Read the "
            f"ledger with the version that wrote it, and begin new rounds from its last base"
        )
    if why := _signature_fault(entry, constitution):
        return why
    if body["kind"] == "constitution" and body["facts"].get("fingerprint") != constitution.fingerprint:
        return "names a different constitution from the one that is used to verify the ledger"
    found = body["facts"].get("countersigned", []) if body["kind"] == "checkpoint" else []
    try:
        seen = [checked(checkpoint, constitution) for checkpoint in found]
    except (DataError, TypeError):
        return "contains a checkpoint without a valid signature"
    if other := [one for one, head in zip(found, seen, strict=True) if not reader.has(head)]:
        name = constitution.known()[other[0]["key"]]
        return Fork(f"contains a checkpoint of a different ledger: {name} countersigned {other[0]['length']} entries")
    return reader.fit_fault(body)


def is_signed(line: bytes, constitution: Constitution) -> bool:
    """Whether a line is a ledger entry that a coordinator signed, for this or any other ledger."""
    entry, _ = parse_entry(line)
    return entry is not None and _is_of_ledgers(entry.body) and not _signature_fault(entry, constitution)


def _is_of_ledgers(body: Any) -> bool:
    whole = isinstance(body, dict) and set(body) == _FIELDS and isinstance(body["facts"], dict)
    whole = whole and isinstance(body["key"], str) and isinstance(body["signature"], str)
    return whole and body["kind"] in KINDS and type(body["round"]) in (int, type(None))


def _signature_fault(entry: Entry, constitution: Constitution) -> str:
    body = entry.body
    signer = constitution.known().get(body["key"])
    if signer is None:
        return f"is signed by {printable(body['key'])[:64]}, a key that is not in the constitution"
    if body["key"] not in constitution.coordinator_keys().values():
        return f"is a {body['kind']} signed by {signer}, which is not a coordinator"
    content = {name: body[name] for name in ("kind", "round", "facts", "key")}
    if not verified(_signed(content, entry.index, entry.previous), body["signature"], body["key"], Domain.LEDGER_ENTRY):
        return f"is not what {signer} signed"
    return ""


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


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
    """Return text from any source, escaped so that Markdown shows it as it is, in one cell of a table."""
    return markdown("" if value is None else str(value))


def _code(value: Any) -> str:
    return f"`{one_line(str(value)).replace('`', '')}`"
