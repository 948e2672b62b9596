"""The keys of a deployment: nodes' keys for connections, and the TLS certificate of the coordinator's server.

These keys only authenticate connections. A message is authenticated by the sender's Ed25519 key
(`worldloom.core.signing`).
"""

import datetime
import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA384
from cryptography.x509.oid import ExtendedKeyUsageOID

from worldloom.core.errors import ConfigError, DataError, StorageError
from worldloom.core.files import check_private, storage_errors
from worldloom.core.names import path_name
from worldloom.core.signing import write_key

_SKEW = datetime.timedelta(hours=1)  # so that a node with a clock that is behind accepts a new certificate
_CA_DAYS = 3650


@dataclass(frozen=True, kw_only=True)
class Tls:
    """Paths of the coordinator's certificate and secret key, and of the authority's certificate, which nodes need."""

    authority: Path
    certificate: Path
    secret: Path


def make_node_keys(folder: Path | str, name: str) -> Path:
    """Write the keys for a node's connections (ECDSA on P-384, in OpenSSH's format); return the public key's path.

    The secret key, NAME.ssh, stays with the node. The public key, NAME.ssh.pub, goes to the coordinator.

    Raises:
        ConfigError: the name could point into another folder.
        StorageError: a key exists already (keys are never overwritten), or cannot be written.
    """
    path_name(name, "the name")
    paths = Path(folder) / f"{name}.ssh", Path(folder) / f"{name}.ssh.pub"
    _refuse_existing(*paths)
    secret = ec.generate_private_key(ec.SECP384R1())
    write_key(
        paths[0],
        secret.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
        ),
    )
    public = secret.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    write_key(paths[1], public + f" {name}\n".encode(), mode=0o644)
    return paths[1]


def connection_key(name: str, text: str) -> bytes:
    """Return the public key of a node's connections (PEM), from its text in OpenSSH's format.

    Raises:
        DataError: the text is not a key of the type that `make_node_keys` writes; the message says whose it is.
    """
    try:
        key = serialization.load_ssh_public_key(text.strip().encode())
    except (ValueError, UnsupportedAlgorithm) as error:
        raise DataError(f"{name}'s public key is invalid ({error}); use the text of the node's .ssh.pub file") from None
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP384R1):
        raise DataError(
            f"{name}'s public key has the wrong type; expected ECDSA on P-384. Create it with 'worldloom weave keys'"
        )
    return key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


def make_tls(folder: Path | str, hosts: Sequence[str] = ("localhost", "127.0.0.1"), days: int = 825) -> Tls:
    """Write a coordinator's certificate for its host names or addresses, signed by its own authority.

    To renew the certificate, remove `server.pem` and `server.key`, and call this again. The same authority signs the
    new certificate, so nodes need no new file.

    Raises:
        ConfigError: there is no host, or `days` is below 1.
        StorageError: a certificate exists already, or cannot be written.
        DataError: the authority's files are damaged.
    """
    if not hosts or days < 1:
        raise ConfigError(f"expected at least one host and days >= 1; got hosts {list(hosts)} and days {days}")
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
        .sign(signer, SHA384())
    )
    write_key(made.secret, _pem(secret))
    write_key(made.certificate, certificate.public_bytes(serialization.Encoding.PEM), mode=0o644)
    return made


def _authority(certificate: Path, secret: Path) -> tuple[Any, Any]:
    """Return the authority's secret key and certificate; create them if they do not exist."""
    if certificate.exists() and secret.exists():
        with storage_errors(certificate):
            contents = secret.read_bytes(), certificate.read_bytes()
        check_private(secret)
        try:
            signer = serialization.load_pem_private_key(contents[0], password=None)
            known = x509.load_pem_x509_certificate(contents[1])
        except (ValueError, TypeError) as error:
            raise DataError(
                f"{certificate.parent} has an invalid certificate authority ({error}); restore ca.pem and ca.key"
            ) from None
        if not isinstance(signer, ec.EllipticCurvePrivateKey) or known.public_key() != signer.public_key():
            raise DataError(f"{secret} is not the secret key of {certificate}; restore the matching key")
        return signer, known
    _refuse_existing(certificate, secret)
    signer = ec.generate_private_key(ec.SECP384R1())
    name = _named("worldloom consortium")
    known = (
        _certificate(name, name, signer.public_key(), _CA_DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(key_cert_sign=True, crl_sign=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(signer.public_key()), critical=False)
        .sign(signer, SHA384())
    )
    write_key(secret, _pem(signer))
    write_key(certificate, known.public_bytes(serialization.Encoding.PEM), mode=0o644)
    return signer, known


def _certificate(subject: Any, issuer: Any, public: Any, days: int) -> Any:
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
    every = (
        "digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement",
        "key_cert_sign", "crl_sign", "encipher_only", "decipher_only",
    )  # fmt: skip
    return x509.KeyUsage(**dict.fromkeys(every, False) | allowed)


def _named(name: str) -> Any:
    return x509.Name([x509.NameAttribute(x509.oid.NameOID.COMMON_NAME, name)])


def _host(host: str) -> Any:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _pem(secret: Any) -> bytes:

    text: bytes = secret.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return text


def _refuse_existing(*paths: Path) -> None:
    for path in paths:
        if path.exists():
            raise StorageError(
                f"{path} exists already; keys and certificates are never overwritten. Choose another folder or name"
            )
