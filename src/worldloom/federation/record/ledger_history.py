"""The history of the rounds, read from a ledger for the live view and the report.

Names, reasons and numbers come from other parties and are not trusted: entries of an unexpected form are skipped, text
is reduced to one printable line, and a number outside its range (`worldloom.federation.rules.ranges`) counts as
missing.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import TypeAdapter

from worldloom.core.chain import Entry
from worldloom.core.errors import DataError
from worldloom.core.text import one_line
from worldloom.federation.rules.constitution import Constitution
from worldloom.federation.rules.ranges import Count, Epsilon, Loss, Number, Share, within

_COUNT, _EPSILON, _LOSS, _NUMBER, _SHARE = (TypeAdapter(kind) for kind in (Count, Epsilon, Loss, Number, Share))
State = Literal["waiting", "contributed", "refused", "left out"]


@dataclass(frozen=True, kw_only=True)
class Contributed:
    """An accepted contribution; `index` is the index of its entry, and `seconds` the time since its round began."""

    index: int
    seconds: float
    bytes: int
    steps: int
    data_class: str
    private: bool  # whether it reports the privacy spent
    epsilon: float | None  # its owner's total so far; None if unbounded


@dataclass(frozen=True, kw_only=True)
class Refused:
    """A contribution that does not count: it never arrived, was refused, or was left out by the quality gate."""

    owner: str
    reason: str
    left_out: bool


@dataclass(frozen=True, kw_only=True)
class Round:
    """One round: its contributions and refusals and, once it is `done`, the weights and the members' losses.

    `losses` has the held-out losses of each member that answered, before and after the round; `median` has the losses
    of the median member.
    """

    number: int
    began: float | None
    contributions: Mapping[str, Contributed]
    refusals: tuple[Refused, ...]
    done: bool
    weights: Mapping[str, float]
    left_out: tuple[str, ...]
    losses: Mapping[str, tuple[float | None, float | None]]
    median: tuple[float, float] | None

    @property
    def bytes(self) -> int:
        """The total size of the contributions to the round, in bytes."""
        return sum(one.bytes for one in self.contributions.values())

    def state(self, owner: str) -> State:
        """Return the state of a member in this round."""
        if owner in self.left_out or any(one.owner == owner and one.left_out for one in self.refusals):
            return "left out"
        if owner in self.contributions:
            return "contributed"
        return "refused" if self.reason(owner) else "waiting"

    def reason(self, owner: str) -> str:
        """Return the newest reason why a member's contribution does not count, or an empty string."""
        return next((one.reason for one in reversed(self.refusals) if one.owner == owner), "")


@dataclass(frozen=True, kw_only=True)
class LedgerHistory:
    """All rounds so far; `total` and `budget` are the constitution's number of rounds and its epsilon budget.

    Both are None if no constitution was given; `budget` is also None if the constitution sets none.
    """

    consortium: str
    members: tuple[str, ...]
    total: int | None
    budget: float | None
    rounds: tuple[Round, ...]
    bases: Mapping[int, str] = field(default_factory=dict)  # round -> fingerprint of its base

    @property
    def done(self) -> bool:
        """Whether the base after the last round is published; False if the number of rounds is unknown."""
        return self.total is not None and max(self.bases, default=-1) >= self.total

    @property
    def current(self) -> Round | None:
        """The newest round, whether in progress or done; None before the first round."""
        return self.rounds[-1] if self.rounds else None

    @property
    def bytes(self) -> int:
        """The total size of the contributions so far, in bytes."""
        return sum(round.bytes for round in self.rounds)

    @property
    def private(self) -> bool:
        """Whether any contribution reports the privacy spent."""
        return any(one.private for round in self.rounds for one in round.contributions.values())

    def sent(self, owner: str) -> int:
        """Return the number of bytes that an owner has contributed so far."""
        return sum(round.contributions[owner].bytes for round in self.rounds if owner in round.contributions)

    def spent(self, owner: str) -> str:
        """Return the epsilon that an owner has spent, as text; empty if the owner never reported it."""
        sent = [round.contributions[owner] for round in self.rounds if owner in round.contributions]
        last = next((one for one in reversed(sent) if one.private), None)
        return "" if last is None else "unbounded" if last.epsilon is None else f"{last.epsilon:.3g}"

    def headline(self) -> str:
        """Return the progress in one line."""
        over = sum(round.done for round in self.rounds)
        if self.done:
            progress = f"all {self.total} rounds are done"
        elif self.current is None:
            progress = "no round has begun"
        else:
            of = "" if self.total is None else f" of {self.total}"
            progress = f"round {self.current.number}, {over}{of} done"
        name = f"{self.consortium}: " if self.consortium else ""
        return f"{name}{progress}; {size(self.bytes)} uploaded so far"


