"""The verbs of a federation: `federate simulate`."""

from __future__ import annotations

import shlex
import sys
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from thriftune.cli.app import Json, Words, app, recipe_of_words
from thriftune.errors import InputError

federate = typer.Typer(
    help="Train one adapter together: data stay at their sites, the adapter goes round.", no_args_is_help=True
)
app.add_typer(federate, name="federate")

Data = Annotated[str | None, typer.Option(help="sums, reviews, imdb, gsm8k, a file, a folder, or a hub id.")]
Config = Annotated[Path | None, typer.Option(help="A recipe in YAML; options on the line override it.")]


@federate.command()
def simulate(
    words: Words = None,
    data: Data = None,
    method: Annotated[str | None, typer.Option(help="lora, qlora, or auto.")] = None,
    clients: Annotated[int, typer.Option(min=1, help="How many sites.")] = 4,
    rounds: Annotated[int | None, typer.Option(min=1, help="How many rounds, federated.rounds.")] = None,
    split: Annotated[
        str, typer.Option(help="even, dirichlet:0.3, dirichlet:0.3:COLUMN, or by:COLUMN: who has which rows.")
    ] = "even",
    ranks: Annotated[str | None, typer.Option(help="The sites' ranks in turn, such as 4,8,16; lora.r for all.")] = None,
    config: Config = None,
    output: Annotated[str | None, typer.Option("--output", "-o", help="Folder of the federation.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Start even when the plan says that it does not fit.")] = False,
    as_json: Json = False,
) -> None:
    """Play a federation on this machine: share the rows out among sites and run all rounds.

    Options of the rounds are written KEY=VALUE as well: local_steps=20 aggregation=rolora send_dtype=float32 ...
    """
    values: dict[str, Any] = {"data": data, "method": method, "output": output, "federated.rounds": rounds}
    recipe = recipe_of_words(words, config, values)
    from thriftune.federated.simulate import Simulation
    from thriftune.federated.simulate import simulate as run_simulation

    asked = Simulation(recipe, clients, split, _ranks(ranks), force, shlex.join(["thriftune", *sys.argv[1:]]))
    record = run_simulation(asked, partial(print, file=sys.stderr, flush=True))
    _print_record(record, as_json)


def _ranks(text: str | None) -> list[int]:
    words = [word.strip() for word in (text or "").split(",") if word.strip()]
    if not all(word.isascii() and word.isdigit() and int(word) > 0 for word in words):
        raise InputError(given=f"--ranks {text}", allowed="whole numbers above 0", do="for example --ranks 4,8,16")
    return [int(word) for word in words]


def _print_record(record: Any, as_json: bool) -> None:
    if as_json:
        typer.echo(record.model_dump_json())
        return
    typer.echo(
        f"{len(record.rounds)} rounds over {len(record.sites)} sites; {record.bytes_up:,} bytes up, "
        f"{record.bytes_down:,} down; {record.wall_s:.1f} s"
    )
    if record.epsilon is not None:
        typer.echo(
            f"privacy loss: epsilon {record.epsilon:.3g} at delta {record.recipe.federated.delta:g}, for one site"
        )
    typer.echo(f"adapter: {record.adapter}")
