"""What GPUs cost an hour at providers that rent them, and what electricity costs, each with where and when it was
seen."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date
from functools import lru_cache
from importlib import resources
from typing import Any

from thriftune.catalog.fields import MOST_USD_PER_KWH, RowReader, price_of
from thriftune.catalog.gpus import built_in_gpus
from thriftune.catalog.rows import Price
from thriftune.catalog.user import UserRows, offer_of, read_user_rows


@dataclass(frozen=True, slots=True)
class ElectricityPrice:
    """US dollars per kWh. `date` is the day on which it was seen, None for the user's own, which counts as current."""

    usd_per_kwh: float
    source: str
    date: date | None


@lru_cache(maxsize=1)
def built_in_prices() -> tuple[Price, ...]:
    """The rows of prices.json, in the file's order."""
    problems: list[str] = []
    rows = [
        price_of(RowReader(f"prices.json, row {number}", fields, problems), built_in_gpus().keys())
        for number, fields in enumerate(_file()["prices"], start=1)
    ]
    if problems:
        raise AssertionError("; ".join(problems))  # a fault of the package, which its tests find
    return tuple(price for price in rows if price is not None)


def prices(user_rows: UserRows | None = None) -> list[Price]:
    """Every price: the built-in rows, of which a user's row of the same GPU, provider and kind replaces one, and the
    user's. `user_rows` None reads the user's files, which raises InputError when a row is wrong."""
    own = _own(user_rows).prices
    replaced = {offer_of(price) for price in own}
    return [*(price for price in built_in_prices() if offer_of(price) not in replaced), *own]


def prices_for(gpu_key: str, user_rows: UserRows | None = None) -> list[Price]:
    """The prices of one GPU, cheapest first; [] for a GPU that nobody is known to rent out."""
    found = [price for price in prices(user_rows) if price.gpu == gpu_key]
    return sorted(found, key=lambda price: (price.usd_per_hour, price.provider, price.kind))


def electricity_price(user_rows: UserRows | None = None) -> ElectricityPrice:
    """What a kWh costs: the user's price when their files have one, else the row of prices.json."""
    own = _own(user_rows)
    if own.electricity_usd_per_kwh is not None:
        return ElectricityPrice(own.electricity_usd_per_kwh, source=str(own.electricity_file), date=None)
    problems: list[str] = []
    row = RowReader("prices.json, electricity", _file()["electricity"], problems)
    price = ElectricityPrice(row.number("usd_per_kwh", "USD", MOST_USD_PER_KWH), row.text("source"), row.day())
    if problems:
        raise AssertionError("; ".join(problems))
    return price


def _own(user_rows: UserRows | None) -> UserRows:
    return read_user_rows(built_in_gpus()) if user_rows is None else user_rows


@lru_cache(maxsize=1)
def _file() -> Mapping[str, Any]:
    text = resources.files("thriftune.catalog").joinpath("prices.json").read_text(encoding="utf-8")
    content: Mapping[str, Any] = json.loads(text)
    return content
