"""What goes over the wire: one line of JSON and the factors, nothing else; read back with suspicion.

    {"kind": "update", "federation": ..., "round": 3, "site": "a", "ticket": ..., ...}\n<factors, one after another>

The factors are raw numbers in the order of the adapter's modules, B before A: both ends know the shapes, so no names
travel. An update carries the ticket of the offer that it answers. A ticket is good once, in its round, for its site: an
update that is sent again, or comes from another round or federation, is refused, and so is one whose length or hash is
not what its header says.

In bfloat16 an update holds what the site changed, and the coordinator, which keeps float32, adds that to its own
factors: rounding a small change costs a part of it, rounding the factors would cost all of it. In float32 it holds the
factors.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from thriftune.errors import InputError
from thriftune.federated.aggregate import Adapter, Factors, Half

LONGEST_HEADER = 4096
MOST_TARGETS = 2**53  # a float64 holds every whole number up to here, and the sum of all sites' stays finite
TYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


class MessageError(InputError):
    """A message that is damaged, stale, repeated, or not what was asked for."""


class Header(BaseModel):
    """`half` says which factors follow and `rank` how many components of each, from `first` on; `train` and the
    components from `train_first` to `train_end` are what the site, of rank `train_rank`, is to train. `places` and
    `terms` are fingerprints of the adapter and of the options. The last three are a site's own.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["offer", "update", "end"]
    federation: str
    round: int
    rounds: int
    site: str
    ticket: str
    half: Half
    first: int = 0
    rank: int
    train: Half
    train_rank: int
    train_first: int
    train_end: int
    dtype: Literal["bfloat16", "float32"]
    differences: bool = False
    places: str
    terms: str
    sha256: str = ""
    targets: Annotated[int, Field(ge=1, le=MOST_TARGETS)] | None = None
    loss: float | None = None
    train_s: float | None = None


@dataclass(frozen=True)
class Message:
    header: Header
    body: bytes


Shapes = Mapping[str, tuple[int, int]]


def pack(header: Header, adapter: Adapter) -> bytes:
    """The message of these factors; only the components that `header` names, of the half that is sent."""
    kind = TYPES[header.dtype]
    body = b"".join(
        part.to(kind).contiguous().view(torch.uint8).numpy().tobytes()
        for factors in adapter.values()
        for part in _sent(_named(factors, header), header.half)
    )
    whole = header.model_copy(update={"sha256": hashlib.sha256(body).hexdigest()})
    return whole.model_dump_json(exclude_defaults=True).encode() + b"\n" + body


def open_message(data: bytes) -> Message:
    """The header and the untouched rest. Raises MessageError for what is no message, or is cut or changed."""
    line, separator, body = data[:LONGEST_HEADER].partition(b"\n")
    if not separator:
        raise _refuse("a message without a header")
    body = data[len(line) + 1 :]
    try:
        header = Header.model_validate_json(line)
    except ValidationError as error:
        first = error.errors()[0]
        raise _refuse(f"a header that cannot be read: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    if hashlib.sha256(body).hexdigest() != header.sha256:
        raise _refuse(f"the message of site {header.site}: {len(body)} bytes that are not those its header names")
    return Message(header, body)


def factors_of(message: Message, shapes: Shapes, current: Adapter) -> dict[str, Factors]:
    """The factors of a message in float32, the half that was not sent taken from `current`. Raises MessageError when
    the bytes are not those of these shapes."""
    header, kind = message.header, TYPES[message.header.dtype]
    rank = header.rank
    sizes = {
        "both": lambda out, into: rank * (out + into),
        "b": lambda out, _: rank * out,
        "a": lambda _, into: rank * into,
    }
    wanted = sum(sizes[header.half](out, into) for out, into in shapes.values()) * kind.itemsize
    if len(message.body) != wanted:
        raise _refuse(f"the message of site {header.site}: {len(message.body)} bytes of factors, not {wanted}")
    numbers = torch.frombuffer(bytearray(message.body), dtype=kind).float() if wanted else torch.zeros(0)
    found, start = {}, 0
    for name, (out, into) in shapes.items():
        part = _named(current[name], header)
        b_OR, a_RI = part.b_OR, part.a_RI
        if header.half in ("both", "b"):
            b_OR, start = numbers[start : start + out * rank].view(out, rank), start + out * rank
        if header.half in ("both", "a"):
            a_RI, start = numbers[start : start + rank * into].view(rank, into), start + rank * into
        found[name] = Factors(b_OR, a_RI)
    return found


def expect(header: Header, **wanted: object) -> None:
    """Raise MessageError unless these fields of a header have these values."""
    for field, value in wanted.items():
        if getattr(header, field) != value:
            raise _refuse(f"the message of site {header.site}: {field} {getattr(header, field)!r}, not {value!r}")


def update_of(message: Message, shapes: Shapes, current: Adapter) -> dict[str, Factors]:
    """The factors that an update stands for at the coordinator, whose adapter is `current`, in float32."""
    if not message.header.differences:
        return factors_of(message, shapes, current)
    still = {name: Factors(torch.zeros_like(part.b_OR), torch.zeros_like(part.a_RI)) for name, part in current.items()}
    now = {name: _named(factors, message.header) for name, factors in current.items()}
    by = factors_of(message, shapes, still)
    return {name: Factors(now[name].b_OR + part.b_OR, now[name].a_RI + part.a_RI) for name, part in by.items()}


def pack_update(header: Header, before: Adapter, after: Adapter) -> bytes:
    """The message of a site that was offered `before` and has `after`: the differences, where they are rounded."""
    if header.dtype == "float32":
        return pack(header, after)
    by = {name: Factors(now.b_OR - before[name].b_OR, now.a_RI - before[name].a_RI) for name, now in after.items()}
    return pack(header.model_copy(update={"differences": True}), by)


def describe_sent(data: bytes) -> str:
    """Everything that a message holds, as one line of JSON for a site's log of what left it."""
    message = open_message(data)
    header = message.header.model_dump(exclude_defaults=True)
    return json.dumps({"bytes": len(data), "bytes_of_factors": len(message.body), **header})


def _named(factors: Factors, header: Header) -> Factors:
    """The components that a header names."""
    return factors.between(header.first, header.first + header.rank)


def _sent(factors: Factors, half: Half) -> list[Tensor]:
    return {"both": [factors.b_OR, factors.a_RI], "b": [factors.b_OR], "a": [factors.a_RI]}[half]


def _refuse(given: str) -> MessageError:
    return MessageError(
        given=given, allowed="the answer to this round's offer, once, whole", do="it is not used; look at who sent it"
    )
