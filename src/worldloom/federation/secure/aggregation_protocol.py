"""The secure aggregation protocol: it reveals only the sum of deltas, and tolerates dropouts.

This is the protocol of Bonawitz et al. 2017 in four exchanges, with messages that are independent of the transport:

1. advertise: each owner signs two fresh X25519 keys, one for masks and one to encrypt its shares.
2. share: each owner splits its mask key and the seed of its own mask into Shamir shares, and encrypts one pair of
   shares for each other owner.
3. mask: each owner adds its own mask, and one pairwise mask per other owner, to its fixed-point delta. The other owner
   subtracts the same pairwise mask.
4. unmask: the remaining owners send one share per owner: of the seed if that owner sent a masked delta, otherwise of
   its mask key. With `threshold` answers the coordinator removes the masks that do not cancel.

For each other owner, an owner sends a share of only one of the two secrets, and it answers each phase once. Because the
threshold is over half of the owners, a coordinator that sends owners different lists still learns at most one secret of
any owner, unless at least 2 threshold - n of the n owners help it. The coordinator learns the participants and the sum;
only differential privacy can hide what the sum reveals. Contributions are hidden, so they cannot be checked: a
malicious owner can change a sum by any amount without being noticed.
"""

import contextlib
import hashlib
import itertools
import json
import math
import random
import re
import secrets
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from typing import Annotated, Any

import numpy as np
import torch
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from numpy.typing import NDArray
from pydantic import Field, StringConstraints, model_validator
from torch import Tensor

from worldloom.core.chain import canonical
from worldloom.core.config import Config
from worldloom.core.errors import ConfigError, DataError
from worldloom.core.signing import Domain, verified

PHASES = ("advertise", "share", "mask", "unmask")
"""The phases of a session, in order."""

PRIME = 2**521 - 1
"""The prime of the field of the secret shares; it is larger than any secret of 32 bytes."""

_SECRET = 32  # bytes of a seed or a key
_POINT = (PRIME.bit_length() + 7) // 8  # bytes of a share
_FRACTION = 24  # deltas are sent as multiples of 2**-24 ...
_GROUPS = 1000  # groups of shares that are tried for one secret
_LIMIT = 1024.0  # ... up to this magnitude, so that a sum of up to 2**28 owners fits into 64 bits
_UNSIGNED = np.dtype("<u8")  # sums are taken modulo 2**64


def split_secret(
    secret: int,
    owners: int,
    threshold: int,
    *,
    prime: int = PRIME,
    draw: Callable[[int], int] = secrets.randbelow,
) -> list[int]:
    """Split a secret into one share per owner; any `threshold` shares recover it, and fewer reveal nothing.

    The shares are returned for the points 1, 2, ... (Shamir 1979). `draw(n)` must return a secret uniform integer from
    0 to n - 1.
    """
    if not (1 <= threshold <= owners < prime and 0 <= secret < prime):
        raise ConfigError(
            f"expected 1 <= threshold <= owners, and a secret below the prime; got {threshold=}, {owners=}. Correct "
            f"the threshold, or use a smaller secret"
        )
    coefficients = [secret, *(draw(prime) for _ in range(threshold - 1))]
    shares = []
    for point in range(1, owners + 1):
        value = 0
        for coefficient in reversed(coefficients):
            value = (value * point + coefficient) % prime
        shares.append(value)
    return shares


def join_secret(shares: Mapping[int, int], *, prime: int = PRIME) -> int:
    """Recover the secret from shares, keyed by point; with fewer shares than the threshold the result is wrong."""
    return _value_at(0, shares, prime)


def _value_at(point: int, shares: Mapping[int, int], prime: int) -> int:
    """Return the value at a point of the polynomial through shares (Lagrange interpolation)."""
    found = 0
    for here, value in shares.items():
        above = below = 1
        for other in shares:
            if other != here:
                above, below = above * (other - point) % prime, below * (other - here) % prime
        found = (found + value * above * pow(below, -1, prime)) % prime
    return found


