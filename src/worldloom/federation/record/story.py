"""What a ledger tells of the rounds, in the form that a live view and a report show.

Names and reasons come from others: what is not of the expected form is passed over, and text becomes one line that can
be printed.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from worldloom.core.chain import Entry, Tail
from worldloom.core.errors import DataError
from worldloom.federation.rules.constitution import Constitution

State = Literal["waiting", "contributed", "refused", "left out"]


@dataclass(frozen=True, kw_only=True)
class Contributed:
    """A contribution that was accepted: as entry `index`, `seconds` after its round began."""

    index: int
    seconds: float
    bytes: int
    steps: int
    data_class: str
    private: bool  # whether it says what privacy was spent
    epsilon: float | None  # all that its owner had spent by then; None without a bound


@dataclass(frozen=True, kw_only=True)
class Refused:
    """A contribution that does not count: it never came or was refused, or came and was left out."""

    owner: str
    reason: str
    left_out: bool


@dataclass(frozen=True, kw_only=True)
class Round:
    """One round: what came, and, once it is `woven`, who had which part in it and what members lost by it.

    `losses` are held-out losses before and after, of each member that answered; `middle` is of the one in the middle.
    """

    number: int
    began: float | None
    contributions: Mapping[str, Contributed]
    refusals: tuple[Refused, ...]
    woven: bool
    weights: Mapping[str, float]
    left_out: tuple[str, ...]
    losses: Mapping[str, tuple[float | None, float | None]]
    middle: tuple[float, float] | None

    @property
    def bytes(self) -> int:
        """The bytes of all contributions."""
        return sum(one.bytes for one in self.contributions.values())

    def state(self, owner: str) -> State:
        """Return how far a member is."""
        if owner in self.left_out or any(one.owner == owner and one.left_out for one in self.refusals):
            return "left out"
        if owner in self.contributions:
            return "contributed"
        return "refused" if self.reason(owner) else "waiting"

    def reason(self, owner: str) -> str:
        """Return why a member's contribution does not count, as it was said last; empty if nothing was said."""
        return next((one.reason for one in reversed(self.refusals) if one.owner == owner), "")


@dataclass(frozen=True, kw_only=True)
class Story:
    """What happened so far; `total` is None without a constitution: no ledger says which round is the last."""

    consortium: str
    members: tuple[str, ...]
    total: int | None
    budget: float | None
    rounds: tuple[Round, ...]
    bases: Mapping[int, str] = field(default_factory=dict)  # the fingerprint of each

    @property
    def done(self) -> bool:
        """Whether the last round's base is published."""
        return self.total is not None and max(self.bases, default=-1) >= self.total

    @property
    def present(self) -> Round | None:
        """The round under way, or the last one; None before the first."""
        return self.rounds[-1] if self.rounds else None

    @property
    def bytes(self) -> int:
        """What all contributions so far weigh."""
        return sum(round.bytes for round in self.rounds)

    @property
    def private(self) -> bool:
        """Whether any contribution says what privacy was spent."""
        return any(one.private for round in self.rounds for one in round.contributions.values())

    def sent(self, owner: str) -> int:
        """Return the bytes of an owner's contributions so far."""
        return sum(round.contributions[owner].bytes for round in self.rounds if owner in round.contributions)

    def spent(self, owner: str) -> str:
        """Return the epsilon that an owner has spent, in words; empty if it never said."""
        told = [round.contributions[owner] for round in self.rounds if owner in round.contributions]
        last = next((one for one in reversed(told) if one.private), None)
        return "" if last is None else "no bound" if last.epsilon is None else f"{last.epsilon:.3g}"

    def headline(self) -> str:
        """Say in a line how far it is."""
        over = sum(round.woven for round in self.rounds)
        if self.done:
            how_far = f"all {self.total} rounds are done"
        elif self.present is None:
            how_far = "no round has begun"
        else:
            of = "" if self.total is None else f" of {self.total}"
            how_far = f"round {self.present.number}, {over}{of} done"
        name = f"{self.consortium}: " if self.consortium else ""
        return f"{name}{how_far}; {size(self.bytes)} came up so far"


def tell(entries: Iterable[Entry], constitution: Constitution | None = None) -> Story:
    """Read entries of a ledger, from its first on.

    Raises:
        DataError: the ledger runs under another constitution.
    """
    begun: dict[int, float] = {}
    bases: dict[int, str] = {}
    by_round: dict[int, list[Entry]] = {}
    for entry in entries:
        body = _mapping(entry.body)
        kind, number, facts = body.get("kind"), body.get("round"), _mapping(body.get("facts"))
        if kind == "constitution" and constitution is not None and facts.get("fingerprint") != constitution.fingerprint:
            raise DataError(
                f"the ledger runs under constitution {printable(facts.get('fingerprint'))[:64]}; the one given is "
                f"{constitution.fingerprint}. Give the one that its members signed"
            )
        if type(number) is not int:
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
    return Story(
        consortium="" if constitution is None else printable(constitution.consortium),
        members=tuple({**dict.fromkeys(() if constitution is None else constitution.members), **seen}),
        total=total,
        budget=None if privacy is None else privacy.epsilon_budget,
        rounds=rounds,
        bases=bases,
    )


