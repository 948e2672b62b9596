"""An owner's part of a sum under secure aggregation: what it answers in each phase, and what it keeps between them.

Its secrets are kept on the disk, where only the owner may read, so that a node that was killed goes on; they are
deleted as soon as it has helped to open the sum, or with the next session that it is asked into. An answer is on the
disk before it leaves: asked the same again, a node says the same, and asked another thing in its place, it refuses.

A node goes into no session older than its newest, and after it helped to open a sum of a round, into no other of that
round: from two sums of the same deltas over other members, the difference would tell single ones.
"""

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from worldloom.core.chain import canonical
from worldloom.core.config import Config
from worldloom.core.errors import DataError
from worldloom.core.files import read_json, storage_errors, write_atomic, write_json
from worldloom.core.signing import SigningKey
from worldloom.federation.record.envelope import SignedMessage, seal
from worldloom.federation.rounds.contribution import Contribution
from worldloom.federation.rules.constitution import Constitution
from worldloom.federation.rules.partition import fingerprint
from worldloom.federation.secure.aggregation_protocol import Masker, Session
from worldloom.federation.secure.privacy import PrivacyConfig, clip_and_noise, secret_generator
from worldloom.federation.secure.secure_rounds import ANSWERS, Transcript, noise_of, session_of
from worldloom.models import delete_tensors, load_tensors, save_tensors

_DELTA = "own-delta"

Contribute = Callable[[int, Mapping[str, Tensor]], Contribution]
"""Trains from a round's base; asked again for the same, it answers the same."""
Spend = Callable[[PrivacyConfig, int, float], Mapping[str, Any]]
"""Pays for a round with this noise in its sum; returns what is spent in all."""


class _Kept(Config):
    """The newest session that a node was asked into, and what it may never do again."""

    session: Session
    constitution: str
    round: int
    attempt: int
    base: str
    masker: dict[str, Any] | None = None  # every secret of the session; None once they are of no more use
    weights: dict[str, float] = Field(default_factory=dict)
    answered: dict[str, str] = Field(default_factory=dict)  # phase -> digest of what was asked
    helped: int = -1  # the newest round of which it helped to open a sum
    paid: dict[str, Any] = Field(default_factory=dict)  # the newest round that was paid for, its noise, what is told


class Helped(DataError):
    """The node helped to open a sum of the round, and helps with no other."""


