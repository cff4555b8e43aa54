"""What a federation writes to the disk: its state between rounds, each round, and the record of the whole."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from thriftune.recipe import Recipe
from thriftune.records import SCHEMA_VERSION, Record


class SiteRound(Record):
    """One site in one round. Bytes are those of its messages, as given to the transport, which counts all sites in
    one."""

    site: str
    rank: int
    bytes_down: int
    bytes_up: int = 0
    bytes_of_factors: int = Field(0, description="of bytes_up, without the header")
    targets: int | None = Field(None, description="target tokens of the site's rows, its weight; None with clip_norm")
    loss: float | None = Field(None, description="mean training loss of the round; None with clip_norm")
    train_s: float | None = Field(None, description="None with clip_norm")
    change: float | None = Field(None, description="norm of what the site changed in the model; None: not taken")
    refused: str = Field("", description="why its update was not taken, in words")


class FederatedRound(Record):
    round: int = Field(description="from 1")
    sites: list[SiteRound]
    updates: int = Field(description="that were taken")
    energy_kept: float | None = Field(
        description="share of the exact mean's squared norm that was kept when it was cut; None: it was not cut"
    )
    eval_loss: float | None = None
    meter: dict[str, int] = Field(
        default_factory=dict,
        description="bytes_down and bytes_up of the round, of all sites, as Flower counted them; none in a simulation",
    )


class Shares(Record):
    """How a simulation shared out its rows: `--split`, and a fingerprint of the rows and of who has which."""

    split: str
    fingerprint: str


class CoordinatorState(Record):
    """Written after every round. `federation` is drawn at the start and stands in every message."""

    schema_version: int = SCHEMA_VERSION
    federation: str
    rounds_done: int = 0
    places: str = Field(description="fingerprint of the adapter's names and shapes")
    recipe: Recipe
    sites: dict[str, int] = Field(description="site -> its rank")
    shares: Shares | None = Field(None, description="of a simulation; between machines each site has its own rows")
    changes: list[float] = Field(default_factory=list, description="norms of the changes taken so far")
    rounds: list[FederatedRound] = Field(default_factory=list)


class FederatedRecord(Record):
    """A federation: what was asked, each round, what it cost in bytes."""

    schema_version: int = SCHEMA_VERSION
    status: Literal["done"] = "done"
    transport: Literal["simulated", "flower"]
    federation: str
    model: str
    method: str
    sites: dict[str, int] = Field(description="site -> its rank")
    split: str | None = Field(None, description="how the rows were shared out, in a simulation")
    rows: dict[str, int] = Field(default_factory=dict, description="site -> its training rows, in a simulation")
    sides: int = Field(description="in + out features, summed over the adapted matrices")
    rounds: list[FederatedRound]
    bytes_down: int = Field(description="sum over the rounds")
    bytes_up: int
    meter: dict[str, Any] = Field(
        default_factory=dict, description="bytes as Flower counts them, since the coordinator was last started"
    )
    epsilon: float | None = Field(None, description="privacy loss at federated.delta; None without clip_norm")
    adapter: str
    wall_s: float
    recipe: Recipe
    hardware: dict[str, Any]
    versions: dict[str, str]
    command: str
    started: str
