"""The rounds of `federate serve` with sites that are late, silent, broken or astray: real sites, messages in memory.

What carries messages between machines is in test_deployment.py; here it is a list, so that who is there when is known.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from thriftune.errors import CheckpointError
from thriftune.federated import serve
from thriftune.federated.coordinator import Coordinator
from thriftune.federated.flower.coordinator import Reply
from thriftune.federated.join import _answer
from thriftune.federated.keys import make_keys
from thriftune.federated.message import MessageError, open_message
from thriftune.federated.site import Site, open_base, recipe_of_rounds
from thriftune.run import prepare_run
from tiny import tiny_model, tiny_recipe, tiny_rows


class Room:
    """Sites around one table. `here(site)` says whether a site is there now; `answer(site, offer)` what it says: the
    bytes of an update, a text for an error of the transport, None for nothing."""

    def __init__(self, names: list[str], here: Callable[[str], bool], answer: Callable[[str, bytes], Any]) -> None:
        self.names, self.here, self.answer = names, here, answer
        self.offered: list[str] = []
        self.waiting: dict[str, bytes] = {}

    def online(self) -> set[str]:
        return {name for name in self.names if self.here(name)}

    def send(self, site: str, data: bytes) -> None:
        assert site not in self.waiting, "an offer behind another one"
        self.offered.append(site)
        self.waiting[site] = data

    def receive(self) -> list[Reply]:
        found = []
        for site, data in list(self.waiting.items()):
            said = self.answer(site, data)
            if said is not None:
                del self.waiting[site]
                found.append(Reply(site, b"", said) if isinstance(said, str) else Reply(site, said, ""))
        return found

    def owing(self) -> set[str]:
        return set(self.waiting)

    def forget(self) -> None:
        self.waiting.clear()

    def traffic(self) -> dict[str, int]:
        return {"bytes_down": 0, "bytes_up": 0}

    def __enter__(self) -> Room:
        return self

    def __exit__(self, *_: object) -> None:
        pass


class Federation:
    def __init__(self, folder: Path, names: list[str], **federated: Any) -> None:
        model = tiny_model(folder / "model")
        settings = {"rounds": 2, "local_steps": 1, **federated}
        rows = tiny_rows(folder / "rows.jsonl", 24)
        recipe = tiny_recipe(model, rows, folder / "fed", federated=settings, train={"max_steps": settings["rounds"]})
        self.prepared, self.folder = prepare_run(recipe_of_rounds(recipe)), folder
        self.base = open_base(self.prepared, folder / "fed", lambda text: None)
        self.coordinator = Coordinator(self.prepared.recipe, dict.fromkeys(names, 4), folder / "fed", None)
        self.sites = {name: self.site(name, keeps=False) for name in names}
        self.said: list[str] = []

    def site(self, name: str, keeps: bool) -> Site:
        return Site(self.base, name, self.prepared.data.train, self.folder / name, [], keeps)

    def round(self, room: Room) -> Any:
        return serve._round(self.coordinator, room, self.said.append)  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "POLL_S", 0.01)
    monkeypatch.setattr(serve, "GOODBYE_S", 2.0)


def test_a_site_that_comes_late_gets_its_offer_when_it_comes(tmp_path: Path) -> None:
    federation = Federation(tmp_path, ["a", "b", "c"])
    answered: list[str] = []

    def answer(site: str, offer: bytes) -> bytes | None:
        if site == "b" and "c" not in answered:  # slow enough for c to come
            return None
        answered.append(site)
        return federation.sites[site].answer(offer)

    room = Room(["a", "b", "c"], lambda name: name != "c" or "a" in answered, answer)
    done = federation.round(room)
    assert answered == ["a", "c", "b"] and room.offered == ["a", "b", "c"]
    assert done.updates == 3


def test_a_silent_site_stops_no_round_and_is_named(tmp_path: Path) -> None:
    federation = Federation(tmp_path, ["a", "b", "c"], round_timeout_s=1.0)
    room = Room(
        ["a", "b", "c"],
        lambda name: True,
        lambda site, offer: None if site == "b" else federation.sites[site].answer(offer),
    )
    done = federation.round(room)
    assert done.updates == 2 and "round 1: time is up, without b" in federation.said
    assert [site.bytes_up > 0 for site in done.sites] == [True, False, True]
    assert federation.coordinator.round == 1


def test_what_a_late_site_sends_of_the_last_round_is_refused_by_its_name(tmp_path: Path) -> None:
    federation = Federation(tmp_path, ["a", "b", "c"], round_timeout_s=1.0)
    late: list[bytes] = []

    def answer(site: str, offer: bytes) -> bytes | None:
        if site == "b" and federation.coordinator.round == 0:
            late[:] = late or [federation.sites[site].answer(offer)]
            return None
        return late[0] if site == "b" else federation.sites[site].answer(offer)

    room = Room(["a", "b", "c"], lambda name: True, answer)
    assert federation.round(room).updates == 2
    done = federation.round(room)
    assert done.updates == 2 and "refused: the message of site b: round 0, not 1" in federation.said
    assert next(site.refused for site in done.sites if site.site == "b") == "the message of site b: round 0, not 1"


def test_a_straggler_gets_no_offer_behind_another_and_catches_up(tmp_path: Path) -> None:
    """Site b needs two rounds for its first answer, and is not waited for in the second; then it is one of three."""
    federation = Federation(tmp_path, ["a", "b", "c"], rounds=4, round_timeout_s=1.0)
    room = Room(
        ["a", "b", "c"],
        lambda name: True,
        lambda site, offer: (
            None if site == "b" and room.offered.count("a") < 3 else federation.sites[site].answer(offer)
        ),
    )
    assert [federation.round(room).updates for _ in range(4)] == [2, 2, 3, 3]
    assert room.offered == ["a", "b", "c", "a", "c", "a", "c", "b", "a", "b", "c"]
    assert [text for text in federation.said if "time is up" in text] == ["round 1: time is up, without b"]
    assert federation.said.count("site b answered an earlier offer, too late to be used") == 1


def test_a_round_waits_for_what_is_owed_where_there_is_no_quorum_without_it(tmp_path: Path) -> None:
    federation = Federation(tmp_path, ["a", "b"], round_timeout_s=1.0, quorum=1.0)
    looks = 0

    def answer(site: str, offer: bytes) -> bytes | str | None:
        nonlocal looks
        looks += site == "b"
        if site == "b" and len(room.offered) < 4:  # until a has had its second offer, and some more
            return None if len(room.offered) < 3 or looks % 20 else "site b: Error: it broke"
        return federation.sites[site].answer(offer)

    room = Room(["a", "b"], lambda name: True, answer)
    assert federation.round(room).updates == 2
    assert room.offered == ["a", "b", "a", "b"]
    assert len([text for text in federation.said if "begins anew" in text]) == 1
    assert "site b: Error: it broke" in federation.said


def test_a_round_without_a_quorum_begins_anew_and_waits_for_sites(tmp_path: Path) -> None:
    federation = Federation(tmp_path, ["a", "b", "c"], quorum=0.6)
    failures = iter(["site b: Error: it broke", "site a: Error: it broke"])
    came = threading.Event()
    threading.Timer(0.5, came.set).start()

    def answer(site: str, offer: bytes) -> bytes | str:
        failure = next(failures, None)
        return failure if failure is not None else federation.sites[site].answer(offer)

    room = Room(["a", "b", "c"], lambda name: name != "c" and (name == "a" or came.is_set()), answer)
    done = federation.round(room)
    assert federation.said[0] == "waiting for sites: a of a, b, c are here"
    assert any("round 1 has 0 of 3 sites' updates" in text and "begins anew" in text for text in federation.said)
    assert done.updates == 2 and room.offered == ["a", "b", "a", "b"]
    assert [site.refused for site in done.sites] == ["", ""]


def test_after_the_last_round_a_site_that_comes_late_gets_the_result(tmp_path: Path) -> None:
    """It is told once, and a site that never comes is not waited for for ever."""
    federation = Federation(tmp_path, ["a", "b", "c"])
    results: dict[str, Path] = {}

    def answer(site: str, message: bytes) -> bytes:
        assert site not in results
        results[site] = federation.sites[site].end(message)
        return b""

    room = Room(["a", "b", "c"], lambda name: name == "a" or (name == "b" and "a" in results), answer)
    serve._say_goodbye(federation.coordinator, room)  # type: ignore[arg-type]
    assert room.offered == ["a", "b"] == list(results)
    assert (results["b"] / "adapter_model.safetensors").exists()


@pytest.mark.parametrize("recorded", [False, True])
def test_all_sites_get_the_result_and_again_when_it_is_given_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recorded: bool
) -> None:
    """Also one that is away when the last round ends, and when serve was killed before the record was written. Started
    again, no site is connected yet."""
    pytest.importorskip("cryptography", reason="cryptography (the extra federated) is not installed")
    make_keys(tmp_path / "certs", ["a", "b"], ["localhost"])
    recipe = tiny_recipe(
        tiny_model(tmp_path / "model"), tiny_rows(tmp_path / "rows.jsonl", 24), tmp_path / "fed",
        federated={"rounds": 1, "local_steps": 1}, train={"max_steps": 1},
    )  # fmt: skip
    asked = serve.Serving(recipe, tmp_path / "certs", {}, "127.0.0.1", 8000, tmp_path / "fed", "serve")
    prepared = prepare_run(recipe_of_rounds(recipe))
    base = open_base(prepared, tmp_path / "base", lambda text: None)
    sites = {name: Site(base, name, prepared.data.train, tmp_path / name, [], False) for name in ("a", "b")}
    looks: Iterator[bool] = iter(())

    def answer(site: str, message: bytes) -> bytes:
        if open_message(message).header.kind == "end":
            (tmp_path / f"{site} has it").touch()
            return b""
        return sites[site].answer(message)

    def room(*_: object) -> Room:
        return Room(["a", "b"], lambda name: next(looks, True), answer)

    monkeypatch.setattr(serve, "CoordinatorLink", room)
    looks = iter([True] * 5 + [False] * 8)  # away at the end of the round
    record = serve.serve(asked, lambda text: None)
    assert [entry.updates for entry in record.rounds] == [2]
    for name in sites:
        assert (tmp_path / f"{name} has it").exists()
        (tmp_path / f"{name} has it").unlink()
    if not recorded:
        (tmp_path / "fed" / "record.json").unlink()
    looks, said = iter([False] * 3), list[str]()
    again = serve.serve(asked, said.append)
    assert "all 1 rounds are done; waiting" in said[0]
    assert all((tmp_path / f"{name} has it").exists() for name in sites)
    assert again.rounds == record.rounds and (again == record) == recorded
    assert (tmp_path / "fed" / "record.json").exists()


class Told:
    """A task that keeps what it was told, in the place of Flower's."""

    def __init__(self, data: bytes) -> None:
        self.data, self.failed = data, list[str]()

    def fail(self, text: str) -> None:
        self.failed.append(text)


