"""What a comparison takes, and which cells a budget leaves. Planned times are of the training alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date

from thriftune.catalog.gpus import find_gpu, local_gpus
from thriftune.catalog.rows import Gpu, Price
from thriftune.compare.grid import BASE, Cell
from thriftune.compare.jobs import Planned
from thriftune.errors import InputError
from thriftune.plan.cost import Market, place_of, seen_words
from thriftune.units import format_bytes, format_seconds


@dataclass(frozen=True)
class Rent:
    """The cheapest on-demand price of a GPU; an offer of several GPUs is paid whole."""

    gpu: Gpu
    price: Price
    today: date

    def usd(self, duration_s: float) -> float:
        return self.price.usd_per_hour * self.price.min_gpus * duration_s / 3600

    def seconds(self, usd: float) -> float:
        return usd * 3600 / (self.price.usd_per_hour * self.price.min_gpus)

    def words(self) -> str:
        several = f" for {self.price.min_gpus} GPUs" if self.price.min_gpus > 1 else ""
        hourly = self.price.usd_per_hour * self.price.min_gpus
        place = f"{self.gpu.key} at {place_of(self.price)}, {seen_words(self.price, self.today)}"
        return f"${hourly:.2f} an hour{several}: {place}"


@dataclass(frozen=True)
class Trimmed:
    """`note` says what was left out and why; '' when everything fits."""

    kept: tuple[Cell, ...]
    skipped: tuple[Cell, ...]
    note: str = ""


def find_rent(name: str | None, market: Market) -> Rent | None:
    """The rent of the GPU of this name, else of this machine's; None where there is no GPU or no price of it.

    Raises InputError for a name that the catalogue does not know, and for a named GPU that nobody rents out.
    """
    if name is not None:
        gpu = find_gpu(name, {row.key: row for row in market.gpus})
    else:
        local = next((found.gpu for found in local_gpus() if found.gpu is not None), None)
        if local is None:
            return None
        gpu = local
    offer = market.usual_offer(gpu)
    if offer is not None:
        return Rent(gpu, offer, market.today)
    if name is None:
        return None
    raise InputError(
        given=f"--gpu {name}: no provider in the catalogue rents it on demand",
        allowed="a GPU with a price (`thriftune gpus` lists them)",
        do="name another one, or add its price to your own YAML file",
    )


def limit_s(usd: float | None, hours: float | None, rent: Rent | None) -> float | None:
    """Seconds that both budgets leave; None without a budget. Raises InputError for dollars without a price, and for
    what is no number."""
    for name, given in (("--budget-usd", usd), ("--budget-hours", hours)):
        if given is not None and not math.isfinite(given):
            raise InputError(given=f"{name} {given:g}", allowed="a number, 0 or more", do="leave it out for no limit")
    limits = [] if hours is None else [hours * 3600]
    if usd is not None:
        if rent is None:
            raise InputError(
                given=f"--budget-usd {usd:g}, and this machine shows no GPU with a price",
                allowed="dollars of a GPU in the catalogue, or --budget-hours",
                do="name the GPU whose price counts with --gpu, such as --gpu h200",
            )
        limits.append(rent.seconds(usd))
    return min(limits) if limits else None


def trim(
    cells: Sequence[Cell], seconds_of: Callable[[Cell], float], fixed_s: float, most_s: float | None, rent: Rent | None
) -> Trimmed:
    """The cells that stay within `most_s`: whole seeds are dropped, the last one first, for all methods alike.

    Args:
        cells: all cells that are not done yet.
        seconds_of: planned seconds of a cell.
        fixed_s: what is spent already and what the search takes.
        most_s: the budget; None for none.
        rent: for the words.

    Raises:
        InputError: even one seed is over the budget; it names the smallest budget that is enough.
    """
    if most_s is None:
        return Trimmed(tuple(cells), ())
    seeds = list(dict.fromkeys(cell.seed for cell in cells if cell.seed is not None))
    kept = list(cells)
    dropped: list[int] = []
    while fixed_s + sum(map(seconds_of, kept)) > most_s and len(seeds) > 1:
        dropped.insert(0, seeds.pop())
        kept = [cell for cell in kept if cell.seed is None or cell.seed in seeds]
    needed_s = fixed_s + sum(map(seconds_of, kept))
    if needed_s > most_s:
        money = f" or --budget-usd {_up(rent.usd(needed_s)):g}" if rent else ""
        raise InputError(
            given=f"one seed of every method is planned to take {format_seconds(needed_s)}"
            + (f" (${rent.usd(needed_s):.2f})" if rent else "")
            + f", the budget is {format_seconds(most_s)}"
            + (f" (${rent.usd(most_s):.2f})" if rent else ""),
            allowed=f"at least --budget-hours {_up(needed_s / 3600):g}{money}",
            do="raise the budget, or ask for fewer --methods, sweeps, rows (data.max_samples) or no --search",
        )
    note = ""
    if dropped:
        listed = ", ".join(map(str, dropped))
        note = f"left out to stay in the budget: seed{'s' if len(dropped) > 1 else ''} {listed} of every method"
    return Trimmed(tuple(kept), tuple(cell for cell in cells if cell not in kept), note)


def _up(number: float) -> float:
    """Two significant digits, rounded up."""
    rounded = float(f"{number:.2g}")
    return rounded if rounded >= number else float(f"{number * 1.1:.2g}")


def planned_s(planned: Planned, cell: Cell) -> float:
    plan = planned.plans.get(cell.variant) if cell.method != BASE else None
    return plan.run_s if plan and plan.fits else 0.0


def plan_words(planned: Planned, cell: Cell, rent: Rent | None) -> str:
    """'planned 5.20 GiB, 12 min 03 s, $0.61'."""
    plan = planned.plans.get(cell.variant)
    if cell.method == BASE:
        return "scored only"
    if plan is None:
        return "no plan"
    words = f"planned {format_bytes(plan.peak_bytes)}"
    if not plan.fits:
        words += f" of {format_bytes(plan.usable_bytes)}: does not fit"
    if plan.run_s:
        words += f", {format_seconds(plan.run_s)}"
        words += f", ${rent.usd(plan.run_s):.2f}" if rent else ""
    return words
