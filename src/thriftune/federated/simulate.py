"""`federate simulate`: all sites in one process, one after another, over one loaded base.

Every byte goes through the same messages, the same coordinator and the same sites as between machines; only nothing
travels (docs/decisions/0011). The data set is read once and shared out as `--split` says.
"""

from __future__ import annotations

import hashlib
import json
import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from thriftune.data import Example
from thriftune.errors import InputError, StoppedBySignal
from thriftune.federated.coordinator import Coordinator
from thriftune.federated.folders import writing_to
from thriftune.federated.privacy import loss_of
from thriftune.federated.records import FederatedRecord, FederatedRound, Shares
from thriftune.federated.result import RECORD, record_of, round_line, write_result
from thriftune.federated.site import Base, Site, eval_loss, open_base, recipe_of_rounds
from thriftune.federated.split import read_split, share_out
from thriftune.recipe import Recipe
from thriftune.records import read_record
from thriftune.run import Prepared, prepare_run
from thriftune.train.loop import eval_is_due
from thriftune.train.observe import MetricsFile


@dataclass(frozen=True)
class Simulation:
    """What the verb was asked for. `ranks` are given to the sites in turn; none: lora.r for all."""

    recipe: Recipe
    clients: int
    split: str
    ranks: Sequence[int]
    force: bool
    command: str


def simulate(asked: Simulation, say: Callable[[str], None]) -> FederatedRecord:
    """Run all rounds and leave a folder as a run does: recipe.yaml, adapter/, record.json; beside them rounds/, sites/.

    Given again with the same output, it goes on after the last round that was written. The sites' optimizers then start
    anew. Raises InputError when that folder holds another federation.
    """
    started, clock = datetime.now(UTC).isoformat(timespec="seconds"), time.perf_counter()
    split = read_split(asked.split)
    recipe = recipe_of_rounds(asked.recipe)
    loss_of(recipe.federated)  # for its refusal: without the accountant all rounds would be trained in vain
    prepared = prepare_run(recipe, force=asked.force)
    recipe = prepared.recipe
    output = Path(recipe.output or "")
    names = [f"site-{number + 1}" for number in range(asked.clients)]
    ranks = {
        name: (asked.ranks or [recipe.lora.r])[place % max(1, len(asked.ranks))] for place, name in enumerate(names)
    }
    who_has = share_out(split, prepared.data.train_rows.rows, asked.clients, recipe.seed)
    examples = _share(prepared, who_has, names)
    shares = Shares(split=asked.split, fingerprint=_fingerprint(prepared, who_has))
    with _stop_naming(output, asked.recipe.output is not None):
        coordinator = Coordinator(recipe, ranks, output, shares)
        if coordinator.is_done and (output / RECORD).exists():
            say(f"all {coordinator.round} rounds are done already")
            return read_record(output / RECORD, FederatedRecord)
        if coordinator.round:
            say(f"going on after round {coordinator.round}; the sites' optimizers start anew")
        base = open_base(prepared, output, say)
        if base.places.fingerprint() != coordinator.state.places:
            raise AssertionError("the adapter over the weights is not the one over the shapes")
        say(f"path: {base.path.name} ({base.path_reason})")
        for name in names:
            say(f"{name}: {len(examples[name]):,} rows, rank {ranks[name]}")
        sites = [_site(base, name, examples[name], output) for name in names]
        while not coordinator.is_done:
            say(round_line(_round(coordinator, base, sites), coordinator))
        record = record_of(
            coordinator,
            transport="simulated",
            rows={name: len(examples[name]) for name in names},
            wall_s=time.perf_counter() - clock,
            device=prepared.device,
            command=asked.command,
            started=started,
        )
        write_result(output, record)
        return record


@contextmanager
def _stop_naming(output: Path, was_named: bool) -> Iterator[None]:
    """A stop says how to go on: without --output the same command would begin in a new folder."""
    try:
        yield
    except StoppedBySignal as stopped:
        if was_named:
            raise
        raise StoppedBySignal(
            signal_number=stopped.signal_number,
            given=stopped.given,
            allowed=stopped.allowed,
            do=f"give the same command again with --output {shlex.quote(str(output))}: it goes on",
        ) from None


def _round(coordinator: Coordinator, base: Base, sites: Sequence[Site]) -> FederatedRound:
    for site in sites:
        coordinator.take(site.name, site.answer(coordinator.offer(site.name)))

    def measure() -> float | None:
        rounds = coordinator.recipe.federated
        done, last = coordinator.round * rounds.local_steps, rounds.rounds * rounds.local_steps
        if not eval_is_due(coordinator.recipe.train, done, done + rounds.local_steps, last, rounds.local_steps):
            return None
        base.places.write(coordinator.current)
        return eval_loss(base)

    return coordinator.close(measure)


def _site(base: Base, name: str, examples: Sequence[Example], output: Path) -> Site:
    folder = output / "sites" / name
    with writing_to(output):
        folder.mkdir(parents=True, exist_ok=True)
    return Site(base, name, examples, folder, [MetricsFile(folder / "metrics.jsonl")], keeps=False)


def _fingerprint(prepared: Prepared, who_has: Sequence[Sequence[int]]) -> str:
    """Equal where the same rows, as tokens, lie at the same sites."""
    text = json.dumps([prepared.data.audit.fingerprint, who_has])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _share(prepared: Prepared, shares: Sequence[Sequence[int]], names: Sequence[str]) -> dict[str, list[Example]]:
    """Each site's examples, in the order of the rows. Raises InputError when a site is left without one."""
    owner = {row: name for name, share in zip(names, shares, strict=True) for row in share}
    found: dict[str, list[Example]] = {name: [] for name in names}
    for example in prepared.data.train:
        found[owner[example.row]].append(example)
    for name, examples in found.items():
        if not examples:
            raise InputError(
                given=f"{name} has no row left with an answer to train on",
                allowed="at least one row a site",
                do="take fewer --clients, or another --split",
            )
    return found
