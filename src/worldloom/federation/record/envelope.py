"""Signed messages between nodes and coordinators: content, sender and integrity.

A message consists of a magic number, the length of the header, the header (canonical JSON: kind, body, size and digest
of the payload, the sender's key), the sender's signature of all that, and the payload in safetensors. Reading a message
executes no code. Every size in a message is checked against the received bytes before use.
"""

import hashlib
import json
import reprlib
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
from worldloom.core.signing import Domain, SigningKey, verified
from worldloom.core.text import one_line
from worldloom.federation.record.bodies import check_answer

_MAGIC = Domain.MESSAGE.value
_LENGTH = struct.Struct("<I")
_SIGNATURE = 64  # bytes
_FIELDS = {"kind", "body", "size", "digest", "key"}
_LARGEST_ANSWER = 2**21  # bytes of an answer's header: room for a share for each member; lists of entries are longer


@dataclass(frozen=True, kw_only=True, eq=False)
class SignedMessage:
    """A message from a known sender; `data` is the complete message as received, and `digest` its SHA-256.

    `statement` is the signed part: the message without its tensors. `size` is the number of bytes of the message.
    """

    kind: str
    sender: str
    key: str
    body: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    data: bytes
    digest: str
    statement: bytes
    size: int


def seal(kind: str, body: Mapping[str, Any], tensors: Mapping[str, Tensor], *, key: SigningKey) -> bytes:
    """Return a signed message; the same arguments always produce the same bytes.

    Raises:
        DataError: the body is not plain JSON, or contains a number that is not finite.
    """
    # Clones, because safetensors refuses tensors that share memory, as tied weights do.
    payload = save(
        {name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
    )
    values = {"kind": kind, "body": dict(body), "size": len(payload), "digest": _digest(payload), "key": key.public}
    header = canonical(values).encode("ascii")
    said = _LENGTH.pack(len(header)) + header
    return _MAGIC + said + bytes.fromhex(key.sign(said, Domain.MESSAGE)) + payload


def unseal(data: bytes, *, kind: str, known: Mapping[str, str], limit: int) -> SignedMessage:
    """Check and decode a message; `known` maps public keys to names, and `limit` is the largest size in bytes.

    Raises:
        DataError: the message is too large, was truncated or changed, has a wrong kind, or is from an unknown sender.
    """
    return _open(data, (kind,), known, limit)


def read_statement(data: bytes, *, kind: str, known: Mapping[str, str], limit: int) -> SignedMessage:
    """Check and decode a message's `statement`, which lacks the tensors but signs their size and digest; see `unseal`.

    Raises:
        DataError: the statement is too large, was changed, has a wrong kind, or is from an unknown sender.
    """
    values, sender, end = _signed_part(data, (kind,), known, limit)
    if end != len(data):
        raise DataError(f"a statement of {sender} has {len(data)} bytes; expected {end}. Ask {sender} for it again")
    return _message(values, sender, data, {}, data)


class Refusal(DataError):
    """A node's signed refusal; `body` is its content."""

    def __init__(self, message: SignedMessage) -> None:
        super().__init__(f"{message.sender} refuses: {message.body.get('why')}")
        self.message, self.body = message, message.body


def unseal_answer(data: bytes, *, kind: str, sender: str, known: Mapping[str, str], limit: int) -> SignedMessage:
    """Check and decode an answer from the node `sender`; see `unseal` and `check_answer`.

    Raises:
        Refusal: the node refused; the error includes its reason.
        DataError: a different sender signed the answer, or the answer or its body is invalid.
    """
    message = _open(data, (kind, "refusal"), known, limit, header=_LARGEST_ANSWER)
    if message.sender != sender:
        raise DataError(
            f"{sender} sent a message that {message.sender} signed; expected one signed by {sender}. "
            f"Start each node with its own key"
        )
    check_answer(message.kind, message.body, sender)
    if message.kind != kind:
        raise Refusal(message)
    return message


def _open(
    data: bytes, kinds: tuple[str, ...], known: Mapping[str, str], limit: int, *, header: int | None = None
) -> SignedMessage:
    values, sender, end = _signed_part(data, kinds, known, limit, header)
    payload = data[end:]
    if values["size"] != len(payload):
        raise DataError(
            f"a message from {sender} should have {values['size']} bytes of tensors, but {len(payload)} arrived. "
            f"Ask {sender} to send the message again"
        )
    if values["digest"] != _digest(payload):
        raise DataError(
            f"the tensors in a message from {sender} do not match the digest in its header. "
            f"Ask {sender} to send the message again"
        )
    return _message(values, sender, data[:end], _tensors(payload, sender), data)


def _message(
    values: Mapping[str, Any], sender: str, statement: bytes, tensors: Mapping[str, Tensor], data: bytes
) -> SignedMessage:
    return SignedMessage(
        kind=values["kind"],
        sender=sender,
        key=values["key"],
        body=values["body"],
        tensors=tensors,
        data=data,
        digest=hashlib.sha256(data).hexdigest(),
        statement=statement,
        size=len(statement) + values["size"],
    )


def _signed_part(
    data: bytes, kinds: tuple[str, ...], known: Mapping[str, str], limit: int, header: int | None = None
) -> tuple[dict[str, Any], str, int]:
    """Check the header and signature of a message; return the header, the sender, and where the signed part ends.

    `limit` and `header` are the largest sizes of the message and of its header, in bytes.
    """
    if len(data) > limit:
        raise DataError(
            f"a message has {len(data)} bytes; expected at most {limit}. Send less, or raise "
            f"largest_megabytes in the constitution"
        )
    start = len(_MAGIC) + _LENGTH.size
    if not data.startswith(_MAGIC):
        raise DataError(
            "a message does not start with the magic number of this version; run the same worldloom on both sides"
        )
    if len(data) < start:
        raise DataError(f"a message is truncated: only {len(data)} bytes arrived. Ask the sender to send it again")
    (length,) = _LENGTH.unpack_from(data, len(_MAGIC))
    end = start + length + _SIGNATURE
    if header is not None and length > header:
        raise DataError(
            f"the header of a message has {length} bytes; expected at most {header}. Run the same version on both sides"
        )
    if end > len(data):
        raise DataError(
            f"a message is truncated or its header is wrong: header and signature should end at byte "
            f"{end}, but only {len(data)} bytes arrived. Ask the sender to send it again"
        )
    values = _header(data[start : start + length])
    key, sender = values["key"], known.get(values["key"])
    if sender is None:
        raise DataError(
            f"a message is from an unknown sender with key {one_line(key[:64])}; expected a key in the constitution. "
            f"Use the same constitution on both sides, and sign with a key that it lists"
        )
    if not verified(data[len(_MAGIC) : start + length], data[start + length : end].hex(), key, Domain.MESSAGE):
        raise DataError(f"a message does not have a valid signature of {sender}; ask {sender} to send it again")
    if values["kind"] not in kinds:
        raise DataError(
            f"expected a message of kind {kinds[0]!r} from {sender}; got {reprlib.repr(values['kind'])}. "
            f"Run the same version on both sides"
        )
    return values, sender, end


def _header(text: bytes) -> dict[str, Any]:
    try:
        values = json.loads(text.decode("ascii"))
        # Each value has one canonical form, so this check also refuses duplicate keys and non-finite numbers.
        if canonical(values).encode("ascii") != text:
            raise ValueError("it is not canonical JSON")
        if not isinstance(values, dict) or set(values) != _FIELDS:
            raise ValueError(f"expected exactly the keys {', '.join(sorted(_FIELDS))}")
        if not all(isinstance(values[name], str) for name in ("kind", "digest", "key")):
            raise ValueError("kind, digest and key must be text")
        if type(values["size"]) is not int or not isinstance(values["body"], dict):
            raise ValueError("size must be an integer, and body must be a mapping")
    except (ValueError, RecursionError, DataError) as error:
        raise DataError(f"the header of a message is invalid: {error}. Ask for the message again") from None
    return values


def _tensors(payload: bytes, sender: str) -> dict[str, Tensor]:
    try:
        (length,) = struct.unpack_from("<Q", payload)
        if length > len(payload) - 8:
            raise ValueError(
                f"the header of the tensors should have {length} bytes, but only {len(payload) - 8} follow"
            )
        # If two tensors have the same name, safetensors silently uses the last one.
        json.loads(payload[8 : 8 + length].decode("utf-8"), object_pairs_hook=_unique)
        return load(payload)
    # For a size above 2**63, torch raises TypeError or RuntimeError.
    except (SafetensorError, ValueError, KeyError, TypeError, ArithmeticError, RuntimeError, struct.error) as error:
        raise DataError(
            f"the tensors in a message from {sender} cannot be read: {error}. Ask for the message again"
        ) from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("two tensors have the same name")
    return found


def _digest(payload: bytes) -> str:
    return hashlib.sha256(payload).hexdigest()
