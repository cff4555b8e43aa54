"""The coordinator: offers the global adapter, takes the sites' updates, makes them one, writes each round to the disk.

It knows messages and folders, not how messages travel; `simulate` calls the sites itself, `serve` through Flower.

    FOLDER/state.json                what is needed to go on: the round, the records so far
    FOLDER/rounds/3/                 the adapter after three rounds, a PEFT folder; 0 is the start
    FOLDER/adapter/, record.json     at the end
"""

from __future__ import annotations

import math
import os
import secrets
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

from thriftune.errors import InputError, ThriftuneError
from thriftune.federated.adapter import find_places, start_of
from thriftune.federated.aggregate import (
    MIXED_RANKS,
    Adapter,
    Factors,
    Refused,
    Update,
    aggregate,
    parts_of,
    refuse_unusable,
    trained_half,
)
from thriftune.federated.folders import writing_to
from thriftune.federated.message import Header, MessageError, expect, open_message, pack, update_of
from thriftune.federated.privacy import private_mean
from thriftune.federated.records import CoordinatorState, FederatedRound, Shares, SiteRound
from thriftune.federated.site import check_recipe, terms_of
from thriftune.methods import METHODS
from thriftune.recipe import Recipe
from thriftune.records import read_record, write_record
from thriftune.run import export_result

STATE = "state.json"


class QuorumError(ThriftuneError):
    """A round for which too few sites sent an update that could be used."""


