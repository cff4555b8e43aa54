"""`federate serve`: the coordinator between machines. It starts Flower's SuperLink, runs the rounds, and stops it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch

from thriftune.errors import InputError
from thriftune.federated.coordinator import Coordinator, QuorumError
from thriftune.federated.flower.coordinator import CoordinatorLink, Reply
from thriftune.federated.keys import read_coordinator_keys
from thriftune.federated.message import MessageError
from thriftune.federated.privacy import loss_of
from thriftune.federated.records import FederatedRecord, FederatedRound
from thriftune.federated.result import RECORD, record_of, round_line, write_result
from thriftune.federated.site import recipe_of_rounds
from thriftune.machine import quiet_libraries
from thriftune.recipe import Recipe
from thriftune.records import read_record

POLL_S = 0.5
GOODBYE_S = 30.0


@dataclass(frozen=True)
class Serving:
    """What the verb was asked for. `ranks`: site -> rank, lora.r for those not named."""

    recipe: Recipe
    certificates: Path
    ranks: dict[str, int]
    host: str
    port: int
    output: Path
    command: str


def serve(asked: Serving, say: Callable[[str], None]) -> FederatedRecord:
    """Run all rounds with the sites that join, and leave the same folder as a simulation. Given again, it goes on with
    the round that it was stopped in; after the last one it gives the result to the sites that come, for a while."""
    started, clock = datetime.now(UTC).isoformat(timespec="seconds"), time.perf_counter()
    quiet_libraries()
    keys = read_coordinator_keys(asked.certificates)
    if strangers := [site for site in asked.ranks if site not in keys.sites]:
        raise InputError(
            given=f"--ranks names {', '.join(strangers)}, who has no key in {asked.certificates}",
            allowed=f"the sites {', '.join(keys.sites)}",
            do="correct the name",
        )
    recipe = recipe_of_rounds(asked.recipe)
    loss_of(recipe.federated)  # for its refusal: without the accountant all rounds would be trained in vain
    recipe = recipe.resolved("lora" if recipe.method == "auto" else recipe.method, str(asked.output))
    sites = {site: asked.ranks.get(site, recipe.lora.r) for site in keys.sites}
    coordinator = Coordinator(recipe, sites, asked.output, None)
    done_before = coordinator.is_done
    with CoordinatorLink(keys, asked.host, asked.port, asked.output / "flower") as link:
        where = f"round {coordinator.round + 1} of {recipe.federated.rounds}"
        if done_before:
            where = f"all {coordinator.round} rounds are done; waiting {GOODBYE_S:g} s for sites that lack the result"
        ranked = ", ".join(f"{site} (rank {rank})" for site, rank in sites.items())
        say(f"serving {asked.host}:{asked.port}, {where}; sites: {ranked}")
        while not coordinator.is_done:
            say(round_line(_round(coordinator, link, say), coordinator))
        meter = link.traffic()
        _say_goodbye(coordinator, link)
    if done_before and (asked.output / RECORD).exists():
        return read_record(asked.output / RECORD, FederatedRecord)
    record = record_of(
        coordinator,
        transport="flower",
        rows={},
        wall_s=time.perf_counter() - clock,
        device=torch.device("cpu"),
        command=asked.command,
        started=started,
        meter=meter,
    )
    write_result(asked.output, record)
    return record


def _round(coordinator: Coordinator, link: CoordinatorLink, say: Callable[[str], None]) -> FederatedRound:
    """One round; begun anew, with all sites that are there, when it ends without a quorum."""
    while True:
        _wait_for_quorum(coordinator, link, say)
        before = link.traffic()
        _collect(coordinator, link, say)
        moved = {way: count - before[way] for way, count in link.traffic().items()}
        try:
            return coordinator.close(lambda: None, moved)
        except QuorumError as error:
            say(f"{error.given}: this round begins anew")
            time.sleep(POLL_S)


def _wait_for_quorum(coordinator: Coordinator, link: CoordinatorLink, say: Callable[[str], None]) -> None:
    told: set[str] | None = None
    while len(online := link.online()) < coordinator.needed:
        if online != told:
            say(f"waiting for sites: {', '.join(sorted(online)) or 'none'} of {', '.join(coordinator.sites)} are here")
            told = online
        time.sleep(POLL_S)


def _collect(coordinator: Coordinator, link: CoordinatorLink, say: Callable[[str], None]) -> None:
    """Offer the adapter to every site that is there or comes, until all offered have answered or time is up.

    A site that still owes an answer to an earlier offer gets none behind it: it would work through them in order, and
    each answer would come too late. When it has answered, or failed, it is offered this round. It is waited for only
    while there is no quorum without it.
    """
    ends = time.monotonic() + coordinator.recipe.federated.round_timeout_s
    offered: set[str] = set()
    while time.monotonic() < ends:
        for reply in link.receive():
            if reply.site in offered:
                _take(coordinator, reply, say)
            else:
                say(reply.error or f"site {reply.site} answered an earlier offer, too late to be used")
        for site in sorted(link.online() - offered - link.owing()):
            link.send(site, coordinator.offer(site))
            offered.add(site)
        if not coordinator.waits_for and (coordinator.has_enough or not link.owing()):
            return
        time.sleep(POLL_S)
    say(f"round {coordinator.round + 1}: time is up, without {', '.join(sorted(link.owing()))}")


def _take(coordinator: Coordinator, reply: Reply, say: Callable[[str], None]) -> None:
    """Take an update, or refuse it aloud."""
    try:
        if reply.error:
            raise MessageError(given=reply.error, allowed="an update", do="look at that site")
        coordinator.take(reply.site, reply.data)
    except MessageError as error:
        coordinator.refuse(reply.site, error.given)
        say(f"refused: {error.given}")


def _say_goodbye(coordinator: Coordinator, link: CoordinatorLink) -> None:
    """Give the result to all sites, as soon as they are there, and wait a little for them and for their thanks.

    One that took part may be away just now: when the coordinator was started again, SuperNodes find it only after a
    while.
    """
    link.forget()  # an answer that is still owed would be taken for thanks
    waiting, told = set(coordinator.sites), set[str]()
    ends = time.monotonic() + GOODBYE_S
    while waiting and time.monotonic() < ends:
        for site in sorted(waiting & link.online() - told):
            link.send(site, coordinator.end(site))
            told.add(site)
        waiting -= {reply.site for reply in link.receive()}
        time.sleep(POLL_S)