class SumSession(Config):
    """The parameters that owners and coordinator agree on before a sum; a `name` must never be used twice.

    `name` contains round, base and attempt. `owners` maps each owner to its Ed25519 key in hexadecimal digits. `shapes`
    maps the names of a delta's tensors to their shapes. `threshold` is over half of the owners; if fewer owners
    complete the session, nothing is revealed.
    """

    name: str = Field(min_length=1)
    owners: Mapping[str, Annotated[str, StringConstraints(pattern=r"\A[0-9a-fA-F]{64}\z")]]
    shapes: Mapping[str, tuple[int, ...]]
    threshold: int = Field(ge=2)

    @model_validator(mode="after")
    def _consistent(self) -> "SumSession":
        n = len(self.owners)
        if len({key.lower() for key in self.owners.values()}) < n:
            raise ConfigError("owners: two owners have the same key; give each owner its own")
        if not n < 2 * self.threshold <= 2 * n:
            raise ConfigError(
                f"threshold: expected more than half of the {n} owners, and at most {n}; got {self.threshold}. If half "
                f"of the owners sufficed, a coordinator could unmask an owner by sending different lists to two halves"
            )
        return self

    @property
    def names(self) -> list[str]:
        """The owners in alphabetical order; the first owner receives the share for point 1."""
        return sorted(self.owners)

    @property
    def size(self) -> int:
        """The number of values in a delta."""
        return sum(math.prod(shape) for shape in self.shapes.values())

    @property
    def digest(self) -> bytes:
        """The SHA-256 of the session; every key and signature depends on it."""
        return hashlib.sha256(canonical(self.model_dump(mode="json")).encode("ascii")).digest()


def encode_delta(delta: Mapping[str, Tensor], session: SumSession) -> NDArray[Any]:
    """Return a delta as one row of integers modulo 2**64, rounded to multiples of 2**-24.

    Raises:
        DataError: the tensors differ from the session's, or a value is not finite or above 1024 in magnitude.
    """
    shapes = {name: tuple(value.shape) for name, value in delta.items()}
    if shapes != dict(session.shapes):
        wrong = sorted(name for name in {*shapes, *session.shapes} if shapes.get(name) != session.shapes.get(name))
        raise DataError(f"the delta's tensors differ from the session's in {', '.join(wrong)}; use the same recipe")
    parts = [np.zeros(0)] + [delta[name].detach().cpu().double().reshape(-1).numpy() for name in sorted(shapes)]
    values = np.concatenate(parts)
    if not np.isfinite(values).all():
        raise DataError("the delta has values that are not finite; check the training losses")
    largest = float(np.abs(values).max(initial=0.0))
    if largest > _LIMIT:
        raise DataError(
            f"a value of the delta is {largest:.4g}, above the limit of {_LIMIT:g}; lower the learning rate, or clip "
            "the delta"
        )
    # Two's complement represents negative numbers.
    return np.rint(values * 2.0**_FRACTION).astype(np.int64).astype(_UNSIGNED, casting="unsafe")


def decode_sum(numbers: NDArray[Any], session: SumSession) -> dict[str, Tensor]:
    """Decode a sum of encoded deltas into tensors (float64)."""
    signed = numbers.astype(_UNSIGNED).view("<i8")
    values = torch.from_numpy(signed.astype(np.float64) / 2.0**_FRACTION)
    found, start = {}, 0
    for name in sorted(session.shapes):
        shape = session.shapes[name]
        found[name] = values[start : start + math.prod(shape)].reshape(shape)
        start += math.prod(shape)
    return found


class WrongShare(DataError):
    """A share that its recipient cannot use; `sender` is the owner named as its sender, even if others changed it."""

    def __init__(self, sender: str, why: str) -> None:
        super().__init__(f"{why}; begin a new session")
        self.sender = sender


