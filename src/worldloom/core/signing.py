"""Signatures of files (Ed25519): who stands behind a policy, and that nobody has changed it since.

A signature is a small JSON file beside the one it signs: the signer's public key and the signature of every byte. A
secret key is a PEM file that only its owner may read; a public key is 64 hexadecimal digits, to be given to anyone.
"""

import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

from worldloom.core.errors import DataError, StorageError
from worldloom.core.files import read_json, storage_errors, write_json

_KIND = "worldloom signature"
_LARGEST = 2**26  # bytes of what is signed: a policy or a picture, read whole before anybody is known to vouch for it


def make_key(path: Path | str) -> str:
    """Write a new secret key, which nobody else may read, and return its public one.

    Raises:
        StorageError: the file is there already, or cannot be written.
    """
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    secret = Ed25519PrivateKey.generate()
    text = secret.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    with storage_errors(path):
        try:
            file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError:
            raise StorageError(f"{path} is there already; a key is never written over. Choose another path") from None
        with os.fdopen(file, "wb") as opened:
            opened.write(text)
    return _public(secret)


def sign_file(path: Path | str, key: Path | str) -> Path:
    """Sign a file as it is now, and return where the signature is kept.

    Raises:
        StorageError: a file cannot be read or written.
        DataError: the key is no Ed25519 key.
    """
    secret, content = _secret(key), _read(path)
    signature = signature_path(path)
    write_json(signature, {"kind": _KIND, "format": 1, "key": _public(secret), "signature": secret.sign(content).hex()})
    return signature


def signature_path(path: Path | str) -> Path:
    """Return where the signature of a file is kept."""
    return Path(path).with_name(f"{Path(path).name}.sig")


def read_signed(path: Path | str, trusted: Collection[str]) -> tuple[bytes, str]:
    """Return the content of a file and the public key of its signer, one of those trusted.

    What is returned is what was verified: the file is read once.

    Raises:
        StorageError: the file or its signature is missing.
        DataError: the signature is not of this content, or of a key that is not trusted.
    """
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    where = signature_path(path)
    if not where.is_file():
        raise StorageError(f"{path} is not signed: there is no {where.name} beside it. Have its owner sign it")
    content, values = _read(path), read_json(where)
    try:
        if not isinstance(values, dict) or (values["kind"], values["format"]) != (_KIND, 1):
            raise ValueError("it is no signature")
        key, signature = _text(values["key"]), bytes.fromhex(_text(values["signature"]))
        public = Ed25519PublicKey.from_public_bytes(bytes.fromhex(key))
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{where} is no signature ({error}); have the owner of {path} sign it again") from None
    try:
        public.verify(signature, content)
    except InvalidSignature:
        raise DataError(
            f"{path} is not what {key[:16]}... signed: it was changed, or the signature is another file's. Ask its "
            f"owner for both files again"
        ) from None
    if key.lower() not in {known.strip().lower() for known in trusted}:
        raise DataError(
            f"{path} is signed by {key}, whom you do not trust; name the key as trusted if it is its owner's"
        )
    return content, key.lower()


def _read(path: Path | str) -> bytes:
    with storage_errors(path), Path(path).open("rb") as file:
        content = file.read(_LARGEST + 1)
    if len(content) > _LARGEST:
        raise DataError(f"{path} is larger than {_LARGEST} bytes; expected a policy or a picture")
    return content


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is no text")
    return value


def _secret(path: Path | str) -> Any:
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        secret = load_pem_private_key(_read(path), password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise DataError(f"{path} is no secret key ({error}); make one with worldloom policy key") from None
    if not isinstance(secret, Ed25519PrivateKey):
        raise DataError(f"{path} is a key of another kind; expected Ed25519. Make one with worldloom policy key")
    return secret


def _public(secret: Any) -> str:
    from cryptography.hazmat.primitives import serialization

    raw: bytes = secret.public_key().public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)
    return raw.hex()