class SecureNode:
    """Answers the phases of sums for one owner."""

    def __init__(self, path: Path | str, *, name: str, key: SigningKey, constitution: Constitution) -> None:
        self.path, self.name = Path(path), name
        self._key, self._constitution = key, constitution

    def advertise(self, asked: SignedMessage, contribute: Contribute) -> bytes:
        """Train, and say what everyone may know of it, with the keys of a new session.

        Raises:
            DataError: the session is an old one, or of a round of which a sum was opened.
        """
        number, attempt, base = self._place(asked)
        known = fingerprint(asked.tensors)
        if base != known:
            raise DataError(f"the message names the base {base[:16]} and brings {known[:16]}; ask again")
        kept = self._kept()
        same = kept is not None and (kept.round, kept.attempt) == (number, attempt)
        if kept is not None and same and (again := self._said(kept, asked)) is not None:
            return again
        if kept is not None and number <= kept.helped:
            raise Helped(
                f"{self.name} has helped to open a sum of round {kept.helped}; another one of round {number} could "
                f"tell single contributions. Go on with the next round"
            )
        if kept is not None and (number, attempt) <= (kept.round, kept.attempt):
            raise DataError(
                f"{self.name} was asked into session {kept.attempt} of round {kept.round} already, and goes into no "
                f"older one than that; begin a newer session"
            )
        contribution = contribute(number, asked.tensors)
        shapes = {name: tuple(tensor.shape) for name, tensor in contribution.tensors.items()}
        session = session_of(self._constitution, number, attempt, base, shapes)
        masker = Masker(self.name, session, self._sign)
        keys = masker.advertise()
        self._make_private()
        save_tensors(self._delta, contribution.tensors, {"round": number}, kind=_DELTA)
        begun = _Kept(
            session=session,
            constitution=self._constitution.fingerprint,
            round=number,
            attempt=attempt,
            base=base,
            masker=masker.state(),
            helped=-1 if kept is None else kept.helped,
            paid={} if kept is None else kept.paid,
        )
        return self._say(begun, asked, {**contribution.body(), "keys": keys}, {})

    def share(self, asked: SignedMessage) -> bytes:
        """Seal shares of this session's secrets for all who advertised.

        Raises:
            DataError: too few advertised, or one of them did not sign what is said of it.
        """
        kept = self._current(asked)
        if (again := self._said(kept, asked)) is not None:
            return again
        others = Transcript(self._constitution, kept.round, kept.attempt, kept.base, kept.session.shapes)
        for owner, said in _mapping(asked, "roster").items():
            others.hear("advertise", owner, _bytes(said))
        masker = self._masker(kept)
        body = masker.share(others.roster)
        changed = kept.model_copy(update={"masker": masker.state(), "weights": others.weights})
        return self._say(changed, asked, body, {})

    def mask(self, asked: SignedMessage, spend: Spend) -> bytes:
        """Weigh the delta, mask it and send it; under privacy it is clipped, noised and paid for before.

        Raises:
            PrivacyBudgetSpent: the budget does not reach.
            DataError: too few shared, or a share was not sealed for this owner.
        """
        kept = self._current(asked)
        if (again := self._said(kept, asked)) is not None:
            return again
        delta: Mapping[str, Tensor] = load_tensors(self._delta, kind=_DELTA)[0]
        if (privacy := self._constitution.privacy) is not None:
            kept = self._paid(kept, privacy, spend)
            share = 1 / self._constitution.threshold
            delta = clip_and_noise(delta, privacy, secret_generator(), share=share)
        weight = kept.weights[self.name]
        masker = self._masker(kept)
        said = masker.mask(_mapping(asked, "inbox"), {name: tensor.double() * weight for name, tensor in delta.items()})
        row = torch.from_numpy(np.frombuffer(said["masked"], "<i8").copy())
        body = {"weight": weight, "spent": kept.paid.get("told", {})}
        return self._say(kept.model_copy(update={"masker": masker.state()}), asked, body, {"masked": row})

    def unmask(self, asked: SignedMessage) -> bytes:
        """Hand over shares by which the sum of the survivors is opened, and delete every secret of the session.

        Raises:
            DataError: the survivors are fewer than the threshold, or others than it masked against.
        """
        kept = self._current(asked)
        answer = self._said(kept, asked) or self._unmasked(kept, asked)
        delete_tensors(self._delta)
        return answer

    def _unmasked(self, kept: _Kept, asked: SignedMessage) -> bytes:
        survivors = asked.body.get("survivors")
        if not isinstance(survivors, list) or not all(isinstance(owner, str) for owner in survivors):
            raise DataError("a node is asked to unmask with a list of the survivors; got none")
        body = self._masker(kept).unmask(survivors)
        return self._say(kept.model_copy(update={"masker": None, "helped": kept.round}), asked, body, {})

    def _paid(self, kept: _Kept, privacy: PrivacyConfig, spend: Spend) -> _Kept:
        """Pay for a round, once: of all its sessions, one sum at most is ever opened.

        A session in which the noise is smaller than what was paid for is paid for by itself.
        """
        noise = noise_of(privacy, self._constitution, self.name, kept.weights)
        if kept.paid.get("round") == kept.round and kept.paid["noise"] <= noise:
            return kept
        told = dict(spend(privacy, kept.round, noise))
        paid = kept.model_copy(update={"paid": {"round": kept.round, "noise": noise, "told": told}})
        self._write(paid)
        return paid

    def _place(self, asked: SignedMessage) -> tuple[int, int, str]:
        number, attempt, base = (asked.body.get(key) for key in ("round", "attempt", "base"))
        if type(number) is not int or type(attempt) is not int or not isinstance(base, str) or attempt < 0:
            raise DataError("a phase of a sum names its round, attempt and base; let both sides run the same version")
        if not 0 <= number < self._constitution.rounds:
            raise DataError(f"the constitution has {self._constitution.rounds} rounds; got round {number}")
        return number, attempt, base

    def _current(self, asked: SignedMessage) -> _Kept:
        kept, place = self._kept(), self._place(asked)
        if kept is None or place != (kept.round, kept.attempt, kept.base):
            raise DataError(
                f"{self.name} is in no session {place[1]} of round {place[0]} with this base; begin a new session"
            )
        return kept

    def _kept(self) -> _Kept | None:
        if not self._where.is_file():
            return None
        kept = _Kept.parse(read_json(self._where))
        return kept if kept.constitution == self._constitution.fingerprint else None

    def _masker(self, kept: _Kept) -> Masker:
        if kept.masker is None:
            raise DataError(
                f"{self.name} has helped to open this sum, and its secrets are deleted; begin a new session"
            )
        return Masker.of(kept.masker, kept.session, self._sign)

    def _said(self, kept: _Kept, asked: SignedMessage) -> bytes | None:
        """Return what was answered to the same message before.

        Raises:
            DataError: another one was answered in its place.
        """
        what = str(asked.body["what"])
        before = kept.answered.get(what)
        if before is None:
            return None
        if before != _digest(asked):
            raise DataError(
                f"{self.name} was asked to {what} in this session before, with something else; an answer given twice "
                f"could reveal its delta"
            )
        with storage_errors(self._answer(what)):
            return self._answer(what).read_bytes()

    def _say(self, kept: _Kept, asked: SignedMessage, body: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> bytes:
        """Sign an answer and write it down, with what the node has become by giving it."""
        what = str(asked.body["what"])
        place = {"owner": self.name, "round": kept.round, "attempt": kept.attempt, "base": kept.base}
        answer = seal(ANSWERS[what], {**body, **place}, tensors, key=self._key)
        # The answer first: until the state names it, it has not left.
        write_atomic(self._answer(what), lambda temporary: temporary.write_bytes(answer))
        self._write(kept.model_copy(update={"answered": {**kept.answered, what: _digest(asked)}}))
        return answer

    def _write(self, kept: _Kept) -> None:
        write_json(self._where, kept.model_dump(mode="json"))

    def _make_private(self) -> None:
        with storage_errors(self.path):
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            self.path.chmod(0o700)

    def _sign(self, content: bytes) -> bytes:
        return bytes.fromhex(self._key.sign(content))

    def _answer(self, what: str) -> Path:
        return self.path / f"{ANSWERS[what]}.msg"

    @property
    def _where(self) -> Path:
        return self.path / "session.json"

    @property
    def _delta(self) -> Path:
        return self.path / "delta"


def _digest(asked: SignedMessage) -> str:
    return hashlib.sha256(canonical(dict(asked.body)).encode("ascii")).hexdigest()


def _mapping(asked: SignedMessage, key: str) -> dict[str, str]:
    found = asked.body.get(key)
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        raise DataError(f"a node is asked to {asked.body['what']} with a mapping of texts as {key!r}; got none")
    return found


def _bytes(text: str) -> bytes:
    try:
        return bytes.fromhex(text)
    except ValueError:
        raise DataError("what a member advertised is passed on as hexadecimal digits; got another text") from None
