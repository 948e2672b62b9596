"""Rounds of which the coordinator sees the sum alone: the messages, what is kept of them, and where a kill goes on.

A session is one try at the sum of a round. Each of its phases (`ANSWERS`) is asked by the coordinator and answered,
signed, by every member that is still there; the ledger says when a session is begun, whose masked contributions are
kept (the survivors), and what their sum is. Until the survivors are written down a kill costs the session, and the
next one draws every key and mask anew; from then on the same session is gone on with, for members who help to open one
sum of a round help with no other. A session of which no sum was opened is deleted with the next one.
"""

import logging
import math
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from fractions import Fraction
from itertools import combinations, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from worldloom.core.chain import canonical
from worldloom.core.errors import ConfigError, DataError, TrainingError
from worldloom.core.files import storage_errors, write_atomic
from worldloom.core.signing import SigningKey
from worldloom.federation.record.envelope import Refusal, SignedMessage, seal, unseal_answer
from worldloom.federation.record.ledger import Ledger, Records
from worldloom.federation.rounds.contribution import check_facts, check_spent
from worldloom.federation.rounds.members import Members
from worldloom.federation.rules.constitution import Constitution
from worldloom.federation.rules.partition import fingerprint
from worldloom.federation.secure.aggregation_protocol import Session, Unmasker, check_keys
from worldloom.federation.secure.privacy import PrivacyConfig, effective_noise
from worldloom.federation.transport.messages import Transport
from worldloom.models import load_tensors, save_tensors

ANSWERS = {"advertise": "advertised", "share": "shared", "mask": "masked", "unmask": "unmasked"}
"""The phases of a session in order, as they are asked, and the kind of message that answers each."""

THE_SUM = "the sum of all"
"""Whose a refusal is where it is nobody's in particular; no member has such a name."""

_log = logging.getLogger(__name__)
_SUM = "secure-sum"
_TRIES = 3  # sessions in a round, where too few members last through one
_GROUPS = 256  # of members whose shares are tried together, where one of them handed over a wrong one


def session_of(
    constitution: Constitution, number: int, attempt: int, base: str, shapes: Mapping[str, tuple[int, ...]]
) -> Session:
    """Return the session of an attempt at a round: every member makes the same one for itself.

    Its owners are all members, there or not: with a threshold of over half of them, no two sums of a round can be
    opened with members who each help with one.
    """
    name = canonical({"constitution": constitution.fingerprint, "round": number, "base": base, "attempt": attempt})
    return Session.parse({
        "name": name,
        "owners": constitution.member_keys(),
        "shapes": {key: tuple(shape) for key, shape in shapes.items()},
        "config": {"threshold": constitution.threshold},
    })  # fmt: skip


def lasting(weights: Mapping[str, float], cap: float, least: int) -> dict[str, float]:
    """Return weights, the largest 1, such that among any `least` or more of their owners none has more than `cap`.

    Weights above a level are lowered to it, the highest level that will do; who drops out later breaks no cap.

    Raises:
        ConfigError: there are fewer owners, or a weight is not above 0.
    """
    exact = {owner: Fraction(weight) for owner, weight in weights.items()}
    if len(exact) < least or min(exact.values(), default=Fraction(0)) <= 0:
        raise ConfigError(f"expected {least} or more weights above 0; got {dict(weights)}")
    share = max(Fraction(cap), Fraction(1, least))  # a cap of 1/3 as a float is a little less than a third
    rest = sorted(exact.values())[: least - 1]  # with whom the largest would have the most
    level = max(exact.values())
    while level > share * (level + sum(min(weight, level) for weight in rest)):
        below = [weight for weight in rest if weight < level]
        level = max(max(below), share * sum(below) / (1 - share * (least - len(below))))
    return {owner: float(min(weight, level) / level) for owner, weight in sorted(exact.items())}


def weights_of(constitution: Constitution, frames: Mapping[str, int]) -> dict[str, float]:
    """Return by what each owner multiplies its delta, from the frames that all announced."""
    power = {"equal": lambda count: 1.0, "frames": float, "sqrt-frames": math.sqrt}[constitution.weighting]
    return lasting({owner: power(count) for owner, count in frames.items()}, constitution.cap, constitution.threshold)


