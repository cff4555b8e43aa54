"""The verbs that use a model, and those that show what this machine and thriftune can do."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from thriftune.cli.app import Json, Overrides, TargetName, app

TASKS = (
    "imdb, reviews, gsm8k, sums, gsm8k_5shot, perplexity, general, exact:COLUMN, FILE.py:FUNCTION, or lm_eval:NAME "
    "(docs/tasks.md)."
)


@app.command(name="eval")
def evaluate_command(
    target: TargetName = "pocket",
    words: Overrides = None,
    task: Annotated[str, typer.Option(help=TASKS)] = "reviews",
    data: Annotated[
        str | None, typer.Option(help="The task's rows, or the text of perplexity: file or folder.")
    ] = None,
    split: Annotated[str, typer.Option(help="Split to score.")] = "test",
    limit: Annotated[int | None, typer.Option(min=1, help="Score a fixed random part of so many rows.")] = None,
    answers: Annotated[Path | None, typer.Option(help="File for every answer (jsonl).")] = None,
    as_json: Json = False,
) -> None:
    """Score a run, an adapter or a model on a task, with a 95 % interval; every answer is kept."""
    from thriftune.serving import evaluate_target

    result = evaluate_target(target, words or [], task=task, data_path=data, split=split, limit=limit, answers=answers)
    if as_json:
        typer.echo(result.model_dump_json())
    else:
        typer.echo(
            f"{result.task}: {result.metric} {result.value:.4f} (95 % interval {result.low:.4f} to "
            f"{result.high:.4f}, {result.rows} rows)"
        )
        for name, value in result.details.items():
            if isinstance(value, (int, float, str)):
                typer.echo(f"  {name}: {value:.4f}" if isinstance(value, float) else f"  {name}: {value}")
        if result.answers:
            typer.echo(f"answers: {result.answers}")


@app.command()
def chat(target: TargetName = "pocket", words: Overrides = None) -> None:
    """Talk to a run, an adapter or a model. /reset starts over, /exit ends."""
    from thriftune.serving import chat_with_target

    chat_with_target(target, words or [])


@app.command()
def predict(
    input_file: Annotated[Path, typer.Option("--input", "-i", help="Rows: jsonl, json, csv or parquet.")],
    target: TargetName = "pocket",
    words: Overrides = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="jsonl file; standard output without.")] = None,
) -> None:
    """Answer every row of a file: one object a row with `prediction`, in the rows' order."""
    from thriftune.serving import predict_with_target

    count = predict_with_target(target, words or [], input_file=input_file, output=output)
    print(f"{count} rows answered" + (f": {output}" if output else ""), file=sys.stderr)


@app.command()
def merge(
    target: TargetName,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the merged model.")],
    as_json: Json = False,
) -> None:
    """Fold an adapter into its 16-bit base, file by file, and compare the result's logits with the adapter's."""
    from thriftune.machine import choose_device, quiet_libraries
    from thriftune.merging import merge as merge_target

    quiet_libraries()
    result = merge_target(target, output, choose_device())
    if as_json:
        typer.echo(json.dumps(result))
        return
    lines = [f"merged {result['adapter']} into {result['base']}: {result['merged']} ({result['dtype']})"]
    if result["loaded_whole"]:
        lines.append(f"the base was loaded whole: {result['loaded_whole']}")
    if result["positions"] is not None:
        lines.append(
            f"logits over {result['positions']} positions: merged and adapter differ by {result['difference']:.2%} "
            f"(largest {result['max_abs_difference']:.3g}), the adapter's whole effect is {result['effect']:.2%}; "
            f"same first token at {result['same_token']:.1%}"
        )
    else:
        lines.append(
            f"the model does not fit in memory, so no logits were compared; {result['kept']:.2%} of the update is in "
            f"the {result['tensors']} tensors that it changes, beside rounding of {result['rounding']:.2%} of its size"
        )
    typer.echo("\n".join(lines))


@app.command()
def shrink(
    target: TargetName,
    keep: Annotated[float, typer.Option(help="Share of the adapter's parameters that may stay, such as 0.5.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the smaller adapter.")],
    round_to: Annotated[int | None, typer.Option(help="A module's rank falls by whole blocks of so many.")] = None,
    as_json: Json = False,
) -> None:
    """Cut a finished adapter to a share of its parameters: the directions with the most energy a parameter stay."""
    from thriftune.machine import quiet_libraries
    from thriftune.shrinking import shrink as shrink_target

    quiet_libraries()
    result = shrink_target(target, output, keep, round_to)
    if as_json:
        typer.echo(json.dumps(result))
        return
    ranks = result["ranks"].values()
    typer.echo(
        f"shrank {result['adapter']}: {result['shrunk']}\n"
        f"{result['parameters_before']:,} -> {result['parameters_after']:,} parameters, ranks {min(ranks)} to "
        f"{max(ranks)}; {result['kept_energy']:.2%} of the update's energy stays"
    )


@app.command()
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the demo; replaced.")] = Path("demo"),
    limit: Annotated[int | None, typer.Option(min=1, help="Score a fixed random part of so many rows.")] = None,
    as_json: Json = False,
) -> None:
    """Compare full, LoRA and QLoRA on the pocket model and built-in data, and show the page. Offline, on a CPU."""
    from thriftune.demo import open_page, run_demo

    outcome = run_demo(output, partial(print, file=sys.stderr, flush=True), limit)
    typer.echo(json.dumps(outcome.as_dict()) if as_json else outcome.as_text())
    if not as_json:
        open_page(output)
    if outcome.failed:
        raise typer.Exit(1)


@app.command()
def doctor(as_json: Json = False) -> None:
    """Say what this machine has and lacks for fine-tuning."""
    from thriftune.doctor import examine
    from thriftune.machine import quiet_libraries

    quiet_libraries()
    findings = examine()
    if as_json:
        typer.echo(json.dumps({"findings": [finding.model_dump() for finding in findings]}))
    else:
        for finding in findings:
            typer.echo(f"{finding.verdict:4}  {finding.subject}: {finding.text}")
