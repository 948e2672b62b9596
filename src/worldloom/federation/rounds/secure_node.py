"""An owner's side of a secure sum: its answer in each phase, and the state between phases.

The secrets of a session are on disk, readable only by the owner, so that a killed node can resume. They are deleted
after the node has helped to unmask the sum, or when it begins its next session. An answer is on disk before it is sent.
A node answers a repeated request with the same bytes, and refuses a different request in the same phase.

A node does not join a session older than its newest one. After it has helped to unmask a sum of a round, it joins no
other session of that round, because the difference of two sums over different members would reveal single deltas.
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
from worldloom.core.config import Config, check_shape
from worldloom.core.errors import DataError
from worldloom.core.files import make_private, read_bytes, read_json, write_atomic, write_json
from worldloom.core.signing import Domain, SigningKey
from worldloom.federation.record.envelope import SignedMessage, seal, unseal
from worldloom.federation.record.statements import origin
from worldloom.federation.rounds.base import Base
from worldloom.federation.rounds.contribution import Contribution
from worldloom.federation.rounds.secure_rounds import ANSWERS, Transcript, noise_of, session_of
from worldloom.federation.rules.constitution import Constitution
from worldloom.federation.secure.aggregation_protocol import Masker, SumSession
from worldloom.federation.secure.privacy import PrivacyConfig, clip_and_noise, secret_generator
from worldloom.models import delete_tensors, load_tensors, save_tensors

_DELTA = "own-delta"

Contribute = Callable[[int, Base], Contribution]
"""A function that trains from the base of a round; a repeated call returns the same contribution."""
Spend = Callable[[PrivacyConfig, int, float], Mapping[str, Any]]
"""A function that accounts for a round whose sum contains this noise; it returns the privacy spent so far."""


class _SessionState(Config):
    """The newest session of a node, and a record of the steps that the node must not repeat."""

    session: SumSession
    constitution: str
    round: int
    attempt: int
    base: str
    masker: dict[str, Any] | None = None  # the secrets of the session; None once they are no longer needed
    weights: dict[str, float] = Field(default_factory=dict)
    answered: dict[str, str] = Field(default_factory=dict)  # phase -> digest of the request
    helped: int = -1  # the newest round whose sum it helped to unmask
    paid: dict[str, Any] = Field(default_factory=dict)  # the newest accounted round, its noise, the privacy spent


class AlreadyHelped(DataError):
    """The node helped to unmask a sum of this round, and must not help with a second one."""


class SecureNode:
    """Answers the requests of secure sums for one owner; each method returns the signed answer to one request."""

    def __init__(self, path: Path | str, *, name: str, key: SigningKey, constitution: Constitution) -> None:
        self.path, self.name = Path(path), name
        self._key, self._constitution = key, constitution
        self._where, self._delta = self.path / "session.json", self.path / "delta"

    def advertise(self, asked: SignedMessage, base: Base, seen: Mapping[str, Any], contribute: Contribute) -> bytes:
        """Train, and return the public facts of the contribution, with the keys of a new session.

        `seen` is the head of the ledger that this node countersigned last.

        Raises:
            DataError: the node has joined a newer session, or a sum of this round was unmasked already.
        """
        number, attempt, _ = self._place(asked)
        state = self._load()
        same = state is not None and (state.round, state.attempt) == (number, attempt)
        if state is not None and same and (again := self._earlier(state, asked)) is not None:
            return again
        if state is not None and number <= state.helped:
            raise AlreadyHelped(
                f"{self.name} has helped to unmask a sum of round {state.helped}; a second sum of round {number} "
                f"could reveal single contributions. Continue with the next round"
            )
        if state is not None and (number, attempt) <= (state.round, state.attempt):
            raise DataError(
                f"{self.name} has joined session {state.attempt} of round {state.round}, and cannot join session "
                f"{attempt} of round {number}; begin a newer session"
            )
        contribution = contribute(number, base)
        session = session_of(self._constitution, number, attempt, base.fingerprint, base.shapes)
        masker = Masker(self.name, session, self._sign)
        keys = masker.advertise()
        make_private(self.path)
        save_tensors(self._delta, contribution.tensors, {"round": number}, kind=_DELTA)
        begun = _SessionState(
            session=session,
            constitution=self._constitution.fingerprint,
            round=number,
            attempt=attempt,
            base=base.fingerprint,
            masker=masker.state(),
            helped=-1 if state is None else state.helped,
            paid={} if state is None else state.paid,
        )
        body = {**contribution.body(), **origin(self._constitution, seen), "keys": keys}
        return self._answer(begun, asked, body, {})

    @property
    def advertised(self) -> int | None:
        """The round of the newest session in which this node advertised its contribution; None before the first."""
        state = self._load()
        return None if state is None or "advertise" not in state.answered else state.round

    def share(self, asked: SignedMessage) -> bytes:
        """Encrypt shares of this session's secrets for all members that advertised keys.

        Raises:
            DataError: too few members advertised keys, or a signature is invalid.
        """
        state = self._current(asked)
        if (again := self._earlier(state, asked)) is not None:
            return again
        others = Transcript(self._constitution, state.round, state.attempt, state.base, state.session.shapes)
        for owner, text in asked.body["roster"].items():
            others.hear("advertise", owner, _bytes(text))
        masker = self._masker(state)
        body = masker.share(others.unmasker.roster)
        changed = state.model_copy(update={"masker": masker.state(), "weights": others.weights})
        return self._answer(changed, asked, body, {})

    def mask(self, asked: SignedMessage, spend: Spend) -> bytes:
        """Return the weighted, masked delta; under privacy the delta is first clipped, noised and accounted for.

        Raises:
            PrivacyBudgetSpent: the budget is too small.
            DataError: too few members sent shares, or a share was not encrypted for this owner.
        """
        state = self._current(asked)
        if (again := self._earlier(state, asked)) is not None:
            return again
        delta: Mapping[str, Tensor] = load_tensors(self._delta, kind=_DELTA)[0]
        if (privacy := self._constitution.privacy) is not None:
            state = self._paid(state, privacy, spend)
            share = 1 / self._constitution.threshold
            delta = clip_and_noise(delta, privacy, secret_generator(), share=share)
        weight = state.weights[self.name]
        masker = self._masker(state)
        made = masker.mask(asked.body["inbox"], {name: tensor.double() * weight for name, tensor in delta.items()})
        row = torch.from_numpy(np.frombuffer(made["masked"], "<i8").copy())
        body = {"weight": weight, "spent": state.paid.get("spent", {})}
        return self._answer(state.model_copy(update={"masker": masker.state()}), asked, body, {"masked": row})

    def unmask(self, asked: SignedMessage) -> bytes:
        """Return the shares that unmask the survivors' sum, and delete every secret of the session.

        Raises:
            DataError: the survivors are fewer than the threshold, lack this owner, or include a member whose pairwise
                mask is not in this owner's delta.
        """
        state = self._current(asked)
        answer = self._earlier(state, asked) or self._unmasked(state, asked)
        delete_tensors(self._delta)
        return answer

    def _unmasked(self, state: _SessionState, asked: SignedMessage) -> bytes:
        body = self._masker(state).unmask(asked.body["survivors"])
        return self._answer(state.model_copy(update={"masker": None, "helped": state.round}), asked, body, {})

    def _paid(self, state: _SessionState, privacy: PrivacyConfig, spend: Spend) -> _SessionState:
        """Account for a round once, because at most one sum of its sessions is ever unmasked.

        If a later session has less noise than was accounted for, that session is accounted for as well.
        """
        noise = noise_of(privacy, self._constitution, self.name, state.weights)
        if state.paid.get("round") == state.round and state.paid["noise"] <= noise:
            return state
        spent = dict(spend(privacy, state.round, noise))
        paid = state.model_copy(update={"paid": {"round": state.round, "noise": noise, "spent": spent}})
        self._write(paid)
        return paid

    def _place(self, asked: SignedMessage) -> tuple[int, int, str]:
        number, attempt, base = (asked.body[key] for key in ("round", "attempt", "base"))
        if not number < self._constitution.rounds:
            raise DataError(
                f"expected a round below {self._constitution.rounds}, as in the constitution; got round {number}. "
                f"Use the same constitution on both sides"
            )
        return number, attempt, base

    def _current(self, asked: SignedMessage) -> _SessionState:
        state, place = self._load(), self._place(asked)
        if state is None or place != (state.round, state.attempt, state.base):
            raise DataError(
                f"{self.name} is not in session {place[1]} of round {place[0]} with this base; begin a new session"
            )
        return state

    def _load(self) -> _SessionState | None:
        if not self._where.is_file():
            return None
        state = check_shape(read_json(self._where), _SessionState, self._where)
        return state if state.constitution == self._constitution.fingerprint else None

    def _masker(self, state: _SessionState) -> Masker:
        if state.masker is None:
            raise DataError(
                f"{self.name} helped to unmask the sum of this session, and then deleted its own secrets for it; "
                f"begin a new session"
            )
        return Masker.of(state.masker, state.session, self._sign)

    def _earlier(self, state: _SessionState, asked: SignedMessage) -> bytes | None:
        """Return the stored answer to the same request, or None if there is none.

        Raises:
            DataError: a different request was answered in this phase, or the stored answer is damaged.
        """
        what = str(asked.body["what"])
        before = state.answered.get(what)
        if before is None:
            return None
        if before != _digest(asked):
            raise DataError(
                f"{self.name} has answered a different request to {what} in this session; a second answer could reveal "
                f"its delta. Begin a new session"
            )
        limit = self._constitution.largest_bytes
        answer = read_bytes(self._answer_path(what), limit)
        try:
            unseal(answer, kind=ANSWERS[what], known={self._key.public: self.name}, limit=limit)
        except DataError as error:
            raise DataError(
                f"the stored answer of {self.name} to the request to {what} is damaged ({error}); begin a new session"
            ) from None
        return answer

    def _answer(
        self, state: _SessionState, asked: SignedMessage, body: Mapping[str, Any], tensors: Mapping[str, Tensor]
    ) -> bytes:
        """Sign an answer, and store it together with the new state."""
        what = str(asked.body["what"])
        place = {"owner": self.name, "round": state.round, "attempt": state.attempt, "base": state.base}
        place["constitution"] = state.constitution
        answer = seal(ANSWERS[what], {**body, **place}, tensors, key=self._key)
        # The answer first: the state must never refer to an answer that is not on disk.
        write_atomic(self._answer_path(what), lambda temporary: temporary.write_bytes(answer))
        self._write(state.model_copy(update={"answered": {**state.answered, what: _digest(asked)}}))
        return answer

    def _write(self, state: _SessionState) -> None:
        write_json(self._where, state.model_dump(mode="json"))

    def _sign(self, content: bytes) -> bytes:
        return bytes.fromhex(self._key.sign(content, Domain.MASK_KEYS))

    def _answer_path(self, what: str) -> Path:
        return self.path / f"{ANSWERS[what]}.msg"


def _digest(asked: SignedMessage) -> str:
    return hashlib.sha256(canonical(dict(asked.body)).encode("ascii")).hexdigest()


def _bytes(text: str) -> bytes:
    try:
        return bytes.fromhex(text)
    except ValueError:
        raise DataError(
            "expected the advertisements in 'roster' as hexadecimal digits; run the same version on both sides"
        ) from None
