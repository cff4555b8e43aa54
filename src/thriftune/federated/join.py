"""`federate join`: a site between machines. The model is loaded once and stays; the rows never leave.

What is sent is written to OUTPUT/sent.jsonl before it is sent: the header whole, and the number of bytes of factors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from thriftune.errors import CheckpointError, InputError, ThriftuneError
from thriftune.federated.flower.site import SiteLink, Task
from thriftune.federated.flower.tasks import TransportError
from thriftune.federated.folders import writing_to
from thriftune.federated.keys import read_site_keys
from thriftune.federated.message import describe_sent, open_message
from thriftune.federated.site import Site, open_base, recipe_of_rounds
from thriftune.recipe import Recipe
from thriftune.records import StepMetrics
from thriftune.run import prepare_run
from thriftune.train import Observer
from thriftune.train.observe import MetricsFile

SENT = "sent.jsonl"


@dataclass(frozen=True)
class Joining:
    recipe: Recipe
    certificates: Path
    server: str
    output: Path | None
    force: bool


def join(asked: Joining, say: Callable[[str], None]) -> Path:
    """Take part until the coordinator ends the federation. Returns the folder of the result, a PEFT adapter.

    Given again with the same output, it goes on with the optimizer of the last round that it finished.
    """
    keys = read_site_keys(asked.certificates)
    host, _, port = asked.server.rpartition(":")
    if not host or not port.isascii() or not port.isdigit() or not 0 < int(port) < 65536:
        raise InputError(
            given=f"--server {asked.server}",
            allowed="HOST:PORT, the coordinator's name and its port",
            do="for example --server hub.example.org:8000",
        )
    output = asked.output or Path("runs") / f"federated-{keys.site}"
    with writing_to(output):
        output.mkdir(parents=True, exist_ok=True)
    prepared = prepare_run(recipe_of_rounds(asked.recipe).replace(output=str(output)), force=asked.force)
    base = open_base(prepared, output, say)
    say(f"site {keys.site}: {len(prepared.data.train):,} rows; path: {base.path.name} ({base.path_reason})")
    observers: list[Observer] = [MetricsFile(output / "metrics.jsonl"), Events(say)]
    site = Site(base, keys.site, prepared.data.train, output, observers, keeps=True)
    with SiteLink(keys, asked.server, output / "flower", say) as link:
        say(f"joining {asked.server}")
        while True:
            task = link.wait()
            try:
                result = _answer(task, site, output, say)
            except TransportError as error:
                say(f"{error.given}; {error.do}")
                continue
            if result is not None:
                return result


class Events:
    """An observer that hands on what happens, and no steps."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say

    def start(self, first_step: int, num_steps: int) -> None:
        pass

    def step(self, metrics: StepMetrics) -> None:
        pass

    def event(self, text: str) -> None:
        self._say(text)

    def saved(self, folder: Path) -> None:
        pass

    def end(self) -> None:
        pass


def _answer(task: Task, site: Site, output: Path, say: Callable[[str], None]) -> Path | None:
    """The folder of the result, when this message was the last. An error of ours is told the coordinator; it is raised
    as well unless it is the message's alone."""
    try:
        header = open_message(task.data).header
        if header.kind == "end":
            result = site.end(task.data)
            task.reply(b"")
            return result
        say(f"round {header.round + 1} of {header.rounds}: {len(task.data):,} bytes came, training")
        update = site.answer(task.data)
    except ThriftuneError as error:
        task.fail(error.given)  # the coordinator learns why
        if isinstance(error, CheckpointError) or not isinstance(error, InputError):
            raise
        say(f"refused: {error.given}")  # a message that cannot be used: this site goes on
        return None
    line = describe_sent(update)
    with writing_to(output), (output / SENT).open("a", encoding="utf-8") as file:
        file.write(line + "\n")
    say(f"round {header.round + 1} of {header.rounds}: sending {len(update):,} bytes")
    task.reply(update)
    return None
