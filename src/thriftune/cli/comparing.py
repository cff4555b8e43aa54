"""The verbs that set runs side by side: `compare` and `report`."""

from __future__ import annotations

import json
import shlex
import sys
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from thriftune.cli.app import Json, app, split_words

CompareWords = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[MODEL] [KEY=VALUE[,VALUE]]... [METHOD:KEY=VALUE[,VALUE]]...",
        help="A model, and recipe options: for all methods or one; several values make a sweep.",
    ),
]


@app.command()
def compare(
    words: CompareWords = None,
    data: Annotated[str | None, typer.Option(help="sums, reviews, imdb, gsm8k, a file, a folder, or a hub id.")] = None,
    task: Annotated[
        str | None, typer.Option(help="What is scored, as for eval; the data's own task by default.")
    ] = None,
    methods: Annotated[
        str, typer.Option(help="Some of base, full, lora, qlora, dynamic, with commas.")
    ] = "base,full,lora,qlora",
    seeds: Annotated[str, typer.Option(help="How many seeds, or seeds with commas: 1,5,9.")] = "3",
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder of the comparison.")] = None,
    config: Annotated[Path | None, typer.Option(help="A recipe in YAML; options on the line override it.")] = None,
    search: Annotated[bool, typer.Option(help="Search each method's learning rate where none is given.")] = True,
    at_once: Annotated[int, typer.Option(min=1, help="Cells at once, over this machine's GPUs in turn.")] = 1,
    tries_at_once: Annotated[
        int | None, typer.Option(min=1, help="Tries of the learning-rate search at once; by default as many as cells.")
    ] = None,
    split: Annotated[str, typer.Option(help="Split to score.")] = "test",
    limit: Annotated[int | None, typer.Option(min=1, help="Score a fixed random part of so many rows.")] = None,
    general_text: Annotated[
        str | None, typer.Option(help="A text file instead of the package's own, for what is forgotten.")
    ] = None,
    gpu: Annotated[str | None, typer.Option(help="The GPU whose price counts, instead of this machine's.")] = None,
    budget_usd: Annotated[float | None, typer.Option(min=0, help="Leave out seeds beyond so many dollars.")] = None,
    budget_hours: Annotated[float | None, typer.Option(min=0, help="Leave out seeds beyond so many hours.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the grid with its plan, train nothing.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Train also what is planned not to fit, or ran out.")] = False,
    as_json: Json = False,
) -> None:
    """Train and score several methods on the same rows, in the same order, and write one report.

    Given again, the same command goes on with what is missing.
    """
    from thriftune.compare import Asked, show_grid
    from thriftune.compare import compare as run_comparison

    found, overrides = split_words(words)
    values: dict[str, Any] = {"model": found, "data": data}
    asked = Asked(
        words=overrides,
        config=config,
        values={key: value for key, value in values.items() if value is not None},
        methods=[text.strip() for text in methods.split(",") if text.strip()],
        seeds=seeds,
        task=task,
        split=split,
        limit=limit,
        general_text=general_text,
        output=output,
        searches=search,
        at_once=at_once,
        tries_at_once=tries_at_once or at_once,
        gpu=gpu,
        budget_usd=budget_usd,
        budget_hours=budget_hours,
        force=force,
        command=shlex.join(["thriftune", *sys.argv[1:]]),
    )
    say = partial(print, file=sys.stderr, flush=True)
    if dry_run:
        grid = show_grid(asked, say)
        if as_json:
            typer.echo(json.dumps(grid))
        return
    compared = run_comparison(asked, say)
    _print_report(compared.report, compared.folder, as_json)
    if compared.failed or compared.undone:
        names = f": {', '.join(compared.failed)}" if compared.failed else ""
        say(f"{len(compared.failed)} cells failed{names}" if compared.failed else "no cell is done")
        raise typer.Exit(1)


@app.command()
def report(
    folders: Annotated[list[Path], typer.Argument(metavar="DIR...", help="Comparisons, cells, or scored runs.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder for the report; without, the first DIR or report/.")
    ] = None,
    gpu: Annotated[str | None, typer.Option(help="The GPU whose price counts, instead of the one trained on.")] = None,
    as_json: Json = False,
) -> None:
    """Join records into one table and one page: report.html, report.md, report.json. Nothing is trained or scored."""
    from thriftune.compare.pages import report_folders

    place = output or (folders[0] if len(folders) == 1 and (folders[0] / "cells").is_dir() else Path("report"))
    _print_report(report_folders(folders, place, [], gpu), place, as_json)


def _print_report(record: Any, folder: Path, as_json: bool) -> None:
    from thriftune.report import report_text

    if as_json:
        typer.echo(record.model_dump_json())
    else:
        typer.echo(report_text(record))
        typer.echo(f"\nreport: {folder / 'report.html'}")
