"""Rounds under secure aggregation: the coordinator receives only sums of contributions.

A session is one attempt at the sum of a round. In each of its phases (`ANSWERS`) the coordinator asks all remaining
members, and each sends a signed answer. The ledger records the start of a session, the members whose masked
contributions are stored (the survivors), and the sum. If the coordinator is killed before the survivors are recorded,
it starts a new session with new keys and masks. If it is killed later, the same session resumes, because members help
to unmask only one sum of a round. A session without an unmasked sum is deleted when the next one starts.
"""

import hashlib
import logging
import math
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from worldloom.core.chain import canonical
from worldloom.core.errors import ConfigError, DataError, StorageError, TrainingError
from worldloom.core.files import read_bytes, storage_errors, write_atomic
from worldloom.core.names import path_name
from worldloom.federation.record.envelope import Refusal, SignedMessage, unseal_answer
from worldloom.federation.record.ledger import Ledger, LedgerReader, Records
from worldloom.federation.record.ledger_rules import THE_SUM
from worldloom.federation.record.statements import SignedContribution, seen_in
from worldloom.federation.rounds.base import Base, fingerprint
from worldloom.federation.rounds.contribution import check_facts, check_spent
from worldloom.federation.rounds.members import Answer, Members
from worldloom.federation.rules.constitution import Constitution
from worldloom.federation.secure.aggregation_protocol import PHASES, SumLost, SumSession, Unmasker
from worldloom.federation.secure.privacy import PrivacyConfig, effective_noise
from worldloom.models import load_tensors, save_tensors

ANSWERS = dict(zip(PHASES, ("advertised", "shared", "masked", "unmasked"), strict=True))
"""The phases of a session in order, each with the kind of message that answers it."""

_log = logging.getLogger(__name__)
_SUM = "secure-sum"
_TRIES = 3  # sessions in a round, if too few members complete one
_BROKEN = "its shares do not recover the secret that it committed to"


def session_of(
    constitution: Constitution, number: int, attempt: int, base: str, shapes: Mapping[str, tuple[int, ...]]
) -> SumSession:
    """Return the session of an attempt at a round; all members derive the same session.

    Its owners are all members, even those that are not connected. Each member helps with only one sum of a round and
    the threshold is over half of all members, so two sums of a round can never be unmasked.
    """
    name = canonical({"constitution": constitution.fingerprint, "round": number, "base": base, "attempt": attempt})
    return SumSession.parse({
        "name": name,
        "owners": constitution.member_keys(),
        "shapes": {key: tuple(shape) for key, shape in shapes.items()},
        "threshold": constitution.threshold,
    })  # fmt: skip


def lasting(weights: Mapping[str, float], cap: float, least: int) -> dict[str, float]:
    """Lower and scale weights so that no owner exceeds the cap, even if owners drop out later, and the largest is 1.

    The weights are clipped at the highest level for which, in any group of at least `least` owners, no owner's share of
    the group's total weight exceeds `cap`.

    Raises:
        ConfigError: there are fewer than `least` owners, or a weight is not above 0.
    """
    exact = {owner: Fraction(weight) for owner, weight in weights.items()}
    if len(exact) < least or min(exact.values(), default=Fraction(0)) <= 0:
        raise ConfigError(
            f"expected at least {least} weights, all above 0; got {dict(weights)}. Leave out owners with weight 0, "
            f"and wait for more owners"
        )
    share = max(Fraction(cap), Fraction(1, least))  # a cap of 1/3 as a float is a little less than a third
    rest = sorted(exact.values())[: least - 1]  # the group in which the largest weight has its largest share
    level = max(exact.values())
    while level > share * (level + sum(min(weight, level) for weight in rest)):
        below = [weight for weight in rest if weight < level]
        level = max(max(below), share * sum(below) / (1 - share * (least - len(below))))
    return {owner: float(min(weight, level) / level) for owner, weight in sorted(exact.items())}


def weights_of(constitution: Constitution, frames: Mapping[str, int]) -> dict[str, float]:
    """Return the weight of each owner's delta, from the numbers of frames that the owners advertised."""
    power = {"equal": lambda count: 1.0, "frames": float, "sqrt-frames": math.sqrt}[constitution.weighting]
    return lasting({owner: power(count) for owner, count in frames.items()}, constitution.cap, constitution.threshold)


