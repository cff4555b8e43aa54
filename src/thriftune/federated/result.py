"""What a federation leaves behind: the adapter, the recipe and the record, in a folder that all verbs open as a
run's."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch

from thriftune.federated.coordinator import Coordinator
from thriftune.federated.privacy import epsilon_of
from thriftune.federated.records import FederatedRecord
from thriftune.machine import hardware, versions
from thriftune.recipe import dump_yaml
from thriftune.records import write_record, write_text_atomically


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
    settings = recipe.federated
    private = settings.clip_norm is not None
    return FederatedRecord(
        transport=transport,
        federation=coordinator.state.federation,
        model=recipe.model.name,
        method=recipe.method,
        sites=coordinator.sites,
        rows=dict(rows),
        rounds=rounds,
        bytes_down=sum(site.bytes_down for entry in rounds for site in entry.sites),
        bytes_up=sum(site.bytes_up for entry in rounds for site in entry.sites),
        meter=dict(meter or {}),
        epsilon=epsilon_of(settings.noise_multiplier, len(rounds), settings.delta) if private else None,
        adapter=str(coordinator.finish()),
        wall_s=wall_s,
        recipe=recipe,
        hardware=hardware(device),
        versions=versions(),
        command=command,
        started=started,
    )


def write_result(folder: Path, record: FederatedRecord) -> None:
    write_text_atomically(folder / "recipe.yaml", dump_yaml(record.recipe))
    write_record(folder / "record.json", record)
