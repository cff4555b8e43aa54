"""What a site sends through Flower that is no message of ours is refused by the name of the site."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("flwr", reason="Flower (the extra federated) is not installed")

from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from thriftune.federated.flower.coordinator import reply
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
