"""What a site sends through Flower that is no message of ours is refused by the name of the site."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("flwr", reason="Flower (the extra federated) is not installed")

from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from thriftune.federated.flower.coordinator import CoordinatorLink, Reply, reply
from thriftune.federated.flower.tasks import content


def message(record: Any) -> Any:
    return SimpleNamespace(content=record, has_error=lambda: False)


def array(data: bytes) -> Any:
    return RecordDict(
        {"message": ArrayRecord({"bytes": Array(dtype="uint8", shape=(0,), stype="numpy.ndarray", data=data)})}
    )


@pytest.mark.parametrize(
    "record",
    [
        RecordDict({}),
        RecordDict({"message": ConfigRecord({"bytes": b"x"})}),
        RecordDict({"error": ConfigRecord({"other": 1})}),
        array(b""),
        array(b"PK\x03\x04 a zip's first bytes"),
        array(b"rubbish"),
    ],
    ids=["nothing", "a record of settings", "an error without text", "no data", "a zip", "rubbish"],
)
def test_what_is_no_message_is_refused_by_the_sites_name(record: Any) -> None:
    found = reply("north", message(record))
    assert found.data == b"" and found.error.startswith("site north sent something that is no message: ")


def test_an_update_and_an_error_arrive() -> None:
    assert reply("north", message(content(b"bytes"))).data == b"bytes"
    failed = RecordDict({"error": ConfigRecord({"text": "no room"})})
    assert reply("north", message(failed)).error == "site north: no room"
    lost = SimpleNamespace(has_error=lambda: True, error=SimpleNamespace(reason="it is gone"))
    assert reply("north", lost).error == "site north: it is gone"


def link_to(names: dict[int, str], pull: Any) -> tuple[Any, list[Any]]:
    """A link that has sent each site message x, y ... of its own, and what Flower says of the sites."""
    link: Any = object.__new__(CoordinatorLink)
    nodes = [SimpleNamespace(node_id=number, last_activated_at="noon") for number in names]
    link._sites, link._pulls = names, {}
    link._waiting = {message: (site, "noon") for message, site in zip("xyz", names.values(), strict=False)}
    link._process = SimpleNamespace(exit_code=None)
    link._control = SimpleNamespace(ListNodes=lambda _: SimpleNamespace(nodes_info=nodes))
    link._grid = SimpleNamespace(pull_messages=pull)
    return link, nodes


def test_a_reply_that_never_comes_whole_holds_up_no_other_site() -> None:
    """Flower's question blocks while it waits for the rest of one."""
    never = threading.Event()

    def pull(asked: list[str]) -> list[Any]:
        if asked == ["x"]:
            never.wait(60)
        return [message(content(asked[0].encode()))]

    link, _ = link_to({1: "a", 2: "b"}, pull)
    started = time.monotonic()
    assert link.receive() == [Reply("b", b"y", "")]
    assert link.receive() == [] and link.owing() == {"a"} and time.monotonic() - started < 5
    link.forget()
    never.set()
    assert link.receive() == []


def test_what_a_question_raises_is_raised() -> None:
    def pull(_: list[str]) -> list[Any]:
        raise ValueError("no such run")

    link, _ = link_to({1: "a"}, pull)
    with pytest.raises(ValueError, match="no such run"):
        link.receive()


def test_a_site_owes_an_answer_until_it_came_or_the_site_was_gone_in_between() -> None:
    """A SuperNode that comes again knows nothing of what it was sent; Flower tells that only to who asks meanwhile."""
    replies: dict[str, Any] = {}
    link, nodes = link_to({1: "a", 2: "b", 3: "c"}, lambda asked: [replies[one] for one in asked if one in replies])
    assert link.receive() == [] and link.owing() == {"a", "b", "c"}
    replies["x"] = message(content(b"update"))
    nodes[1].last_activated_at = "one o'clock"
    assert link.receive() == [Reply("a", b"update", ""), Reply("b", b"", "site b was gone before it answered")]
    assert link.owing() == {"c"}