def read_history(entries: Iterable[Entry], constitution: Constitution | None = None) -> LedgerHistory:
    """Return the history of the rounds from the entries of a ledger, beginning with its first entry.

    Raises:
        DataError: the ledger belongs to a different constitution.
    """
    begun: dict[int, float] = {}
    bases: dict[int, str] = {}
    by_round: dict[int, list[Entry]] = {}
    for entry in entries:
        body = _mapping(entry.body)
        kind, facts = body.get("kind"), _mapping(body.get("facts"))
        number: int | None = within(_NUMBER, body.get("round"))
        if kind == "constitution" and constitution is not None and facts.get("fingerprint") != constitution.fingerprint:
            raise DataError(
                f"the ledger belongs to constitution {printable(facts.get('fingerprint'))[:64]}, but the given one is "
                f"{constitution.fingerprint}. Pass the constitution of this ledger"
            )
        if number is None or (constitution is not None and number > constitution.rounds):
            continue
        if kind == "base":
            bases[number] = printable(facts.get("fingerprint"))
            begun.setdefault(number, entry.time)
        elif kind in ("contribution", "refusal", "round"):
            by_round.setdefault(number, []).append(entry)
    total = None if constitution is None else constitution.rounds
    numbers = sorted(number for number in {*bases, *by_round} if total is None or number < total)
    rounds = tuple(_round(number, begun.get(number), by_round.get(number, [])) for number in numbers)
    seen = {
        name: None
        for round in rounds
        for name in (*round.contributions, *(one.owner for one in round.refusals), *round.weights, *round.losses)
    }
    privacy = None if constitution is None else constitution.privacy
    return LedgerHistory(
        consortium="" if constitution is None else printable(constitution.consortium),
        members=tuple({**dict.fromkeys(() if constitution is None else constitution.members), **seen}),
        total=total,
        budget=None if privacy is None else privacy.epsilon_budget,
        rounds=rounds,
        bases=bases,
    )


def describe(entry: Entry, history: LedgerHistory) -> str:
    """Return a one-line description of an entry; empty if the entry has an unknown form."""
    body = _mapping(entry.body)
    kind, number, facts = body.get("kind"), body.get("round"), _mapping(body.get("facts"))
    owner = printable(facts.get("owner"))
    round = next((one for one in history.rounds if one.number == number), None)
    if kind == "constitution":
        return f"the ledger begins with constitution {printable(facts.get('fingerprint'))[:16]}"
    if kind == "base" and history.total is not None and number == history.total:
        return f"{history.headline()}; the last base is {history.bases.get(number, '')[:16]}"
    if round is None:
        return "" if type(number) is int else printable(kind)
    if kind == "base":
        return f"round {number} begins from base {printable(facts.get('fingerprint'))[:16]}"
    if kind == "contribution" and owner in round.contributions:
        one = round.contributions[owner]
        spent = f", epsilon {one.epsilon:.3g} spent" if one.epsilon is not None else ""
        return f"round {number}: {owner} contributed {size(one.bytes)} after {duration(one.seconds)}{spent}"
    if kind == "refusal":
        came = owner in round.contributions and round.contributions[owner].index < entry.index and "what" not in facts
        return f"round {number}: {owner} is {'left out' if came else 'refused'}: {printable(facts.get('reason'))}"
    if kind == "round":
        parts = [f"{name} {loss_change(*pair, '->')}" for name, pair in round.losses.items()]
        median = [f"held-out loss {loss_change(*round.median, '->')}"] if round.median else []
        left = [f"left out: {', '.join(round.left_out)}"] if round.left_out else []
        result = "is done" if round.weights else "leaves the base unchanged"
        figures = [*median, *([", ".join(parts)] if parts else []), *left, f"{size(round.bytes)} uploaded"]
        return f"round {number} {result}: {'; '.join(figures)}"
    return ""


