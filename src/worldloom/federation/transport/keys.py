"""The keys of a deployment: by which a node is known to the coordinator's server, and by which nodes know that server.

They open connections, no more. Who stands behind a message is said by the Ed25519 key that signs it
(`worldloom.core.signing`).
"""

import datetime
import ipaddress
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from worldloom.core.errors import ConfigError, DataError, StorageError
from worldloom.core.files import storage_errors

_SKEW = datetime.timedelta(hours=1)  # a node whose clock is behind accepts a new certificate too
_CA_DAYS = 3650


@dataclass(frozen=True, kw_only=True)
class NodeKeys:
    """Where the keys of a node are: the secret one stays with it, the public one is given to the coordinator."""

    secret: Path
    public: Path


@dataclass(frozen=True, kw_only=True)
class Tls:
    """Where the coordinator's certificate is, its secret key, and the authority's certificate that nodes are given."""

    authority: Path
    certificate: Path
    secret: Path


def make_node_keys(folder: Path | str, name: str) -> NodeKeys:
    """Write the keys by which a node opens connections: ECDSA on P-384, in OpenSSH's format.

    Raises:
        StorageError: one is there already (a key is never written over), or cannot be written.
    """
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    keys = NodeKeys(secret=Path(folder) / f"{name}.ssh", public=Path(folder) / f"{name}.ssh.pub")
    _refuse_existing(keys.secret, keys.public)
    secret = ec.generate_private_key(ec.SECP384R1())
    _write(
        keys.secret,
        secret.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
        ),
        mode=0o600,
    )
    public = secret.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    _write(keys.public, public + f" {name}\n".encode())
    return keys


def make_tls(folder: Path | str, hosts: Sequence[str] = ("localhost", "127.0.0.1"), days: int = 825) -> Tls:
    """Write the certificate of a coordinator whom nodes reach by these names or addresses, signed by its own authority.

    An authority that is in the folder signs again, so that nodes go on with the certificate that they have: take
    `server.pem` and `server.key` away before the old one expires, and make a new one.

    Raises:
        ConfigError: no host is named, or the days are none.
        StorageError: a certificate is there already, or cannot be written.
        DataError: the authority's files are damaged.
    """
    from cryptography import x509
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import ExtendedKeyUsageOID

    if not hosts or days < 1:
        raise ConfigError(f"a certificate needs a host and at least a day; got {list(hosts)} and {days}")
    folder = Path(folder)
    made = Tls(authority=folder / "ca.pem", certificate=folder / "server.pem", secret=folder / "server.key")
    _refuse_existing(made.certificate, made.secret)
    signer, authority = _authority(made.authority, folder / "ca.key")
    secret = ec.generate_private_key(ec.SECP384R1())
    certificate = (
        _certificate(_named(hosts[0]), authority.subject, secret.public_key(), days)
        .add_extension(x509.SubjectAlternativeName([_host(host) for host in hosts]), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(digital_signature=True), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False)
        .sign(signer, _sha384())
    )
    _write(made.secret, _pem(secret), mode=0o600)
    _write(made.certificate, certificate.public_bytes(serialization.Encoding.PEM))
    return made


def _authority(certificate: Path, secret: Path) -> tuple[Any, Any]:
    """Return the authority's secret key and certificate; where there is none, make it."""
    from cryptography import x509
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    if certificate.exists() and secret.exists():
        with storage_errors(certificate):
            contents = secret.read_bytes(), certificate.read_bytes()
        try:
            signer = serialization.load_pem_private_key(contents[0], password=None)
            known = x509.load_pem_x509_certificate(contents[1])
        except (ValueError, TypeError) as error:
            raise DataError(f"{certificate.parent} holds no authority ({error}); restore ca.pem and ca.key") from None
        if not isinstance(signer, ec.EllipticCurvePrivateKey) or known.public_key() != signer.public_key():
            raise DataError(f"{secret} is not the key of {certificate}; restore the one that belongs to it")
        return signer, known
    _refuse_existing(certificate, secret)
    signer = ec.generate_private_key(ec.SECP384R1())
    name = _named("worldloom consortium")
    known = (
        _certificate(name, name, signer.public_key(), _CA_DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(key_cert_sign=True, crl_sign=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(signer.public_key()), critical=False)
        .sign(signer, _sha384())
    )
    _write(secret, _pem(signer), mode=0o600)
    _write(certificate, known.public_bytes(serialization.Encoding.PEM))
    return signer, known


def _certificate(subject: Any, issuer: Any, public: Any, days: int) -> Any:
    from cryptography import x509

    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _SKEW)
        .not_valid_after(now + datetime.timedelta(days=days))
    )


def _usage(**allowed: bool) -> Any:
    from cryptography import x509

    every = (
        "digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement",
        "key_cert_sign", "crl_sign", "encipher_only", "decipher_only",
    )  # fmt: skip
    return x509.KeyUsage(**dict.fromkeys(every, False) | allowed)


def _named(name: str) -> Any:
    from cryptography import x509

    return x509.Name([x509.NameAttribute(x509.oid.NameOID.COMMON_NAME, name)])


def _host(host: str) -> Any:
    from cryptography import x509

    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _sha384() -> Any:
    from cryptography.hazmat.primitives.hashes import SHA384

    return SHA384()


def _pem(secret: Any) -> bytes:
    from cryptography.hazmat.primitives import serialization

    text: bytes = secret.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return text


def _refuse_existing(*paths: Path) -> None:
    for path in paths:
        if path.exists():
            raise StorageError(f"{path} is there already; a key is never written over. Choose another folder or name")


def _write(path: Path, content: bytes, *, mode: int = 0o644) -> None:
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        # It is created with its mode: at no moment may another user open a secret.
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        with os.fdopen(file, "wb") as opened:
            opened.write(content)
