"""What messages keep of numbers, and how many bytes they take."""

from __future__ import annotations

import json

import pytest
import torch

from thriftune.federated.aggregate import Adapter, Factors, Half
from thriftune.federated.message import (
    MOST_TARGETS,
    Header,
    MessageError,
    describe_sent,
    factors_of,
    open_message,
    pack,
    pack_update,
    update_of,
)

SHAPES = {"m": (7, 11), "n": (12, 5)}


def header(half: Half = "both", rank: int = 3, dtype: str = "bfloat16") -> Header:
    values = {"kind": "update", "federation": "f", "round": 0, "rounds": 2, "site": "a", "ticket": "t", "half": half}
    return Header.model_validate(
        {
            **values,
            "rank": rank,
            "train": half,
            "train_rank": rank,
            "train_first": 0,
            "train_end": rank,
            "dtype": dtype,
            "places": "p",
            "terms": "q",
        }
    )


def draw(seed: int, scale: float = 1.0) -> dict[str, Factors]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: Factors(
            scale * torch.randn(out, 3, generator=generator), scale * torch.randn(3, into, generator=generator)
        )
        for name, (out, into) in SHAPES.items()
    }


def moved(adapter: Adapter, by: Adapter) -> dict[str, Factors]:
    return {name: Factors(part.b_OR + by[name].b_OR, part.a_RI + by[name].a_RI) for name, part in adapter.items()}


def test_float32_arrives_to_the_bit() -> None:
    sent = draw(1)
    found = factors_of(open_message(pack(header(dtype="float32"), sent)), SHAPES, draw(2))
    assert all(torch.equal(found[name].b_OR, part.b_OR) and torch.equal(found[name].a_RI, part.a_RI)
               for name, part in sent.items())  # fmt: skip


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_part_in_the_middle_arrives_as_that_part(dtype: str) -> None:
    """The components 1 to 3 of three, changed: the others neither travel nor are taken for what they are not."""
    named = header(rank=2, dtype=dtype).model_copy(update={"first": 1})
    before = draw(1)
    after = moved(before, draw(2, 0.125))
    found = update_of(open_message(pack_update(named, before, after)), SHAPES, before)
    for name, part in after.items():
        assert torch.allclose(found[name].b_OR, part.b_OR[:, 1:], atol=2e-3)
        assert torch.allclose(found[name].a_RI, part.a_RI[1:], atol=2e-3)
        assert not torch.allclose(part.b_OR[:, 1:], part.b_OR[:, :2], atol=0.1)


@pytest.mark.parametrize("half", ["both", "a", "b"])
@pytest.mark.parametrize("rank", [1, 3])
def test_bytes_are_those_of_what_is_sent_and_a_header(half: Half, rank: int) -> None:
    data = pack(header(half, rank), draw(1))
    out, into = sum(out for out, _ in SHAPES.values()), sum(into for _, into in SHAPES.values())
    sides = {"both": out + into, "a": into, "b": out}[half]
    told = json.loads(describe_sent(data))
    assert told["bytes_of_factors"] == 2 * rank * sides == len(open_message(data).body)
    assert told["bytes"] == len(data) < 2 * rank * sides + 500


def test_a_change_far_below_a_factors_rounding_arrives() -> None:
    """In bfloat16 a weight of 1 cannot tell 1.0001 from 1; the change of 0.0001 can be told to a part in 256."""
    master, change = draw(1), draw(2, 1e-4)
    offered = factors_of(open_message(pack(header(), master)), SHAPES, master)
    after = moved(offered, change)
    rounded = factors_of(open_message(pack(header(), after)), SHAPES, master)
    found = update_of(open_message(pack_update(header(), offered, after)), SHAPES, master)
    for name, part in change.items():
        arrived = found[name].b_OR - master[name].b_OR
        assert torch.allclose(arrived, part.b_OR, rtol=0.01, atol=1e-6)
        assert not torch.allclose(rounded[name].b_OR - offered[name].b_OR, part.b_OR, rtol=0.5, atol=1e-6)


def test_the_half_that_is_not_sent_is_the_coordinators() -> None:
    master, after = draw(1), draw(2)
    for dtype in ("bfloat16", "float32"):
        found = update_of(open_message(pack_update(header("b", dtype=dtype), master, after)), SHAPES, master)
        for name in SHAPES:
            assert torch.equal(found[name].a_RI, master[name].a_RI)
            assert torch.allclose(found[name].b_OR, after[name].b_OR, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("targets", [-1, 0, MOST_TARGETS + 1, 10**308, 10**400])
def test_a_weight_that_no_rows_have_is_refused(targets: int) -> None:
    """10**400 is no float, and the sum of two of 10**308 is none."""
    data = pack(header().model_copy(update={"targets": targets}), draw(1))
    with pytest.raises(MessageError, match="targets"):
        open_message(data)
    assert open_message(pack(header().model_copy(update={"targets": MOST_TARGETS}), draw(1)))
