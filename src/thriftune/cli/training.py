"""The verb that trains."""

from __future__ import annotations

import json
import os
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from thriftune.cli.app import Json, Words, app, recipe_of_words


@app.command()
def train(
    words: Words = None,
    data: Annotated[str | None, typer.Option(help="sums, reviews, imdb, gsm8k, a file, a folder, or a hub id.")] = None,
    method: Annotated[str | None, typer.Option(help="lora, qlora, dynamic, full, or auto.")] = None,
    config: Annotated[Path | None, typer.Option(help="A recipe in YAML; options on the line override it.")] = None,
    max_memory: Annotated[str | None, typer.Option(help="GPU memory that the run may take, such as 24GiB.")] = None,
    output: Annotated[str | None, typer.Option("--output", "-o", help="Folder of the run.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check model and data, print, train nothing.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Start even when the plan says that it does not fit.")] = False,
    as_json: Json = False,
) -> None:
    """Tune a model: audit the data, train, save the result, the metrics and a record.

    Without a model and data the pocket model is tuned on the built-in reviews. Options are written KEY=VALUE, such as
    learning_rate=1e-4 lora_r=32 max_length=512; docs/recipe.md lists them all.
    """
    asked = {"data": data, "method": method, "output": output, "max_memory": max_memory}
    recipe = recipe_of_words(words, config, asked)
    from rich.console import Console

    from thriftune.console import ProgressLine, print_audit
    from thriftune.data import audit_lines, example_segments
    from thriftune.run import prepare_run, run

    console = Console(stderr=True)
    prepared = prepare_run(recipe, force=force)
    first = prepared.data.train[0]
    is_main = os.environ.get("RANK", "0") == "0"
    if is_main:
        print_audit(console, audit_lines(prepared.data.audit), example_segments(first, prepared.tokenizer, longest=600))
        for line in (*prepared.planned.lines(), _start_line(prepared)):
            console.print(line, highlight=False, markup=False, soft_wrap=True)
    if dry_run:
        _finish_dry_run(prepared, as_json)
        return
    stored = shlex.quote(f"{prepared.recipe.output}/recipe.yaml")
    resume = f"thriftune train --config {stored} resume_from_checkpoint=auto"
    record = run(
        prepared,
        observers=[ProgressLine(console, recipe.train.logging_steps, "")] if is_main else [],
        command=shlex.join(["thriftune", *sys.argv[1:]]),
        resume_command=resume,
    )
    if not is_main:
        return
    if as_json:
        typer.echo(record.model_dump_json())
    else:
        _print_record(record)


def _start_line(prepared: Any) -> str:
    method, reason = prepared.recipe.method, prepared.planned.reason
    return f"method {method} ({reason}); device {prepared.device}; output {prepared.recipe.output}"


def _finish_dry_run(prepared: Any, as_json: bool) -> None:
    from thriftune.recipe import dump_yaml

    if as_json:
        shown = {
            "recipe": prepared.recipe.dump(),
            "data": prepared.data.audit.model_dump(),
            "total_parameters": prepared.description.total_parameters,
        }
        typer.echo(json.dumps(shown))
    else:
        typer.echo(dump_yaml(prepared.recipe), nl=False)


def _print_record(record: Any) -> None:
    from thriftune.units import format_bytes, format_count, format_seconds, format_share

    loss = "none" if record.loss is None else f"{record.loss:.4f}"
    share = format_share(record.trainable_parameters, record.total_parameters)
    typer.echo(
        f"done: {record.method}, {record.steps} steps, loss {loss}, "
        f"{format_count(round(record.tokens_per_s))} tokens/s, "
        f"peak {format_bytes(record.peak_bytes)}, {format_seconds(record.wall_s)}\n"
        f"trained {record.trainable_parameters:,} of {record.total_parameters:,} parameters ({share})\n"
        f"result: {record.adapter}\n"
        f"try it: thriftune chat {Path(record.adapter).parent}"
    )
