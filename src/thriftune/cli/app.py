"""The application that the verbs join, and what several of them share: options, and the recipe of a line's words."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from thriftune import __version__
from thriftune.errors import InputError

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


def recipe_of_words(words: list[str] | None, config: Path | None, options: dict[str, Any]) -> Recipe:
    """The recipe of the line: at most one bare word, the model; the others are KEY=VALUE."""
    from thriftune.recipe import read_recipe

    model, overrides = split_words(words)
    return read_recipe(config, overrides, {"model": model, **options})


def split_words(words: list[str] | None) -> tuple[str | None, list[str]]:
    """(the bare word, which is the model, the KEY=VALUE words). Raises InputError for several bare ones."""
    overrides = [word for word in words or [] if "=" in word and not _exists(word)]
    bare = [word for word in words or [] if word not in overrides]
    if len(bare) > 1:
        raise InputError(
            given=f"{len(bare)} words that are no KEY=VALUE: {', '.join(bare)}",
            allowed="one model name",
            do="write options as key=value, without spaces around =; put a name that has spaces into quotes",
        )
    return bare[0] if bare else None, overrides


def _exists(word: str) -> bool:
    try:
        return Path(word).exists()
    except OSError:  # too long to be a file's name
        return False
