"""`federate keys`: a small certificate authority, the coordinator's certificate, one key pair for each site.

    CERTS/authority.key     signs the coordinator's certificate; needed for nothing else: keep it off the network
    CERTS/coordinator/      authority.pem, server.pem, server.key, sites/a.pub ...
    CERTS/sites/a/          authority.pem, a.key, a.pub: all that site a needs, to be carried there by a safe way

The coordinator proves itself by its certificate, a site by its key (elliptic curve P-384). Private files are readable
by their owner only.
"""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from thriftune.errors import InputError
from thriftune.federated.folders import writing_to

DAYS = 825  # the longest that common TLS libraries accept for a server
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}")
LABEL = r"[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?"
HOST = re.compile(rf"(\*\.)?({LABEL}\.)*(?![0-9]+$){LABEL}")  # the last label is not a number: that would be an address


def make_keys(output: Path, sites: Sequence[str], hosts: Sequence[str]) -> list[Path]:
    """Write the three folders and return the private files. Raises InputError for names that are none, or when `output`
    holds keys already, OutputError when it cannot be written to."""
    _check(output, sites, hosts)
    with writing_to(output):
        return _write_keys(output, sites, hosts)


def _write_keys(output: Path, sites: Sequence[str], hosts: Sequence[str]) -> list[Path]:
    from cryptography.hazmat.primitives.asymmetric import ec

    curve = ec.SECP384R1()
    authority, server = ec.generate_private_key(curve), ec.generate_private_key(curve)
    authority_pem = _certificate(authority, None, authority, [])
    server_pem = _certificate(server, "coordinator", authority, hosts)
    coordinator = output / "coordinator"
    private = [
        _private(output / "authority.key", authority, "pem"),
        _private(coordinator / "server.key", server, "pem"),
    ]
    _public(output / "authority.pem", authority_pem)
    _public(coordinator / "authority.pem", authority_pem)
    _public(coordinator / "server.pem", server_pem)
    for site in sites:
        key = ec.generate_private_key(curve)
        folder = output / "sites" / site
        private.append(_private(folder / f"{site}.key", key, "ssh"))
        for place in (folder / f"{site}.pub", coordinator / "sites" / f"{site}.pub"):
            _public(place, _ssh_public(key))
        _public(folder / "authority.pem", authority_pem)
    return private


@dataclass(frozen=True)
class SiteKeys:
    """What `join` reads from its folder; the site's name is its key's."""

    site: str
    authority: Path
    key: Path


def read_site_keys(folder: Path) -> SiteKeys:
    """Raises InputError when the folder is not one that `federate keys` made for a site."""
    keys = sorted(folder.glob("*.key")) if folder.is_dir() else []
    if len(keys) != 1 or not (folder / "authority.pem").is_file() or not NAME.fullmatch(keys[0].stem):
        raise InputError(
            given=f"--certificates {folder} has {len(keys)} keys" if keys else f"--certificates {folder} has no key",
            allowed="the folder of one site, CERTS/sites/NAME, with authority.pem and NAME.key",
            do="make them with: thriftune federate keys --output CERTS --sites NAME,...",
        )
    if (folder / "sites").is_dir():
        raise InputError(
            given=f"--certificates {folder} holds the keys of the authority or the coordinator, not of a site",
            allowed="the folder of one site, CERTS/sites/NAME, with authority.pem and NAME.key",
            do="name that folder; the others' private keys do not belong at a site",
        )
    return SiteKeys(keys[0].stem, folder / "authority.pem", keys[0])


@dataclass(frozen=True)
class CoordinatorKeys:
    authority: Path
    certificate: Path
    key: Path
    sites: dict[str, Path]  # name -> public key


def read_coordinator_keys(folder: Path) -> CoordinatorKeys:
    """Raises InputError when the folder is not one that `federate keys` made for the coordinator."""
    place = folder / "coordinator" if (folder / "coordinator").is_dir() else folder
    files = [place / name for name in ("authority.pem", "server.pem", "server.key")]
    sites = {path.stem: path for path in sorted((place / "sites").glob("*.pub"))}
    if not all(path.is_file() for path in files) or not sites:
        raise InputError(
            given=f"--certificates {folder} lacks the coordinator's certificate, its key, or the sites' public keys",
            allowed="CERTS or CERTS/coordinator, as federate keys writes it",
            do="make them with: thriftune federate keys --output CERTS --sites NAME,...",
        )
    return CoordinatorKeys(files[0], files[1], files[2], sites)


def _check(output: Path, sites: Sequence[str], hosts: Sequence[str]) -> None:
    wrong = [site for site in sites if not NAME.fullmatch(site)]
    if wrong or not sites or len(set(sites)) != len(sites):
        raise InputError(
            given=f"--sites {','.join(sites)}",
            allowed="different names of letters, digits, dots, dashes and underscores",
            do="for example --sites a,b,c",
        )
    unknown = [host for host in hosts if not _is_host(host)]
    if unknown or not hosts:
        raise InputError(
            given=f"--hosts with {', '.join(unknown)}" if unknown else "no --hosts",
            allowed="names and addresses of the coordinator, without a port; a name in its ASCII form (xn--...)",
            do="for example --hosts hub.example.org,10.0.0.7",
        )
    # The authority's key may have been carried away, as it should be; its certificate stays.
    if (output / "authority.key").exists() or (output / "authority.pem").exists():
        raise InputError(
            given=f"{output} holds keys already", allowed="a new folder: keys are not overwritten", do="name another"
        )


def _certificate(key: Any, name: str | None, authority: Any, hosts: Sequence[str]) -> bytes:
    """A certificate of `key` signed by the authority; `name` None makes the authority's own."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization

    issuer = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "thriftune federation")])
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)]) if name else issuer
    now = datetime.now(UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(minutes=5))
        .not_valid_after(now + timedelta(days=DAYS))
        .add_extension(x509.BasicConstraints(ca=name is None, path_length=0 if name is None else None), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.public_key()), critical=False)
        .add_extension(_usage(signs=name is None), critical=True)
    )
    if name:
        builder = builder.add_extension(x509.SubjectAlternativeName([_host(host) for host in hosts]), critical=False)
        builder = builder.add_extension(x509.ExtendedKeyUsage([x509.ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
    return builder.sign(authority, hashes.SHA384()).public_bytes(serialization.Encoding.PEM)


def _usage(signs: bool) -> Any:
    from cryptography import x509

    return x509.KeyUsage(
        digital_signature=True, content_commitment=False, key_encipherment=False, data_encipherment=False,
        key_agreement=False, key_cert_sign=signs, crl_sign=signs, encipher_only=False, decipher_only=False,
    )  # fmt: skip


def _is_host(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return len(host) <= 253 and HOST.fullmatch(host) is not None
    return True


def _host(host: str) -> Any:
    from cryptography import x509

    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _private(path: Path, key: Any, kind: str) -> Path:
    """Write a private key that only its owner can read."""
    from cryptography.hazmat.primitives import serialization

    form = serialization.PrivateFormat.OpenSSH if kind == "ssh" else serialization.PrivateFormat.PKCS8
    data = key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())
    path.parent.mkdir(parents=True, exist_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(data)
    return path


def _public(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def _ssh_public(key: Any) -> bytes:
    from cryptography.hazmat.primitives import serialization

    data: bytes = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    return data