def noise_of(config: PrivacyConfig, constitution: Constitution, owner: str, weights: Mapping[str, float]) -> float:
    """Return the least noise that a sum with this owner can contain, relative to its sensitivity.

    A sum has at least `threshold` owners. The noise is least if the sum has exactly `threshold` owners: this owner and
    the others with the lowest weights. For the sensitivity see `effective_noise`.
    """
    others = sorted(weight for name, weight in weights.items() if name != owner)[: constitution.threshold - 1]
    return effective_noise(config.noise, [weights[owner], *others], share=1 / constitution.threshold)


class Transcript:
    """The members' answers in a session, each checked when it is received.

    `shapes` are the shapes of the base's tensors. The coordinator checks all answers with a transcript; a node checks
    only the other members' advertisements. `unmasker` computes the sum from the answers.
    """

    def __init__(
        self,
        constitution: Constitution,
        number: int,
        attempt: int,
        base: str,
        shapes: Mapping[str, tuple[int, ...]],
    ) -> None:
        self.unmasker = Unmasker(session_of(constitution, number, attempt, base, shapes))
        self.session = self.unmasker.session
        self.constitution, self.round, self.attempt, self._base = constitution, number, attempt, base
        self.place = {"round": number, "attempt": attempt, "base": base}
        self._answers: dict[str, dict[str, SignedMessage]] = {what: {} for what in ANSWERS}

    def hear(self, what: str, node: str, data: bytes) -> None:
        """Open, check and store a node's answer to a phase.

        Raises:
            Refusal: the node refused.
            DataError: the answer is invalid.
        """
        known, limit = self.constitution.member_names(), self.constitution.largest_bytes
        self.take(what, unseal_answer(data, kind=ANSWERS[what], sender=node, known=known, limit=limit))

    def take(self, what: str, message: SignedMessage) -> None:
        """Check and store an answer to a phase.

        Raises:
            DataError: the answer is invalid.
        """
        node = message.sender
        expected = {"owner": node, "constitution": self.constitution.fingerprint, **self.place}
        for key, value in expected.items():
            if message.body.get(key) != value:
                raise DataError(
                    f"the answer of {node} has {key} {message.body.get(key)!r}; expected {value!r}. "
                    f"Leave this answer out"
                )
        said: Any = message.body
        if what == "advertise":
            check_facts(message, self.round, self._base, self.constitution)
            said = message.body.get("keys")
        elif what == "mask":
            said = {"masked": self._masked(message)}
        self.unmasker.take(what, node, said)
        # Drop the tensors, which are as large as the model: the unmasker has already added them to the sum.
        self._answers[what][node] = replace(message, tensors={}, data=b"")

    def answers(self, what: str) -> dict[str, SignedMessage]:
        """Return the answers to a phase, by owner, without their tensors."""
        return dict(sorted(self._answers[what].items()))

    def digests(self, what: str) -> dict[str, str]:
        """Return the digest of each answer to a phase."""
        return {owner: message.digest for owner, message in self.answers(what).items()}

    @property
    def weights(self) -> dict[str, float]:
        """The weight of the delta of each member that advertised keys."""
        return weights_of(
            self.constitution, {owner: answer.body["frames"] for owner, answer in self.answers("advertise").items()}
        )

    def open(self) -> tuple[dict[str, Tensor], list[str]]:
        """Return the sum of the survivors' weighted deltas (float64), and the members whose shares unmasked it.

        Raises:
            DataError: too few members sent shares, or too many of them are wrong; see `Unmasker.sum`.
        """
        helpers = list(self.answers("unmask"))
        total = self.unmasker.sum(helpers)
        honest = [helper for helper in helpers if helper not in self.unmasker.wrong]
        return total, honest if len(honest) >= self.session.threshold else helpers

    def _masked(self, message: SignedMessage) -> bytes:
        if message.body.get("weight") != self.weights.get(message.sender):
            raise DataError(
                f"the contribution of {message.sender} has weight {message.body.get('weight')!r}; expected "
                f"{self.weights.get(message.sender)!r}. Leave the contribution out"
            )
        row = message.tensors.get("masked")
        if row is None or len(message.tensors) > 1 or row.dtype != torch.int64:
            raise DataError(
                f"{message.sender} did not send one int64 tensor 'masked' as its masked delta; leave "
                f"{message.sender} out"
            )
        check_spent(message, self.constitution)
        return row.numpy().tobytes()