def printable(value: Any) -> str:
    """Return a value of a ledger as text that is safe to print; see `one_line`. None is empty."""
    return one_line("" if value is None else str(value))


def size(count: float | int) -> str:
    """Return a number of bytes as text with a suitable unit."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= 0.9995 * scale:
            return f"{_three(count / scale)} {unit}"
    return f"{count:.0f} B"


def duration(seconds: float | int) -> str:
    """Return a time in seconds as text with suitable units."""
    whole = round(max(seconds, 0.0))
    if whole < 60:
        return f"{whole} s"
    large, small, units = (
        (*divmod(whole, 60), ("min", "s")) if whole < 3600 else (*divmod(whole // 60, 60), ("h", "min"))
    )
    return f"{large} {units[0]} {small:02d} {units[1]}" if small else f"{large} {units[0]}"


def loss_change(before: float | None, after: float | None, arrow: str = "\N{RIGHTWARDS ARROW}") -> str:
    """Return the losses before and after a round as text; pass an ASCII `arrow` if the output may not be Unicode."""
    return f" {arrow} ".join("?" if value is None else _three(value) for value in (before, after))


def _three(value: float | int) -> str:
    """Return a number as text with three significant digits, or all digits of a longer integer part."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    digits = 2 - math.floor(math.log10(abs(float(f"{value:.3g}"))))
    return f"{value:,.{max(0, digits)}f}" if digits <= 6 else f"{value:.3g}"


def _round(number: int, began: float | None, entries: Iterable[Entry]) -> Round:
    contributions: dict[str, Contributed] = {}
    refusals: list[Refused] = []
    made: Mapping[str, Any] | None = None
    for entry in entries:
        facts = _mapping(entry.body.get("facts"))
        owner = printable(facts.get("owner"))
        if entry.body["kind"] == "contribution":
            spent = _mapping(facts.get("spent"))
            contributions[owner] = Contributed(
                index=entry.index,
                seconds=0.0 if began is None else max(0.0, entry.time - began),
                bytes=within(_COUNT, facts.get("bytes")) or 0,
                steps=within(_COUNT, facts.get("steps")) or 0,
                data_class=printable(facts.get("data_class")),
                private=bool(spent),
                epsilon=within(_EPSILON, spent.get("epsilon")),
            )
        elif entry.body["kind"] == "refusal":
            reason = printable(facts.get("reason")) or "no reason given"
            # With "what" an answer to another request was refused, not the contribution.
            came = owner in contributions and "what" not in facts
            refusals.append(Refused(owner=owner, reason=reason, left_out=came))
        else:
            made = facts
    result = made or {}
    left_out = result.get("left_out")
    judged = _mapping(result.get("evaluation"))
    before, after = within(_LOSS, judged.get("before")), within(_LOSS, judged.get("after"))
    return Round(
        number=number,
        began=began,
        contributions=contributions,
        refusals=tuple(refusals),
        done=made is not None,
        weights={
            printable(name): weight
            for name, value in _mapping(result.get("weights")).items()
            if (weight := within(_SHARE, value)) is not None
        },
        left_out=tuple(map(printable, left_out)) if isinstance(left_out, list) else (),
        losses={
            printable(name): (within(_LOSS, pair[0]), within(_LOSS, pair[1]))
            for name, pair in _mapping(judged.get("owners")).items()
            if isinstance(pair, list) and len(pair) == 2
        },
        median=None if before is None or after is None else (before, after),
    )


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
