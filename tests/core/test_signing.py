"""Who signed a file is known, and every change to it is found."""

import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worldloom.core.errors import DataError, StorageError
from worldloom.core.signing import (
    Domain,
    SignedFile,
    SigningKey,
    make_key,
    read_signed,
    sign_file,
    signature_path,
    verified,
)
from worldloom.core.user_state import own_key, own_public_key


@pytest.fixture(scope="module")
def signed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("signed")
    path = folder / "policy.yaml"
    path.write_bytes(b"owner: Acme\nrisk: 0.05\n")
    public = make_key(folder / "secret.pem")
    sign_file(path, folder / "secret.pem", Domain.RULE_LAYER)
    return path, public


def test_what_was_signed_is_read_with_its_signer(signed: tuple[Path, str]) -> None:
    path, public = signed
    expected = SignedFile(content=path.read_bytes(), key=public, parts={})
    assert read_signed(path, [public.upper()], Domain.RULE_LAYER) == expected


def test_a_secret_key_is_for_its_owner_alone_and_never_written_over(tmp_path: Path) -> None:
    make_key(tmp_path / "key.pem")
    before = (tmp_path / "key.pem").read_bytes()
    assert (tmp_path / "key.pem").stat().st_mode & 0o077 == 0
    with pytest.raises(StorageError, match="never overwritten"):
        make_key(tmp_path / "key.pem")
    assert (tmp_path / "key.pem").read_bytes() == before


def test_a_key_that_could_not_be_written_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(StorageError, match="full"):
            make_key(tmp_path / "keys" / "key.pem")
    assert not any((tmp_path / "keys").iterdir())
    make_key(tmp_path / "keys" / "key.pem")


@pytest.mark.parametrize("kind", ["empty", "garbage", "folder", "link to nothing"])
def test_a_damaged_key_of_the_user_is_told_with_its_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    path = tmp_path / "worldloom" / "key.pem"
    path.parent.mkdir()
    if kind == "folder":
        path.mkdir()
    elif kind == "link to nothing":
        path.symlink_to(tmp_path / "nothing")
    else:
        path.touch(0o600)
        path.write_text("" if kind == "empty" else "garbage")
    for read in (own_key, own_public_key):
        with pytest.raises(DataError, match="your own key, is damaged or not a file. Delete it"):
            read()
    path.rmdir() if kind == "folder" else path.unlink()
    assert own_public_key() is None
    assert own_key().public == own_public_key()


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604, 0o660])
def test_a_key_that_others_can_read_is_refused_with_the_command_that_helps(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "a key.pem"
    make_key(path)
    path.chmod(mode)
    with pytest.raises(StorageError, match=f"other users may use .*{mode:03o}.*run: chmod -R go= '.*a key.pem'"):
        SigningKey(path)
    path.chmod(0o600)
    SigningKey(path)


def test_users_who_share_their_state_have_keys_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLDLOOM_STATE", str(tmp_path / "shared"))
    keys = set()
    make_key(tmp_path / "shared" / "key.pem")  # as another user could
    for user in ("ann", "ben"):
        monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / user))
        assert own_public_key() is None
        keys.add(own_key().public)
    assert len(keys) == 2


def test_a_key_of_another_user_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    own_key()
    user = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: user + 1)
    with pytest.raises(
        StorageError, match=rf"belongs to the user with the number {user}, .* your own number, {user + 1}"
    ):
        own_public_key()


