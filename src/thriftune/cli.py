"""The verbs. Nothing heavy is imported here: each verb imports what it needs when it runs, so `--help` is instant.

Results go to standard output, everything else to standard error. With `--json` standard output holds one JSON object.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from thriftune import __version__
from thriftune.errors import InputError, StoppedBySignal, ThriftuneError

if TYPE_CHECKING:
    from thriftune.recipe import Recipe

app = typer.Typer(
    name="thriftune",
    help="Adapt open language models to a task with the least memory, time and money.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output and nothing else.")]
Words = Annotated[
    list[str] | None,
    typer.Argument(metavar="[MODEL] [KEY=VALUE]...", help="A model (hub id, folder or 'pocket'), and recipe options."),
]
TargetName = Annotated[str, typer.Argument(metavar="TARGET", help="A run's folder, an adapter, or a model.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Recipe options, such as max_new_tokens=64.")
]


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"thriftune {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command()
def train(
    words: Words = None,
    data: Annotated[str | None, typer.Option(help="sums, reviews, imdb, gsm8k, a file, a folder, or a hub id.")] = None,
    method: Annotated[str | None, typer.Option(help="lora, qlora, full, or auto.")] = None,
    config: Annotated[Path | None, typer.Option(help="A recipe in YAML; options on the line override it.")] = None,
    output: Annotated[str | None, typer.Option("--output", "-o", help="Folder of the run.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check model and data, print, train nothing.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Start even when the plan says that it does not fit.")] = False,
    as_json: Json = False,
) -> None:
    """Tune a model: audit the data, train, save the result, the metrics and a record.

    Without a model and data the pocket model is tuned on the built-in reviews. Options are written KEY=VALUE, such as
    learning_rate=1e-4 lora_r=32 max_length=512; docs/recipe.md lists them all.
    """
    console = Console(stderr=True)
    recipe = _recipe(words, config, {"data": data, "method": method, "output": output})
    from thriftune.console import ProgressLine, print_audit
    from thriftune.data import audit_lines, example_segments
    from thriftune.run import prepare_run, run

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
        observers=[ProgressLine(console, recipe.train.logging_steps)] if is_main else [],
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


@app.command()
def plan(
    words: Words = None,
    data: Annotated[
        str | None, typer.Option(help="Your rows, as in train: times are for them. Else every row is max_length long.")
    ] = None,
    gpu: Annotated[
        list[str] | None, typer.Option(help="A GPU's name, 2xNAME for two, or local; may be repeated. Default: local.")
    ] = None,
    gpus: Annotated[int | None, typer.Option(help="How many of each GPU.")] = None,
    method: Annotated[list[str] | None, typer.Option(help="full, lora, qlora; repeated or with commas.")] = None,
    prefer: Annotated[str, typer.Option(help="balanced, speed, memory, quality, or cost.")] = "balanced",
    article: Annotated[bool, typer.Option("--article", help="The methods side by side.")] = False,
    config: Annotated[Path | None, typer.Option(help="A recipe in YAML; options on the line override it.")] = None,
    as_json: Json = False,
) -> None:
    """Say what fits, how long it takes, what it costs and which method to take. Nothing is loaded or trained.

    The model may be a hub id, a folder, or a name such as llama-3-8b; options are those of train.
    """
    from thriftune.plan.show import plan_text
    from thriftune.planning import plan_words

    named = [text.strip() for entry in method or [] for text in entry.split(",") if text.strip()]
    recipe = _recipe(words, config, {"data": data})
    found = plan_words(recipe, gpu_names=gpu or [], gpus=gpus, methods=named, prefer=prefer)
    typer.echo(found.model_dump_json() if as_json else plan_text(found, article))


@app.command(name="gpus")
def gpus_command(as_json: Json = False) -> None:
    """List the GPUs of the catalogue and of your own files, with memory, bandwidth and the cheapest price an hour."""
    from thriftune.plan.show import gpu_table
    from thriftune.planning import list_gpus

    rows = list_gpus()
    typer.echo(json.dumps({"gpus": rows}) if as_json else gpu_table(rows))


@app.command(name="eval")
def evaluate_command(
    target: TargetName = "pocket",
    words: Overrides = None,
    task: Annotated[str, typer.Option(help="imdb, gsm8k, sums, reviews, or perplexity.")] = "reviews",
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
    Console(stderr=True).print(
        f"{count} rows answered" + (f": {output}" if output else ""), highlight=False, markup=False
    )


@app.command()
def merge(
    target: TargetName,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the merged model.")],
    as_json: Json = False,
) -> None:
    """Fold an adapter into its 16-bit base, reload the result and compare its logits with the adapter's."""
    from thriftune.machine import choose_device, quiet_libraries
    from thriftune.merging import merge as merge_target

    quiet_libraries()
    result = merge_target(target, output, choose_device())
    if as_json:
        typer.echo(json.dumps(result))
        return
    typer.echo(
        f"merged {result['adapter']} into {result['base']}: {result['merged']} ({result['dtype']})\n"
        f"logits over {result['positions']} positions: merged and adapter differ by {result['difference']:.2%} "
        f"(largest {result['max_abs_difference']:.3g}), the adapter's whole effect is {result['effect']:.2%}; "
        f"same first token at {result['same_token']:.1%}"
    )


@app.command()
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the run; replaced.")] = Path("demo"),
    as_json: Json = False,
) -> None:
    """Tune the pocket model on built-in data, score it before and after, show three answers. Offline, on a CPU."""
    from thriftune.demo import run_demo

    outcome = run_demo(output, Console(stderr=True))
    typer.echo(json.dumps(outcome.as_dict()) if as_json else outcome.as_text())


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


def _recipe(words: list[str] | None, config: Path | None, options: dict[str, Any]) -> Recipe:
    """The recipe of the line: at most one bare word, the model; the others are KEY=VALUE."""
    from thriftune.recipe import read_recipe

    overrides = [word for word in words or [] if "=" in word and not _exists(word)]
    bare = [word for word in words or [] if word not in overrides]
    if len(bare) > 1:
        raise InputError(
            given=f"{len(bare)} words that are no KEY=VALUE: {', '.join(bare)}",
            allowed="one model name",
            do="write options as key=value, without spaces around =",
        )
    return read_recipe(config, overrides, {"model": bare[0] if bare else None, **options})


def _exists(word: str) -> bool:
    try:
        return Path(word).exists()
    except OSError:  # too long to be a file's name
        return False


def _let_segments_grow() -> None:
    """PyTorch's expandable segments, unless the user has set the allocator: measured on an H200, it then takes 0.3 to
    2 % more from the driver than it hands out, instead of 3 to 8 %."""
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
    if not any(name in os.environ for name in names):
        for name in names:
            os.environ[name] = "expandable_segments:True"


def main() -> None:
    """The console script: an error of ours is three lines on standard error and its exit code, never a traceback."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    _let_segments_grow()
    try:
        app()
    except ThriftuneError as error:
        word = "stopped" if isinstance(error, StoppedBySignal) else "error"
        print(f"{word}: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("stopped at once: nothing more was saved", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