def suspended(records: Records, number: int) -> set[str]:
    """Return the members that do not take part in sums of a round, because of faults that the ledger records.

    A member whose shares do not recover its secrets is at fault. If a member cannot use another member's share, nobody
    else can tell which of the two lies: the sender counts as at fault, unless the accuser has accused more members than
    have accused the sender. A member at fault misses the rest of the round, and then 1, 2, 4, ... rounds.
    """
    said: dict[str, dict[str, int]] = {}  # sender -> accuser -> the round of the newest complaint
    faults: dict[str, list[int]] = {}  # member -> rounds
    for entry in records.entries("refusal"):
        facts, round = entry.body["facts"], entry.body["round"]
        if "said_by" in facts:
            said.setdefault(facts["owner"], {})[facts["said_by"]] = round
            by = facts["said_by"]
            accused = sum(by in accusers for accusers in said.values())
            faults.setdefault(by if accused > len(said[facts["owner"]]) else facts["owner"], []).append(round)
        elif facts.get("broken") is True:
            faults.setdefault(facts["owner"], []).append(round)
    return {owner for owner, rounds in faults.items() if number <= max(rounds) + 2 ** min(len({*rounds}) - 1, 30)}


class SecureSums:
    """The coordinator's side of secure sums, one sum per round; messages are stored before the ledger records them."""

    def __init__(self, path: Path, constitution: Constitution, *, ledger: Ledger, members: Members) -> None:
        self._path, self._constitution, self._ledger, self._members = path, constitution, ledger, members
        self._helped = set[str]()  # members that helped to unmask a sum of this round that is lost here

    def gather(self, number: int, base: Base) -> dict[str, float]:
        """Return the weight of each owner's delta in the sum of a round; empty if no sum can be unmasked.

        Raises:
            TrainingError: fewer members than the threshold took part; run again when more are connected.
        """
        if (done := _facts(self._ledger, "sum", number)) is not None:
            return dict(done["weights"])
        kinds = [entry.body["kind"] for entry in self._ledger.entries() if entry.body["round"] == number]
        if "survivors" in kinds and "succession" in kinds[kinds.index("survivors") :]:
            reason = "a lost coordinator began this sum, and members help to unmask only one sum of a round"
            return self._give_up(number, reason)
        self._helped = set[str]()
        if (survived := _facts(self._ledger, "survivors", number)) is not None:  # this session is the last of the round
            held = _again(self._path, survived, self._constitution, number, base)
            for path in sorted(_file(self._path, held, "unmask", "x").parent.glob("*.msg")):
                try:
                    held.hear("unmask", path.stem, _bytes(path, self._constitution))
                except (DataError, StorageError) as error:
                    _log.warning("round %d: %s is damaged (%s); %s is asked again", number, path, error, path.stem)
            return self._opened(held)
        why = ""
        for _ in range(_TRIES):
            try:
                held = self._masked(number, base)
            except DataError as error:
                _log.warning("round %d: %s", number, error)
                why = str(error)
                continue
            return self._opened(held)
        if len(self._constitution.members) - len(self._helped) < self._constitution.threshold:
            helped = ", ".join(sorted(self._helped))
            return self._give_up(
                number, f"{helped} helped to unmask a sum that is lost, and cannot help with a second one"
            )
        raise TrainingError(
            f"round {number} has no sum: {why}. Start the coordinator again when more members are connected"
        )

    def _give_up(self, number: int, reason: str) -> dict[str, float]:
        facts = {"owner": THE_SUM, "reason": f"{reason[:900]}. The base does not change"}
        self._ledger.append("refusal", facts, round=number)
        return {}

    def _masked(self, number: int, base: Base) -> Transcript:
        """Start a session, and run it until the survivors are recorded.

        Raises:
            DataError: too few members took part.
        """
        begun = [e.body["facts"]["attempt"] for e in self._ledger.entries("session") if e.body["round"] == number]
        attempt = max(begun, default=-1) + 1
        for old in (self._path / "sessions").glob(f"{number:05d}-*"):
            with storage_errors(old):
                shutil.rmtree(old)
        held = Transcript(self._constitution, number, attempt, base.fingerprint, base.shapes)
        facts = {"attempt": attempt, "threshold": held.session.threshold, "session": held.session.digest.hex()}
        self._ledger.append("session", facts, round=number)
        body = {"what": "advertise", **held.place}
        nodes = self._trusted(number)
        answers = self._members.exchange(nodes, body, base, kind=ANSWERS["advertise"])
        self._collect(held, "advertise", answers)
        sent = {owner: _file(self._path, held, "advertise", owner) for owner in held.unmasker.roster}
        roster = {owner: _bytes(path, self._constitution).hex() for owner, path in sent.items()}
        self._ask(held, "share", {owner: {"roster": roster} for owner in roster})
        self._ask(held, "mask", {owner: {"inbox": inbox} for owner, inbox in held.unmasker.inboxes.items()})
        _log.info("round %d: %s sent a masked contribution", number, ", ".join(held.unmasker.survivors))
        digests = {what: held.digests(what) for what in ("advertise", "share", "mask")}
        self._ledger.append("survivors", {"attempt": attempt, **digests}, round=number)
        return held

    def _opened(self, held: Transcript) -> dict[str, float]:
        """Ask the survivors for their shares, and store the sum; return the survivors' weights.

        Raises:
            TrainingError: too few survivors have answered so far.
        """
        survivors, refused = held.unmasker.survivors, set[str]()
        for _ in range(_TRIES):
            missing = [owner for owner in survivors if owner not in held.answers("unmask")]
            refused = self._ask(held, "unmask", {owner: {"survivors": survivors} for owner in missing})
            try:
                total, helped = held.open()
            except DataError as error:
                why = error
                continue
            for owner in sorted(held.unmasker.wrong):
                _log.warning("round %d: %s sent a wrong share, which was not needed", held.round, owner)
            save_tensors(_stem(self._path, held.round), total, {"round": held.round}, kind=_SUM)
            weights = {owner: held.weights[owner] for owner in survivors}
            digests = held.digests("unmask")
            facts = {"attempt": held.attempt, "fingerprint": fingerprint(total), "weights": weights}
            unmask = {owner: digests[owner] for owner in helped}
            self._ledger.append("sum", {**facts, "unmask": unmask}, round=held.round)
            return weights
        waiting = set(survivors) - set(held.answers("unmask")) - refused
        if waiting and len(held.answers("unmask")) + len(waiting) >= held.session.threshold:
            raise TrainingError(
                f"the sum of round {held.round} cannot be unmasked yet: {why}. Start the coordinator again when "
                f"{', '.join(sorted(waiting))} are connected"
            )
        for owner in why.owners if isinstance(why, SumLost) else ():
            facts = {"owner": owner, "reason": f"unmask: {_BROKEN}", "attempt": held.attempt, "broken": True}
            self._ledger.append("refusal", facts, round=held.round)
        return self._give_up(held.round, f"the sum can never be unmasked: {why}")

    def _trusted(self, number: int) -> list[str]:
        """Return the nodes that take part in the next session of a round: those that are not `suspended`.

        If these are fewer than the threshold, all nodes take part.
        """
        nodes = list(self._members.nodes())
        out = suspended(self._ledger, number)
        trusted = [node for node in nodes if node not in out]
        if len(trusted) < self._constitution.threshold:
            return nodes
        if len(trusted) < len(nodes):
            names = ", ".join(sorted(set(nodes) - set(trusted)))
            _log.warning("round %d: the sum is formed without %s, because of faults in earlier sums", number, names)
        return trusted

    def _ask(self, held: Transcript, what: str, bodies: Mapping[str, Mapping[str, Any]]) -> set[str]:
        """Send members the requests of a phase; return the members that refused or left."""
        bodies = {owner: {"what": what, **held.place, **body} for owner, body in bodies.items()}
        return self._collect(held, what, self._members.exchange_each(bodies, kind=ANSWERS[what]))

    def _collect(self, held: Transcript, what: str, answers: Iterable[Answer]) -> set[str]:
        failed = self._members.collect(
            answers,
            held.round,
            lambda message: self._accept(held, what, message),
            phase=f"{what}: ",
            attempt=held.attempt,
        )
        refusals = {owner: error for owner, error in failed.items() if isinstance(error, Refusal)}
        for owner, error in refusals.items():
            sender = error.body.get("sender")
            if what == "mask" and sender in held.unmasker.inboxes and sender != owner:
                facts = {"owner": sender, "reason": f"mask: {owner} cannot use the share from {sender}"}
                self._ledger.append("refusal", {**facts, "attempt": held.attempt, "said_by": owner}, round=held.round)
        self._helped |= {owner for owner, error in refusals.items() if error.body.get("helped") is True}
        return {*refusals, *(owner for owner, error in failed.items() if error is None)}

    def _accept(self, held: Transcript, what: str, message: SignedMessage) -> None:
        """Check an answer, and store it as received.

        Raises:
            DataError: the answer is invalid.
        """
        if what == "advertise":
            self._members.check_seen(message.sender, seen_in(message))
        signed = None
        if what == "mask":
            self._members.check_spent(message.sender, message.body["spent"])
            said = [held.answers("advertise")[message.sender].statement, message.statement]
            signed = SignedContribution.of(said, held.round, self._constitution)
        held.take(what, message)  # from here on a masked delta is in the sum, so nothing may refuse it
        path = _file(self._path, held, what, message.sender)
        write_atomic(path, lambda temporary: temporary.write_bytes(message.data))
        if signed is not None:
            self._ledger.append("contribution", signed.facts, round=held.round)
            self._members.mark_present(message.sender, signed.seen, held.round)