class SumLost(DataError):
    """A sum that the helpers' shares cannot unmask; `owners` have certainly sent wrong shares or a wrong commitment."""

    def __init__(self, why: str, owners: Collection[str]) -> None:
        super().__init__(why)
        self.owners = sorted(owners)


class Masker:
    """An owner's side of one sum: `advertise`, `share`, `mask`, `unmask`, each called once and in this order.

    `sign` signs with the secret key that belongs to the owner's key in the session, in the domain `MASK_KEYS`.
    """

    def __init__(self, owner: str, session: SumSession, sign: Callable[[bytes], bytes]) -> None:
        if owner not in session.owners:
            raise ConfigError(f"{owner!r} is not an owner in the session; expected one of {', '.join(session.names)}")
        self.owner, self.session, self._sign = owner, session, sign
        self._stage = "advertise"
        self._mask_key, self._box_key = X25519PrivateKey.generate(), X25519PrivateKey.generate()
        self._seed = secrets.token_bytes(_SECRET)
        self._roster: dict[str, dict[str, Any]] = {}
        self._shares: dict[str, tuple[int, int]] = {}  # owner -> shares of its mask key and of its seed

    def state(self) -> dict[str, Any]:
        """Return the state as plain JSON, to resume after a kill.

        The state contains every secret: delete the state after the sum.

        Never resume from a state that is older than the last answer: a second answer with the same masks could reveal
        the delta.
        """
        return {
            "owner": self.owner,
            "stage": self._stage,
            "mask": self._mask_key.private_bytes_raw().hex(),
            "box": self._box_key.private_bytes_raw().hex(),
            "seed": self._seed.hex(),
            "roster": self._roster,
            "shares": {owner: [f"{key:x}", f"{seed:x}"] for owner, (key, seed) in self._shares.items()},
        }

    @classmethod
    def of(cls, state: Mapping[str, Any], session: SumSession, sign: Callable[[bytes], bytes]) -> "Masker":
        """Return a masker that continues from this state.

        Raises:
            DataError: the state is invalid.
        """
        try:
            found = cls(state["owner"], session, sign)
            found._stage, found._seed = str(state["stage"]), bytes.fromhex(state["seed"])
            found._mask_key, found._box_key = (
                X25519PrivateKey.from_private_bytes(bytes.fromhex(state[key])) for key in ("mask", "box")
            )
            found._roster = {owner: dict(keys) for owner, keys in state["roster"].items()}
            found._shares = {owner: (int(key, 16), int(seed, 16)) for owner, (key, seed) in state["shares"].items()}
        except (AttributeError, KeyError, TypeError, ValueError, ConfigError) as error:
            raise DataError(
                f"the saved state of an owner in the secure sum is invalid ({error}); begin a new session of "
                f"the secure sum"
            ) from None
        return found

    def advertise(self) -> dict[str, str]:
        """Return the signed public keys, which are sent to all owners."""
        self._begin("advertise", "share")
        keys = {"owner": self.owner, "mask": _public(self._mask_key), "box": _public(self._box_key)}
        return {**keys, "signature": self._sign(_claim(keys, self.session)).hex()}

    def share(self, roster: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        """Store the advertised keys of all owners; return the encrypted shares, one pair for each other owner.

        Raises:
            DataError: there are too few owners, an owner is unknown, or keys are not signed by their owner.
        """
        self._begin("share", "mask")
        _enough(roster, self.session, "advertised keys")
        # Each owner signed its keys for this session, so the coordinator cannot insert its own keys.
        self._roster = {owner: check_keys(owner, keys, self.session) for owner, keys in roster.items()}
        if self._roster.get(self.owner, {}).get("mask") != _public(self._mask_key):
            raise DataError(f"the roster does not have the keys that {self.owner} advertised; begin a new session")
        owners, threshold = self.session.names, self.session.threshold
        keys = split_secret(int.from_bytes(self._mask_key.private_bytes_raw(), "big"), len(owners), threshold)
        seeds = split_secret(int.from_bytes(self._seed, "big"), len(owners), threshold)
        sealed = {}
        for owner, key, seed in zip(owners, keys, seeds, strict=True):
            if owner == self.owner:
                self._shares[owner] = (key, seed)
            elif owner in self._roster:
                plain = key.to_bytes(_POINT, "big") + seed.to_bytes(_POINT, "big")
                sealed[owner] = self._box(self.owner, owner).encrypt(_NONCE, plain, None).hex()
        return {"owner": self.owner, "commitment": _commitment(self._seed, self.session), "shares": sealed}

    def mask(self, inbox: Mapping[str, str], delta: Mapping[str, Tensor]) -> dict[str, Any]:
        """Decrypt the shares of the other owners, and return this owner's masked delta.

        The delta gets a pairwise mask for each owner in the inbox. To weight a delta, multiply it first.

        Raises:
            WrongShare: a share is not encrypted for this owner.
            DataError: the shares are too few, or the delta cannot be encoded.
        """
        self._begin("mask", "unmask")
        for sender, sealed in inbox.items():
            if sender == self.owner or sender not in self._roster:
                raise DataError(f"{sender!r} is not another owner on the roster; begin a new session")
            try:
                plain = self._box(sender, self.owner).decrypt(_NONCE, bytes.fromhex(sealed), None)
            except (InvalidTag, ValueError, TypeError):
                raise WrongShare(sender, f"the share from {sender} was not encrypted for {self.owner}") from None
            if len(plain) != 2 * _POINT:
                raise WrongShare(sender, f"the share from {sender} has {len(plain)} bytes; expected {2 * _POINT}")
            self._shares[sender] = (int.from_bytes(plain[:_POINT], "big"), int.from_bytes(plain[_POINT:], "big"))
        _enough(self._shares, self.session, "shared their keys")
        total = encode_delta(delta, self.session) + _own_mask(self._seed, self.session)
        for other in self._shares:
            if other != self.owner:
                total += _pair_mask(self._mask_key, self.owner, other, self._roster[other]["mask"], self.session)
        return {"owner": self.owner, "masked": total.tobytes()}

    def unmask(self, survivors: Collection[str]) -> dict[str, Any]:
        """Return a share of the seed of each survivor, and a share of the mask key of each other owner.

        Raises:
            DataError: there are too few survivors, they lack this owner, or they include an owner whose pairwise mask
                is not in this owner's delta.
        """
        self._begin("unmask", "done")
        there = set(survivors)
        if not there <= set(self._shares) or self.owner not in there:
            raise DataError(
                f"{sorted(there)} cannot be the survivors: expected {self.owner} and names from "
                f"{sorted(self._shares)} only. Begin a new session"
            )
        _enough(there, self.session, "sent their deltas")
        return {
            "owner": self.owner,
            "seeds": {owner: f"{seed:x}" for owner, (_, seed) in self._shares.items() if owner in there},
            "keys": {owner: f"{key:x}" for owner, (key, _) in self._shares.items() if owner not in there},
        }

    def _box(self, sender: str, recipient: str) -> ChaCha20Poly1305:
        """Return the cipher for the only message from one owner to another; one use per key allows a fixed nonce."""
        other = recipient if sender == self.owner else sender
        return ChaCha20Poly1305(
            _agree(self._box_key, self._roster[other]["box"], ["share", sender, recipient], self.session)
        )

    def _begin(self, stage: str, following: str) -> None:
        # A later failure ends the session for this owner, because no phase may be answered twice.
        if self._stage != stage:
            raise DataError(
                f"{self.owner} was asked to {stage} in {self.session.name!r}, but its next step is {self._stage}; "
                f"a second answer could reveal its delta. Begin a new session"
            )
        self._stage = following


class Unmasker:
    """The coordinator's side of one sum: it stores the owners' answers to each phase, and unmasks the sum.

    Missing and refused answers are left out. `roster`, `inboxes` and `survivors` are the contents of the next requests
    to the owners; they raise `DataError` if too few owners remain.
    """

    def __init__(self, session: SumSession) -> None:
        self.session = session
        self.wrong: set[str] = set()  # helpers of the last `sum` that sent a wrong share
        self._answers: dict[str, dict[str, Any]] = {phase: {} for phase in PHASES}
        self._total = np.zeros(session.size, _UNSIGNED)
        self._check: dict[str, Callable[[str, Any], Any]] = {
            "advertise": lambda owner, keys: check_keys(owner, keys, session),
            "share": self._shared,
            "mask": self._masked,
            "unmask": self._unmasked,
        }

    def take(self, phase: str, owner: str, message: Any) -> None:
        """Check and store an owner's answer to a phase.

        Raises:
            DataError: the owner is not expected or has answered already, or the answer is invalid.
        """
        before = PHASES.index(phase) - 1
        expected = self.session.owners if before < 0 else self._answers[PHASES[before]]
        if owner not in expected or owner in self._answers[phase]:
            raise DataError(f"{owner!r} is not expected to {phase}, or has answered already; leave this message out")
        self._answers[phase][owner] = self._check[phase](owner, message)

    @property
    def roster(self) -> dict[str, dict[str, Any]]:
        """The keys of all owners that advertised; send them to each of these owners."""
        return self._enough("advertise", "advertised keys")

    @property
    def inboxes(self) -> dict[str, dict[str, str]]:
        """For each owner that sent shares, the shares that the other owners encrypted for this owner."""
        given = self._enough("share", "shared their keys")
        return {
            owner: {sender: message["shares"][owner] for sender, message in given.items() if sender != owner}
            for owner in given
        }

    @property
    def survivors(self) -> list[str]:
        """The owners that sent masked deltas; send this list to each of them."""
        return sorted(self._enough("mask", "sent their deltas"))

    def sum(self, helpers: Collection[str]) -> dict[str, Tensor]:
        """Return the sum of the survivors' deltas (float64), unmasked with the shares of the owners in `helpers`.

        A secret is recovered if enough of its shares are right; commitments and public keys show whether a recovered
        secret is right. Helpers that certainly sent a wrong share are then in `wrong`.

        Raises:
            DataError: there are too few helpers.
            SumLost: the shares of a secret do not recover it. The error names the secret's owner if at least
                `threshold` helpers sent right shares of other secrets.
        """
        answers = {owner: self._answers["unmask"][owner] for owner in helpers}
        _enough(answers, self.session, "helped to unmask")
        self.wrong, right, lost = set(), set[str](), list[str]()
        total, survivors, shared = self._total.copy(), self.survivors, self._answers["share"]

        def secret_of(part: str, owner: str, is_right: Callable[[bytes], bool]) -> bytes | None:
            shares: dict[str, int] = {}
            for name, answer in answers.items():
                with contextlib.suppress(ValueError):
                    shares[name] = int(answer[part][owner], 16) % PRIME
            found = self._recover(shares, is_right)
            if found is None:
                lost.append(owner)
                return None
            secret, agreeing = found
            # Two polynomials with this secret that differ agree in less than threshold - 1 shares, so another group of
            # helpers cannot agree as well. With fewer that agree, liars could make honest helpers look wrong.
            if 2 * len(agreeing) - len(answers) >= self.session.threshold - 1:
                right.update(agreeing)
                self.wrong |= set(answers) - agreeing
            return secret

        for owner in survivors:
            seed = secret_of("seeds", owner, partial(self._is_seed, shared[owner]["commitment"]))
            if seed is not None:
                total -= _own_mask(seed, self.session)
        for owner in sorted(set(shared) - set(survivors)):
            secret = secret_of("keys", owner, partial(_is_key_of, self.roster[owner]["mask"]))
            if secret is not None:
                key = X25519PrivateKey.from_private_bytes(secret)
                for other in survivors:
                    # The mask that the missing owner would have added; the others have already subtracted it.
                    total += _pair_mask(key, owner, other, self.roster[other]["mask"], self.session)
        if lost:
            certain = lost if len(right - self.wrong) >= self.session.threshold else []
            raise SumLost(
                f"the shares of {', '.join(lost)} do not recover the secrets; at least one share is missing or wrong",
                certain,
            )
        return decode_sum(total, self.session)

    def _is_seed(self, commitment: str, seed: bytes) -> bool:
        return _commitment(seed, self.session) == commitment

    def _recover(self, shares: Mapping[str, int], is_right: Callable[[bytes], bool]) -> tuple[bytes, set[str]] | None:
        """Return a secret, and the owners whose shares agree with it; None if no tried group of shares recovers it.

        The shares of all owners that sent no wrong share of another secret are tried first. Groups of `threshold`
        owners follow: first groups of these owners, then groups of any owners.
        """
        points = {name: point for point, name in enumerate(self.session.names, 1)}
        trusted = sorted(name for name in shares if name not in self.wrong)
        for group in itertools.chain([trusted], *(
            _groups(names, self.session.threshold) for names in (trusted, sorted(shares))
        )):  # fmt: skip
            if len(group) < self.session.threshold:
                continue
            joined = {points[name]: shares[name] for name in group}
            number = join_secret(joined)
            if number >> 8 * _SECRET or not is_right(secret := number.to_bytes(_SECRET, "big")):
                continue
            others = set(shares) - set(group)
            return secret, {*group, *(x for x in others if _value_at(points[x], joined, PRIME) == shares[x])}
        return None

    def _enough(self, phase: str, did: str) -> dict[str, Any]:
        _enough(self._answers[phase], self.session, did)
        return self._answers[phase]

    def _shared(self, owner: str, message: Any) -> Any:
        others = set(self._answers["advertise"]) - {owner}
        if not isinstance(message.get("commitment"), str) or not _texts_for(message.get("shares"), others):
            raise DataError(
                f"{owner} must send a commitment, and a share for each of {sorted(others)}; leave {owner} out"
            )
        return message

    def _masked(self, owner: str, message: Any) -> None:
        data = message.get("masked")
        if not isinstance(data, bytes) or len(data) != self._total.nbytes:
            raise DataError(f"expected a masked delta of {self.session.size} values from {owner}; leave {owner} out")
        self._total += np.frombuffer(
            data, _UNSIGNED
        )  # a masked delta is as large as the model, so only the sum is stored

    def _unmasked(self, owner: str, message: Any) -> Any:
        survivors = set(self._answers["mask"])
        gone = set(self._answers["share"]) - survivors
        if not _texts_for(message.get("seeds"), survivors) or not _texts_for(message.get("keys"), gone):
            raise DataError(
                f"{owner} must send shares of the masks of {sorted(survivors)} and of the keys of {sorted(gone)}; "
                f"the sum is unmasked without the shares from {owner}"
            )
        return message


def check_keys(owner: str, message: Any, session: SumSession) -> dict[str, Any]:
    """Check the keys that an owner advertised, and return them.

    Raises:
        DataError: the keys are not signed by that owner for this session, or are not valid.
    """
    try:
        if message["owner"] != owner:
            raise ValueError
        keys = {"owner": owner, "mask": str(message["mask"]), "box": str(message["box"])}
        if not verified(_claim(keys, session), message["signature"], session.owners[owner], Domain.MASK_KEYS):
            raise ValueError
    except (KeyError, TypeError, ValueError):
        raise DataError(
            f"the keys of {owner!r} are not signed by that owner for this session; leave {owner!r} out"
        ) from None
    for name in ("mask", "box"):
        if not _is_public_key(keys[name]):
            raise DataError(f"{owner!r} sent an invalid X25519 key {keys[name][:64]!r}; leave {owner!r} out")
    return {**keys, "signature": str(message["signature"])}


_NONCE = bytes(12)


def _is_key_of(public: str, key: bytes) -> bool:
    return _public(X25519PrivateKey.from_private_bytes(key)) == public


def _is_public_key(text: str) -> bool:
    """Return whether a text is an X25519 key with which every owner can agree on a secret."""
    if not re.fullmatch("[0-9a-f]{64}", text):
        return False
    try:  # a key of low order gives the same secret to everybody, which is an error
        X25519PrivateKey.generate().exchange(X25519PublicKey.from_public_bytes(bytes.fromhex(text)))
    except ValueError:
        return False
    return True


def _groups(owners: list[str], size: int) -> Iterator[list[str]]:
    """Yield groups of owners: all groups of this size if there are at most `_GROUPS`, otherwise `_GROUPS` random ones.

    The random groups are the same in every process.
    """
    if math.comb(len(owners), size) <= _GROUPS:
        yield from map(list, itertools.combinations(owners, size))
        return
    draw = random.Random(0)
    for _ in range(_GROUPS):
        yield draw.sample(owners, size)


def _texts_for(found: Any, owners: Collection[str]) -> bool:
    """Return whether `found` is a mapping from exactly these owners to strings."""
    return isinstance(found, dict) and set(found) == set(owners) and all(isinstance(x, str) for x in found.values())


def _enough(there: Collection[str], session: SumSession, did: str) -> None:
    if len(there) < session.threshold:
        raise DataError(
            f"only {len(there)} of {len(session.owners)} owners {did}, fewer than the threshold of "
            f"{session.threshold}; nothing is revealed. Begin a new session"
        )


def _claim(keys: Mapping[str, str], session: SumSession) -> bytes:
    return session.digest + canonical(dict(keys)).encode("ascii")


def _commitment(seed: bytes, session: SumSession) -> str:
    return hashlib.sha256(b"worldloom own mask\0" + session.digest + seed).hexdigest()


def _agree(secret: X25519PrivateKey, public: str, use: Sequence[str], session: SumSession) -> bytes:
    """Return the secret that two owners share for one use (X25519, then HKDF)."""
    try:
        shared = secret.exchange(X25519PublicKey.from_public_bytes(bytes.fromhex(public)))
    except ValueError:
        raise DataError(f"{public!r} is not a valid X25519 key; begin a new session") from None
    info = json.dumps(["worldloom", *use]).encode("ascii")
    return HKDF(algorithm=SHA256(), length=_SECRET, salt=session.digest, info=info).derive(shared)


def _stream(key: bytes, session: SumSession) -> NDArray[Any]:
    """Return uniform integers modulo 2**64; each key is used for only one stream, so the nonce is constant."""
    zeros = bytes(session.size * _UNSIGNED.itemsize)
    return np.frombuffer(Cipher(ChaCha20(key, bytes(16)), mode=None).encryptor().update(zeros), _UNSIGNED)


def _own_mask(seed: bytes, session: SumSession) -> NDArray[Any]:
    info = b"worldloom own mask"
    return _stream(HKDF(algorithm=SHA256(), length=_SECRET, salt=session.digest, info=info).derive(seed), session)


def _pair_mask(secret: X25519PrivateKey, owner: str, other: str, public: str, session: SumSession) -> NDArray[Any]:
    """Return the pairwise mask that `owner` adds; `other` subtracts the same numbers."""
    mask = _stream(_agree(secret, public, ["mask", *sorted((owner, other))], session), session)
    return mask if owner < other else np.negative(mask)


def _public(key: X25519PrivateKey) -> str:
    return key.public_key().public_bytes_raw().hex()
