"""The keys of a federation: who can read them, what they say, and what is refused."""

from __future__ import annotations

import ssl
from datetime import UTC, datetime
from pathlib import Path

import pytest

from thriftune.errors import InputError
from thriftune.federated.keys import DAYS, make_keys, read_coordinator_keys, read_site_keys

pytest.importorskip("cryptography", reason="cryptography (the extra federated) is not installed")


def test_each_end_finds_its_own_and_private_files_are_private(tmp_path: Path) -> None:
    private = make_keys(tmp_path / "certs", ["a", "b.north"], ["localhost", "10.0.0.7", "hub.example.org"])
    assert len(private) == 4
    assert all(path.stat().st_mode & 0o777 == 0o600 for path in private)
    coordinator = read_coordinator_keys(tmp_path / "certs")
    assert list(coordinator.sites) == ["a", "b.north"]
    assert read_coordinator_keys(tmp_path / "certs" / "coordinator") == coordinator
    site = read_site_keys(tmp_path / "certs" / "sites" / "b.north")
    assert site.site == "b.north"
    assert coordinator.sites["b.north"].read_bytes() == site.key.with_suffix(".pub").read_bytes()
    assert [path.name for path in (tmp_path / "certs" / "coordinator").rglob("*.key")] == ["server.key"]


def test_the_certificate_names_the_hosts_and_is_the_authoritys(tmp_path: Path) -> None:
    from cryptography import x509

    make_keys(tmp_path, ["a"], ["localhost", "10.0.0.7"])
    server = x509.load_pem_x509_certificate((tmp_path / "coordinator" / "server.pem").read_bytes())
    authority = x509.load_pem_x509_certificate((tmp_path / "authority.pem").read_bytes())
    server.verify_directly_issued_by(authority)
    names = server.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["localhost"]
    assert [str(address) for address in names.get_values_for_type(x509.IPAddress)] == ["10.0.0.7"]
    assert not server.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    assert (server.not_valid_after_utc - datetime.now(UTC)).days <= DAYS
    ssl.create_default_context(cafile=str(tmp_path / "authority.pem"))


@pytest.mark.parametrize("sites", [[], ["a", "a"], ["../a"], ["a b"], [""], [".hidden"]])
def test_names_that_are_none(tmp_path: Path, sites: list[str]) -> None:
    with pytest.raises(InputError, match="--sites"):
        make_keys(tmp_path, sites, ["localhost"])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "host",
    [
        "",
        "not a host!",
        "m\u00fcnchen.example",
        "hub:8000",
        "10.0.0.256",
        "-a.example",
        "a..b",
        "x" * 64,
        "[::1]",
        "https://a",
    ],
)
def test_hosts_that_are_none(tmp_path: Path, host: str) -> None:
    with pytest.raises(InputError, match="--hosts"):
        make_keys(tmp_path, ["a"], ["localhost", host])
    assert not list(tmp_path.iterdir())


def test_hosts_of_every_kind(tmp_path: Path) -> None:
    hosts = ["localhost", "10.0.0.7", "::1", "hub.example.org", "xn--mnchen-3ya.example", "*.example.org", "node_7"]
    assert make_keys(tmp_path, ["a"], hosts)


def test_keys_are_not_overwritten_and_folders_that_are_none_are_refused(tmp_path: Path) -> None:
    make_keys(tmp_path, ["a"], ["localhost"])
    with pytest.raises(InputError, match="holds keys already"):
        make_keys(tmp_path, ["b"], ["localhost"])
    (tmp_path / "authority.key").rename(tmp_path / "carried away")
    with pytest.raises(InputError, match="holds keys already"):
        make_keys(tmp_path, ["b"], ["localhost"])
    with pytest.raises(InputError, match="has no key"):
        read_site_keys(tmp_path / "nowhere")
    with pytest.raises(InputError, match="lacks the coordinator"):
        read_coordinator_keys(tmp_path / "sites" / "a")
