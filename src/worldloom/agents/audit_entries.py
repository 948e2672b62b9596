"""The bodies of an audit log's entries. The hash chain shows only that no entry was changed, so bodies are checked."""

import os
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from worldloom.core.chain import Entry
from worldloom.core.errors import DataError

FORMAT = 1
_MOST_THREADS = max(256, os.cpu_count() or 1)

Digest = Annotated[str, StringConstraints(pattern="^[0-9a-f]{64}$")]
Numbers = list[float | None]
Places = list[Annotated[int, Field(ge=0)]]
BodyT = TypeVar("BodyT", bound="EntryBody")

FORGED = "the log was not written by worldloom, or was forged"


class EntryBody(BaseModel):
    """The body of any entry; further keys are allowed."""

    model_config = ConfigDict(frozen=True, strict=True, allow_inf_nan=False)

    event: str
    part: str = ""


class BeganBody(EntryBody):
    """The start of episodes; see `AuditLog.begin`."""

    environments: int = Field(ge=0)
    goal: Digest


class WentOnBody(EntryBody):
    """The environments that continue; see `AuditLog.select`."""

    environments: Places


class Happened(BaseModel):
    """What followed a plan: the distance from the prediction, and the violations that were observed."""

    model_config = EntryBody.model_config

    gap: Numbers | None
    seen: dict[str, Numbers]


class EndedBody(EntryBody):
    """The end of episodes; see `AuditLog.ended`."""

    environments: Places
    outcomes: list[str]
    happened: Happened | None


class DecidedBody(EntryBody):
    """A decision; see `AuditLog.decided`."""

    situation: Digest
    actions: Digest
    plan: Digest
    first: list[Numbers]
    cost: Numbers
    violations: dict[str, Numbers]
    refused: list[int]
    cut_short: bool = Field(alias="cut short")
    stretch: float
    happened: Happened | None


class AgentDescription(EntryBody):
    """The body of an 'opened' entry: all that the decisions after it depend on, apart from their situations."""

    run: str
    model: str
    method: dict[str, Any]
    layers: list[dict[str, Any]]
    margins: list[Annotated[list[float], Field(min_length=1)]] | None
    threads: int = Field(ge=1, le=_MOST_THREADS)


_BODIES: dict[str, type[EntryBody]] = {
    "opened": EntryBody,
    "began": BeganBody,
    "decided": DecidedBody,
    "went on": WentOnBody,
    "ended": EndedBody,
}


def parse_body(entry: Entry, kind: type[BodyT]) -> BodyT:
    """Return the body of an entry.

    Raises:
        DataError: a key is missing or has a wrong value; the message names the first one.
    """
    try:
        return kind.model_validate(entry.body)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(map(str, first["loc"]))
        why = f"has no {key!r}" if first["type"] == "missing" else f"has a wrong {key!r}: {first['msg']}"
    raise DataError(f"entry {entry.index} {why}; {FORGED}")


def check_entry(entry: Entry) -> None:
    """Check that an entry has a known event, and the keys of its event.

    Raises:
        DataError: a key is missing or has a wrong value, or the log's format version is not supported.
    """
    event = parse_body(entry, EntryBody).event
    if event not in _BODIES:
        raise DataError(
            f"entry {entry.index} has the unknown event {event[:80]!r}; expected {', '.join(_BODIES)}. The log was not "
            f"written by worldloom, or was forged"
        )
    if event == "opened" and entry.body.get("format") != FORMAT:
        raise DataError(
            f"from entry {entry.index} on, the audit log has format {entry.body.get('format')!r}; this version of "
            f"worldloom reads format {FORMAT}. Use the version that wrote the log"
        )
    parse_body(entry, _BODIES[event])
