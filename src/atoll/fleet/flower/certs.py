"""Keys and certificates of a federation, made once by whoever hosts the server.

    FOLDER/
      ca/          ca.key           the authority: keep it apart from the server
      server/      server.key server.pem ca.pem operator.token executor.secret clients/NAME.pub    goes to the server
      operator/    operator.token ca.pem                      to those who start runs
      sites/NAME/  site.key ca.pem                            each to its site

A site may make its key itself (`site_key`) and send the public half alone. Who may join is who lies in `server/clients`.
Private files are readable by their owner alone.
"""

from __future__ import annotations

import datetime
import hashlib
import ipaddress
import os
import re
import secrets
from collections.abc import Sequence
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from atoll.errors import AtollError

YEAR = datetime.timedelta(days=365)
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")


def init(folder: Path, hosts: Sequence[str]) -> None:
    """The authority, the server's certificate for `hosts`, and the operator's token.

    Raises:
        AtollError: there is an authority in `folder` already.
    """
    if (folder / "ca" / "ca.key").exists():
        raise AtollError(
            "there is an authority here already", where=str(folder / "ca"),
            remedy="`atoll certs site NAME` adds a site; a new federation needs a new folder",
        )  # fmt: skip
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "atoll federation")])
    usage = x509.KeyUsage(False, False, False, False, False, True, True, False, False)  # signs certificates and no more
    certificate = (
        _certificate(name, name, key.public_key(), 10 * YEAR)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    write_private(folder / "ca" / "ca.key", _pem(key))
    for part in ("ca", "server", "operator"):
        write(folder / part / "ca.pem", certificate.public_bytes(serialization.Encoding.PEM))
    token = secrets.token_urlsafe(32).encode()
    for part in ("server", "operator"):
        write_private(folder / part / "operator.token", token)
    write_private(folder / "server" / "executor.secret", executor_secret(token))  # for Flower's own command
    (folder / "server" / "clients").mkdir(exist_ok=True)
    server(folder, hosts)


def server(folder: Path, hosts: Sequence[str], valid: datetime.timedelta = YEAR) -> None:
    """The server's key and its certificate, signed by the authority in `folder`; replaces those that are there."""
    ca_key, ca = _authority(folder)
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, hosts[0])])
    certificate = (
        _certificate(name, ca.subject, key.public_key(), valid)
        .add_extension(x509.SubjectAlternativeName([_host(host) for host in hosts]), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()), critical=False)
        .sign(ca_key, hashes.SHA256())
    )
    write_private(folder / "server" / "server.key", _pem(key))
    write(folder / "server" / "server.pem", certificate.public_bytes(serialization.Encoding.PEM))


def site(folder: Path, name: str, public: bytes | None = None) -> Path:
    """Enrolls a site: its folder to hand over, with a new key; or only the public key of a site that made its own.

    Raises:
        AtollError: a name that is none, or that is taken.
    """
    if not NAME.fullmatch(name):
        raise AtollError("a site may not be called so", found=name, allowed="letters, digits, '.', '_' and '-'")
    enrolled = folder / "server" / "clients" / f"{name}.pub"
    if enrolled.exists():
        raise AtollError(
            "there is a site of that name",
            where=str(enrolled),
            remedy="another name; or remove the file, which revokes it",
        )
    if public is not None:
        refuse_key(public, enrolled.parent)
    own = folder / "sites" / name
    write(enrolled, public or site_key(own / "site.key"))
    if public is None:
        write(own / "ca.pem", (folder / "ca" / "ca.pem").read_bytes())
    return own


def refuse_key(public: bytes, clients: Path) -> None:
    """Raises AtollError for what is no public key of a site, or is enrolled already."""
    try:
        key = serialization.load_ssh_public_key(public)
        fits = isinstance(key, ec.EllipticCurvePublicKey)
    except (ValueError, UnsupportedAlgorithm):
        fits = False
    if not fits:
        private = b"PRIVATE" in public
        raise AtollError(
            "not a site's public key", where="--public", found="a private key" if private else "",
            remedy="the file site.pub that `atoll certs key` made; a private key stays at its site",
        )  # fmt: skip
    for path in sorted(clients.glob("*.pub")):
        if path.read_bytes().split()[:2] == public.split()[:2]:
            raise AtollError("this key is enrolled already", where=str(path), found=path.stem, remedy="use that name")


def executor_secret(token: bytes) -> bytes:
    """What lets a process take a run's work at the SuperLink: whoever has the operator's token."""
    return hashlib.sha256(b"executor " + token).digest()


def site_key(path: Path) -> bytes:
    """Writes a new private key of a site to `path`; returns its public half, in OpenSSH's format as Flower wants it."""
    key = ec.generate_private_key(ec.SECP256R1())  # a call is signed and checked 10 times as fast as with P-384
    encoding, form = serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH
    write_private(path, key.private_bytes(encoding, form, serialization.NoEncryption()))
    return key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)


def write_private(path: Path, data: bytes) -> None:
    """For its owner alone, from the first byte on."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(data)


def write(path: Path, data: bytes) -> None:
    """For everybody."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def read(path: Path, what: str, remedy: str = "`atoll certs init` makes a federation's keys") -> bytes:
    """A file of a federation's folder. Raises AtollError if it is not there."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise AtollError(f"no {what}", where=str(path), found=error.strerror, remedy=remedy) from error


def _authority(folder: Path) -> tuple[ec.EllipticCurvePrivateKey, x509.Certificate]:
    key = serialization.load_pem_private_key(read(folder / "ca" / "ca.key", "authority"), password=None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    return key, x509.load_pem_x509_certificate(read(folder / "ca" / "ca.pem", "authority"))


def _certificate(
    subject: x509.Name, issuer: x509.Name, public: ec.EllipticCurvePublicKey, valid: datetime.timedelta
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    begins = min(now, now + valid) - datetime.timedelta(minutes=5)  # clocks differ
    builder = x509.CertificateBuilder().subject_name(subject).issuer_name(issuer).public_key(public)
    return builder.serial_number(x509.random_serial_number()).not_valid_before(begins).not_valid_after(now + valid)


def _host(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
