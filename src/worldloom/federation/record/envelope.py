"""Signed messages: what a node or a coordinator says, who said it, and that nobody changed it on the way.

A message is a magic, the length of the header, the header (canonical JSON: kind, body, size and digest of the payload,
the sender's key), the sender's signature of all of that, and the payload in safetensors. Nothing in it runs code, and
no size that it states is believed before it is compared with what came.
"""

import hashlib
import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from worldloom.core.chain import canonical
from worldloom.core.errors import DataError
from worldloom.core.signing import SigningKey, verified

_MAGIC = b"WLWEAVE\x01"
_LENGTH = struct.Struct("<I")
_SIGNATURE = 64  # bytes
_FIELDS = {"kind", "body", "size", "digest", "key"}


@dataclass(frozen=True, kw_only=True, eq=False)
class SignedMessage:
    """A message whose sender is known; `digest` (SHA-256) is of every byte of it."""

    kind: str
    sender: str
    key: str
    body: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    digest: str


def seal(kind: str, body: Mapping[str, Any], tensors: Mapping[str, Tensor], *, key: SigningKey) -> bytes:
    """Return a signed message; the same arguments give the same bytes.

    Raises:
        DataError: the body is no plain JSON, or holds a number that is not finite.
    """
    # A clone of each, because safetensors refuses tensors that share memory, as tied weights do.
    payload = save(
        {name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
    )
    values = {"kind": kind, "body": dict(body), "size": len(payload), "digest": _digest(payload), "key": key.public}
    header = canonical(values).encode("ascii")
    said = _MAGIC + _LENGTH.pack(len(header)) + header
    return said + bytes.fromhex(key.sign(said)) + payload


def unseal(data: bytes, *, kind: str, known: Mapping[str, str], limit: int) -> SignedMessage:
    """Return what a message says; `known` gives the name of each public key, `limit` the largest size in bytes.

    Raises:
        DataError: it is too large, cut short, changed, of another kind, or of a sender who is not known; names which.
    """
    if len(data) > limit:
        raise DataError(f"a message of {len(data)} bytes; expected at most {limit}. Ask for less, or raise the limit")
    start = len(_MAGIC) + _LENGTH.size
    if not data.startswith(_MAGIC):
        raise DataError("the bytes are no message of this version (wrong magic); let both sides run the same one")
    if len(data) < start:
        raise DataError(f"a message is truncated: {len(data)} bytes came. Ask for it again")
    (length,) = _LENGTH.unpack_from(data, len(_MAGIC))
    if start + length + _SIGNATURE > len(data):
        raise DataError(f"a message is truncated or lies: its header claims {length} bytes, {len(data)} came in all")
    values = _header(data[start : start + length])
    key, sender = values["key"], known.get(values["key"])
    if sender is None:
        raise DataError(f"a message is of an unknown sender, {key}; only keys that the constitution names are heard")
    signature = data[start + length : start + length + _SIGNATURE].hex()
    if not verified(data[: start + length], signature, key):
        raise DataError(f"a message has a bad signature: it is not what {sender} signed. Ask for it again")
    payload = data[start + length + _SIGNATURE :]
    if values["size"] != len(payload):
        raise DataError(f"a message of {sender} claims {values['size']} bytes of tensors; {len(payload)} came")
    if values["digest"] != _digest(payload):
        raise DataError(f"the tensors in a message of {sender} were changed: their digest is another. Ask again")
    if values["kind"] != kind:
        raise DataError(f"expected a message of kind {kind!r} from {sender}; got {values['kind']!r}")
    return SignedMessage(
        kind=kind,
        sender=sender,
        key=key,
        body=values["body"],
        tensors=_tensors(payload, sender),
        digest=hashlib.sha256(data).hexdigest(),
    )


class Refusal(DataError):
    """What a node answers, signed, instead of what it was asked for; `body` is all that it says."""

    def __init__(self, refusal: SignedMessage) -> None:
        super().__init__(f"{refusal.sender} refuses: {refusal.body.get('why')}")
        self.body = refusal.body


def unseal_answer(data: bytes, *, kind: str, known: Mapping[str, str], limit: int) -> SignedMessage:
    """Return what a node answers; see `unseal`.

    Raises:
        Refusal: it is a refusal; says why.
        DataError: see `unseal`.
    """
    try:
        return unseal(data, kind=kind, known=known, limit=limit)
    except DataError as error:
        try:
            refusal = unseal(data, kind="refusal", known=known, limit=limit)
        except DataError:
            raise error from None
        raise Refusal(refusal) from None


def _header(text: bytes) -> dict[str, Any]:
    try:
        values = json.loads(text.decode("ascii"))
        # One text for one value: this refuses keys that stand twice and numbers that are not finite.
        if canonical(values).encode("ascii") != text:
            raise ValueError("it is not canonical")
        if not isinstance(values, dict) or set(values) != _FIELDS:
            raise ValueError(f"it holds {', '.join(sorted(_FIELDS))}, and nothing else")
        if not all(isinstance(values[name], str) for name in ("kind", "digest", "key")):
            raise ValueError("its kind, digest and key are text")
        if type(values["size"]) is not int or not isinstance(values["body"], dict):
            raise ValueError("its size is a whole number and its body a mapping")
    except (ValueError, RecursionError, DataError) as error:
        raise DataError(f"the header of a message is not as expected: {error}. Ask for the message again") from None
    return values


def _tensors(payload: bytes, sender: str) -> dict[str, Tensor]:
    try:
        (length,) = struct.unpack_from("<Q", payload)
        if length > len(payload) - 8:
            raise ValueError(f"their header claims {length} bytes")
        # safetensors takes the last of two tensors with one name; which was meant nobody can say.
        json.loads(payload[8 : 8 + length].decode("utf-8"), object_pairs_hook=_once)
        return load(payload)
    except (SafetensorError, ValueError, KeyError, RecursionError, struct.error) as error:
        raise DataError(f"the tensors in a message of {sender} cannot be read: {error}. Ask for it again") from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name is a duplicate")
    return found


def _digest(payload: bytes) -> str:
    return hashlib.sha256(payload).hexdigest()
