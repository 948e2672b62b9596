"""A message is heard only if it is whole, of a known sender, and of the kind that was expected."""

import json
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from worldloom.core.chain import canonical
from worldloom.core.errors import DataError
from worldloom.core.signing import Domain, SigningKey, make_key
from worldloom.federation.record import envelope
from worldloom.federation.record.envelope import SignedMessage, seal, unseal, unseal_answer

_LIMIT = 10_000


@pytest.fixture(scope="module")
def key(tmp_path_factory: pytest.TempPathFactory) -> SigningKey:
    path = tmp_path_factory.mktemp("keys") / "a.pem"
    make_key(path)
    return SigningKey(path)


def _message(key: SigningKey) -> bytes:
    return seal("answer", {"round": 3, "loss": 0.5}, {"a": torch.arange(4.0), "b": torch.zeros(0, 2)}, key=key)


def _open(data: bytes, key: SigningKey, kind: str = "answer", limit: int = _LIMIT) -> SignedMessage:
    return unseal(data, kind=kind, known={key.public: "acme"}, limit=limit)


def _forged(key: SigningKey, payload: bytes = b"", **changed: object) -> bytes:
    """Return what a member with a true key, but its own software, may send."""
    digest = envelope._digest(payload)
    values = {"kind": "answer", "body": {}, "size": len(payload), "digest": digest, "key": key.public, **changed}
    return _signed(key, canonical(values).encode(), payload)


def _signed(key: SigningKey, header: bytes, payload: bytes = b"") -> bytes:
    said = struct.pack("<I", len(header)) + header
    return b"WLWEAVE\x01" + said + bytes.fromhex(key.sign(said, Domain.MESSAGE)) + payload


def test_what_was_sealed_is_read_with_its_sender(key: SigningKey) -> None:
    tied = torch.eye(3)
    data = seal("answer", {"round": 3}, {"a": tied, "b": tied.T[:, :2]}, key=key)
    message = _open(data, key)
    assert (message.sender, message.key, message.body) == ("acme", key.public, {"round": 3})
    assert torch.equal(message.tensors["a"], tied)
    assert torch.equal(message.tensors["b"], tied[:, :2])
    assert seal("answer", {"round": 3}, {"b": tied.T[:, :2], "a": tied}, key=key) == data
    assert _open(seal("answer", {}, {}, key=key), key).tensors == {}


@given(st.data())
def test_any_changed_byte_is_refused(key: SigningKey, data: st.DataObject) -> None:
    content = bytearray(_message(key))
    content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    with pytest.raises(DataError):
        _open(bytes(content), key)


@given(st.data())
def test_a_part_of_a_message_or_more_than_it_is_refused(key: SigningKey, data: st.DataObject) -> None:
    content = _message(key)
    with pytest.raises(DataError):
        _open(content[: data.draw(st.integers(0, len(content) - 1))], key)
    with pytest.raises(DataError, match="should have"):
        _open(content + data.draw(st.binary(min_size=1, max_size=9)), key)


def test_each_cause_is_named(key: SigningKey, tmp_path: Path) -> None:
    content = _message(key)
    make_key(tmp_path / "b.pem")
    stranger = SigningKey(tmp_path / "b.pem")
    with pytest.raises(DataError, match=f"unknown sender with key {stranger.public}"):
        _open(_message(stranger), key)
    with pytest.raises(DataError, match="magic number"):
        _open(b"x" + content, key)
    with pytest.raises(DataError, match=f"at most {len(content) - 1}"):
        _open(content, key, limit=len(content) - 1)
    with pytest.raises(DataError, match="expected a message of kind 'ask' from acme; got 'answer'"):
        _open(content, key, kind="ask")
    with pytest.raises(DataError, match="truncated or its header is wrong"):
        _open(content[:8] + struct.pack("<I", 2**32 - 1) + content[12:], key)
    (length,) = struct.unpack_from("<I", content, 8)
    with pytest.raises(DataError, match="does not have a valid signature"):
        _open(content[: 12 + length] + bytes(64) + content[76 + length :], key)
    with pytest.raises(DataError, match="do not match the digest"):
        _open(content[:-1] + b"\x07", key)


def test_what_a_member_may_send_in_a_header_and_what_errors_quote_of_it_is_limited(key: SigningKey) -> None:
    def answer(data: bytes) -> SignedMessage:
        return unseal_answer(data, kind="verdict", sender="acme", known={key.public: "acme"}, limit=10**8)

    with pytest.raises(DataError, match="the header of a message has 3000[0-9]{3} bytes; expected at most 2097152"):
        answer(seal("refusal", {"round": 0, "why": "x" * 3_000_000}, {}, key=key))
    for data in (
        seal("refusal", {"round": 0, "why": "x" * 30_000}, {}, key=key),
        seal("x" * 30_000, {}, {}, key=key),
        seal("verdict", {"x" * 30_000: 1}, {}, key=key),
        _signed(key, canonical({"kind": "verdict", "body": {}, "size": 0, "digest": "", "key": "x" * 30_000}).encode()),
    ):
        with pytest.raises(DataError) as refused:
            answer(data)
        assert len(str(refused.value)) < 1000


def test_a_member_that_forges_its_own_message_is_refused(key: SigningKey) -> None:
    for text in ('{"a":NaN}', '{"a":1e999}', '{"a":1,"a":2}', "[" * 5000, '{ "a":1}', "[]", "\xff"):
        with pytest.raises(DataError, match="header"):
            _open(_signed(key, text.encode("latin-1")), key)
    for wrong in ({"size": True}, {"size": "9"}, {"body": []}, {"kind": 3}, {"extra": 1}):
        with pytest.raises(DataError, match="header"):
            _open(_forged(key, **wrong), key)
    with pytest.raises(DataError, match="should have 1000000000000"):
        _open(_forged(key, size=10**12), key)
    entry = json.dumps({"dtype": "F32", "shape": [1], "data_offsets": [0, 4]})
    for table in (f'{{"a":{entry},"a":{entry}}}', f'{{"a":{entry.replace("[1]", "[99]")}}}', "{", "\xff"):
        text = table.encode("latin-1")
        with pytest.raises(DataError, match="cannot be read"):
            _open(_forged(key, struct.pack("<Q", len(text)) + text + bytes(4)), key)
    for payload in (b"", struct.pack("<Q", 2**63), bytes(3)):
        with pytest.raises(DataError, match="cannot be read"):
            _open(_forged(key, payload), key)


def test_a_body_that_is_not_finite_is_never_sent(key: SigningKey) -> None:
    with pytest.raises(DataError, match="finite"):
        seal("answer", {"loss": float("nan")}, {}, key=key)
