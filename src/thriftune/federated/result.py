"""What a federation leaves behind: the adapter, the recipe and the record, in a folder that all verbs open as a
run's."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch

from thriftune.federated.coordinator import Coordinator
from thriftune.federated.privacy import loss_of
from thriftune.federated.records import FederatedRecord, FederatedRound
from thriftune.machine import hardware, versions
from thriftune.recipe import dump_yaml
from thriftune.records import write_record, write_text_atomically

RECORD = "record.json"


def record_of(
    coordinator: Coordinator,
    *,
    transport: Literal["simulated", "flower"],
    rows: Mapping[str, int],
    wall_s: float,
    device: torch.device,
    command: str,
    started: str,
    meter: Mapping[str, Any] | None = None,
) -> FederatedRecord:
    """Write the result and return the record of a federation whose rounds are done."""
    recipe, rounds = coordinator.recipe, coordinator.state.rounds
    return FederatedRecord(
        transport=transport,
        federation=coordinator.state.federation,
        model=recipe.model.name,
        method=recipe.method,
        sites=coordinator.sites,
        split=coordinator.state.shares.split if coordinator.state.shares else None,
        rows=dict(rows),
        sides=coordinator.sides,
        rounds=rounds,
        bytes_down=sum(site.bytes_down for entry in rounds for site in entry.sites),
        bytes_up=sum(site.bytes_up for entry in rounds for site in entry.sites),
        meter=dict(meter or {}),
        epsilon=loss_of(recipe.federated),
        adapter=str(coordinator.finish()),
        wall_s=wall_s,
        recipe=recipe,
        hardware=hardware(device),
        versions=versions(),
        command=command,
        started=started,
    )


def round_line(done: FederatedRound, coordinator: Coordinator) -> str:
    """One line for a finished round: how many of all sites took part, losses, bytes, what was refused."""
    losses = [site.loss for site in done.sites if site.loss is not None]
    up, down = (sum(getattr(site, key) for site in done.sites) for key in ("bytes_up", "bytes_down"))
    rounds = coordinator.recipe.federated.rounds
    words = [f"round {done.round}/{rounds}: {done.updates} of {len(coordinator.sites)} sites"]
    if losses:
        words.append(f"loss {min(losses):.4f} to {max(losses):.4f}")
    if done.eval_loss is not None:
        words.append(f"eval loss {done.eval_loss:.4f}")
    words.append(f"{up:,} bytes up, {down:,} down")
    if done.energy_kept is not None:
        words.append(f"energy kept {done.energy_kept:.4f}")
    words += [site.refused for site in done.sites if site.refused]
    return ", ".join(words)


def write_result(folder: Path, record: FederatedRecord) -> None:
    write_text_atomically(folder / "recipe.yaml", dump_yaml(record.recipe))
    write_record(folder / RECORD, record)