@given(st.data())
def test_a_changed_byte_is_found_wherever_it_is(signed: tuple[Path, str], data: st.DataObject) -> None:
    path, public = signed
    content = bytearray(path.read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    content[place] ^= data.draw(st.integers(1, 255))
    other = path.with_name("changed.yaml")
    other.write_bytes(bytes(content))
    signature_path(other).write_bytes(signature_path(path).read_bytes())
    with pytest.raises(DataError, match="changed"):
        read_signed(other, [public], Domain.RULE_LAYER)


@given(st.data())
def test_a_changed_signature_is_refused(signed: tuple[Path, str], data: st.DataObject) -> None:
    path, public = signed
    text = signature_path(path).read_text()
    place = data.draw(st.integers(0, len(text) - 1))
    other = path.with_name("resigned.yaml")
    other.write_bytes(path.read_bytes())
    changed = text[:place] + data.draw(st.sampled_from("0123456789abcdefx{} ")) + text[place + 1 :]
    signature_path(other).write_text(changed)
    try:
        same = json.loads(changed) == json.loads(text)
    except ValueError:
        same = False
    if same or changed.lower() == text:
        assert read_signed(other, [public], Domain.RULE_LAYER).key == public
    else:
        with pytest.raises((DataError, StorageError)):
            read_signed(other, [public], Domain.RULE_LAYER)


def test_a_stranger_is_refused_and_named(signed: tuple[Path, str], tmp_path: Path) -> None:
    path, public = signed
    with pytest.raises(DataError, match=f"{public}, which is not a trusted key"):
        read_signed(path, [make_key(tmp_path / "another.pem")], Domain.RULE_LAYER)


def test_what_is_not_signed_is_refused(tmp_path: Path) -> None:
    (tmp_path / "policy.yaml").write_text("owner: Acme\n")
    with pytest.raises(StorageError, match="not signed"):
        read_signed(tmp_path / "policy.yaml", [], Domain.RULE_LAYER)


def test_a_key_of_another_kind_does_not_sign(tmp_path: Path) -> None:
    (tmp_path / "policy.yaml").write_text("owner: Acme\n")
    (tmp_path / "key.pem").write_text("-----BEGIN nothing-----\n")
    with pytest.raises(DataError, match="not a secret key"):
        sign_file(tmp_path / "policy.yaml", tmp_path / "key.pem", Domain.RULE_LAYER)
    assert not signature_path(tmp_path / "policy.yaml").exists()


@given(content=st.binary(max_size=40), place=st.integers(0, 10**6), bits=st.integers(1, 255))
def test_a_signature_is_of_one_content_by_one_key(
    signed: tuple[Path, str], content: bytes, place: int, bits: int
) -> None:
    key = SigningKey(signed[0].with_name("secret.pem"))
    assert key.public == signed[1]
    signature = key.sign(content, Domain.DATA_CARD)
    assert verified(content, signature, key.public, Domain.DATA_CARD)
    changed = bytearray(content + b".")
    changed[place % len(changed)] ^= bits
    assert not verified(bytes(changed), signature, key.public, Domain.DATA_CARD)
    other = bytearray(bytes.fromhex(signature))
    other[place % 64] ^= bits
    assert not verified(content, other.hex(), key.public, Domain.DATA_CARD)
    assert not verified(content, signature[:-1] + " ", key.public, Domain.DATA_CARD)
    assert not verified(content, signature, signature[:64], Domain.DATA_CARD)


@given(content=st.binary(max_size=80), made=st.sampled_from(Domain), read=st.sampled_from(Domain))
def test_a_signature_is_valid_in_its_own_domain_only(
    signed: tuple[Path, str], content: bytes, made: Domain, read: Domain
) -> None:
    key = SigningKey(signed[0].with_name("secret.pem"))
    assert verified(content, key.sign(content, made), key.public, read) == (made is read)
    # Nor does content that imitates another domain help, wherever the signed bytes are split.
    imitated = read.value + content
    assert not verified(content, key.sign(imitated, made), key.public, read)


def test_no_domain_begins_with_another_one() -> None:
    for one in Domain:
        assert not [other for other in Domain if other is not one and other.value.startswith(one.value)]


def test_a_file_signed_for_one_purpose_serves_no_other(signed: tuple[Path, str]) -> None:
    path, public = signed
    with pytest.raises(DataError, match="signed as 'rule layer'; expected 'data card'"):
        read_signed(path, [public], Domain.DATA_CARD)
    where = signature_path(path)
    before = where.read_text()
    relabelled = path.with_name("relabelled.yaml")
    relabelled.write_bytes(path.read_bytes())
    signature_path(relabelled).write_text(before.replace('"rule layer"', '"data card"'))
    with pytest.raises(DataError, match="does not match the signature"):
        read_signed(relabelled, [public], Domain.DATA_CARD)
    with pytest.raises(DataError, match="already signed as 'rule layer'"):  # signing must not destroy another signature
        sign_file(path, path.with_name("secret.pem"), Domain.DATA_CARD)
    assert where.read_text() == before
