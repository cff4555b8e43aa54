"""A site whose coordinator is not there says so, now and then."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from thriftune.federated.flower import site
from thriftune.federated.keys import SiteKeys

httpx = pytest.importorskip("httpx", reason="httpx (the extra federated) is not installed")


def test_a_site_without_a_connection_says_so_until_it_is_let_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock that goes on by a second at each wait: at 10 s, at 70 s; let in at 100 s, with a message at 300 s."""
    now = 0.0

    def wait(seconds: float) -> None:
        nonlocal now
        now += 1.0

    def acquire(*_: Any) -> str | None:
        if now < 100.0:
            raise httpx.ConnectError("nobody is there")
        return "token" if now >= 300.0 else None

    process = SimpleNamespace(
        exit_code=None, log=tmp_path / "supernode.log", stop=lambda: None,
        said=lambda: f"{site.LET_IN} 7" if now >= 100.0 else "Connection attempt failed, retrying",
    )  # fmt: skip
    monkeypatch.setattr(site, "time", SimpleNamespace(monotonic=lambda: now, sleep=wait))
    monkeypatch.setattr(site, "acquire", acquire)
    monkeypatch.setattr(site, "prepare", lambda folder: {})
    monkeypatch.setattr(site, "Leashed", lambda *_: process)
    monkeypatch.setattr(site, "acquiring_client", lambda *_: SimpleNamespace(close=lambda: None))
    monkeypatch.setattr(site, "Task", lambda address, token: token)
    said: list[tuple[float, str]] = []
    keys = SiteKeys("a", tmp_path / "authority.pem", tmp_path / "a.key")
    with site.SiteLink(keys, "hub:8000", tmp_path, lambda text: said.append((now, text))) as link:
        assert link.wait() == "token"
    assert [when for when, _ in said] == [10.0, 70.0]
    assert all(text.startswith("no connection yet to the coordinator at hub:8000") for _, text in said)