def load_sum(path: Path, number: int) -> dict[str, Tensor]:
    """Return the stored sum of a round's weighted deltas.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    return load_tensors(_stem(path, number), kind=_SUM)[0]


def reopen(
    path: Path, records: LedgerReader, constitution: Constitution, number: int, base: Base, *, into: Path
) -> dict[str, float]:
    """Unmask a round's sum again from stored messages, and write it to another folder; return the owners' weights.

    Raises:
        StorageError: a message is missing.
        DataError: a message or the sum does not match the ledger.
    """
    survived, done = _facts(records, "survivors", number), _facts(records, "sum", number)
    if survived is None or done is None:
        raise DataError(
            f"the ledger has no sum of round {number}, so the next base cannot be recomputed; restore "
            f"the ledger from a copy"
        )
    held = _again(path, survived, constitution, number, base)
    _hear_stored(path, held, "unmask", done["unmask"])
    total, _ = held.open()
    if {fingerprint(total), fingerprint(load_sum(path, number))} != {done["fingerprint"]}:
        raise DataError(
            f"the sum of round {number} is not the sum of the stored contributions; restore the folder from a copy"
        )
    save_tensors(_stem(into, number), total, {"round": number}, kind=_SUM)
    return {owner: held.weights[owner] for owner in held.unmasker.survivors}


def _again(
    path: Path, facts: Mapping[str, Any], constitution: Constitution, number: int, base: Base
) -> Transcript:  # fmt: skip
    """Return a stored session up to the point where its survivors are recorded."""
    held = Transcript(constitution, number, facts["attempt"], base.fingerprint, base.shapes)
    for what in ("advertise", "share", "mask"):
        _hear_stored(path, held, what, facts[what])
    return held


def _hear_stored(path: Path, held: Transcript, what: str, named: Mapping[str, str]) -> None:
    """Check the stored answers to a phase against the digests in the ledger."""
    stored = {owner: _bytes(_file(path, held, what, owner), held.constitution) for owner in named}
    if wrong := sorted(owner for owner, data in stored.items() if hashlib.sha256(data).hexdigest() != named[owner]):
        raise DataError(
            f"the stored answers of {', '.join(wrong)} to the request to {what} in round {held.round} do not match the "
            f"ledger; restore {', '.join(str(_file(path, held, what, owner)) for owner in wrong)} from a copy"
        )
    for owner, data in stored.items():
        held.hear(what, owner, data)


def _facts(records: Records, kind: str, number: int) -> Mapping[str, Any] | None:
    """Return the newest facts of a kind in a round, or None if there are none."""
    return next(reversed(records.of(kind, number)), None)


def _stem(path: Path, number: int) -> Path:
    return path / "sums" / f"{number:05d}"


def _file(path: Path, held: Transcript, what: str, owner: str) -> Path:
    return path / "sessions" / f"{held.round:05d}-{held.attempt:03d}" / what / f"{path_name(owner, 'owner')}.msg"


def _bytes(path: Path, constitution: Constitution) -> bytes:
    return read_bytes(path, constitution.largest_bytes)