def noise_of(config: PrivacyConfig, constitution: Constitution, owner: str, weights: Mapping[str, float]) -> float:
    """Return the noise, in its own clips, that surely covers an owner in a sum: its own and that of the lightest."""
    others = sorted(weight for name, weight in weights.items() if name != owner)[: constitution.threshold - 1]
    return effective_noise(config.noise, [weights[owner], *others], share=1 / constitution.threshold)


class Transcript:
    """What members said in a session, checked as it comes: a phase needs those before it.

    `shapes` are those of the base's tensors. A node reads the others' advertised messages with it, the coordinator all.
    """

    def __init__(
        self,
        constitution: Constitution,
        number: int,
        attempt: int,
        base: str,
        shapes: Mapping[str, tuple[int, ...]],
    ) -> None:
        self.session = session_of(constitution, number, attempt, base, shapes)
        self._constitution, self.round, self.attempt, self._base = constitution, number, attempt, base
        self.place = {"round": number, "attempt": attempt, "base": base}
        self._members = {public: name for name, public in constitution.member_keys().items()}
        self._said: dict[str, dict[str, SignedMessage]] = {what: {} for what in ANSWERS}
        self._check = {
            "advertise": self._advertised,
            "share": self._shared,
            "mask": self._masked,
            "unmask": self._unmasked,
        }

    def hear(self, what: str, node: str, data: bytes) -> SignedMessage:
        """Take a node's answer to a phase.

        Raises:
            Refusal: it is a refusal.
            DataError: it is not what was asked for.
        """
        message = self._read(what, data)
        if message.sender != node:
            raise DataError(f"{node} sent what {message.sender} signed; expected its own")
        for key, value in {"owner": node, **self.place}.items():
            if message.body.get(key) != value:
                raise DataError(f"what {node} answers has {key} {message.body.get(key)!r}; expected {value!r}")
        self._check[what](message)
        # A masked contribution is as large as the model; it is read again where it is added up.
        self._said[what][node] = replace(message, tensors={})
        return message

    def said(self, what: str) -> dict[str, SignedMessage]:
        """Return the answers to a phase, by owner, without their tensors."""
        return dict(sorted(self._said[what].items()))

    def digests(self, what: str) -> dict[str, str]:
        """Return the digest of each answer to a phase."""
        return {owner: message.digest for owner, message in self.said(what).items()}

    @property
    def weights(self) -> dict[str, float]:
        """By what each who advertised multiplies its delta."""
        return weights_of(
            self._constitution, {owner: said.body["frames"] for owner, said in self.said("advertise").items()}
        )

    @property
    def roster(self) -> dict[str, dict[str, Any]]:
        """The keys that each advertised."""
        return {owner: said.body["keys"] for owner, said in self.said("advertise").items()}

    def unmasker(self) -> Unmasker:
        """Return the coordinator's part, with the keys of all who advertised.

        Raises:
            DataError: they are fewer than the threshold.
        """
        found = Unmasker(self.session)
        found.advertised(list(self.roster.values()))
        return found

    def inboxes(self) -> dict[str, dict[str, str]]:
        """Return for each who shared what the others sealed for it.

        Raises:
            DataError: they are fewer than the threshold.
        """
        return self.unmasker().shared([said.body for said in self.said("share").values()])

    def open(self, read: Callable[[str], bytes]) -> tuple[dict[str, Tensor], list[str]]:
        """Return the sum of the survivors' weighted deltas (float64), and whose shares opened it.

        `read` gives a survivor's masked message again.

        Raises:
            DataError: too few handed over their shares, or no group of them has the right ones.
        """
        unmasker, answers = self.unmasker(), self.said("unmask")
        unmasker.shared([said.body for said in self.said("share").values()])
        unmasker.masked(
            {"owner": owner, "masked": _row(self._read("mask", read(owner)))} for owner in self.said("mask")
        )
        wrong = None
        for group in islice(_groups(list(answers), self.session.config.threshold), _GROUPS):
            try:
                return unmasker.unmasked([answers[owner].body for owner in group]), group
            except DataError as error:
                wrong = wrong or error
        assert wrong is not None
        raise wrong

    def _read(self, what: str, data: bytes) -> SignedMessage:
        limit = self._constitution.largest_bytes
        return unseal_answer(data, kind=ANSWERS[what], known=self._members, limit=limit)

    def _advertised(self, message: SignedMessage) -> None:
        check_facts(message, self.round, self._base, self._constitution)
        if not message.body["frames"] and self._constitution.weighting != "equal":
            raise DataError(f"{message.sender} saw no frames, which weighs nothing; leave it out")
        check_keys(message.sender, message.body.get("keys"), self.session)

    def _shared(self, message: SignedMessage) -> None:
        others = set(self._said["advertise"]) - {message.sender}
        shares = message.body.get("shares")
        if message.sender not in self._said["advertise"] or not isinstance(message.body.get("commitment"), str):
            raise DataError(f"{message.sender} did not advertise, or does not commit to its mask; leave it out")
        if not _texts_for(shares, others):
            raise DataError(f"{message.sender} did not seal a share for each of {sorted(others)}; leave it out")

    def _masked(self, message: SignedMessage) -> None:
        sender, row = message.sender, message.tensors.get("masked")
        if sender not in self._said["share"] or message.body.get("weight") != self.weights[sender]:
            raise DataError(f"{sender} did not share its keys, or weighs itself otherwise than all; leave it out")
        size = (self.session.size,)
        if row is None or len(message.tensors) > 1 or row.dtype != torch.int64 or tuple(row.shape) != size:
            raise DataError(f"{sender} sent no masked delta of {size[0]} whole numbers; leave it out")
        check_spent(message, self._constitution)

    def _unmasked(self, message: SignedMessage) -> None:
        there = set(self._said["mask"])
        gone = set(self._said["share"]) - there
        seeds, keys = message.body.get("seeds"), message.body.get("keys")
        if message.sender not in there or not _texts_for(seeds, there) or not _texts_for(keys, gone):
            raise DataError(
                f"{message.sender} did not hand over a share of the mask of each of {sorted(there)}, and of the key of "
                f"each of {sorted(gone)}; it is gone without"
            )


