"""What a run costs: the hours at each provider that rents the GPU, and the electricity at home."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date

from thriftune.catalog.prices import ElectricityPrice
from thriftune.catalog.rows import STALE_AFTER_DAYS, Gpu, Price

ELECTRICITY = "electricity at home"
# The mean draw of a GPU that trains, as a share of its power limit. Our own runs on an H200 (700 W) drew 34 % (batches
# that are small for that card) to 59 %; a smaller card is fuller and runs near its limit. This is the upper side, and
# counts the GPU alone, not the computer around it.
POWER_SHARE = 0.85
JOULES_A_KWH = 3.6e6


@dataclass(frozen=True, slots=True)
class Market:
    """The GPUs that could be taken instead, every price, and the day on which a price is called old."""

    gpus: Sequence[Gpu]
    prices: Sequence[Price]
    electricity: ElectricityPrice
    today: date

    def prices_of(self, gpu: Gpu) -> list[Price]:
        """This GPU's rows, cheapest first."""
        found = [price for price in self.prices if price.gpu == gpu.key]
        return sorted(found, key=lambda price: (price.usd_per_hour, price.provider, price.kind))

    def usual_offer(self, gpu: Gpu) -> Price | None:
        """The on-demand offer whose smallest unit costs least an hour; None where nobody rents the GPU on demand."""
        offers = [price for price in self.prices_of(gpu) if price.kind == "on-demand"]
        return min(offers, key=lambda price: price.usd_per_hour * price.min_gpus, default=None)

    def least_offer(self, gpu: Gpu) -> Price | None:
        """What one would take: on demand where there is such an offer, else the one whose smallest unit costs least."""
        smallest = min(self.prices_of(gpu), key=lambda price: price.usd_per_hour * price.min_gpus, default=None)
        return self.usual_offer(gpu) or smallest


def run_dollars(
    gpu: Gpu, count: int, run_s: float, prices: Sequence[Price], electricity: ElectricityPrice
) -> dict[str, float]:
    """US dollars of `run_s` seconds on `count` GPUs, by place, in the order of `prices` (this GPU's rows).

    An offer that starts at more GPUs than the run uses is paid whole. Loading and billing by the hour are not counted.
    """
    found: dict[str, float] = {}
    for price in prices:
        dollars = price.usd_per_hour * max(count, price.min_gpus) * run_s / 3600
        found[place_of(price)] = dollars
    energy_kwh = gpu.power_w * POWER_SHARE * count * run_s / JOULES_A_KWH
    found[ELECTRICITY] = energy_kwh * electricity.usd_per_kwh
    return found


def place_of(price: Price) -> str:
    """'RunPod secure on-demand': the key of a price in `cost_usd`."""
    return f"{price.provider} {price.kind}"


def seen_words(price: Price, today: date) -> str:
    """'seen 2026-11-01', and for how long that is too long ago."""
    old = f", more than {STALE_AFTER_DAYS} days ago: check it" if price.is_stale(today) else ""
    return f"seen {price.date}{old}"


def price_notes(prices: Sequence[Price], electricity: ElectricityPrice, count: int, today: date) -> list[str]:
    """What to know of these rows before believing a sum: those seen long ago, and those that rent out several GPUs."""
    notes = []
    stale = [f"{place_of(price)} ({price.date})" for price in prices if price.is_stale(today)]
    if electricity.date is not None and (today - electricity.date).days > STALE_AFTER_DAYS:
        stale.append(f"{ELECTRICITY}, ${electricity.usd_per_kwh:g} a kWh ({electricity.date})")
    if stale:
        listed = ", ".join(stale)
        notes.append(f"prices seen more than {STALE_AFTER_DAYS} days ago, check them: {listed}")
    whole = [price for price in prices if price.min_gpus > count]
    if whole:
        listed = ", ".join(f"{place_of(price)} ({price.min_gpus} GPUs)" for price in whole)
        notes.append(f"rented out only several at a time, and counted so: {listed}")
    if not prices:
        notes.append("no provider in the catalogue rents this GPU; add a price with its date in your own YAML file")
    return notes


def cheapest(cost_usd: dict[str, float]) -> tuple[str, float] | None:
    """The cheapest place that rents the GPU, or the electricity when none does; None without any cost."""
    rented = {place: dollars for place, dollars in cost_usd.items() if place != ELECTRICITY} or cost_usd
    return min(rented.items(), key=lambda item: item[1]) if rented else None
