"""The verbs that answer before anything is spent: `plan` and `gpus`."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from thriftune.cli.app import Json, Words, app, recipe_of_words


@app.command()
def plan(
    words: Words = None,
    data: Annotated[
        str | None, typer.Option(help="Your rows, as in train: times are for them. Else every row is max_length long.")
    ] = None,
    gpu: Annotated[
        list[str] | None,
        typer.Option(help="A GPU's name, 2xNAME for two, local, or cpu; may be repeated. Default: local."),
    ] = None,
    gpus: Annotated[int | None, typer.Option(help="How many of each GPU.")] = None,
    method: Annotated[list[str] | None, typer.Option(help="full, lora, qlora, dynamic; with commas.")] = None,
    prefer: Annotated[str, typer.Option(help="balanced, speed, memory, quality, or cost.")] = "balanced",
    article: Annotated[bool, typer.Option("--article", help="The methods side by side.")] = False,
    measure: Annotated[
        bool, typer.Option("--measure", help="Time some layers on this machine's GPU (or CPU), instead of the table.")
    ] = False,
    max_memory: Annotated[str | None, typer.Option(help="GPU memory that the run may take, such as 24GiB.")] = None,
    config: Annotated[Path | None, typer.Option(help="A recipe in YAML; options on the line override it.")] = None,
    as_json: Json = False,
) -> None:
    """Say what fits, how long it takes, what it costs and which method to take. No weights are read.

    The model may be a hub id, a folder, or a name such as llama-3-8b; options are those of train.
    """
    from thriftune.plan.plan import KNOWN_METHODS
    from thriftune.plan.show import plan_text
    from thriftune.planning import plan_words

    named = [text.strip() for entry in method or [] for text in entry.split(",") if text.strip()]
    only = named[0] if len(named) == 1 and named[0] in KNOWN_METHODS else None  # the recipe's, as in train
    recipe = recipe_of_words(words, config, {"data": data, "method": only, "max_memory": max_memory})
    asked: dict[str, Any] = {"gpu_names": gpu or [], "gpus": gpus, "methods": named, "prefer": prefer}
    if measure:
        from thriftune.measure import measure_words

        found = measure_words(recipe, **asked, say=partial(print, file=sys.stderr, flush=True))
    else:
        found = plan_words(recipe, **asked)
    typer.echo(found.model_dump_json() if as_json else plan_text(found, article))


@app.command(name="gpus")
def gpus_command(as_json: Json = False) -> None:
    """List the GPUs of the catalogue and of your own files, with memory, bandwidth and the cheapest price an hour."""
    from thriftune.plan.show import gpu_table
    from thriftune.planning import list_gpus

    rows = list_gpus()
    typer.echo(json.dumps({"gpus": rows}) if as_json else gpu_table(rows))
