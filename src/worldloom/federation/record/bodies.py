"""The bodies of all messages between nodes and coordinators: their keys, types and ranges.

A body is checked once, when its message arrives; see `worldloom.federation.rules.ranges`. A key that is not declared
here is refused, so every number that is sent has a declared range.
"""

import reprlib
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints, ValidationError

from worldloom.core.config import Config
from worldloom.core.errors import DataError
from worldloom.core.registry import nearest
from worldloom.federation.rules.ranges import Count, Epsilon, Length, Magnitude, Number, Share
from worldloom.federation.secure.privacy import Clip, Noise

CONTRIBUTION_FORMAT = 2
"""The version of the format of contributions. In version 1 they named neither a constitution nor a ledger head."""

_LONGEST = 600  # characters of an error, because the sender chooses its length
_Short = Annotated[str, StringConstraints(max_length=4096)]  # a name, key, hash, signature or share


class Body(Config, strict=True):
    """The body of a message. Types are strict: the number 1 is valid neither as a Boolean nor as text."""


class Checkpoint(Body):
    """A ledger head (number of entries and newest hash), signed by a member that has received this ledger."""

    kind: _Short
    format: Literal[2]
    length: Length
    hash: _Short
    key: _Short
    signature: _Short


class SeenHead(Body):
    """The length of a ledger, and the hash of its newest entry."""

    length: Annotated[Length, Field(ge=1)]
    hash: _Short


class Spent(Body):
    """The privacy that an owner has spent; empty without differential privacy.

    `noise` is in units of `clip`. Under secure aggregation, `share` is the owner's fraction of the noise's variance,
    and `in_sum` is the least noise that the sum can contain.
    """

    clip: Clip | None = None
    noise: Noise | None = None
    delta: Share | None = None
    round: Number | None = None
    share: Share | None = None
    in_sum: Noise | None = None
    epsilon: Epsilon | None = None


class _Trained(Body):
    """The public facts of an owner's training in a round; `seen` is the head of the ledger that the owner had seen."""

    format: Literal[2]
    constitution: _Short
    seen: SeenHead
    owner: _Short
    round: Number
    base: _Short
    steps: Count
    frames: Count
    data_class: _Short


class ContributionBody(_Trained):
    """The facts of a contribution; the delta is in the message's tensors."""

    spent: Spent


class VerdictBody(Body):
    """The losses of a base on held-out episodes."""

    round: Number
    base: _Short
    losses: dict[str, Magnitude]
    countersigned: Checkpoint


class ReceiptBody(Body):
    """The confirmation that the last base is stored."""

    round: Number
    countersigned: Checkpoint


class RefusalBody(Body):
    """The reason why a node does not answer, and what it lacks.

    `length` is the number of ledger entries that the node has, and `lacks` means that it has no copy of the base.
    `helped` means that the node has helped to unmask a sum of this round. `left` means that its owner left the
    consortium. `sender` is the member whose share in a secure sum this node cannot use.
    """

    round: Number | None
    why: _Short
    length: Length | None = None
    lacks: bool = False
    helped: bool = False
    sender: _Short | None = None
    left: bool = False
    constitution: _Short | None = None


class _InSession(Body):
    """The fields of every answer in a session (one attempt at a secure sum); `attempt` is the session's number."""

    constitution: _Short
    owner: _Short
    round: Number
    attempt: Number
    base: _Short


class SessionKeys(Body):
    """An owner's public keys for a session, signed by the owner: `mask` for masks, `box` to encrypt shares for it."""

    owner: _Short
    mask: _Short
    box: _Short
    signature: _Short


class AdvertisedBody(_Trained):
    """The facts of a contribution to a secure sum, and the keys of the session."""

    attempt: Number
    keys: SessionKeys


class SharedBody(_InSession):
    """The encrypted shares of an owner's secrets, by recipient."""

    commitment: _Short
    shares: dict[str, _Short]


class MaskedBody(_InSession):
    """The weight of a masked delta; the delta is in the message's tensors."""

    weight: Share
    spent: Spent


class UnmaskedBody(_InSession):
    """The shares that unmask a sum, by the secret's owner: of the seeds of owners in the sum, of others' mask keys."""

    seeds: dict[str, _Short]
    keys: dict[str, _Short]


class LedgerLines(Body):
    """Entries of the ledger, the first with index `begin`."""

    begin: Length
    lines: list[str]


class _Ask(Body):
    """A request of a coordinator."""

    what: _Short
    constitution: _Short


class RoundAsk(_Ask):
    """A request to train from a base, to evaluate it, or to store it.

    The base is in the message's tensors, unless the coordinator has sent it to this node before.
    """

    round: Number
    base: _Short
    ledger: LedgerLines


class AdvertiseAsk(RoundAsk):
    """A request to train from a base, and to begin a session of a secure sum."""

    attempt: Number


class _SessionAsk(_Ask):
    """A request in a session of a secure sum."""

    round: Number
    attempt: Number
    base: _Short


class ShareAsk(_SessionAsk):
    """A request to share secrets; `roster` has each owner's answer to `advertise`, in hexadecimal digits."""

    roster: dict[str, str]


class MaskAsk(_SessionAsk):
    """A request for a masked delta; `inbox` has the shares that are encrypted for the recipient, by sender."""

    inbox: dict[str, _Short]


class UnmaskAsk(_SessionAsk):
    """A request to unmask the sum of the survivors."""

    survivors: list[str]


ANSWERS: Mapping[str, type[Body]] = {
    "contribution": ContributionBody,
    "verdict": VerdictBody,
    "receipt": ReceiptBody,
    "refusal": RefusalBody,
    "advertised": AdvertisedBody,
    "shared": SharedBody,
    "masked": MaskedBody,
    "unmasked": UnmaskedBody,
}
"""The class of the body, by the kind of answer."""

ASKS: Mapping[str, type[Body]] = {
    "train": RoundAsk,
    "judge": RoundAsk,
    "store": RoundAsk,
    "advertise": AdvertiseAsk,
    "share": ShareAsk,
    "mask": MaskAsk,
    "unmask": UnmaskAsk,
}
"""The class of the body, by what the request asks for."""


def check_answer(kind: str, body: Mapping[str, Any], sender: str) -> None:
    """Check the body of an answer.

    Raises:
        DataError: the kind is unknown, or a key, type or range is wrong; the message names the sender and the key.
    """
    if kind not in ANSWERS:
        raise DataError(f"{sender} sent a message of unknown kind {kind!r}; {nearest(kind, ANSWERS)}")
    _check(ANSWERS[kind], body, f"the {kind} of {sender}")


def check_ask(body: Mapping[str, Any]) -> None:
    """Check the body of a request; `body["what"]` must be a key of `ASKS`.

    Raises:
        DataError: a key, type or range is wrong; the message names the key.
    """
    _check(ASKS[body["what"]], body, f"the request to {body['what']}")


def _check(model: type[Body], body: Mapping[str, Any], what: str) -> None:
    try:
        model.model_validate(dict(body))
    except ValidationError as error:
        found = [
            f"{'.'.join(map(str, item['loc']))}: {item['msg']}; got {reprlib.repr(item['input'])}"
            for item in error.errors(include_url=False)[:3]
        ]
        raise DataError(
            f"{what} is invalid: {'; '.join(found)[:_LONGEST]}. Run the same version on both sides"
        ) from None
