"""Prices of GPUs and of electricity: plausible rows, the cheapest first, and how old they are."""

from __future__ import annotations

from collections import Counter
from datetime import date, timedelta

import pytest

from thriftune.catalog.gpus import built_in_gpus
from thriftune.catalog.prices import built_in_prices, electricity_price, prices, prices_for
from thriftune.catalog.rows import Price
from thriftune.catalog.user import UserRows, offer_of

ROWS = built_in_prices()
NOBODY = UserRows()


@pytest.mark.parametrize("price", ROWS, ids=lambda price: f"{price.gpu}, {price.provider}, {price.kind}")
def test_every_row_is_plausible(price: Price):
    assert price.gpu in built_in_gpus()
    assert 0.05 <= price.usd_per_hour <= 15 and price.min_gpus in (1, 2, 4, 8)
    assert price.source.startswith("https://") and ";" in price.source
    assert date(2025, 1, 1) <= price.date <= date.today()
    assert price.kind in ("on-demand", "spot")


def test_an_offer_stands_once_and_spot_is_cheaper_at_the_same_provider():
    assert all(count == 1 for count in Counter(map(offer_of, ROWS)).values())
    on_demand = {(price.gpu, price.provider): price.usd_per_hour for price in ROWS if price.kind == "on-demand"}
    spot = {(price.gpu, price.provider): price.usd_per_hour for price in ROWS if price.kind == "spot"}
    assert len(spot) >= 10
    assert all(spot[offer] < on_demand[offer] for offer in spot.keys() & on_demand.keys())


def test_what_is_rented_out_most_has_two_offers_or_more():
    counts = Counter(price.gpu for price in ROWS)
    for key in ("t4", "l4", "a10", "a6000", "a100-40gb", "a100-80gb", "h100-sxm", "h200", "b200", "l40s", "rtx-4090"):
        assert counts[key] >= 2, key


def test_the_cheapest_comes_first():
    found = prices_for("h100-sxm", NOBODY)
    assert len(found) > 5 and all(price.gpu == "h100-sxm" for price in found)
    assert [price.usd_per_hour for price in found] == sorted(price.usd_per_hour for price in found)


@pytest.mark.parametrize("key", ["rtx-4070", "m3-max-64gb", "nothing-of-the-kind"])
def test_what_nobody_rents_out_has_no_prices(key):
    assert prices_for(key, NOBODY) == []


def test_a_price_is_stale_after_180_days():
    price = ROWS[0]
    assert not price.is_stale(price.date) and not price.is_stale(price.date + timedelta(days=180))
    assert price.is_stale(price.date + timedelta(days=181))


def test_most_of_the_rows_were_fresh_when_they_were_written():
    written = date(2026, 11, 23)
    assert sum(price.is_stale(written) for price in ROWS) < 0.3 * len(ROWS)


def test_a_users_price_replaces_the_offer_and_the_rest_stays():
    offer = next(price for price in ROWS if price.provider == "Lambda" and price.gpu == "a10")
    own = Price("a10", "LAMBDA", "on-demand", 0.9, "my bill", date(2026, 11, 1))
    found = prices(UserRows(prices=(own,)))
    assert own in found and offer not in found and len(found) == len(ROWS)
    assert prices_for("a10", UserRows(prices=(own,)))[0] is own


def test_the_electricity_price_has_a_source_and_a_date():
    price = electricity_price(NOBODY)
    assert 0.1 < price.usd_per_kwh < 0.4 and "https://www.eia.gov" in price.source
    assert price.date is not None and date(2026, 1, 1) < price.date <= date.today()