class Watch:
    """Looks at a folder of rounds while others write it; `story` is what was seen so far.

    Raises:
        DataError: see `tell` and `Tail`.
    """

    def __init__(self, rounds: Path | str, constitution: Constitution | None = None) -> None:
        self.ledger = Path(rounds) / "ledger.jsonl"
        self._tail, self._constitution = Tail(self.ledger), constitution
        self._entries: list[Entry] = []
        self.story = tell((), constitution)

    def look(self) -> list[str]:
        """Look once more; return a line for each event since the last time."""
        if not (new := self._tail.new()):
            return []
        self._entries += new
        self.story = tell(self._entries, self._constitution)
        return [line for entry in new if (line := describe(entry, self.story))]


def describe(entry: Entry, story: Story) -> str:
    """Return an entry in a line, as one event of a story that has it; empty for one of an unknown form."""
    body = _mapping(entry.body)
    kind, number, facts = body.get("kind"), body.get("round"), _mapping(body.get("facts"))
    owner = printable(facts.get("owner"))
    round = next((one for one in story.rounds if one.number == number), None)
    if kind == "constitution":
        return f"the ledger begins, under constitution {printable(facts.get('fingerprint'))[:16]}"
    if kind == "base" and story.total is not None and number == story.total:
        return f"{story.headline()}; the last base is {story.bases[number][:16]}"
    if round is None:
        return "" if type(number) is int else printable(kind)
    if kind == "base":
        return f"round {number} begins, from base {printable(facts.get('fingerprint'))[:16]}"
    if kind == "contribution" and owner in round.contributions:
        one = round.contributions[owner]
        spent = f", epsilon {one.epsilon:.3g} spent" if one.epsilon is not None else ""
        return f"round {number}: {owner} contributed {size(one.bytes)} after {duration(one.seconds)}{spent}"
    if kind == "refusal":
        came = owner in round.contributions and round.contributions[owner].index < entry.index
        return f"round {number}: {owner} is {'left out' if came else 'refused'}: {printable(facts.get('reason'))}"
    if kind == "round":
        parts = [f"{name} {_step(*pair)}" for name, pair in round.losses.items()]
        middle = [f"held-out loss {_step(*round.middle)}"] if round.middle else []
        left = [f"left out: {', '.join(round.left_out)}"] if round.left_out else []
        made = "is woven" if round.weights else "leaves the base as it was"
        said = "; ".join([*middle, *([", ".join(parts)] if parts else []), *left, f"{size(round.bytes)} came up"])
        return f"round {number} {made}: {said}"
    return ""


def printable(value: Any) -> str:
    """Return anybody's text as one line that a terminal prints as it stands: no control characters, no escapes."""
    text = "" if value is None else str(value)
    return " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())


def size(count: float | int) -> str:
    """Return a number of bytes in the unit that suits it."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= 0.9995 * scale:
            return f"{_three(count / scale)} {unit}"
    return f"{count:.0f} B"


def duration(seconds: float | int) -> str:
    """Return a time in the units that suit it."""
    whole = round(max(seconds, 0.0))
    if whole < 60:
        return f"{whole} s"
    large, small, units = (
        (*divmod(whole, 60), ("min", "s")) if whole < 3600 else (*divmod(whole // 60, 60), ("h", "min"))
    )
    return f"{large} {units[0]} {small:02d} {units[1]}" if small else f"{large} {units[0]}"


def loss_change(before: float | None, after: float | None) -> str:
    """Return a held-out loss before and after a round."""
    return " \N{RIGHTWARDS ARROW} ".join("?" if value is None else _three(value) for value in (before, after))


def _step(before: float | None, after: float | None) -> str:
    # Plain letters: lines go to logs and pipes of any encoding.
    return " -> ".join("?" if value is None else _three(value) for value in (before, after))


def _three(value: float | int) -> str:
    """Return a number with three digits that count, and all before its point."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    digits = 2 - math.floor(math.log10(abs(float(f"{value:.3g}"))))
    return f"{value:,.{max(0, digits)}f}" if digits <= 6 else f"{value:.3g}"


def _round(number: int, began: float | None, entries: Iterable[Entry]) -> Round:
    contributions: dict[str, Contributed] = {}
    refusals: list[Refused] = []
    made: Mapping[str, Any] | None = None
    for entry in entries:
        facts = _mapping(entry.body["facts"])
        owner = printable(facts.get("owner"))
        if entry.body["kind"] == "contribution":
            spent = _mapping(facts.get("spent"))
            contributions[owner] = Contributed(
                index=entry.index,
                seconds=0.0 if began is None else max(0.0, entry.time - began),
                bytes=int(_number(facts.get("bytes")) or 0),
                steps=int(_number(facts.get("steps")) or 0),
                data_class=printable(facts.get("data_class")),
                private=bool(spent),
                epsilon=_number(spent.get("epsilon")),
            )
        elif entry.body["kind"] == "refusal":
            reason = printable(facts.get("reason")) or "no reason is given"
            refusals.append(Refused(owner=owner, reason=reason, left_out=owner in contributions))
        else:
            made = facts
    said = made or {}
    left_out = said.get("left_out")
    judged = _mapping(said.get("evaluation"))
    before, after = _number(judged.get("before")), _number(judged.get("after"))
    return Round(
        number=number,
        began=began,
        contributions=contributions,
        refusals=tuple(refusals),
        woven=made is not None,
        weights={
            printable(name): weight
            for name, value in _mapping(said.get("weights")).items()
            if (weight := _number(value)) is not None
        },
        left_out=tuple(map(printable, left_out)) if isinstance(left_out, list) else (),
        losses={
            printable(name): (_number(pair[0]), _number(pair[1]))
            for name, pair in _mapping(judged.get("owners")).items()
            if isinstance(pair, list) and len(pair) == 2
        },
        middle=None if before is None or after is None else (before, after),
    )


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None