def test_a_site_in_the_folder_of_another_federation_is_refused_each_time_and_ends(tmp_path: Path) -> None:
    federation = Federation(tmp_path, ["a"])
    federation.site("a", keeps=True).answer(federation.coordinator.offer("a"))
    other = Coordinator(federation.prepared.recipe, {"a": 4}, tmp_path / "other", None)
    again = federation.site("a", keeps=True)
    for _ in range(2):
        task = Told(other.offer("a"))
        with pytest.raises(CheckpointError, match="federation was"):
            _answer(task, again, tmp_path / "a", lambda text: None)  # type: ignore[arg-type]
        assert len(task.failed) == 1 and "belongs to another run" in task.failed[0]
    assert [path.name for path in (tmp_path / "a").glob("checkpoint-*")] == ["checkpoint-1"]


def test_a_site_that_has_joined_takes_nothing_of_another_federation(tmp_path: Path) -> None:
    federation = Federation(tmp_path, ["a"])
    other = Coordinator(federation.prepared.recipe, {"a": 4}, tmp_path / "other", None)
    site = federation.sites["a"]
    federation.coordinator.take("a", site.answer(federation.coordinator.offer("a")))
    task = Told(other.offer("a"))
    assert _answer(task, site, tmp_path, lambda text: None) is None  # type: ignore[arg-type]
    assert f"federation {other.state.federation!r}, not {federation.coordinator.state.federation!r}" in task.failed[0]
    with pytest.raises(MessageError, match="federation"):
        site.end(other.end("a"))
    federation.coordinator.close(lambda: None)
    federation.coordinator.take("a", site.answer(federation.coordinator.offer("a")))