class Sums:
    """The coordinator's part: it opens one sum a round over a transport, and keeps what the sum is made of.

    What it keeps, it keeps before the ledger says so.
    """

    def __init__(
        self,
        path: Path,
        constitution: Constitution,
        *,
        key: SigningKey,
        transport: Transport,
        ledger: Ledger,
        members: Members,
    ) -> None:
        self._path, self._constitution, self._key = path, constitution, key
        self._transport, self._ledger, self._circle = transport, ledger, members
        self._helped = set[str]()  # who helped to open a sum of this round that is not here

    def gather(self, number: int, base: Mapping[str, Tensor]) -> dict[str, float]:
        """Return by what each owner in the sum of a round multiplied its delta; none if it can never be opened.

        Raises:
            TrainingError: fewer members than the threshold were there; run again when they are back.
        """
        if (done := _facts(self._ledger, "sum", number)) is not None:
            return dict(done["weights"])
        kinds = [entry.body["kind"] for entry in self._ledger.entries() if entry.body["round"] == number]
        if "survivors" in kinds and "succession" in kinds[kinds.index("survivors") :]:
            reason = "it was begun by a coordinator that is lost: nobody helps with another. The base stays as it is"
            self._ledger.append("refusal", {"owner": THE_SUM, "reason": reason}, round=number)
            return {}
        self._helped = set[str]()
        resumed, why = self._survived(number, base), ""
        if resumed is not None:
            return self._opened(*resumed)
        for _ in range(_TRIES):
            try:
                masked = self._masked(number, base)
            except DataError as error:
                _log.warning("round %d: %s", number, error)
                why = str(error)
                continue
            return self._opened(*masked)
        if len(self._constitution.members) - len(self._helped) < self._constitution.threshold:
            helped = ", ".join(sorted(self._helped))
            reason = f"{helped} helped to open a sum that is lost, and help with no other. The base stays as it is"
            self._ledger.append("refusal", {"owner": THE_SUM, "reason": reason[:1000]}, round=number)
            return {}
        raise TrainingError(f"round {number} has no sum: {why}. Start the coordinator again when more members are back")

    def _masked(self, number: int, base: Mapping[str, Tensor]) -> "tuple[Transcript, Path]":
        """Begin a session, and bring it to where the survivors are known.

        Raises:
            DataError: too few members lasted.
        """
        begun = [e.body["facts"]["attempt"] for e in self._ledger.entries("session") if e.body["round"] == number]
        attempt = max(begun, default=-1) + 1
        for old in (self._path / "sessions").glob(f"{number:05d}-*"):
            with storage_errors(old):
                shutil.rmtree(old)
        held = Transcript(self._constitution, number, attempt, fingerprint(base), _shapes(base))
        folder = _folder(self._path, number, attempt)
        facts = {"attempt": attempt, "threshold": held.session.config.threshold, "session": held.session.digest.hex()}
        self._ledger.append("session", facts, round=number)
        nodes = [node for node in self._transport.nodes() if node in self._constitution.members]
        self._ask(held, folder, "advertise", {node: {} for node in nodes}, base)
        held.unmasker()
        roster = {"roster": {owner: _bytes(_file(folder, "advertise", owner)).hex() for owner in held.roster}}
        self._ask(held, folder, "share", dict.fromkeys(held.roster, roster))
        self._ask(held, folder, "mask", {owner: {"inbox": inbox} for owner, inbox in held.inboxes().items()})
        there = held.digests("mask")
        if len(there) < held.session.config.threshold:
            raise DataError(
                f"{len(there)} members sent a masked contribution; expected {held.session.config.threshold} or more"
            )
        told = {what: held.digests(what) for what in ("advertise", "share", "mask")}
        self._ledger.append("survivors", {"attempt": attempt, **told}, round=number)
        return held, folder

    def _survived(self, number: int, base: Mapping[str, Tensor]) -> "tuple[Transcript, Path] | None":
        """Return the session of a round whose survivors are known, if there is one: no other is begun after it."""
        facts = _facts(self._ledger, "survivors", number)
        if facts is None:
            return None
        held, folder = _again(self._path, facts, self._constitution, number, base)
        for path in sorted((folder / "unmask").glob("*.msg")):
            held.hear("unmask", path.stem, path.read_bytes())
        return held, folder

    def _opened(self, held: Transcript, folder: Path) -> dict[str, float]:
        """Ask the survivors to unmask, and keep the sum; return their weights.

        Raises:
            TrainingError: too few answered, and others may yet.
        """
        there, refused = sorted(held.said("mask")), set[str]()
        for _ in range(_TRIES):
            missing = [owner for owner in there if owner not in held.said("unmask")]
            refused = self._ask(held, folder, "unmask", {owner: {"survivors": there} for owner in missing})
            try:
                total, helped = held.open(lambda owner: _bytes(_file(folder, "mask", owner)))
            except DataError as error:
                why = error
                continue
            save_tensors(_stem(self._path, held.round), total, {"round": held.round}, kind=_SUM)
            weights = {owner: held.weights[owner] for owner in there}
            digests = held.digests("unmask")
            facts = {
                "attempt": held.attempt,
                "fingerprint": fingerprint(total),
                "weights": weights,
                "unmask": {owner: digests[owner] for owner in helped},
            }
            self._ledger.append("sum", facts, round=held.round)
            return weights
        waiting = set(there) - set(held.said("unmask")) - refused
        if waiting and len(held.said("unmask")) + len(waiting) >= held.session.config.threshold:
            raise TrainingError(
                f"the sum of round {held.round} cannot be opened yet: {why}. Start the coordinator again when "
                f"{', '.join(sorted(waiting))} are back"
            )
        reason = f"it can never be opened: {why}. The base stays as it is"
        self._ledger.append("refusal", {"owner": THE_SUM, "reason": reason[:1000]}, round=held.round)
        return {}

    def _ask(
        self,
        held: Transcript,
        folder: Path,
        what: str,
        bodies: Mapping[str, Mapping[str, Any]],
        base: Mapping[str, Tensor] | None = None,
    ) -> set[str]:
        """Ask members for a phase and keep what they answer; return who refused."""
        common = {"what": what, "constitution": self._constitution.fingerprint, **held.place}
        if base is not None:
            replies = self._circle.exchange(list(bodies), common, base)
        else:
            sealed = {owner: seal("ask", {**common, **body}, {}, key=self._key) for owner, body in bodies.items()}
            replies = self._transport.exchange(sealed, seconds=self._constitution.patience_seconds)
        refused = set[str]()
        for reply in replies:
            if self._circle.has_left(reply, held.round):
                refused.add(reply.node)
                continue
            try:
                if reply.data is None:
                    raise DataError(reply.error)
                self._accept(held, folder, what, reply.node, reply.data)
            except DataError as error:
                if isinstance(error, Refusal):
                    refused.add(reply.node)
                    if error.body.get("helped") is True:
                        self._helped.add(reply.node)
                _log.warning("round %d: %s: %s: %s", held.round, what, reply.node, error)
                facts = {"owner": reply.node, "reason": f"{what}: {error}"[:1000], "attempt": held.attempt}
                self._ledger.append("refusal", facts, round=held.round)
        return refused

    def _accept(self, held: Transcript, folder: Path, what: str, node: str, data: bytes) -> None:
        """Check an answer, and keep it as it came.

        Raises:
            DataError: it is not what was asked for.
        """
        message = held.hear(what, node, data)
        write_atomic(_file(folder, what, node), lambda temporary: temporary.write_bytes(data))
        if what == "mask":
            said = held.said("advertise")[node].body
            facts = {key: said[key] for key in ("owner", "steps", "frames", "data_class", "attempt")}
            facts |= {"spent": message.body["spent"], "message": message.digest, "bytes": len(data)}
            self._ledger.append("contribution", facts, round=held.round)