class Coordinator:
    def __init__(self, recipe: Recipe, sites: Mapping[str, int], folder: Path, shares: Shares | None) -> None:
        """Start, or go on with the rounds in `folder`. `sites`: site -> rank; `shares`: the rows of a simulation's.

        Raises InputError when the rounds in `folder` are of another recipe, other sites or other shares, OutputError
        when it cannot be written to.
        """
        check_recipe(recipe)
        _check_sites(recipe, sites)
        self.recipe, self.sites, self.folder = recipe, dict(sites), folder
        self._loaded, self._model = start_of(recipe)
        self._places = find_places(self._model)
        self._shapes = self._places.shapes()
        self.state = self._take_up(shares)
        self.current: Adapter = self._places.read()
        self._tickets: dict[str, str] = {}
        self._updates: dict[str, Update] = {}
        self._sent: dict[str, SiteRound] = {}
        self._refused: list[Refused] = []

    @property
    def round(self) -> int:
        return self.state.rounds_done

    @property
    def sides(self) -> int:
        """In + out features, summed over the adapted matrices."""
        return sum(out + into for out, into in self._shapes.values())

    @property
    def is_done(self) -> bool:
        return self.round >= self.recipe.federated.rounds

    @property
    def waits_for(self) -> list[str]:
        """Sites that were made an offer in this round and have neither answered nor been refused."""
        refused = {entry.site for entry in self._refused}
        return [site for site in self._tickets if site not in self._updates and site not in refused]

    @property
    def needed(self) -> float:
        """How many sites' updates a round needs at least."""
        return self.recipe.federated.quorum * len(self.sites)

    @property
    def has_enough(self) -> bool:
        return len(self._updates) >= self.needed

    def offer(self, site: str) -> bytes:
        """The message that asks a site for its update in this round; the offer before it is void."""
        self._tickets[site] = secrets.token_hex(8)
        data = self._message(site, "offer", self._tickets[site])
        self._sent[site] = SiteRound(site=site, rank=self.sites[site], bytes_down=len(data))
        return data

    def end(self, site: str) -> bytes:
        """The message that gives a site the result."""
        return self._message(site, "end", "")

    def _message(self, site: str, kind: Literal["offer", "end"], ticket: str) -> bytes:
        rounds = self.recipe.federated
        first, stop = self._part(site)
        header = Header(
            kind=kind,
            federation=self.state.federation,
            round=self.round,
            rounds=rounds.rounds,
            site=site,
            ticket=ticket,
            half="both",
            rank=self._places.rank,
            train=trained_half(rounds.aggregation, self.round),
            train_rank=self.sites[site],
            train_first=first,
            train_end=stop,
            dtype=rounds.send_dtype if kind == "offer" else "float32",
            places=self._places.fingerprint(),
            terms=terms_of(self.recipe),
        )
        return pack(header, self.current)

    def _part(self, site: str) -> tuple[int, int]:
        """(first, end) of the components that a site trains in this round. It is at its next part only when the one
        before was taken, so that one that misses every other round trains them all. Sites of one rank do not all begin
        with the same part."""
        entries = (entry for done in self.state.rounds for entry in done.sites if entry.site == site)
        turn = list(self.sites).index(site) + sum(entry.change is not None for entry in entries)
        parts = parts_of(self.recipe.federated.aggregation, self.sites[site], self._places.rank)
        return parts[turn % len(parts)]

    def take(self, site: str, data: bytes) -> None:
        """Keep the update that a site sent. Raises MessageError for one that is not the answer to this round's
        offer."""
        message = open_message(data)
        header = message.header
        first, stop = self._part(site)
        expect(
            header,
            kind="update",
            site=site,
            federation=self.state.federation,
            round=self.round,
            ticket=self._tickets.get(site),
            first=first,
            rank=stop - first,
            half=trained_half(self.recipe.federated.aggregation, self.round),
            dtype=self.recipe.federated.send_dtype,
            places=self._places.fingerprint(),
        )
        if site in self._updates:
            raise MessageError(
                given=f"a second update of site {site} in round {self.round + 1}", allowed="one", do="it is not used"
            )
        weight = 1.0 if self.recipe.federated.clip_norm else float(header.targets or 0)
        if weight <= 0:
            raise MessageError(given=f"site {site} names no target tokens", allowed="1 or more", do="it is not used")
        adapter = update_of(message, self._shapes, self.current)
        self._updates[site] = Update(site, weight, adapter, first)
        own = {"targets": header.targets, "loss": header.loss, "train_s": header.train_s}
        update = {"bytes_up": len(data), "bytes_of_factors": len(message.body), **own}
        self._sent[site] = self._sent[site].model_copy(update=update)

    def refuse(self, site: str, reason: str) -> None:
        """Note that what a site sent in this round is not used, and why."""
        self._refused.append(Refused(site, reason))

    def close(self, measure: Callable[[], float | None], meter: Mapping[str, int] | None = None) -> FederatedRound:
        """Make the round's updates one, write the round, and go to the next. `measure` tells the eval loss of what is
        then `current`; `meter` has the bytes of this round as the transport counted them, if one did. Raises
        QuorumError, and then nothing has changed but that new offers have to be made."""
        rounds = self.recipe.federated
        # Clipping bounds every site by itself; to compare it with the others would let one site put out another.
        largest = math.inf if rounds.clip_norm else rounds.largest_change
        taken, refused, changes = refuse_unusable(
            self.current, list(self._updates.values()), self._places.scale, largest, self.state.changes
        )
        refused = [*self._refused, *refused]
        self._check_quorum(len(taken), refused)
        if rounds.clip_norm:
            half = trained_half(rounds.aggregation, self.round)
            adapter, kept = private_mean(self.current, taken, half, rounds, len(self.sites)), None
        else:
            merged = aggregate(rounds.aggregation, self.current, taken)
            adapter, kept = merged.adapter, merged.energy_kept
        self.current = {name: Factors(part.b_OR.float(), part.a_RI.float()) for name, part in adapter.items()}
        reasons = {entry.site: entry.reason for entry in refused}
        change_of = dict(zip([update.site for update in taken], changes, strict=True))
        record = FederatedRound(
            round=self.round + 1,
            sites=[
                entry.model_copy(update={"change": change_of.get(site), "refused": reasons.get(site, "")})
                for site, entry in self._sent.items()
            ],
            updates=len(taken),
            energy_kept=kept,
            eval_loss=measure(),
            meter=dict(meter or {}),
        )
        self._write(record, changes)
        self._tickets, self._updates, self._sent, self._refused = {}, {}, {}, []
        return record

    def finish(self) -> Path:
        """Write the result as a PEFT folder and return it."""
        result = self.folder / "adapter"
        self._places.write(self.current)
        export_result(METHODS["lora"], self._model, self._loaded, self.recipe, result)
        return result

    def _check_quorum(self, updates: int, refused: list[Refused]) -> None:
        if updates >= self.needed:
            return
        self._tickets, self._updates, self._sent, self._refused = {}, {}, {}, []
        why = "".join(f"; {entry.reason}" for entry in refused)
        raise QuorumError(
            given=f"round {self.round + 1} has {updates} of {len(self.sites)} sites' updates{why}",
            allowed=f"{self.needed:g} or more (federated.quorum {self.recipe.federated.quorum:g})",
            do=f"mend what keeps the others out and give the federation in {self.folder} again: this round begins anew",
        )

    def _take_up(self, shares: Shares | None) -> CoordinatorState:
        path = self.folder / STATE
        if not path.exists():
            state = CoordinatorState(
                federation=secrets.token_hex(8),
                places=self._places.fingerprint(),
                recipe=self.recipe,
                sites=self.sites,
                shares=shares,
            )
            self._write_adapter(0)
            write_record(path, state)
            return state
        state = read_record(path, CoordinatorState)
        same_model = (state.recipe, state.places) == (self.recipe, self._places.fingerprint())
        others = ["another recipe"] * (not same_model) + ["other sites or ranks"] * (state.sites != self.sites)
        if state.shares != shares:
            stored, asked = (part.split if part else "none" for part in (state.shares, shares))
            others.append("other rows" if stored == asked else f"another --split ({stored}, not {asked})")
        if others:
            raise InputError(
                given=f"{self.folder} holds rounds of {' and '.join(others)}",
                allowed="the same recipe, sites, ranks, rows and split, to go on, or a new folder",
                do=f"name another --output, or restore the settings in {path}",
            )
        METHODS["lora"].load(self._model, self._round_folder(state.rounds_done))
        return state

    def _write(self, record: FederatedRound, changes: list[float]) -> None:
        """The adapter first, then the state that names it: killed in between, the round is done again."""
        self._places.write(self.current)
        self._write_adapter(record.round)
        update = {
            "rounds_done": record.round,
            "changes": [*self.state.changes, *changes],
            "rounds": [*self.state.rounds, record],
        }
        self.state = self.state.model_copy(update=update)
        write_record(self.folder / STATE, self.state)

    def _write_adapter(self, number: int) -> None:
        folder = self._round_folder(number)
        aside = folder.with_name(f".{number}.{os.getpid()}.writing")
        shutil.rmtree(aside, ignore_errors=True)
        with writing_to(self.folder):
            aside.mkdir(parents=True)
            METHODS["lora"].save(self._model, aside)
            shutil.rmtree(folder, ignore_errors=True)
            aside.rename(folder)

    def _round_folder(self, number: int) -> Path:
        return self.folder / "rounds" / str(number)


def _check_sites(recipe: Recipe, sites: Mapping[str, int]) -> None:
    largest, smallest = max(sites.values()), min(sites.values())
    if largest > recipe.lora.r or smallest < 1:
        raise InputError(
            given=f"a site of rank {largest if largest > recipe.lora.r else smallest}, and lora.r {recipe.lora.r}",
            allowed="ranks from 1 to lora.r, the rank of the global adapter",
            do="raise lora.r or lower that rank",
        )
    aggregation = recipe.federated.aggregation
    if smallest < recipe.lora.r and aggregation not in MIXED_RANKS:
        raise InputError(
            given=f"a site of rank {smallest} with aggregation {aggregation} and lora.r {recipe.lora.r}",
            allowed=f"all sites of rank lora.r, or aggregation {' or '.join(MIXED_RANKS)}",
            do="set federated.aggregation=svd, or give all sites the same rank",
        )
