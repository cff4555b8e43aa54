"""What a site sends through Flower that is no message of ours is refused by the name of the site."""

from __future__ import annotations

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


def test_a_site_owes_an_answer_until_it_came_or_the_site_was_gone_in_between() -> None:
    """A SuperNode that comes again knows nothing of what it was sent; Flower tells that only to who asks meanwhile."""
    link: Any = object.__new__(CoordinatorLink)
    nodes = [SimpleNamespace(node_id=number, last_activated_at="noon") for number in (1, 2, 3)]
    replies: list[Any] = []
    link._sites = {1: "a", 2: "b", 3: "c"}
    link._waiting = {"x": ("a", "noon"), "y": ("b", "noon"), "z": ("c", "noon")}
    link._process = SimpleNamespace(exit_code=None)
    link._control = SimpleNamespace(ListNodes=lambda _: SimpleNamespace(nodes_info=nodes))
    link._grid = SimpleNamespace(pull_messages=lambda _: replies)
    assert link.receive() == [] and link.owing() == {"a", "b", "c"}
    replies.append(message(content(b"update")))
    replies[0].metadata = SimpleNamespace(reply_to_message_id="x")
    nodes[1].last_activated_at = "one o'clock"
    assert link.receive() == [Reply("a", b"update", ""), Reply("b", b"", "site b was gone before it answered")]
    assert link.owing() == {"c"}