def kept_sum(path: Path, number: int) -> dict[str, Tensor]:
    """Return the sum of a round's weighted deltas.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    return load_tensors(_stem(path, number), kind=_SUM)[0]


def reopen(
    path: Path, records: Records, constitution: Constitution, number: int, base: Mapping[str, Tensor], *, into: Path
) -> dict[str, float]:
    """Open a round's sum again from the kept messages, and keep it in another folder; return its owners' weights.

    Raises:
        StorageError: a message is missing.
        DataError: a message or the sum is not the one that the ledger names.
    """
    there, done = _facts(records, "survivors", number), _facts(records, "sum", number)
    if there is None or done is None:
        raise DataError(f"the ledger names no sum of round {number}; its base cannot be computed again")
    held, folder = _again(path, there, constitution, number, base)
    for owner in done["unmask"]:
        held.hear("unmask", owner, _bytes(_file(folder, "unmask", owner)))
    _as_named(held, done, "unmask")
    total, _ = held.open(lambda owner: _bytes(_file(folder, "mask", owner)))
    if {fingerprint(total), fingerprint(kept_sum(path, number))} != {done["fingerprint"]}:
        raise DataError(f"the sum of round {number} is not what the masked contributions give; it was changed")
    save_tensors(_stem(into, number), total, {"round": number}, kind=_SUM)
    return {owner: held.weights[owner] for owner in held.said("mask")}


def _again(
    path: Path, facts: Mapping[str, Any], constitution: Constitution, number: int, base: Mapping[str, Tensor]
) -> tuple[Transcript, Path]:
    """Return a kept session as far as its survivors are known."""
    held = Transcript(constitution, number, facts["attempt"], fingerprint(base), _shapes(base))
    folder = _folder(path, number, facts["attempt"])
    for what in ("advertise", "share", "mask"):
        for owner in facts[what]:
            held.hear(what, owner, _bytes(_file(folder, what, owner)))
        _as_named(held, facts, what)
    return held, folder


def _as_named(held: Transcript, facts: Mapping[str, Any], what: str) -> None:
    found = held.digests(what)
    if wrong := sorted(owner for owner in facts[what] if found[owner] != facts[what][owner]):
        raise DataError(
            f"the {ANSWERS[what]} message of {', '.join(wrong)} in round {held.round} is not the one that the ledger "
            f"names"
        )


def _facts(records: Records, kind: str, number: int) -> Mapping[str, Any] | None:
    """Return the newest facts of a kind in a round."""
    return next(reversed(records.of(kind, number)), None)


def _groups(owners: list[str], least: int) -> Iterator[list[str]]:
    """Yield all owners, then groups of fewer, down to the least."""
    yield owners
    for size in range(len(owners) - 1, least - 1, -1):
        yield from map(list, combinations(owners, size))


def _texts_for(found: Any, owners: Collection[str]) -> bool:
    """Say whether this is a mapping from exactly these owners to text."""
    return isinstance(found, dict) and set(found) == set(owners) and all(isinstance(x, str) for x in found.values())


def _row(message: SignedMessage) -> bytes:
    return message.tensors["masked"].numpy().tobytes()


def _shapes(base: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in base.items()}


def _stem(path: Path, number: int) -> Path:
    return path / "sums" / f"{number:05d}"


def _folder(path: Path, number: int, attempt: int) -> Path:
    return path / "sessions" / f"{number:05d}-{attempt:03d}"


def _file(folder: Path, what: str, owner: str) -> Path:
    return folder / what / f"{owner}.msg"


def _bytes(path: Path) -> bytes:
    with storage_errors(path):
        return path.read_bytes()
