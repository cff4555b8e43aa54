"""The verbs of a federation: `federate simulate`, `keys`, `serve` and `join`."""

from __future__ import annotations

import shlex
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from thriftune.cli.app import Json, Words, app, recipe_of_words
from thriftune.errors import InputError, StoppedBySignal

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
    with _terminated_cleanly():
        record = run_simulation(asked, partial(print, file=sys.stderr, flush=True))
    _print_record(record, as_json)


@federate.command()
def keys(
    sites: Annotated[str, typer.Option(help="The sites' names, with commas.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="A new folder for the keys.")],
    hosts: Annotated[
        str, typer.Option(help="Names and addresses of the coordinator, with commas, besides this machine's own.")
    ] = "",
) -> None:
    """Make a small certificate authority, the coordinator's certificate, and a key for each site."""
    from thriftune.federated.keys import make_keys

    for path in make_keys(output, _names(sites), [*dict.fromkeys(["localhost", "127.0.0.1", *_names(hosts)])]):
        typer.echo(f"private: {path}")
    typer.echo(f"carry {output}/sites/NAME to each site and {output}/coordinator to the coordinator, by a safe way")


@federate.command()
def serve(
    certificates: Annotated[Path, typer.Option(help="The folder that federate keys made, or its coordinator/.")],
    words: Words = None,
    ranks: Annotated[str | None, typer.Option(help="Sites' ranks: a=4,b=16; lora.r for the others.")] = None,
    host: Annotated[
        str, typer.Option(help="The address to listen on; 0.0.0.0 for all of this machine's.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8000,
    config: Config = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the federation.")] = Path("runs/federation"),
    as_json: Json = False,
) -> None:
    """Coordinate the rounds of a federation. No rows and no weights of the base are needed here.

    Given again, it goes on with the round that it was stopped in; after the last one it gives the result to the sites
    that come within half a minute.
    """
    recipe = recipe_of_words(words, config, {})
    from thriftune.federated.serve import Serving
    from thriftune.federated.serve import serve as run_server

    command = shlex.join(["thriftune", *sys.argv[1:]])
    asked = Serving(recipe, certificates, _site_ranks(ranks), host, port, output, command)
    with _terminated_cleanly():
        record = run_server(asked, partial(print, file=sys.stderr, flush=True))
    _print_record(record, as_json)


@federate.command()
def join(
    server: Annotated[str, typer.Option(help="HOST:PORT of the coordinator, a name of its certificate.")],
    certificates: Annotated[Path, typer.Option(help="This site's folder of what federate keys made.")],
    words: Words = None,
    data: Data = None,
    method: Annotated[str | None, typer.Option(help="lora, qlora, or auto.")] = None,
    config: Config = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="This site's folder; runs/federated-NAME by default.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Start even when the plan says that it does not fit.")] = False,
) -> None:
    """Take part in a federation with this site's rows, until the coordinator ends it."""
    recipe = recipe_of_words(words, config, {"data": data, "method": method})
    from thriftune.federated.join import Joining
    from thriftune.federated.join import join as run_site

    asked = Joining(recipe, certificates, server, output, force)
    with _terminated_cleanly():
        adapter = run_site(asked, partial(print, file=sys.stderr, flush=True))
    typer.echo(f"adapter: {adapter}")


@contextmanager
def _terminated_cleanly() -> Iterator[None]:
    """SIGTERM ends like Ctrl-C: Flower's processes are stopped, and it is told how to go on."""

    def stop(number: int, _frame: Any) -> None:
        raise StoppedBySignal(
            signal_number=number,
            given=f"{signal.Signals(number).name}; rounds that are done are kept",
            allowed="stopping at any time",
            do="give the same command again: it goes on",
        )

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _names(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _site_ranks(text: str | None) -> dict[str, int]:
    """a=4,b=16 -> {"a": 4, "b": 16}"""
    pairs = [word.partition("=")[::2] for word in _names(text or "")]
    for site, rank in pairs:
        if not site or not rank.isascii() or not rank.isdigit() or int(rank) < 1:
            raise InputError(
                given=f"--ranks {text}", allowed="SITE=RANK with commas", do="for example --ranks a=4,b=16"
            )
    return {site: int(rank) for site, rank in pairs}


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
